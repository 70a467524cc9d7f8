"""Scores that arrive in blocks of columns: all are kept, the top k, or the sums of groups."""

from __future__ import annotations

from typing import Protocol

import torch
from scipy import sparse
from torch import Tensor

from ..recovery.design import SparseMatrix
from ..subsets import Membership
from ..system.devices import as_float64

#: Groups of columns for each of the k best, and the width from which looking at groups first is faster.
_GROUPS, _WIDE = 5, 20


class Collector(Protocol):
    """Takes in blocks of columns from left to right.

    Attributes:
        keeps_all: Whether every score is kept, so that one wide block costs no more memory.
        over_all_batches: Whether one collector takes in all test batches.
    """

    keeps_all: bool
    over_all_batches: bool

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
    over_all_batches = False

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


class ColumnSums:
    """Keep the sum of each column over all test points, in float64, and give it or its k best.

    Args:
        n_columns: Width of the whole matrix.
        k: None for the whole row.
        proponents: With k: whether the highest are the best.
    """

    keeps_all = False
    over_all_batches = True

    def __init__(self, n_columns: int, k: int | None, proponents: bool) -> None:
        self.n_columns, self.k, self.largest = n_columns, k, proponents
        self._sums: Tensor | None = None
        self._dtype = torch.float32

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        scores = as_float64(block)
        if self._sums is None:
            self._sums, self._dtype = scores.new_zeros(1, self.n_columns), block.dtype
        self._sums[0, start : start + block.shape[1]] += scores.sum(0)

    def sums(self) -> Tensor:
        """`(1, n_columns)` in float64."""
        assert self._sums is not None, "no block has been seen"
        return self._sums

    def result(self) -> tuple[Tensor, ...]:
        """The sums `(1, n_columns)`, or indices and values of the k best."""
        return self.result_of(self.sums())

    def result_of(self, sums: Tensor) -> tuple[Tensor, ...]:
        """`result`, for sums that may be those of several processes."""
        row = sums.to(self._dtype)
        if self.k is None:
            return (row,)
        best = StreamedTopK(self.k, self.largest)
        best.update(row, 0)
        return best.result()


class GroupSums:
    """Keep the sum of the scores of each group of columns, in float64.

    Args:
        membership: CSR `(n_groups, n_columns)`.
    """

    keeps_all = False
    over_all_batches = False

    def __init__(self, membership: Membership) -> None:
        self._membership = sparse.csc_matrix(membership)
        self._sums: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        scores = as_float64(block)
        members = self._membership[:, start : start + block.shape[1]].tocsr()
        sums = SparseMatrix(members, scores.device).times(scores.T).T
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
    over_all_batches = False

    def __init__(self, k: int, largest: bool) -> None:
        self.k = k
        self.largest = largest
        self._scores: Tensor | None = None
        self._indices: Tensor | None = None

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...`, `(n_rows, n_block)`."""
        signed = block if self.largest else -block
        if block.device.type != "cpu":
            self._scores, self._indices = _merged(self._scores, self._indices, signed, start, self.k)
            return
        if self._scores is None or self._indices is None:
            self._scores, self._indices = _best(*_worth_ranking(signed, self.k, start), self.k)
            return
        # What only equals the k-th score has a higher index and cannot enter.
        full = self._scores.shape[1] == self.k
        enters = ~(signed <= self._scores[:, -1:]) if full else torch.ones_like(signed, dtype=torch.bool)
        signed, columns = _picked(signed, enters, start)
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


def _merged(
    scores: Tensor | None, indices: Tensor | None, block: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of those that were kept and of a block to their right. Nothing depends on a value, so that a
    GPU need not be waited for; a stable sort leaves ties, whose indices ascend, as they are.
    """
    columns = torch.arange(start, start + block.shape[1], device=block.device).expand_as(block)
    if scores is not None and indices is not None:
        block, columns = torch.cat([scores, block], 1), torch.cat([indices, columns], 1)
    order = block.argsort(dim=1, descending=True, stable=True)[:, :k]
    return block.gather(1, order), columns.gather(1, order)


def merge_top_k(indices: Tensor, scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k best of lists that are side by side, such as those of several processes; ties by lower index.

    Args:
        indices: Design that the lists name, `(n_rows, n)` int64.
        scores: Their scores, `(n_rows, n)`.
        k: How many are kept.
        largest: Proponents or opponents.
    """
    best, chosen = _best(scores if largest else -scores, indices, min(k, scores.shape[1]))
    return chosen, best if largest else -best


def _worth_ranking(scores: Tensor, k: int, start: int) -> tuple[Tensor, Tensor]:
    """Scores and indices (from `start` on) that hold the k best of each row: of a wide block, little else."""
    if scores.shape[1] >= _WIDE * k:
        chosen = ~(scores < _reached_by(scores, k))
        if int(chosen.count_nonzero()) <= chosen.numel() // 4:  # else ties: picking would save nothing
            return _picked(scores, chosen, start)
    return scores, torch.arange(start, start + scores.shape[1], device=scores.device).expand_as(scores)


def _reached_by(scores: Tensor, k: int) -> Tensor:
    """A score that at least k columns of each row reach, `(n_rows, 1)`: the k-th largest of the maxima of
    groups of columns, which costs a fraction of the k-th largest of all.
    """
    groups = _GROUPS * k
    size = scores.shape[1] // groups
    maxima = scores[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    bound: Tensor = maxima.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return bound


def _picked(scores: Tensor, chosen: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What is chosen of each row, left-aligned and padded with -inf.

    Returns:
        Scores and indices (from `start` on), `(n_rows, most)`, where most is the largest number in a row.
    """
    rows, places = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(scores))
    most = int(counts.max()) if len(rows) else 0
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    picked = scores.new_full((len(scores), most), -torch.inf)
    indices = places.new_full((len(scores), most), torch.iinfo(torch.int64).max)
    picked[rows, slots] = scores[rows, places]
    indices[rows, slots] = places + start
    return picked, indices


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
