"""What the closed form keeps of training examples with several positions: all rows, or a matrix of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from ..features.precomputed import Precomputed
from ..operators import Changed, FittedOperators
from ..positions import Positions
from ..system.memory import rows_that_fit
from ..system.processes import SINGLE_PROCESS, SingleProcess
from .operators import ClosedFormOperators
from .position_products import summed_products

Self = TypeVar("Self", bound="KeptPositions")


@dataclass
class KeptPositions(FittedOperators):
    """The part of `PositionOperators` that holds the training set.

    Attributes:
        rows: Those of all positions, each as an example of its own; without features in the form "matrix".
        most_bytes: Of what is held at a time.
        of_all: Numbers of rows with a weight above 0 of the training examples of all processes; `positions`
            are of this one.
        matrices: M_i of this process, `(n, (n_features + 1) n_outputs)`; None in the form "rows".
        known: In the form "matrix", what needs rows: "norms", "self_influence" and "suspects",
            one number for each example of this process.
    """

    rows: ClosedFormOperators
    most_bytes: int
    of_all: Positions
    matrices: Tensor | None = None
    known: dict[str, Tensor] | None = None

    @classmethod
    def of(
        cls: type[Self], rows: ClosedFormOperators, most_bytes: int, ranks: SingleProcess = SINGLE_PROCESS
    ) -> Self:
        """Of fitted rows, in the form "rows".

        Args:
            rows: With positions.
            most_bytes: Of what is held at a time.
            ranks: Processes that share the training set.
        """
        assert rows.positions is not None, "rows of examples with positions"
        counted = rows.positions.counted(rows.weights)
        return cls(rows, most_bytes, Positions(ranks.all_gather(counted, "numbers of positions")))

    @property
    def features(self) -> Tensor:
        """Of the rows; none in the form "matrix"."""
        return self.rows.features

    @override
    def without_features(self: Self) -> Self:
        return replace(self, rows=self.rows.without_features())

    @override
    def with_features(self: Self, features: Tensor, logits: Tensor) -> Self:
        return replace(self, rows=self.rows.with_features(features, logits))

    @property
    @override
    def keeps_rows(self) -> bool:
        return self.form == "rows"

    @override
    def with_examples(self, new: Precomputed) -> Changed:
        return self.rows.with_examples(new)

    @override
    def without_examples(self, keep: Tensor) -> Changed:
        return self.rows.without_examples(keep)

    @override
    def with_others(self, places: Tensor, new: Precomputed) -> Changed:
        return self.rows.with_others(places, new)

    @property
    def form(self) -> str:
        """What is kept: "rows" or "matrix"."""
        return "rows" if self.matrices is None else "matrix"

    @property
    def positions(self) -> Positions:
        """Rows of each example."""
        assert self.rows.positions is not None
        return self.rows.positions

    @property
    def n_train(self) -> int:
        """Number of training examples, of all processes."""
        return len(self.of_all)

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        """C."""
        return self.rows.n_classes

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where products are taken."""
        return self.rows.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of products."""
        return self.rows.dtype

    @property
    def temperature(self) -> float:
        """T of the tempered residuals."""
        return self.rows.temperature

    @override
    def coverage(self) -> Tensor:
        return self.of_all.counts > 0

    @property
    def _rows_at_once(self) -> int:
        """Rows that fit the budget with their examples' matrices, if all examples were as short as one is."""
        width = self.rows.scale.shape[0]
        each = 2 * width * self.n_classes / self._fewest + 2 * (width + self.n_classes)
        return rows_that_fit(self.most_bytes, int(each * self.dtype.itemsize))

    @cached_property
    def _fewest(self) -> int:
        """Rows of the shortest example that has some."""
        return int(self.of_all.counts[self.of_all.counts > 0].min())

    def matrices_of(self, examples: slice) -> Tensor:
        """`[h_t, 1] (x) omega_t r_t` summed over the positions of some examples, flat."""
        rows = self.positions.rows_of(examples)
        h = self.rows._data.features_of(rows)
        residuals, few = self.rows._residuals.of(rows), self.positions.of(examples)
        of_features = summed_products(h, residuals, few)
        return torch.cat([of_features, few.sum(residuals).to(of_features)], 1)
