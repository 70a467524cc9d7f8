"""Batch dimension of an activation, inferred from two passes with different batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import bad_value
from .agreement import MANY, are_alike, differing


@dataclass(frozen=True)
class Layout:
    """Batch layout of an activation.

    Attributes:
        batch_dim: The batch dimension.
        rows: Rows per example in that dimension: "one"; or several, ordered by example ("examples first",
            `(n k, ...)`) or by position ("positions first", `(k n, ...)`).
    """

    batch_dim: int
    rows: str


def batch_layout(many: Tensor, few: Tensor, order: list[int], unit: float, place: str) -> Layout:
    """Find the batch dimension from the activations of two passes.

    Its size depends on the number of examples, and its rows on the examples. The model may reorder them.

    Args:
        many: Activation for three examples.
        few: Activation for two of them.
        order: Which two, in the order of `few`.
        unit: From `rounding`.
        place: Name of the layer in the error.

    Raises:
        ValueError: No dimension qualifies, or more than one does.
    """
    dims = differing(many, few)
    if len(dims) != 1 or many.shape[dims[0]] * len(order) != few.shape[dims[0]] * MANY:
        shapes = f"{tuple(many.shape)} for {MANY} examples, {tuple(few.shape)} for {len(order)}"
        remedy = "Name a layer that keeps examples apart."
        raise bad_value("layers", "give one row per example", f"the shapes {shapes} from {place!r}", remedy)
    dim = dims[0]
    k, index = many.shape[dim] // MANY, torch.tensor(order, device=many.device)
    by_rows = {
        "examples first": many.unflatten(dim, (MANY, k)).index_select(dim, index),
        "positions first": many.unflatten(dim, (k, MANY)).index_select(dim + 1, index),
    }
    fits = [rows for rows, some in by_rows.items() if are_alike(some.flatten(dim, dim + 1), few, unit)]
    if not fits:
        raise bad_value(
            "layers",
            "give an example the same row in every batch",
            f"others from {place!r} when the examples come in another order or number",
            "Name a layer where the model has not sorted or mixed the examples.",
        )
    if k == 1:
        return Layout(dim, "one")
    if len(fits) > 1:
        raise bad_value(
            "layers",
            "show which rows belong to an example",
            f"{k} rows for each from {place!r}, all alike",
            "Put different examples first.",
        )
    return Layout(dim, fits[0])
