"""Closed-form operators: what they keep of a training set, and the scores.

Features and logits are not copied; besides them only vectors of length n_train are kept. Residuals,
`(n_train, n_classes)`, are kept if they fit the memory budget, and otherwise recomputed block by block. The
scores are bitwise the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..features.precomputed import Precomputed
from ..losses import CrossEntropy, Loss
from ..operators import Changed, FittedOperators, TestPoints
from ..positions import Positions
from ..recovery import soft_threshold
from ..residuals import OF_A_HEAD, choose_residuals
from ..system.devices import float64_device, matching
from ..system.memory import MOST_ROWS, blocks
from ..system.saved_values import saved_as
from ..system.to_device import TrainingBlocks, working_dtype
from .curvature import (
    ClosedFormQuery,
    Curvature,
    Term,
    forms_of,
    on_raw_features,
    score_block,
)
from .damping import head_dtype
from .forms import TrainingForms, in_range, norms_of, outer, sizes_and_units
from .incremental import with_examples, with_others, without_examples
from .moments import Moments, scaled_features
from .position_head import fit_head
from .ridge_head import RidgeHead
from .training_residuals import TrainingResiduals, readable_widths


@saved_as("closed-form")
@dataclass
class ClosedFormOperators(FittedOperators):
    """Closed-form operators of all singleton subsets.

    Attributes:
        features: Raw features h of the training set, `(n_train, n_features)`, as they were stored.
        logits: z, `(n_train, n_classes)`, likewise.
        labels: y as the loss has them, `(n_train,)` int64 or `(n_train, n_classes)`, on the compute device.
        widths: Widths of the layers, in the order of the columns.
        moments: Sums over the training set, which incremental updates change.
        scale: Factor of each feature, 1 for the constant, `(n_features + 1,)` in the dtype of products.
        head: Ridge head on all layers but the last; None where the residuals need none (see `ridge_head`).
        ridge_ratio: Factor of the ridge part of the residuals "both": a number, or one per output.
        curvature: Approximation of F + lambda I.
        kind: The option `residuals`.
        temperature: T.
        threshold: The option of that name.
        block_rows: Training examples per block.
        head_damping: lambda of the ridge head.
        residual_bytes: Residuals are kept if they take no more bytes.
        loss: What the model was trained with.
        weights: omega of each example, `(n_train,)` float64; None for 1.
        positions: Rows of each example, where all of these have one for each position.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]
    moments: Moments
    scale: Tensor
    head: RidgeHead | None
    ridge_ratio: float | Tensor
    curvature: Curvature
    kind: str
    temperature: float
    threshold: float = 0.0
    block_rows: int = MOST_ROWS
    head_damping: float = 0.1
    residual_bytes: int = 0
    loss: Loss = field(default_factory=CrossEntropy)
    weights: Tensor | None = None
    positions: Positions | None = None

    @property
    def n_train(self) -> int:
        """N, the training examples of all processes."""
        return self.moments.n_train

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        """C."""
        return self.logits.shape[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Compute device."""
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of products."""
        return self.scale.dtype

    @property
    def residuals(self) -> Tensor:
        """r_i of the whole training set, `(n_train, n_classes)`; recomputed at every call."""
        return self._whole(lambda rows: self.curvature.scale * self._residuals.of(rows))

    @property
    def loss_residuals(self) -> Tensor:
        """e_y - p at temperature 1, `(n_train, n_classes)`; recomputed at every call."""
        return self._whole(self._residuals.of_loss)

    def _whole(self, of_rows: Callable[[slice], Tensor]) -> Tensor:
        whole = self.scale.new_empty(len(self.labels), self.n_classes, dtype=working_dtype(self.features))
        for rows in self._data:
            whole[rows] = of_rows(rows).to(whole)
        return whole

    def prepare(self, points: TestPoints) -> ClosedFormQuery:
        """Precondition the test points."""
        phi = scaled_features(points.features.to(self.scale.device), self.scale, self.scale.dtype)
        gradients = points.gradients.to(phi)
        terms = self.curvature.solve(phi, gradients)
        return ClosedFormQuery(on_raw_features(terms, self.scale, self.moments.weight), phi, gradients)

    def scores(self, prepared: ClosedFormQuery, columns: slice) -> Tensor:
        """Scores `(n_test, n_columns)` against a slice of the training set."""
        scores = self._dense_scores(prepared.terms, columns)
        return soft_threshold(scores, self.threshold) if self.threshold else scores

    def _dense_scores(self, terms: Sequence[Term], columns: slice) -> Tensor:
        like, features = terms[0][0], self.features[columns]
        in_place = features.dtype == like.dtype and features.device == like.device
        if in_place and self._residuals.kept is not None:
            return score_block(terms, features, self._residuals.kept[columns])
        scores = like.new_empty(len(like), len(features), dtype=working_dtype(features))
        for block in blocks(len(features), self.block_rows):
            rows = slice(columns.start + block.start, columns.start + block.stop)
            scores[:, block] = score_block(terms, self._data.features_of(rows), self._residuals.of(rows))
        return scores

    def train_norms(self) -> Tensor:
        """`sqrt(<phi_i (x) r_i, (F + lambda)^-1 (phi_i (x) r_i)> / N)` times 1/sqrt(s), `(n_train,)`."""
        return self._train_norms

    @cached_property
    def _train_norms(self) -> Tensor:
        norms = []
        for rows in self._forms.blocks:
            sizes, units = sizes_and_units(self._residuals.of(rows))
            norms.append(norms_of(self._forms.of(rows, units, units), sizes))
        return torch.cat(norms).to(working_dtype(self.features))

    def test_norms(self, prepared: ClosedFormQuery) -> Tensor:
        """The same norm of the test points, times sqrt(s), `(n_test,)`."""
        sizes, units = sizes_and_units(prepared.gradients)
        forms = forms_of(self.curvature.solve(prepared.phi, units), prepared.phi, units)
        norms = norms_of(forms / self.moments.weight, sizes)
        return norms.to(working_dtype(self.features))

    def query_vectors(self, prepared: ClosedFormQuery) -> Tensor | None:
        """`sum_t U_t (x) V_t`, `(n_test, (n_features + 1) n_classes)`; none with a threshold."""
        if self.threshold:
            return None
        return torch.stack([outer(u, v.to(u)) for u, v in prepared.terms]).sum(0)

    def train_vectors(self, rows: Tensor) -> Tensor | None:
        """`[h_i, 1] (x) r_i` of training examples, likewise."""
        if self.threshold:
            return None
        blocks_of_rows = ((block, rows[(rows >= block.start) & (rows < block.stop)]) for block in self._data)
        parts = [
            self._residuals.of(block)[(few - block.start).to(self.labels.device)]
            for block, few in blocks_of_rows
            if len(few)
        ]
        residuals = torch.cat([self._residuals.of(slice(0, 0)), *parts])
        h = matching(self.features[rows.to(self.features.device)], residuals).to(self.dtype)
        return outer(torch.nn.functional.pad(h, (0, 1), value=1.0), residuals.to(h))

    def self_influence(self) -> Tensor:
        """`<phi_i (x) (e_y - p), (F + lambda)^-1 (phi_i (x) r_i)> / N`, `(n_train,)`."""
        parts = []
        for rows in self._forms.blocks:
            sizes, units = sizes_and_units(self._residuals.of_loss(rows))
            left = units.to(self.scale)
            parts.append(sizes * matching(self._forms.of(rows, left, self._residuals.of(rows)), sizes))
        return in_range(torch.cat(parts), self.scale.device, working_dtype(self.features))

    def self_influence_of(self, points: TestPoints) -> Tensor:
        """Self-influence of examples outside the training set, `(n,)`.

        The ridge head has not seen them, so nothing is left out.
        """
        phi, own, right = self.sides_of_others(points)
        sizes, units = sizes_and_units(own)
        forms = forms_of(self.curvature.solve(phi, right), phi, units.to(phi))
        values = sizes * matching(forms, sizes) / self.moments.weight
        return in_range(values, self.scale.device, working_dtype(self.features))

    def sides_of_others(self, points: TestPoints) -> tuple[Tensor, Tensor, Tensor]:
        """Of other examples: phi, `e_y - p`, and the residuals that they would have in units of s.

        The last ones times what the loss weighs their labels with, as those of training examples are.
        """
        phi = scaled_features(points.features.to(self.scale.device), self.scale, self.scale.dtype)
        loss, predictions, device = self.loss, None, float64_device(self.device)
        if self.kind in OF_A_HEAD:
            predictions = loss.possible(self.ridge_head.predict(points.features))
        z, y = points.logits.to(device).to(torch.float64), points.asked.to(device)
        of_loss = loss.residuals, loss.encoded, loss.of_ridge_head
        options = self.kind, z, y, predictions, self.temperature, self.ridge_ratio
        residuals, _ = choose_residuals(*options, *of_loss)
        right = loss.weighed(residuals, y) / self.curvature.scale
        return phi, loss.residuals(z, y), right.to(phi)

    def mislabel_scores(self) -> Tensor:
        """Norm of the leave-one-out residual of the ridge head: how far a label is from its prediction."""
        return self.ridge_head.norms

    def mislabel_scores_of_outputs(self) -> Tensor:
        """Absolute leave-one-out residual of each output, `(n_train, n_classes)`."""
        head = self.ridge_head
        width = len(head.weights) - 1
        parts = [head.left_out(self.features[rows, :width], self.labels[rows], rows) for rows in self._data]
        return torch.cat(parts).abs().to(self.scale.device, working_dtype(self.features))

    def without_features(self) -> ClosedFormOperators:
        """A copy without features and logits."""
        return replace(self, features=self.features[:0].clone(), logits=self.logits[:0].clone())

    def with_features(self, features: Tensor, logits: Tensor) -> ClosedFormOperators:
        """A copy with features and logits."""
        return replace(self, features=features, logits=logits)

    def with_examples(self, new: Precomputed) -> Changed:
        """Append examples (`incremental.with_examples`)."""
        return with_examples(self, new)

    def without_examples(self, keep: Tensor) -> Changed:
        """Keep some examples (`incremental.without_examples`)."""
        return without_examples(self, keep)

    def with_others(self, places: Tensor, new: Precomputed) -> Changed:
        """Replace some examples (`incremental.with_others`)."""
        return with_others(self, places, new)

    def keep_residuals(self) -> None:
        """Compute residuals now if they fit the budget, so that the first query is not slower."""
        _ = self._residuals.kept

    @property
    def _data(self) -> TrainingBlocks:
        return TrainingBlocks(
            self.features, self.logits, self.labels, self.scale.dtype, self.block_rows, self.weights
        )

    @cached_property
    def ridge_head(self) -> RidgeHead:
        """`head`, fitted now if it is None."""
        if self.head is not None:
            return self.head
        read = readable_widths(self.widths)
        d = sum(read)
        precision = head_dtype(self.head_damping, self.n_train, d, self.dtype)
        of_head = self.features[:, :d], self.labels, self.moments.of_layers(read), self.head_damping
        return fit_head(*of_head, self.positions, self.block_rows, precision, self.loss, self.weights)

    @cached_property
    def _residuals(self) -> TrainingResiduals:
        """Residuals of the training set, divided by s."""
        return TrainingResiduals(
            self._data,
            self.ridge_head if self.kind in OF_A_HEAD else None,
            self.kind,
            self.temperature,
            self.ridge_ratio,
            self.curvature.scale,
            self.residual_bytes,
            self.loss,
        )

    @cached_property
    def _forms(self) -> TrainingForms:
        return TrainingForms(self._data, self.curvature, self.scale, self.moments.weight)
