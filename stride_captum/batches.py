"""Mini-batches of Algorithm 1, line 6: B_S from each subset, B_R from what is outside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from .subsets import Membership

_BITS = 31


@dataclass(frozen=True)
class SubsetRows:
    """The membership on a device: `indices[starts[k] : starts[k] + sizes[k]]` is S_k, sorted.

    Attributes:
        indices: Training indices of all subsets, one after the other, `(n_entries,)` int32 or int64.
        starts: `(K,)` int64.
        sizes: |S_k|, `(K,)` int64.
        n_train: N.
    """

    indices: Tensor
    starts: Tensor
    sizes: Tensor
    n_train: int

    @classmethod
    def from_membership(cls, membership: Membership, device: torch.device | str = "cpu") -> SubsetRows:
        """Put the CSR matrix `(K, N)` on a device; on the CPU its indices are shared, not copied."""
        csr = sparse.csr_matrix(membership)
        if not csr.has_sorted_indices:
            csr = csr.sorted_indices()
        pointers = torch.from_numpy(csr.indptr.astype(np.int64)).to(device)
        indices = torch.from_numpy(csr.indices).to(device)
        return cls(indices, pointers[:-1], pointers.diff(), csr.shape[1])

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
        """B_R for some subsets, without rejection and without listing D minus S_k.

        The u-th example outside S_k (from 0) is `u + c`, where c counts the members m_j (sorted) with
        `m_j - j <= u`; c is found by bisection in all subsets at once.
        """
        sizes = self.sizes[subsets]
        positions, mask = stratified_positions(self.n_train - sizes, width, uniforms)
        low = torch.zeros_like(positions)
        high = sizes[:, None].expand_as(positions)
        for _ in range(int(sizes.max()).bit_length()):
            middle = (low + high) // 2
            inside = middle < sizes[:, None]
            before = inside & (self._member(subsets, middle.where(inside, 0)) - middle <= positions)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        return (positions + low).where(mask, 0), mask

    def _member(self, subsets: slice, positions: Tensor) -> Tensor:
        """The members at `positions` `(k, width)`; 0 is allowed for an empty subset and means nothing."""
        entries = (self.starts[subsets, None] + positions).clamp(max=max(len(self.indices) - 1, 0))
        return self.indices[entries].long()


def draw_uniforms(width: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`width + 1` integers below 2^31 for one batch of every subset, drawn on the CPU: `(width + 1,)`."""
    return torch.randint(2**_BITS, (width + 1,), generator=generator).to(device)


def stratified_positions(sizes: Tensor, width: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `width` distinct positions in `[0, size)` for every size, each equally likely.

    One position is drawn in each of `width` strata of (nearly) equal length, then all are rotated by
    the same amount. The uniforms are shared by all subsets, so that subsets of the same size take the
    same positions: what the batch adds to one operator it adds to all, and a comparison between
    subsets sees less of it. The number of subsets that are drawn at once changes nothing.

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
