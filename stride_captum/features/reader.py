"""Features of one batch, or of a whole training set in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..errors import bad_value
from ..layers.activations import Tap, at_positions, recording
from ..positions import Positions, joined
from .precomputed import Precomputed

if TYPE_CHECKING:
    from ..influence.reading import BatchReader

#: A function of one batch: outputs of the model, and what each tap gives (see `recording`).
Run = Callable[[ExampleBatch], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Rows:
    """What one batch gives: a row for each example, or for each position of each.

    Attributes:
        features: Of each tap, `(n_rows, width)`.
        logits: z, `(n_rows, n_outputs)`, at least float32.
        labels: As the data set has them, one for each row; None where there are none.
        outputs: Of the model, as they came.
        kept: Which positions of the examples have a row, `(n, P)` bool; None where an example has one row.
    """

    features: list[Tensor]
    logits: Tensor
    labels: Tensor | None
    outputs: Tensor
    kept: Tensor | None

    @cached_property
    def positions(self) -> Positions | None:
        """Rows of each example; None where each has one."""
        return None if self.kept is None else Positions.of_mask(self.kept)

    @property
    def side_by_side(self) -> Tensor:
        """Features of all taps, `(n_rows, n_features)`."""
        return self.features[0] if len(self.features) == 1 else torch.cat(self.features, dim=1)


def read_batch(reader: BatchReader, run: Run, taps: Sequence[Tap], batch: ExampleBatch) -> Rows:
    """Features, logits and labels of one batch.

    Args:
        reader: The method, which knows its loss.
        run: What `recording` yields for the taps.
        taps: Where features are read.
        batch: On its device.
    """
    outputs, features = run(batch)
    outputs = outputs.detach()
    found = reader.position_rows(outputs, batch)
    if found is None:
        return Rows(features, _single(reader._as_logits(outputs, batch)), batch.labels, outputs, None)
    there = (at_positions(f, found.grid, tap) for f, tap in zip(features, taps, strict=True))
    features = [f[found.kept.to(f.device)] for f in there]
    return Rows(features, _single(reader.loss.logits(found.outputs)), found.labels, found.outputs, found.kept)


def _single(logits: Tensor) -> Tensor:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


@dataclass(frozen=True)
class TrainingRows(Rows):
    """Rows of training examples, with labels as the loss has them, and their weights.

    Attributes:
        labels: `(n_rows,)` int64, or `(n_rows, n_outputs)`.
        weights: omega, `(n_rows,)` float64; None for 1.
    """

    labels: Tensor
    weights: Tensor | None = None


def read_training_set(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Iterable[ExampleBatch],
    compute: Callable[[Run, ExampleBatch], TrainingRows],
    expected: int | None,
) -> Precomputed:
    """Features, logits and labels of a whole training set, written where they stay.

    Args:
        model: The network.
        taps: Where features are read.
        batches: The training set in order.
        compute: Rows of one batch, given what `recording` yields.
        expected: Number of examples; None if it is not known.
    """
    width = sum(tap.width for tap in taps)
    features: Tensor | None = None
    parts, read, seen = [], [], 0
    with recording(model, taps) as run:
        for batch in batches:
            rows = compute(run, batch)
            n = len(rows.logits)
            if expected is not None and rows.kept is None and seen + n <= expected:
                if features is None:
                    features = rows.features[0].new_empty(expected, width)
                start = 0
                for tap, row in zip(taps, rows.features, strict=True):
                    features[seen : seen + n, start : start + tap.width] = row
                    start += tap.width
            else:
                parts.append(rows.side_by_side)
            read.append((rows.logits, rows.labels, rows.weights, rows.positions))
            seen += n
    if not read:
        raise bad_value("train_dataset", "hold at least one example", "an empty one")
    logits, labels, weights, positions = zip(*read, strict=True)
    features = torch.cat(parts) if features is None else features[:seen]
    known = [part for part in positions if part is not None]
    if known and len(known) < len(positions):
        must = "return outputs with positions for every batch, or for none"
        raise bad_value("model", must, "both")
    if known:
        check_some_rows(seen)
    return Precomputed(
        features,
        torch.cat(logits).to(features),
        torch.cat(labels),
        [tap.width for tap in taps],
        all_weights(weights),
        joined(known) if known else None,
    )


def all_weights(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Weights of all batches behind one another; None where there are none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def check_some_rows(n_rows: int) -> None:
    """Refuse examples without a position that has a label.

    Raises:
        ValueError: There is no row.
    """
    if not n_rows:
        raise bad_value("train_dataset", "have at least one label that is not ignored", "none")


def weights_of_rows(parts: Sequence[Tensor | None], positions: Positions | None) -> list[Tensor | None]:
    """Weights of the rows of all batches, given those of their examples, `(n,)` or `(n, P)` each."""
    if positions is None or any(part is None for part in parts):
        return list(parts)
    found, start = [], 0
    for part in parts:
        assert part is not None
        few = positions.of(slice(start, start + len(part)))
        assert few.places is not None
        own = few.spread(part)
        found.append(own if part.ndim == 1 else own[torch.arange(len(own)), few.places.to(own.device).long()])
        start += len(part)
    return found
