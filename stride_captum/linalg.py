"""Gram matrices and quadratic forms with a triangular factor, at 5/8 of the operations; range of float32.

Both products go block by block over the features, so that the blocks that a symmetric result repeats, or
that a triangular factor leaves empty, are not computed: with four blocks 5/8 of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCKS = 4
_NARROWEST = 128
#: Root mean square norms of a layer between which float32 holds sums of squares and of inverses.
_SMALLEST, _LARGEST = 1e-12, 1e12


def in_float32(norms: Tensor) -> Tensor:
    """Whether root mean square norms leave their sums of squares within float32, a bool for each."""
    return (norms > _SMALLEST) & (norms < _LARGEST)


def add_gram_matrix(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to a sum of such matrices, in its dtype and on its device.

    Args:
        total: Symmetric, `(d, d)`; changed in place.
        rows: `(n, d)`.
    """
    for block in _feature_blocks(rows.shape[1]):
        total[block, block.start :] += (rows[:, block].T @ rows[:, block.start :]).to(total.device)
        total[block.stop :, block] = total[block, block.stop :].T


def inverse_forms(rows: Tensor, factor: Tensor) -> Tensor:
    """`x^T (L L^T)^-1 x = |L^-1 x|^2` of each row x = (row, 1), `(n,)`.

    Args:
        rows: `(n, d)`.
        factor: L, lower triangular, `(d + 1, d + 1)`.
    """
    return whitened(rows, factor).square_().sum(1)


def whitened(rows: Tensor, factor: Tensor) -> Tensor:
    """`L^-1 x` of each row x = (row, 1), by forward substitution, `(n, d + 1)`.

    Args:
        rows: `(n, d)`.
        factor: L, lower triangular, `(d + 1, d + 1)`.
    """
    n, d = rows.shape
    solved = rows.new_empty(n, d + 1)
    for block in _feature_blocks(d):
        right = rows[:, block]
        if block.start:
            before = slice(0, block.start)
            right = torch.addmm(right, solved[:, before], factor[block, before].T, alpha=-1)
        diagonal = factor[block, block]
        inverse = torch.linalg.solve_triangular(
            diagonal, torch.eye(len(diagonal), dtype=rows.dtype, device=rows.device), upper=False
        )
        torch.mm(right, inverse.T, out=solved[:, block])
    solved[:, d] = (1 - solved[:, :d] @ factor[d, :d]) / factor[d, d]
    return solved


def _feature_blocks(d: int) -> Iterator[slice]:
    size = max(-(-d // _BLOCKS), _NARROWEST)
    for start in range(0, d, size):
        yield slice(start, min(start + size, d))
