"""Features at the positions of the outputs: tokens as they are, maps resized to the grid of the labels.

What a convolution reads is a map of the patches of its kernel (`Tap.patches`), resized like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import bad_value
from ..losses.positions import channels_last, has_positions
from ..losses.summed_positions import SummedPositions
from .pooling import Tap

if TYPE_CHECKING:
    from ..losses import Loss

_MODES: tuple[Literal["linear", "bilinear", "trilinear"], ...] = ("linear", "bilinear", "trilinear")


def grid_of(outputs: Tensor, loss: Loss) -> tuple[int, ...] | None:
    """Sizes of the positions of an example; None where it has one row of outputs, or all make one."""
    if not has_positions(outputs) or isinstance(loss, SummedPositions):
        return None
    return tuple(channels_last(outputs, loss.class_dim).shape[1:-1])


def at_positions(features: Tensor, grid: tuple[int, ...], tap: Tap) -> Tensor:
    """The features of each position of the outputs.

    A map of another size is resized: averaged where it is finer than the outputs, interpolated where it is
    coarser. A row that stands for the whole example is not repeated.

    Args:
        features: `(n, positions..., width)`, as `features_of` gives them.
        grid: Sizes of the positions of the outputs.
        tap: Where they come from.

    Returns:
        `(n, P, width)`, P the product of the grid.

    Raises:
        ValueError: Other positions than those of the outputs, which cannot be resized.
    """
    sizes = tuple(features.shape[1:-1])
    if sizes == grid:
        return features.flatten(1, -2)
    if len(sizes) == len(grid) == tap.spatial:
        return _resized(features.movedim(-1, 1), grid).movedim(1, -1).flatten(1, -2)
    if len(sizes) != len(grid) and sizes and _product(sizes) == _product(grid):
        return features.flatten(1, -2)
    got = f"the positions {sizes}" if sizes else "one row per example"
    raise bad_value(
        "layers",
        f"give one row for each of the positions {grid} of the outputs",
        f"{got} from {str(tap)!r}",
        "Name layers before positions are merged, or with maps, which are resized.",
    )


def at_kept_positions(
    features: Sequence[Tensor], taps: Sequence[Tap], grid: tuple[int, ...], kept: Tensor
) -> list[Tensor]:
    """The features of each tap at some positions of the outputs, `(n_rows, width)`.

    Args:
        features: Of each tap, as for `at_positions`.
        taps: Where they come from.
        grid: Sizes of the positions of the outputs.
        kept: Which positions have a row, `(n, P)` bool.
    """
    there = (at_positions(f, grid, tap) for f, tap in zip(features, taps, strict=True))
    every = bool(kept.all())
    return [f.flatten(0, 1) if every else f[kept.to(f.device)] for f in there]


def _resized(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps `(n, channels, sizes...)` on another grid: smaller sides are means, larger ones interpolated."""
    sides = [min(side, size) for side, size in zip(grid, maps.shape[2:], strict=True)]
    if sides != list(maps.shape[2:]):
        pooling: list[Callable[..., Tensor]] = [
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
        ]
        maps = pooling[len(grid) - 1](maps, sides)
    if sides != list(grid):
        maps = F.interpolate(maps, size=list(grid), mode=_MODES[len(grid) - 1], align_corners=False)
    return maps


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())
