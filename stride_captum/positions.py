"""Positions: an example whose model output has many rows (tokens, pixels), laid out one after the other.

Where an example has positions, every array "of rows" has one row a position, those of an example side by
side, and `Positions` says how many each example has. A score of the example is a sum over its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .system.saved_values import saved_as


@saved_as("positions")
@dataclass(frozen=True)
class Positions:
    """How many rows belong to each example.

    Attributes:
        counts: Rows of each example, `(n,)` int64 on the CPU; 0 where all labels are ignored.
        places: Which position of its example each row is, `(n_rows,)` int32 on the CPU; None for the first,
            the second, ...

    >>> positions = Positions(torch.tensor([2, 0, 1]))
    >>> positions.sum(torch.tensor([[1.0], [2.0], [5.0]])).tolist()
    [[3.0], [0.0], [5.0]]
    """

    counts: Tensor
    places: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", self.counts.cpu())  # what is loaded for a GPU lies there
        object.__setattr__(self, "places", None if self.places is None else self.places.cpu())

    @classmethod
    def of_mask(cls, kept: Tensor) -> Positions:
        """Of positions that have a row, `(n, P)` bool."""
        mask = kept.cpu()
        return cls(mask.sum(1), mask.nonzero()[:, 1].int())

    @classmethod
    def single(cls, n: int) -> Positions:
        """One row for each of n examples."""
        return cls(torch.ones(n, dtype=torch.int64, device="cpu"))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def n_rows(self) -> int:
        """Rows of all examples."""
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> Tensor:
        """First row of each example, and the number of rows, `(n + 1,)`."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def examples(self) -> Tensor:
        """The example of each row, `(n_rows,)` int64."""
        return torch.arange(len(self), device="cpu").repeat_interleave(self.counts)

    def rows_of(self, examples: slice) -> slice:
        """The rows of consecutive examples."""
        start, stop, _ = examples.indices(len(self))
        return slice(int(self.offsets[start]), int(self.offsets[max(start, stop)]))

    def of(self, examples: slice) -> Positions:
        """The positions of consecutive examples alone."""
        places = None if self.places is None else self.places[self.rows_of(examples)]
        return Positions(self.counts[examples], places)

    def rows_at(self, examples: Tensor) -> Tensor:
        """The rows of some examples, in their order, `(k_rows,)` int64.

        Args:
            examples: Places, `(k,)` int64 on the CPU.
        """
        counts = self.counts[examples]
        before = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum()), device="cpu")
        return (self.offsets[examples] - before).repeat_interleave(counts) + places

    def at(self, examples: Tensor) -> Positions:
        """The positions of some examples, in their order."""
        places = None if self.places is None else self.places[self.rows_at(examples)]
        return Positions(self.counts[examples], places)

    def blocks(self, most_rows: int) -> Iterator[slice]:
        """Consecutive examples with at most `most_rows` rows together, or a single one that has more."""
        start, n = 0, len(self)
        while start < n:
            limit = int(self.offsets[start]) + most_rows
            stop = int(torch.searchsorted(self.offsets, limit, right=True)) - 1
            stop = min(max(stop, start + 1), n)
            yield slice(start, stop)
            start = stop

    def sum(self, rows: Tensor) -> Tensor:
        """Sum over the rows of each example, `(n_rows, ...)` to `(n, ...)`."""
        if self.all_filled:
            return self.padded(rows).sum(1)
        total = rows.new_zeros(len(self), *rows.shape[1:])
        return total.index_add_(0, self.examples.to(rows.device), rows)

    def counted(self, weights: Tensor | None) -> Tensor:
        """Rows of each example with a weight above 0, `(n,)` int64 on the CPU.

        Args:
            weights: Of the rows, `(n_rows,)`; None for 1.
        """
        return self.counts if weights is None else self.sum((weights > 0).long()).cpu()

    def mean(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the rows of each example with a weight above 0, each taken once; 0 where there are none.

        Args:
            rows: `(n_rows, ...)`.
            weights: `(n_rows,)`; None for 1.
        """
        behind = (-1, *[1] * (rows.ndim - 1))
        few = rows if weights is None else rows * (weights > 0).to(rows).reshape(behind)
        return self.sum(few) / self.counted(weights).clamp_min(1).to(rows).reshape(behind)

    def spread(self, values: Tensor) -> Tensor:
        """The value of its example for each row, `(n, ...)` to `(n_rows, ...)`."""
        return values[self.examples.to(values.device)]

    def in_place(self, rows: Tensor, n_positions: int = 0) -> Tensor:
        """Rows at their positions and 0 at those without a row, `(n, P, ...)`.

        Args:
            rows: `(n_rows, ...)`.
            n_positions: P; at least up to the last row.
        """
        starts = self.spread(self.offsets[:-1])
        places = (
            torch.arange(self.n_rows, device="cpu") - starts if self.places is None else self.places.long()
        )
        last = int(places.max()) + 1 if len(places) else 0
        found = rows.new_zeros(len(self), max(n_positions, last), *rows.shape[1:])
        found[self.examples.to(rows.device), places.to(rows.device)] = rows
        return found

    def padded(self, rows: Tensor) -> Tensor:
        """`(n, most positions, ...)`: rows of an example in front, 0 behind them."""
        if self.all_filled:
            return rows.reshape(len(self), self.n_rows // len(self), *rows.shape[1:])
        filled = self.filled(rows.device)
        found = rows.new_zeros(*filled.shape, *rows.shape[1:])
        found[filled] = rows
        return found

    def unpadded(self, values: Tensor) -> Tensor:
        """The rows of what `padded` gave, `(n, most positions, ...)` to `(n_rows, ...)`."""
        return values.flatten(0, 1) if self.all_filled else values[self.filled(values.device)]

    @cached_property
    def all_filled(self) -> bool:
        """Whether every example has as many rows, and some."""
        return self.n_rows > 0 and self.n_rows == len(self) * int(self.counts.max())

    def filled(self, device: torch.device | None = None) -> Tensor:
        """Which places of `padded` hold a row, `(n, most positions)` bool."""
        most = int(self.counts.max()) if len(self) else 0
        return (torch.arange(most, device="cpu") < self.counts[:, None]).to(device or self.counts.device)


def joined(parts: Iterable[Positions]) -> Positions:
    """Positions of examples that follow one another."""
    parts = list(parts)
    places = [part.places for part in parts if part.places is not None]
    whole = torch.cat(places) if len(places) == len(parts) else None
    return Positions(torch.cat([part.counts for part in parts]), whole)
