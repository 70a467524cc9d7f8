"""Test points with positions, and sums over the positions of each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..positions import Positions
from .curvature import ClosedFormQuery, Term


@dataclass(frozen=True)
class PositionQuery:
    """Test points as the closed form scores them.

    Attributes:
        rows: Their positions, as test points of their own.
        positions: Rows of each test point.
        matrices: `sum_s U_s (x) V_s` of each, flat, `(n_test, (n_features + 1) n_outputs)`.
        n_positions: P, those without a row too.
    """

    rows: ClosedFormQuery
    positions: Positions
    matrices: Tensor
    n_positions: int = 0


def matrices_of_rows(terms: Sequence[Term], positions: Positions) -> Tensor:
    """`sum_t U_t (x) V_t` over the positions of each example and the terms, flat."""
    total: Tensor | Any = 0
    for u, v in terms:
        total = total + summed_products(u, v.to(u), positions)
    return total


def summed_products(left: Tensor, right: Tensor, positions: Positions) -> Tensor:
    """`sum_t left_t (x) right_t` over the positions of each example, flat, `(n, n_left n_right)`."""
    right, n = right.to(left), len(positions)
    if positions.all_filled:
        a, b = positions.padded(left), positions.padded(right)
        return (a.transpose(1, 2) @ b).flatten(1)
    found = left.new_zeros(n, left.shape[1], right.shape[1])
    for i in range(n):
        rows = positions.rows_of(slice(i, i + 1))
        torch.mm(left[rows].T, right[rows], out=found[i])
    return found.flatten(1)


def forms_of_examples(
    terms: Sequence[Term], phi: Tensor, lefts: Sequence[Tensor], positions: Positions
) -> list[Tensor]:
    """`<sum_t phi_t (x) left_t, sum_t U_t (x) V_t>` of each example, summed over the terms, `(n,)`.

    Args:
        terms: Of each row, `(n_rows, n_features + 1)` and `(n_rows, n_classes)`.
        phi: `(n_rows, n_features + 1)`.
        lefts: `(n_rows, n_classes)` each; the result has as many entries.
        positions: Rows of each example.
    """
    most, width, n_outputs = int(positions.counts.max()), phi.shape[1], lefts[0].shape[1]
    by_pairs = most * len(terms) * (width + n_outputs * len(lefts))
    by_matrices = width * n_outputs * (len(terms) + len(lefts))
    if by_pairs > by_matrices:
        solved = matrices_of_rows(terms, positions)
        return [(summed_products(phi, left, positions) * solved).sum(1) for left in lefts]
    columns = positions.padded(phi).transpose(1, 2)
    others = [positions.padded(left.to(phi)).transpose(1, 2) for left in lefts]
    totals = [phi.new_zeros(len(positions)) for _ in lefts]
    for u, v in terms:
        pairs, weights = positions.padded(u) @ columns, positions.padded(v.to(u))
        for total, other in zip(totals, others, strict=True):
            total += (pairs * (weights @ other)).sum((1, 2))
    return totals


def sizes_and_units_of_examples(vectors: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """The largest entry of each example, `(n,)`, and rows divided by it, whose squares do not underflow."""
    largest = vectors.abs().amax(1)
    examples = positions.examples.to(vectors.device)
    sizes = largest.new_zeros(len(positions)).scatter_reduce_(0, examples, largest, "amax")
    return sizes, vectors / torch.where(sizes > 0, sizes, 1.0)[examples][:, None]
