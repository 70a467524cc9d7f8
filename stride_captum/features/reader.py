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
from ..layers.activations import Tap, recording
from ..layers.positions import at_kept_positions
from ..losses.positions import check_weight_shape
from ..positions import Positions, joined
from .precomputed import Precomputed, positions_in_some

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


def read_batch(
    reader: BatchReader, run: Run, taps: Sequence[Tap], batch: ExampleBatch, asked: bool = False
) -> Rows:
    """Features, logits and labels of one batch.

    Args:
        reader: The method, which knows its loss.
        run: What `recording` yields for the taps.
        taps: Where features are read.
        batch: On its device.
        asked: As for `position_rows`.
    """
    outputs, features = run(batch)
    outputs = outputs.detach()
    found = reader.position_rows(outputs, batch, asked)
    if found is None:
        return Rows(features, _single(reader._as_logits(outputs, batch)), batch.labels, outputs, None)
    features = at_kept_positions(features, taps, found.grid, found.kept)
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
    features, read = _Growing(expected), []
    with recording(model, taps) as run:
        for batch in batches:
            rows = compute(run, batch)
            features.append(rows.features, len(rows.logits) if rows.kept is None else len(rows.kept))
            read.append((rows.logits, rows.labels, rows.weights, rows.positions))
    if not read:
        raise bad_value("train_dataset", "hold at least one example", "an empty one")
    logits, labels, weights, positions = zip(*read, strict=True)
    known = [part for part in positions if part is not None]
    if known and len(known) < len(positions):
        raise positions_in_some()
    whole = features.whole()
    return Precomputed(
        whole,
        torch.cat(logits).to(whole),
        torch.cat(labels),
        [tap.width for tap in taps],
        all_weights(weights),
        joined(known) if known else None,
    )


class _Growing:
    """Features of a training set, written where they stay.

    Memory is taken for as many rows as the examples so far foretell, and once more where these were too few.
    """

    def __init__(self, expected: int | None) -> None:
        self.expected, self.n_examples, self.n_rows = expected, 0, 0
        self._rows: Tensor | None = None

    def append(self, features: Sequence[Tensor], n_examples: int) -> None:
        """Add a batch: rows of each tap, `(n_rows, width)`."""
        start, n = self.n_rows, len(features[0])
        self.n_examples, self.n_rows = self.n_examples + n_examples, start + n
        if self._rows is None or self.n_rows > len(self._rows):
            self._rows = self._longer(features)
        place = self._rows[start : self.n_rows]
        for columns, rows in zip(place.split([f.shape[1] for f in features], 1), features, strict=True):
            columns.copy_(rows)

    def _longer(self, features: Sequence[Tensor]) -> Tensor:
        most = max(self.expected or 2 * self.n_examples, self.n_examples)
        length = max(-(-self.n_rows * most // max(self.n_examples, 1)), self.n_rows)
        if self._rows is not None:
            length = max(length, len(self._rows) * 5 // 4)
        longer = features[0].new_empty(length, sum(f.shape[1] for f in features))
        if self._rows is not None:
            longer[: len(self._rows)] = self._rows
        return longer

    def whole(self) -> Tensor:
        """All rows, `(n_rows, n_features)`; a copy if much of the memory was not needed."""
        assert self._rows is not None
        rows = self._rows[: self.n_rows]
        return rows.clone() if 8 * self.n_rows < 7 * len(self._rows) else rows


def all_weights(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Weights of all batches behind one another; None where there are none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def weights_of_rows(
    parts: Sequence[Tensor | None], sizes: Sequence[int], positions: Positions | None
) -> list[Tensor | None]:
    """Weights of the rows of all batches, given those of their examples.

    Args:
        parts: Of the examples of each batch, `(n,)` or `(n, P)`.
        sizes: P of each batch.
        positions: Rows of each example; None where each has one.

    Raises:
        ValueError: Weights `(n, P)` for examples without positions, or with another number of them.
    """
    if positions is None:
        for part in parts:
            check_weight_shape(part, None)
    if positions is None or any(part is None for part in parts):
        return list(parts)
    found: list[Tensor | None] = []
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        assert part is not None
        check_weight_shape(part, (len(part), size))
        few = positions.of(slice(start, start + len(part)))
        assert few.places is not None
        own = few.spread(part)
        if part.ndim == 2:
            own = own.gather(1, few.places.to(own.device).long()[:, None]).squeeze(1)
        found.append(own)
        start += len(part)
    return found
