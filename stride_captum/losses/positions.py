"""Outputs and labels with several positions an example, as rows: one row for each position with a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import bad_value
from ..positions import Positions

if TYPE_CHECKING:
    from .base import Loss


@dataclass(frozen=True)
class PositionRows:
    """One batch as rows of positions.

    Attributes:
        outputs: Of the model, `(n_rows, n_outputs)`.
        labels: `(n_rows,)` or `(n_rows, n_outputs)`; None without labels.
        kept: Positions that have a row, `(n, P)` bool: those with a label, or without labels those that are
            no padding.
        grid: Sizes of the positions of an example, such as (P,) or (H, W); their product is P.
    """

    outputs: Tensor
    labels: Tensor | None
    kept: Tensor
    grid: tuple[int, ...]

    @property
    def positions(self) -> Positions:
        """Rows of each example of the batch."""
        return Positions.of_mask(self.kept)


def has_positions(outputs: Tensor) -> bool:
    """Whether outputs have several positions an example: three or more dimensions."""
    return outputs.ndim > 2


def check_class_dim(class_dim: int | None) -> None:
    """Refuse what is no axis.

    Raises:
        ValueError: No integer, or 0, the axis of the examples.
    """
    whole = isinstance(class_dim, int) and not isinstance(class_dim, bool)
    if class_dim is not None and (not whole or class_dim == 0):
        raise bad_value("class_dim", "be an axis behind the first, or None", repr(class_dim))


def channels_last(outputs: Tensor, class_dim: int | None) -> Tensor:
    """Outputs as `(n, *grid, n_outputs)`: three axes are `(n, P, C)`, four `(n, C, H, W)`.

    Args:
        outputs: With at least three dimensions.
        class_dim: Which dimension counts the outputs of a position, where it is another.

    Raises:
        ValueError: Five or more axes without `class_dim`, or a `class_dim` that is no such axis.
    """
    if class_dim is None:
        if outputs.ndim > 4:
            must = "be given for outputs with more than four dimensions"
            remedy = "Write loss=CrossEntropy(class_dim=1), or where the outputs of a position stand."
            raise bad_value("class_dim", must, f"outputs of shape {tuple(outputs.shape)}", remedy)
        class_dim = 2 if outputs.ndim == 3 else 1
    if not -outputs.ndim < class_dim < outputs.ndim or class_dim % outputs.ndim == 0:
        must = f"be an axis behind the first of outputs with {outputs.ndim} dimensions"
        raise bad_value("class_dim", must, class_dim)
    return outputs.movedim(class_dim, -1)


def position_rows(
    loss: Loss,
    outputs: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    argument: str,
    weights: Tensor | None = None,
) -> PositionRows:
    """A batch as rows, without positions whose label is `ignore_index`, or that are padding or of weight 0.

    Args:
        loss: Which says where classes stand, and what is ignored.
        outputs: As the model gave them.
        labels: As the data set gave them; None where there are none.
        mask: `(n, P)`, 0 for padding, looked at where there are no labels; None for no padding.
        argument: What errors call the source of the labels.
        weights: Of the positions, `(n, P)`; None for 1.

    Raises:
        ValueError: Labels or weights that do not fit the outputs.
    """
    last = channels_last(outputs, loss.class_dim)
    grid = tuple(last.shape[1:-1])
    rows = last.flatten(1, -2)
    if labels is None:
        kept = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if mask is not None and mask.shape == kept.shape:
            kept = (mask != 0).to(kept.device)
        flat = None
    else:
        flat = labels_by_position(loss, labels.to(rows.device), outputs, argument)
        kept = loss.counted(flat)
    if weights is not None:
        check_weight_shape(weights, tuple(kept.shape))
        kept = kept & (weights > 0).to(kept.device)
    return PositionRows(rows[kept], None if flat is None else flat[kept], kept, grid)


def labels_by_position(loss: Loss, labels: Tensor, outputs: Tensor, argument: str) -> Tensor:
    """Labels with one axis of positions, `(n, P)` or `(n, P, n_outputs)`.

    Args:
        loss: Which says where classes stand.
        labels: As the data set gave them: `(n, *grid)`, or of the shape of the outputs.
        outputs: As the model gave them, of which the shape is read.
        argument: What errors call the source of the labels.

    Raises:
        ValueError: Labels that do not fit the outputs.
    """
    last = channels_last(outputs, loss.class_dim)
    n, *grid, width = last.shape
    if tuple(labels.shape) == (n, *grid):
        return labels.flatten(1)
    if labels.ndim == outputs.ndim and _fits(labels, loss, (n, *grid, width)):
        return channels_last(labels, loss.class_dim).flatten(1, -2)
    must = f"hold labels of shape {(n, *grid)} for outputs of shape {tuple(outputs.shape)}"
    remedy = (
        "Three axes are read as (n, positions, classes), four as (n, classes, height, width). Write "
        f"loss={type(loss).__name__}(class_dim=...) where the classes stand elsewhere."
    )
    raise bad_value(argument, must, f"shape {tuple(labels.shape)}", remedy)


def labels_at_positions(
    loss: Loss, labels: Tensor, n_positions: int, shape: tuple[int, ...] | None, argument: str
) -> Tensor:
    """Labels with one axis of positions, `(n, P)` or `(n, P, n_outputs)`, where outputs are not at hand.

    Args:
        loss: Which says where classes stand.
        labels: As the data set gave them.
        n_positions: P.
        shape: Of the outputs of one example; None takes P positions in any form.
        argument: What errors call the source of the labels.

    Raises:
        ValueError: Labels that do not fit.
    """
    if shape is not None:
        outputs = torch.empty(len(labels), *shape, device="meta")
        return labels_by_position(loss, labels, outputs, argument)
    if labels.ndim > 1 and labels[0].numel() == n_positions:
        return labels.flatten(1)
    if labels.ndim > 2:
        y = channels_last(labels, loss.class_dim).flatten(1, -2)
        if y.shape[1] == n_positions:
            return y
    must = f"hold labels for {n_positions} positions of each example"
    raise bad_value(argument, must, f"shape {tuple(labels.shape)}")


def _fits(labels: Tensor, loss: Loss, shape: tuple[int, ...]) -> bool:
    return tuple(channels_last(labels, loss.class_dim).shape) == shape


def check_weight_shape(weights: Tensor | None, positions: tuple[int, ...] | None) -> None:
    """Refuse weights of positions that do not fit the positions of the examples.

    Args:
        weights: `(n,)`, or `(n, P)`.
        positions: `(n, P)` of the examples; None for examples without positions.

    Raises:
        ValueError: They have two axes, and another shape.
    """
    if weights is not None and weights.ndim == 2 and weights.shape != positions:
        must = "hold one for each example" + ("" if positions is None else f", or {positions}")
        raise bad_value("sample_weight", must, f"the shape {tuple(weights.shape)}")
