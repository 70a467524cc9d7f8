"""Features h(x): activations of layers, recorded during forward passes as one row per example.

A *tap* names a place in the network: "fc1" is the output of the submodule fc1 and "fc1:input" what it
reads. Convolution maps are pooled to at most 4 x 4, token sequences are averaged, vectors are taken as
they are; where positions have outputs of their own, each has a row (`layers.positions`). Rows are
concatenated in the order of the taps; scaling is left to the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..errors import bad_value
from .hooks import watching
from .pooling import Place, Tap, activation_in, features_of, mean_of_tokens, to_rows
from .tap_probe import not_run
from .taps import default_taps, layer_places, named_taps


@contextmanager
def recording(
    model: nn.Module, taps: Sequence[Tap]
) -> Iterator[Callable[[Any], tuple[Tensor, list[Tensor]]]]:
    """Context manager that records the taps during forward passes and removes its hooks afterwards.

    Rows are computed while a submodule runs, so that later in-place writes to an activation do not affect
    them and whole maps are not kept.

    Yields:
        `run(batch) -> (outputs, rows)`: outputs of the model, and a list with `(n, width)` for each tap.
        With rows per position, `(n, positions..., width)` (`at_positions`).
    """
    recorder = _Recorder(taps)
    with watching(model, recorder.taps, recorder.see) as forward:

        def run(batch: Any) -> tuple[Tensor, list[Tensor]]:
            batch = ExampleBatch.of(batch)
            recorder.start(token_mask(batch))
            outputs = forward(batch.copied())
            rows = [recorder.rows(tap, len(outputs)) for tap in taps]
            recorder.start(None)
            return outputs, rows

        yield run


def token_mask(batch: ExampleBatch) -> Tensor | None:
    """`attention_mask` of a batch that is a dict, `(n, tokens)` with 0 for padding; None without one."""
    mask = batch.content.get("attention_mask") if isinstance(batch.content, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


class _Recorder:
    """Rows at each tap during a forward pass."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = {(tap.name, tap.reads_input): tap for tap in taps}
        self.start(None)

    def start(self, mask: Tensor | None) -> None:
        """Reset before a forward pass."""
        self._mask = mask
        self._parts: dict[Place, list[Tensor]] = {}
        self._runs: dict[Place, int] = {}

    def see(self, place: Place, values: list[Any]) -> None:
        """Store the rows of the tensors at a place, as copies."""
        tap = self.taps[place]
        for value in values:
            activation = activation_in(value, str(tap))
            if tap.spatial and activation.ndim not in (2, tap.spatial + 2):
                must = f"give maps with {tap.spatial} dimensions in every batch"
                raise bad_value("layers", must, f"the shape {tuple(activation.shape)} from {str(tap)!r}")
            rows = features_of(activation, tap, self._mask)
            if rows.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr():
                rows = rows.clone()
            parts = self._parts.setdefault(place, [])
            self._runs[place] = self._runs.get(place, 0) + 1
            if tap.parts == 0 and parts and parts[0].shape == rows.shape:
                parts[0] += rows
            else:
                parts.append(rows)

    def rows(self, tap: Tap, n: int) -> Tensor:
        """Rows of a tap after a pass over `n` examples, `(n, width)`."""
        place = tap.name, tap.reads_input
        if place not in self._parts:
            raise not_run(place)
        parts, runs = self._parts[place], self._runs[place]
        if tap.parts not in (0, runs):
            raise bad_value(
                "layers",
                "name submodules that run equally often in every batch",
                f"{runs} runs of {str(tap)!r} instead of {tap.parts}",
                "Name a layer that runs once a batch.",
            )
        width = sum(part.shape[-1] for part in parts)
        if width != tap.width:
            raise bad_value(
                "layers",
                f"give {tap.width} features per example in every batch",
                f"{width} from {str(tap)!r}",
                "Bring all inputs to one size, or name a layer behind global pooling.",
            )
        parts = [self._one_per_example(part, tap, n) for part in parts]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return rows if tap.parts else rows / runs

    def _one_per_example(self, rows: Tensor, tap: Tap, n: int) -> Tensor:
        if tap.rows != "one" and len(rows) % n == 0:
            first = tap.rows == "examples first"
            each: Tensor = rows.unflatten(0, (n, -1)) if first else rows.unflatten(0, (-1, n)).transpose(0, 1)
            if tap.per_position:
                return each
            if self._mask is not None and self._mask.shape == each.shape[:2]:
                return mean_of_tokens(each, self._mask)
            return each.mean(1)
        if len(rows) != n:
            raise bad_value(
                "layers",
                f"give one row per example ({n} in this batch)",
                f"{len(rows)} rows from {str(tap)!r}",
                "Is a batch dimension missing from the inputs, as in x[0] instead of x[:1]?",
            )
        return rows


def check_finite(values: Tensor, what: str = "activations") -> None:
    """Refuse NaN or infinite values, which would spread to every score.

    Args:
        values: One row per training example.
        what: Their name in the error.
    """
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values).all(1)).nonzero()[0])
        raise bad_value(
            "train_dataset",
            f"give finite {what}",
            f"NaN or infinity for example {row}",
            "Look for it in the inputs or the weights, or for an overflow in half precision.",
        )


__all__ = [
    "Tap",
    "check_finite",
    "default_taps",
    "layer_places",
    "named_taps",
    "recording",
    "to_rows",
    "token_mask",
]
