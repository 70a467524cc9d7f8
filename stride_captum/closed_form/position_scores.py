"""Closed form for examples with several positions: scores are sums over the positions of both sides.

    score = <sum_s phi_s (x) g_s, a_i> = 1/W sum_s sum_t omega_t <phi_s, A^-1 phi_t> <g_s, Sigma^-1 r_t>

s runs over the positions of the test point, t over those of training example i. Two forms give the same:

    rows      phi_t and r_t of every position are kept: P (d + C) numbers an example
    matrix    M_i = sum_t phi_t (x) omega_t r_t is kept: d C numbers an example
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import bad_value
from ..operators import TestPoints
from ..positions import Positions
from ..recovery import soft_threshold
from ..system.memory import blocks, rows_that_fit
from ..system.saved_values import saved_as
from ..system.to_device import working_dtype
from .curvature import ClosedFormQuery, score_block
from .forms import in_range, norms_of
from .moments import scaled_features
from .position_products import (
    PositionQuery,
    forms_of_examples,
    matrices_of_rows,
    sizes_and_units_of_examples,
)
from .position_rows import KeptPositions

#: Products of pairs of positions that are held at a time.
_PAIRS = 2**22


@saved_as("closed-form.positions")
@dataclass
class PositionOperators(KeptPositions):
    """Closed-form operators of examples with several positions."""

    @override
    def test_points_at_once(self) -> int:
        """As many as their rows, and their matrices, fit the budget."""
        most = int(self.of_all.counts.max())
        width = self.rows.scale.shape[0]
        each = 4 * most * (width + self.n_classes) + 2 * width * self.n_classes
        return rows_that_fit(self.most_bytes, each * self.dtype.itemsize, None)

    @override
    def prepare(self, points: TestPoints) -> PositionQuery:
        assert points.positions is not None, "test points have positions as the training examples have"
        rows = self.rows.prepare(points)
        return PositionQuery(
            rows, points.positions, matrices_of_rows(rows.terms, points.positions), points.n_positions
        )

    @override
    def scores(self, prepared: PositionQuery, columns: slice) -> Tensor:
        scores = self._scores(prepared, columns)
        return soft_threshold(scores, self.rows.threshold) if self.rows.threshold else scores

    def _scores(self, prepared: PositionQuery, columns: slice) -> Tensor:
        left = prepared.matrices
        if self.matrices is not None:
            return left @ self.matrices[columns].T
        start, stop, _ = columns.indices(len(self.positions))
        parts = []
        pairs = self._by_pairs(prepared.positions, slice(start, stop))
        most = max(_PAIRS // max(prepared.positions.n_rows, 1), 1) if pairs else self._rows_at_once
        for examples in self.positions.of(slice(start, stop)).blocks(most):
            block = slice(start + examples.start, start + examples.stop)
            parts.append(self._of_pairs(prepared, block) if pairs else left @ self.matrices_of(block).T)
        empty = left.new_zeros(len(left), 0)
        return torch.cat([empty, *parts], 1).to(working_dtype(self.rows.features))

    def _by_pairs(self, test: Positions, columns: slice) -> bool:
        """Whether products of all pairs of positions cost less than matrices made for this query."""
        width, n_outputs = self.rows.scale.shape[0], self.n_classes
        rows = self.positions.rows_of(columns)
        n_rows, n = rows.stop - rows.start, columns.stop - columns.start
        pairs = test.n_rows * n_rows * (width + n_outputs)
        return bool(pairs < (n_rows + len(test) * n) * width * n_outputs)

    def _of_pairs(self, prepared: PositionQuery, block: slice) -> Tensor:
        products = self._products(prepared, self.positions.rows_of(block))
        return self.positions.of(block).sum(prepared.positions.sum(products).T.contiguous()).T

    @override
    def position_scores(self, prepared: PositionQuery, example: int | None) -> Tensor:
        if self.rows.threshold:
            raise bad_value("threshold", "be 0 for scores of positions, which add up", self.rows.threshold)
        if example is None:
            n_rows = prepared.positions.n_rows
            parts = [self._of_each(prepared, rows) for rows in blocks(n_rows, self._rows_at_once)]
            empty = prepared.matrices.new_zeros(0, len(self.positions))
            return prepared.positions.in_place(torch.cat([empty, *parts]), prepared.n_positions)
        if self.matrices is not None:
            must = "be 'rows' for scores of the positions of a training example"
            raise bad_value("form", must, repr(self.form), "Write operators=ClosedForm(form='rows').")
        one = slice(example, example + 1)
        products = self._products(prepared, self.positions.rows_of(one))
        return self.positions.of(one).in_place(prepared.positions.sum(products).T)[0].T

    def _of_each(self, prepared: PositionQuery, rows: slice) -> Tensor:
        """Scores of some positions of the test points, each on its own, `(n_rows, n_train)`."""
        query = prepared.rows
        terms = [(u[rows], v[rows]) for u, v in query.terms]
        each = Positions.single(rows.stop - rows.start)
        few = ClosedFormQuery(terms, query.phi[rows], query.gradients[rows])
        return self._scores(PositionQuery(few, each, matrices_of_rows(terms, each)), slice(None))

    def _products(self, prepared: PositionQuery, rows: slice) -> Tensor:
        """Of pairs of a position of a test point and one of a training example."""
        features = self.rows._data.features_of(rows)
        return score_block(prepared.rows.terms, features, self.rows._residuals.of(rows))

    def in_form(self, form: str) -> PositionOperators:
        """These operators in the form "matrix" (the rows are let go), or as they are."""
        if form == "rows":
            return self
        known = {
            "norms": self.train_norms(),
            "self_influence": self.self_influence(),
            "suspects": self.mislabel_scores(),
        }
        width = self.rows.scale.shape[0] * self.n_classes
        matrices = torch.empty(len(self.positions), width, dtype=self.dtype, device=self.device)
        for block in self.positions.blocks(self._rows_at_once):
            matrices[block] = self.matrices_of(block)
        few = self.rows.without_features()
        few = replace(
            few, labels=few.labels[:0].clone(), weights=None, head=self.rows.ridge_head.without_rows()
        )
        return replace(self, rows=few, matrices=matrices, known=known)

    @override
    def train_norms(self) -> Tensor:
        """`sqrt(<G, (F + lambda)^-1 G> / W)` of `G = sum_t phi_t (x) omega_t r_t`, times 1/sqrt(s)."""
        return self._training_forms[0] if self.known is None else self.known["norms"]

    @cached_property
    def _training_forms(self) -> tuple[Tensor, Tensor]:
        """Norms and self-influence of the training examples, `(n_train,)` each, from the same solutions."""
        norms, selves, weight = [], [], self.rows.moments.weight
        for block in self.positions.blocks(self._rows_at_once):
            rows, few = self.positions.rows_of(block), self.positions.of(block)
            phi = scaled_features(self.rows._data.features_of(rows), self.rows.scale)
            sizes, units = sizes_and_units_of_examples(self.rows._residuals.of(rows), few)
            of_loss = self.rows._residuals.of_loss(rows)
            omega = self.rows._data.weights_of(rows, of_loss)
            if omega is not None:  # a position of weight 0 counts on neither side
                of_loss = of_loss * (omega > 0)[:, None]
            own_sizes, own = sizes_and_units_of_examples(of_loss, few)
            terms = self.rows.curvature.solve(phi, units.to(phi))
            squares, forms = (f / weight for f in forms_of_examples(terms, phi, [units, own], few))
            norms.append(norms_of(squares, sizes))
            selves.append(own_sizes * sizes.to(own_sizes) * forms.to(own_sizes))
        return torch.cat(norms).to(working_dtype(self.rows.features)), self._in_range(torch.cat(selves))

    @override
    def test_norms(self, prepared: PositionQuery) -> Tensor:
        phi, positions = prepared.rows.phi, prepared.positions
        sizes, units = sizes_and_units_of_examples(prepared.rows.gradients, positions)
        return norms_of(self._form(phi, units, units, positions) / self.rows.moments.weight, sizes)

    def _form(self, phi: Tensor, left: Tensor, right: Tensor, positions: Positions) -> Tensor:
        """`<sum_t phi_t (x) left_t, (F + lambda)^-1 sum_t phi_t (x) right_t>` in units of 1/s, `(n,)`."""
        terms = self.rows.curvature.solve(phi, right.to(phi))
        return forms_of_examples(terms, phi, [left], positions)[0]

    @override
    def query_vectors(self, prepared: PositionQuery) -> Tensor | None:
        return None if self.rows.threshold else prepared.matrices

    @override
    def train_vectors(self, rows: Tensor) -> Tensor | None:
        if self.rows.threshold:
            return None
        if self.matrices is not None:
            return self.matrices[rows.to(self.matrices.device)]
        parts = [self.matrices_of(slice(i, i + 1)) for i in rows.tolist()]
        return torch.cat([self.matrices_of(slice(0, 0)), *parts])

    @override
    def self_influence(self) -> Tensor:
        """`<sum_t phi_t (x) (y_t - p_t), a_i>` over positions with a weight above 0, `(n_train,)`."""
        return self._training_forms[1] if self.known is None else self.known["self_influence"]

    @override
    def self_influence_of(self, points: TestPoints) -> Tensor:
        assert points.positions is not None
        phi, own, right = self.rows.sides_of_others(points)
        sizes, units = sizes_and_units_of_examples(own, points.positions)
        forms = self._form(phi, units.to(phi), right, points.positions) / self.rows.moments.weight
        return self._in_range(sizes * forms.to(sizes))

    def _in_range(self, values: Tensor) -> Tensor:
        return in_range(values, self.device, working_dtype(self.rows.features))

    @override
    def mislabel_scores(self) -> Tensor:
        """Norm of what a head without the example leaves unexplained: mean over positions that count."""
        if self.known is not None:
            return self.known["suspects"]
        return self.positions.mean(self.rows.mislabel_scores(), self.rows.weights)

    @override
    def mislabel_scores_of_outputs(self) -> NoReturn:
        must = "have one row of outputs per example for per_label=True"
        raise bad_value("model", must, "several positions", "Leave `per_label` out.")
