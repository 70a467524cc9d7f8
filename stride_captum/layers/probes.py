"""Check that the outputs of a model for an example depend on that example alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..errors import bad_value
from .agreement import MANY, are_alike, differing, is_plain, largest, rounding, thinned
from .hooks import check_weights_exist, scripted_parts, uncompiled, watching
from .pooling import Place


def spread(n: int) -> list[int]:
    """Indices of three examples spread over n; the last is repeated if n < 3."""
    return [0, n // 2, n - 1] if n >= MANY else [0, n - 1, n - 1]


def check_deterministic(model: nn.Module, batch: Any) -> None:
    """Refuse a model whose outputs for an example depend on chance, or on the other examples of the batch.

    Runs four passes over two or three examples of one batch, so that padding is the same in all of them. If
    randomness changes the outputs in less than half their digits, activations of submodules show it.

    Args:
        model: In eval mode; an error names the submodule where the difference begins.
        batch: Any batch; the model is given copies of its tensors.

    Raises:
        ValueError: Outputs that change from pass to pass, or with the other examples.
    """
    check_weights_exist(model)
    every = ExampleBatch.of(batch)
    examples = spread(len(every))

    def inputs(rows: list[int]) -> ExampleBatch:
        return every[torch.tensor(rows)]

    def outputs_of(some: ExampleBatch) -> Tensor:
        return some.outputs(model)

    with torch.no_grad(), uncompiled():
        outputs, again = outputs_of(inputs(examples)), outputs_of(inputs(examples))
        if outputs.shape[:1] != (MANY,):
            got = f"the shape {tuple(outputs.shape)} for {MANY} examples"
            raise bad_value("model", "return outputs with one row per example", got)
        if not are_alike(outputs, again, 0.0):
            place, unit = _first_difference(model, inputs(examples), inputs(examples), None)
            if place is not None or not are_alike(outputs, again, unit):
                raise _by_chance(_in_words(model, place))
        scale = largest(outputs)
        for row in (0, MANY - 1):
            rows = [examples[row]] * 2  # some models do not accept a single example
            pair = outputs_of(inputs(rows))
            if all(are_alike(outputs[row], one, rounding(model, outputs), scale) for one in pair):
                continue
            place, unit = _first_difference(model, inputs(examples), inputs(rows), row)
            if all(are_alike(outputs[row], one, unit, scale) for one in pair):
                continue
            again = outputs_of(inputs(rows))
            fault = _by_batch if are_alike(pair, again, unit, scale) else _by_chance
            raise fault(_in_words(model, place))


def _by_chance(where: str) -> ValueError:
    return bad_value(
        "model",
        "give an example the same outputs in every pass",
        f"outputs that change by chance, first {where}",
        "F.dropout(x) drops in eval mode too: write F.dropout(x, training=self.training).",
    )


def _by_batch(where: str) -> ValueError:
    return bad_value(
        "model",
        "give an example the same outputs in every batch",
        f"outputs that change with the other examples, first {where}",
        "Normalize with running statistics, or over the features of one example.",
    )


def _first_difference(
    model: nn.Module, a: ExampleBatch, b: ExampleBatch, row: int | None
) -> tuple[Place | None, float]:
    """First place at which two passes differ by more than rounding.

    Args:
        model: The network.
        a: A batch of `MANY` examples.
        b: The same batch, or with `row` the example in that row, twice.
        row: Which row of `a`; None for all.

    Returns:
        The place (None if no submodule differs), and the largest epsilon of the activations: half precision
        inside a model is visible only there.
    """
    seen: list[tuple[Place, torch.Size, Tensor]] = []
    different: list[Place] = []

    def see_many(place: Place, values: list[Any]) -> None:
        for value in values:
            if is_plain(value) and value.is_floating_point():
                seen.append((place, value.shape, thinned(value, value.shape)))

    with watching(model, both_sides(model), see_many) as run:
        run(a.copied())
    unit = rounding(model, *(tensor for _, _, tensor in seen))
    least = unit**0.5 * max((largest(tensor) for _, _, tensor in seen), default=0.0)
    rest = iter(seen)

    def see_other(place: Place, values: list[Any]) -> None:
        for value in values:
            if is_plain(value) and value.is_floating_point():
                _, shape, some = next(rest, (place, value.shape, value))
                if not _agree(some, thinned(value, shape), row, unit, max(largest(some), least)):
                    different.append(place)

    with watching(model, both_sides(model), see_other) as run:
        run(b.copied())
    return next(iter(different), None), unit


def _in_words(model: nn.Module, place: Place | None) -> str:
    if place is None or not place[0]:
        return "in the `forward` of the model itself"
    kind = type(model.get_submodule(place[0])).__name__
    return f"{'in what reaches' if place[1] else 'at'} {place[0]!r} ({kind})"


def both_sides(model: nn.Module) -> list[Place]:
    """Inputs and outputs of all submodules that take hooks, and of the model itself."""
    closed = scripted_parts(model)
    names = [name for name, _ in model.named_modules() if name not in closed]
    return [(name, reads_input) for name in names for reads_input in (True, False)]


def _agree(a: Tensor, b: Tensor, row: int | None, unit: float, scale: float) -> bool:
    """Whether a tensor agrees between two passes, or for one example; True if it cannot be determined."""
    if row is None:
        return a.shape != b.shape or are_alike(a, b, unit, scale)
    dims = differing(a, b)
    if len(dims) != 1 or a.shape[dims[0]] != MANY or b.shape[dims[0]] != MANY - 1:
        return True
    return all(are_alike(a.select(dims[0], row), one, unit, scale) for one in b.unbind(dims[0]))
