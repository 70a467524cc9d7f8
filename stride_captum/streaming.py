"""Owns what becomes of scores that arrive in blocks of columns: all of them, the top k, or group sums."""

from __future__ import annotations

from typing import Protocol

import torch
from scipy import sparse
from torch import Tensor

from .subsets import Membership


class Collector(Protocol):
    """Takes in blocks of columns from left to right.

    Attributes:
        keeps_all: Whether every score is kept, so that one wide block costs no more memory.
    """

    keeps_all: bool

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""

    def result(self) -> tuple[Tensor, ...]:
        """What was collected, one row per test point."""


class DenseScores:
    """Keep every score.

    Args:
        n_columns: Width of the whole matrix.
    """

    keeps_all = True

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

    keeps_all = False

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

    keeps_all = False

    def __init__(self, k: int, largest: bool) -> None:
        self.k = k
        self.largest = largest
        self._scores: Tensor | None = None
        self._indices: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        signed = block if self.largest else -block
        columns = torch.arange(start, start + block.shape[1], device=block.device).expand_as(signed)
        if self._scores is None or self._indices is None:
            self._scores, self._indices = _best(signed, columns, self.k)
            return
        if self._scores.shape[1] == self.k:
            signed, columns = _candidates(signed, self._scores[:, -1:], start)
            if signed.shape[1] == 0:
                return
        self._scores, self._indices = _best(
            torch.cat([self._scores, signed], 1), torch.cat([self._indices, columns], 1), self.k
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices (int64) and scores, `(n_rows, min(k, n_columns))`, best first."""
        assert self._scores is not None, "no block has been seen"
        assert self._indices is not None
        return self._indices, self._scores if self.largest else -self._scores


def merge_top_k(indices: Tensor, scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of lists that are side by side, such as those of several processes; ties by lower index.

    Args:
        indices: Columns that the lists name, `(n_rows, n)` int64.
        scores: Their scores, `(n_rows, n)`.
        k: How many are kept.
        largest: Proponents or opponents.
    """
    best, chosen = _best(scores if largest else -scores, indices, min(k, scores.shape[1]))
    return chosen, best if largest else -best


def _candidates(signed: Tensor, kth: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What beats the k-th score of its row, left-aligned and padded with -inf; an equal score has a
    higher index and cannot enter.

    Returns:
        Scores and indices, `(n_rows, most)`, where most is the largest number in a row.
    """
    rows, places = (~(signed <= kth)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(signed))
    most = int(counts.max()) if len(rows) else 0
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    scores = signed.new_full((len(signed), most), -torch.inf)
    indices = places.new_full((len(signed), most), torch.iinfo(torch.int64).max)
    scores[rows, slots] = signed[rows, places]
    indices[rows, slots] = places + start
    return scores, indices


def _best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, ties by lower index."""
    k = min(k, scores.shape[1])
    values, places = scores.topk(k, dim=1)
    kth = values[:, -1:]
    # topk breaks ties at the k-th score as it likes: redo the rows in which that can matter.
    tied = (scores == kth).sum(1, dtype=torch.int32) > (values == kth).sum(1)
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
