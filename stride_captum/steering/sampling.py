"""Mini-batches of Algorithm 1, line 6: B_S from inside each subset, B_R from outside."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..subsets import Membership

_BITS = 31
#: Batches that are drawn together on a GPU, and their entries: 2^20 of them take 26 MiB.
_AHEAD, _AHEAD_ENTRIES = 16, 2**20


@dataclass(frozen=True)
class SubsetRows:
    """The membership on a device: `indices[starts[k] : starts[k] + sizes[k]]` is S_k, sorted.

    Attributes:
        indices: Training indices of all subsets, one after the other, `(n_entries,)` int32 or int64.
        starts: `(K,)` int64.
        sizes: |S_k|, `(K,)` int64.
        largest: Largest size.
        n_train: N.
    """

    indices: Tensor
    starts: Tensor
    sizes: Tensor
    largest: int
    n_train: int

    @classmethod
    def from_membership(cls, membership: Membership, device: torch.device | str = "cpu") -> SubsetRows:
        """Move the CSR matrix `(K, N)` to a device; on the CPU its indices are shared, not copied."""
        csr = sparse.csr_matrix(membership)
        if not csr.has_sorted_indices:
            csr = csr.sorted_indices()
        pointers = torch.from_numpy(csr.indptr.astype(np.int64)).to(device)
        indices = torch.from_numpy(csr.indices).to(device)
        largest = int(np.diff(csr.indptr).max(initial=0))
        return cls(indices, pointers[:-1], pointers.diff(), largest, csr.shape[1])

    def draw_members(self, subsets: slice, width: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """B_S for some subsets.

        Args:
            subsets: Which k, a slice with start and stop.
            width: b. Subsets with at most b members give all of them.
            uniforms: From `draw_uniforms(width)`.

        Returns:
            Training indices `(k, width)` int64, and which of them are examples `(k, width)` bool.
        """
        positions, mask = stratified_positions(self.sizes[subsets], width, uniforms)
        return self._member(subsets, positions.where(mask, 0)).where(mask, 0), mask

    def draw_outsiders(self, subsets: slice, width: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """B_R for some subsets, without rejection sampling and without listing D minus S_k.

        The u-th example outside S_k (from 0) is `u + c`, where c counts the members m_j (sorted) with
        `m_j - j <= u`; c is found by bisection in all subsets at once.
        """
        sizes = self.sizes[subsets]
        positions, mask = stratified_positions(self.n_train - sizes, width, uniforms)
        low = torch.zeros_like(positions)
        high = sizes[:, None].expand_as(positions)
        for _ in range(self.largest.bit_length()):
            middle = (low + high) // 2
            inside = middle < sizes[:, None]
            before = inside & (self._member(subsets, middle.where(inside, 0)) - middle <= positions)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        return (positions + low).where(mask, 0), mask

    def _member(self, subsets: slice, positions: Tensor) -> Tensor:
        """Members at `positions` `(k, width)`; the result is arbitrary for empty subsets."""
        entries = (self.starts[subsets, None] + positions).clamp(max=max(len(self.indices) - 1, 0))
        return self.indices[entries].long()


@dataclass(frozen=True)
class MiniBatch:
    """B_S and B_R of the subsets of one block.

    Attributes:
        inside: B_S, training indices `(k, b)` int64.
        mask: Which of them are examples, `(k, b)` bool.
        outside: B_R, `(k, b)`.
        outside_mask: Likewise.
        distinct: The examples in either, ascending, `(m,)` int64.
        places: Where in `distinct` the examples are, those of B_S before those of B_R, `(k, 2 b)` int64.
    """

    inside: Tensor
    mask: Tensor
    outside: Tensor
    outside_mask: Tensor
    distinct: Tensor
    places: Tensor


class MiniBatches:
    """Batches of all steps, one per block of subsets.

    The number of distinct examples in a batch determines tensor sizes, which takes a GPU synchronization. On
    a GPU several batches are drawn per synchronization.

    Args:
        subsets: All of them.
        blocks: Slices of the subsets.
        width: b.
        generator: Of the draws; on the CPU.
    """

    def __init__(
        self,
        subsets: SubsetRows,
        blocks: Sequence[slice],
        width: int,
        generator: torch.Generator,
    ) -> None:
        self.subsets, self.blocks, self.width = subsets, blocks, width
        self._upcoming = self._draws(generator)
        self._ready: deque[MiniBatch] = deque()

    def step(self) -> Iterator[MiniBatch]:
        """The batches of the next step, one for each block."""
        for _ in self.blocks:
            if not self._ready:
                self._fill()
            yield self._ready.popleft()

    def _fill(self) -> None:
        drawn = [next(self._upcoming)]
        if drawn[0].places.device.type != "cpu":
            more = min(_AHEAD, _AHEAD_ENTRIES // drawn[0].places.numel()) - 1
            drawn += itertools.islice(self._upcoming, max(more, 0))
        counts = torch.stack([batch.places.max() for batch in drawn]).tolist()
        for batch, last in zip(drawn, counts, strict=True):
            self._ready.append(replace(batch, distinct=batch.distinct[: last + 1]))

    def _draws(self, generator: torch.Generator) -> Iterator[MiniBatch]:
        """Endless batches with padded `distinct`."""
        device = self.subsets.indices.device
        while True:
            uniforms = (
                draw_uniforms(self.width, generator, device),
                draw_uniforms(self.width, generator, device),
            )
            for block in self.blocks:
                inside, mask = self.subsets.draw_members(block, self.width, uniforms[0])
                outside, outside_mask = self.subsets.draw_outsiders(block, self.width, uniforms[1])
                distinct, places = padded_unique(torch.cat([inside, outside], 1))
                yield MiniBatch(inside, mask, outside, outside_mask, distinct, places)


def padded_unique(values: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.unique` with a result padded to the number of values, without GPU synchronization.

    Args:
        values: Integers, any shape.

    Returns:
        The distinct values, ascending, padded with zeros; and the position of each value in it.

    >>> padded_unique(torch.tensor([7, 3, 7]))
    (tensor([3, 7, 0]), tensor([1, 0, 1]))
    """
    ordered, order = values.reshape(-1).sort()
    rank = torch.zeros_like(ordered)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    places = torch.empty_like(rank).scatter_(0, order, rank)
    return torch.zeros_like(ordered).scatter_(0, rank, ordered), places.view(values.shape)


