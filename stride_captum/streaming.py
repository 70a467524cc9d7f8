"""Owns what becomes of scores that arrive in blocks of columns: all of them, the top k, or group sums."""

from __future__ import annotations

from typing import Protocol

import torch
from scipy import sparse
from torch import Tensor

from .subsets import Membership


class Collector(Protocol):
    """Takes in blocks of columns from left to right."""

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""

    def result(self) -> tuple[Tensor, ...]:
        """What was collected, one row per test point."""


class DenseScores:
    """Keep every score.

    Args:
        n_columns: Width of the whole matrix.
    """

    def __init__(self, n_columns: int) -> None:
        self.n_columns = n_columns
        self._scores: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        if block.shape[1] == self.n_columns:
            self._scores = block
            return
        if self._scores is None:
            self._scores = block.new_empty(len(block), self.n_columns)
        self._scores[:, start : start + block.shape[1]] = block

    def result(self) -> tuple[Tensor, ...]:
        """`(n_rows, n_columns)`."""
        assert self._scores is not None, "no block has been seen"
        return (self._scores,)


class GroupSums:
    """Keep the sum of the scores of each group of columns, in float64.

    Args:
        membership: CSR `(n_groups, n_columns)`.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = sparse.csc_matrix(membership)
        self._sums: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        members = self._membership[:, start : start + block.shape[1]]
        sums = torch.from_numpy(members @ block.cpu().double().numpy().T).T
        self._sums = sums if self._sums is None else self._sums + sums
        self._like = block

    def result(self) -> tuple[Tensor, ...]:
        """`(n_rows, n_groups)`."""
        assert self._sums is not None, "no block has been seen"
        return (self._sums.to(self._like),)


class StreamedTopK:
    """Keep the k best columns of each row while blocks of columns arrive from left to right.

    Ties go to the lower index, so that the answer does not depend on the size of the blocks. NaN is
    never hidden: a row with a NaN keeps it at the front.

    Args:
        k: How many columns are kept; fewer where the matrix has fewer.
        largest: Proponents (largest first) or opponents (smallest first).

    >>> best = StreamedTopK(2, largest=True)
    >>> best.update(torch.tensor([[1.0, 3.0]]), 0)
    >>> best.update(torch.tensor([[3.0, 2.0]]), 2)
    >>> [part.tolist() for part in best.result()]
    [[[1, 2]], [[3.0, 3.0]]]
    """

    def __init__(self, k: int, largest: bool) -> None:
        self.k = k
        self.largest = largest
        self._scores: Tensor | None = None
        self._indices: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        signed = block if self.largest else -block
        if self._scores is None or self._indices is None:
            columns = torch.arange(start, start + block.shape[1], device=block.device)
            self._scores, self._indices = _best(signed, columns.expand_as(signed), self.k)
            return
        if self._scores.shape[1] == self.k:
            # Only what beats the k-th score can enter: an equal score has a higher index.
            enters = ~(signed <= self._scores[:, -1:])
            most = int(enters.sum(1).max())
            if most == 0:
                return
            if most < block.shape[1] // 4:
                signed = torch.where(enters, signed, -torch.inf)
                signed, local = signed.topk(most, dim=1)
                signed, local = _best(signed, local, most)
                candidates = local + start
            else:
                candidates = torch.arange(start, start + block.shape[1], device=block.device).expand_as(
                    signed
                )
        else:
            candidates = torch.arange(start, start + block.shape[1], device=block.device).expand_as(signed)
        self._scores, self._indices = _best(
            torch.cat([self._scores, signed], 1), torch.cat([self._indices, candidates], 1), self.k
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices (int64) and scores, `(n_rows, min(k, n_columns))`, best first."""
        assert self._scores is not None, "no block has been seen"
        assert self._indices is not None
        return self._indices, self._scores if self.largest else -self._scores


def _best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, ties by lower index."""
    k = min(k, scores.shape[1])
    values, places = scores.topk(k, dim=1)
    kth = values[:, -1:]
    # topk breaks ties at the k-th score as it likes: redo the rows in which that can matter.
    tied = (scores == kth).sum(1) > (values == kth).sum(1)
    ambiguous = (tied | kth.isnan().squeeze(1)).nonzero().squeeze(1)
    if ambiguous.numel():
        rows = scores[ambiguous]
        by_index = indices[ambiguous].argsort(dim=1, stable=True)
        by_score = rows.gather(1, by_index).argsort(dim=1, descending=True, stable=True)[:, :k]
        places[ambiguous] = by_index.gather(1, by_score)
    picked = indices.gather(1, places)
    order = picked.argsort(dim=1)
    order = order.gather(
        1, scores.gather(1, places.gather(1, order)).argsort(dim=1, descending=True, stable=True)
    )
    places = places.gather(1, order)
    return scores.gather(1, places), indices.gather(1, places)