def draw_uniforms(width: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`width + 1` integers below 2^31 for one batch of every subset, drawn on the CPU: `(width + 1,)`."""
    return torch.randint(2**_BITS, (width + 1,), generator=generator, device="cpu").to(device)


def stratified_positions(sizes: Tensor, width: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `width` distinct positions in `[0, size)` for every size, each equally likely.

    One position is drawn in each of `width` strata of (nearly) equal length, then all are rotated by the same
    amount. The uniforms are shared by all subsets, so that subsets of the same size take the same positions:
    sampling noise is common to all operators and cancels in comparisons between subsets. The draw does not
    depend on how many subsets are drawn at once.

    Args:
        sizes: `(k,)` int64.
        width: b.
        uniforms: From `draw_uniforms(width)`.

    Returns:
        Positions `(k, width)` and mask `(k, width)`: a size of at most b gives `0, ..., size - 1`.
    """
    sizes, slot = sizes[:, None], torch.arange(width, device=sizes.device)
    lower, upper = slot * sizes // width, (slot + 1) * sizes // width
    drawn = lower + ((uniforms[:-1] * (upper - lower)) >> _BITS)
    rotated = (drawn + ((uniforms[-1] * sizes) >> _BITS)) % sizes.clamp(min=1)
    return torch.where(sizes <= width, slot, rotated), slot < sizes
