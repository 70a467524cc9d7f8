"""What the closed form keeps of a training set, and how scores come from it.

Features and logits stay where they are; beside them, only vectors have an entry for every example. Residuals,
`(n_train, n_classes)`, are computed from these block by block whenever they are needed, and kept only if they
fit the memory budget. Scores are the same bits either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import bad_value
from ..losses import CrossEntropy, Loss
from ..operators import Changed, FittedOperators, TestPoints
from ..positions import Positions
from ..recovery import soft_threshold
from ..residuals import choose_residuals
from ..system.devices import matching
from ..system.memory import DEFAULT_BUDGET, MOST_ROWS, blocks, rows_that_fit
from ..system.processes import SINGLE_PROCESS, SingleProcess
from ..system.saved_values import saved_as
from ..system.to_device import TrainingBlocks, working_dtype
from .class_moments import MOST_CLASSES, class_moments
from .curvature import (
    Curvature,
    IdentityCurvature,
    KroneckerCurvature,
    Term,
    forms_of,
    on_raw_features,
    score_block,
)
from .curvature_fit import fit_curvature
from .damping import LEAST_OF_HEAD, check_damping, needs_float64
from .incremental import with_examples, with_others, without_examples
from .moments import Moments, feature_moments, scaled_features
from .position_head import fit_position_head
from .ridge_head import RidgeHead, fit_ridge_head
from .training_residuals import TrainingResiduals

if TYPE_CHECKING:
    from .options import ClosedForm

#: Rows that are taken at a time by curvatures with many Kronecker terms.
_FEW_ROWS = 256
#: Logits of a block: arrays twice as large are slower, because the system clears them at every use.
_LOGITS = 2**21
#: Norm of residuals, in the unit of the curvature, up to which scores stay within float32.
_LARGEST_RESIDUAL = 1e30


@saved_as("closed-form")
@dataclass
class ClosedFormOperators(FittedOperators):
    """Closed-form operators of all singleton subsets.

    Attributes:
        features: Raw features h of the training set, `(n_train, n_features)`, as they were stored.
        logits: z, `(n_train, n_classes)`, likewise.
        labels: y as the loss has them, `(n_train,)` int64 or `(n_train, n_classes)`; products are taken
            where they are.
        widths: Widths of the layers, in the order of the columns.
        moments: Sums that change when examples come or go.
        scale: Factor of each feature, 1 for the constant, `(n_features + 1,)` in the dtype of products.
        head: Ridge head on all layers but the last.
        ridge_ratio: Factor of the ridge part of the residuals "both": a number, or one an output.
        curvature: Approximation of F + lambda I.
        kind: The option `residuals`.
        temperature: T.
        threshold: The option of that name.
        block_rows: Training examples that are read at a time, where that needs memory.
        residual_bytes: Residuals are kept where they take no more.
        loss: What the model was trained with.
        weights: omega of each example, `(n_train,)` float64; None for 1.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]
    moments: Moments
    scale: Tensor
    head: RidgeHead
    ridge_ratio: float | Tensor
    curvature: Curvature
    kind: str
    temperature: float
    threshold: float = 0.0
    block_rows: int = MOST_ROWS
    residual_bytes: int = 0
    loss: Loss = field(default_factory=CrossEntropy)
    weights: Tensor | None = None

    @property
    def n_train(self) -> int:
        """N, all training examples: more than there are features where processes share them."""
        return self.moments.n_train

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        """C."""
        return self.logits.shape[1]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where products are taken."""
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of products."""
        return self.scale.dtype

    @property
    def residuals(self) -> Tensor:
        """r_i of the whole training set, `(n_train, n_classes)`; made anew at every call."""
        return self._whole(lambda rows: self.curvature.scale * self._residuals.of(rows))

    @property
    def loss_residuals(self) -> Tensor:
        """e_y - p at temperature 1, `(n_train, n_classes)`; made anew at every call."""
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
        for rows in self._form_blocks:
            sizes, units = _sizes_and_units(self._residuals.of(rows))
            norms.append(norms_of(self._forms(rows, units, units), sizes))
        return torch.cat(norms).to(working_dtype(self.features))

    def test_norms(self, prepared: ClosedFormQuery) -> Tensor:
        """The same norm of the test points, times sqrt(s) instead, `(n_test,)`."""
        sizes, units = _sizes_and_units(prepared.gradients)
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
        residuals = torch.cat(parts)
        h = matching(self.features[rows.to(self.features.device)], residuals).to(self.dtype)
        return outer(torch.nn.functional.pad(h, (0, 1), value=1.0), residuals.to(h))

    def self_influence(self) -> Tensor:
        """`<phi_i (x) (e_y - p), (F + lambda)^-1 (phi_i (x) r_i)> / N`, `(n_train,)`."""
        parts = []
        for rows in self._form_blocks:
            sizes, units = _sizes_and_units(self._residuals.of_loss(rows))
            left = units.to(self.scale)
            parts.append(sizes * matching(self._forms(rows, left, self._residuals.of(rows)), sizes))
        return self.in_range(torch.cat(parts))

    def self_influence_of(self, points: TestPoints) -> Tensor:
        """The self-influence that other examples would have, `(n,)`.

        The ridge part of their residuals is out of sample as it is: nothing is left out.
        """
        phi, own, right = self.sides_of_others(points)
        sizes, units = _sizes_and_units(own)
        forms = forms_of(self.curvature.solve(phi, right), phi, units.to(phi))
        return self.in_range(sizes * matching(forms, sizes) / self.moments.weight)

    def sides_of_others(self, points: TestPoints) -> tuple[Tensor, Tensor, Tensor]:
        """Of other examples: phi, `e_y - p`, and the residuals that they would have in units of s."""
        phi = scaled_features(points.features.to(self.scale.device), self.scale, self.scale.dtype)
        loss, predictions = self.loss, self.loss.possible(self.head.predict(points.features))
        z, y = matching(points.logits, predictions), points.asked.to(predictions.device)
        residuals, _ = choose_residuals(
            self.kind, z, y, predictions, self.temperature, self.ridge_ratio, loss.residuals, loss.encoded
        )
        return phi, loss.residuals(z, y), (residuals / self.curvature.scale).to(phi)

    def mislabel_scores(self) -> Tensor:
        """Norm of the leave-one-out residual of the ridge head: how far a label is from what others say."""
        return self.head.norms

    def out_of_sample_mislabel_scores(self) -> Tensor:
        """`|e_y - p|`: what a model that has not seen an example says of its label."""
        norms: Tensor = torch.linalg.vector_norm(self.loss_residuals, dim=1)
        return norms

    def mislabel_scores_of_outputs(self) -> Tensor:
        """Its entry for each output without sign, `(n_train, n_classes)`."""
        width = len(self.head.weights) - 1
        parts = [
            self.head.left_out(self.features[rows, :width], self.labels[rows], rows) for rows in self._data
        ]
        return torch.cat(parts).abs().to(self.scale.device, working_dtype(self.features))

    def without_features(self) -> ClosedFormOperators:
        """A copy without features and logits."""
        return replace(self, features=self.features[:0].clone(), logits=self.logits[:0].clone())

    def with_features(self, features: Tensor, logits: Tensor) -> ClosedFormOperators:
        """A copy with features and logits."""
        return replace(self, features=features, logits=logits)

    def with_examples(
        self, features: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> Changed:
        """The training set with examples behind it (`incremental.with_examples`)."""
        return with_examples(self, features, logits, labels, weights)

    def without_examples(self, keep: Tensor) -> Changed:
        """Some examples of the training set (`incremental.without_examples`)."""
        return without_examples(self, keep)

    def with_others(
        self,
        rows: Tensor,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
    ) -> Changed:
        """The training set with others in some places (`incremental.with_others`)."""
        return with_others(self, rows, features, logits, labels, weights)

    def keep_residuals(self) -> None:
        """Compute residuals that fit the budget now, so that the first query is as fast as the second."""
        _ = self._residuals.kept

    @property
    def _data(self) -> TrainingBlocks:
        return TrainingBlocks(
            self.features, self.logits, self.labels, self.scale.dtype, self.block_rows, self.weights
        )

    @cached_property
    def _residuals(self) -> TrainingResiduals:
        """Of the training set, in units of s."""
        return TrainingResiduals(
            self._data,
            self.head,
            self.kind,
            self.temperature,
            self.ridge_ratio,
            self.curvature.scale,
            self.residual_bytes,
            self.loss,
        )

    @property
    def _simple(self) -> bool:
        """Whether a quadratic form is a product of one form of features and one of classes."""
        return isinstance(self.curvature, IdentityCurvature | KroneckerCurvature)

    @property
    def _form_blocks(self) -> TrainingBlocks:
        few = self.block_rows if self._simple else min(self.block_rows, _FEW_ROWS)
        return replace(self._data, block_rows=few)

    @cached_property
    def _leverage_forms(self) -> Tensor:
        assert isinstance(self.curvature, IdentityCurvature | KroneckerCurvature)
        return self.curvature.inverse.forms(self._data, self.scale)

    def _forms(self, rows: slice, left: Tensor, right: Tensor) -> Tensor:
        """`<phi_i (x) left_i, (F + lambda)^-1 (phi_i (x) right_i)> / N` in units of 1/s, `(n_rows,)`."""
        if isinstance(self.curvature, IdentityCurvature | KroneckerCurvature):
            return (
                self._leverage_forms[rows] * self.curvature.class_product(left, right) / self.moments.weight
            )
        phi = scaled_features(self._data.features_of(rows), self.scale)
        return forms_of(self.curvature.solve(phi, right), phi, left) / self.moments.weight

    def in_range(self, values: Tensor) -> Tensor:
        """Results from float64 in the working dtype, unless all of them would become 0."""
        rounded = values.to(self.scale.device, working_dtype(self.features))
        largest, least = float(values.abs().max()), torch.finfo(rounded.dtype).tiny
        if 0 < largest < least:
            raise bad_value(
                "model",
                f"have losses of which float32 can hold the products (above {least:.0e})",
                f"{largest:.0e} at most",
                "Give the model and its data in float64.",
            )
        return rounded


@dataclass(frozen=True)
class ClosedFormQuery:
    """Test points as the closed form scores them.

    Attributes:
        terms: Preconditioned; they act on raw training features.
        phi: Scaled features with the constant, `(n_test, n_features + 1)`.
        gradients: Of the response, `(n_test, n_classes)`.
    """

    terms: list[Term]
    phi: Tensor
    gradients: Tensor


def outer(left: Tensor, right: Tensor) -> Tensor:
    """The outer product of each pair of rows, flat, `(n, n_left n_right)`."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _sizes_and_units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row, and the rows divided by it: tiny residuals have no tiny squares."""
    sizes = vectors.abs().amax(1)
    return sizes, vectors / torch.where(sizes > 0, sizes, 1.0)[:, None]


def norms_of(forms: Tensor, sizes: Tensor) -> Tensor:
    """Norms of rows from the forms of their units; 0 where the inverse would overflow."""
    norms = forms.clamp_min(0).sqrt() * sizes
    return torch.where(norms >= torch.finfo(norms.dtype).tiny, norms, 0.0)


def fit_closed_form(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    options: ClosedForm,
    temperature: float,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    ranks: SingleProcess = SINGLE_PROCESS,
    moments: Moments | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
    positions: Positions | None = None,
) -> ClosedFormOperators:
    """Fit the closed form: two products of n_train x n_features x n_features, or less.

    Args:
        features: Raw features `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`, likewise.
        labels: `(n_train,)` int64, or as `loss` has them, on the device where products are taken; blocks of
            features go there.
        widths: Widths of the layers, in the order of the columns.
        options: As the user has given them; its temperature is not read.
        temperature: T of the tempered residuals; also of p in the curvature, unless the residuals are
            those of training.
        memory_budget: Bytes of one block; residuals are kept if they fit it.
        ranks: Who else has a share of the training set.
        moments: Of the features, where they are known: one of the two products is saved.
        loss: What the model was trained with; None for cross-entropy.
        weights: omega, `(n_train,)` float64, beside the labels; None for 1.
        positions: Where all arrays have one row for each position: which rows are those of an example, which
            the ridge head leaves out together.

    Raises:
        ValueError: A damping too small for the precision of the features, logits without uncertainty, or
            tempered residuals of a loss without a temperature.
    """
    loss = CrossEntropy() if loss is None else loss
    if options.residuals == "temperature" and not loss.tempered:
        must = f"be 'training', 'leave-one-out' or 'both' for loss={loss.name!r}, which has no temperature"
        raise bad_value("residuals", must, repr(options.residuals))
    for name in ("damping", "head_damping"):
        check_damping(getattr(options, name), features, name)
    n = int(ranks.sums("number of examples", len(labels))[0])
    # The last layer has memorised the training labels: what it says of them is not out of sample.
    d = sum(widths[:-1]) if len(widths) > 1 else features.shape[1]
    exact = needs_float64(options.damping, n, features.shape[1])
    exact_head = exact or needs_float64(options.head_damping, n, d, LEAST_OF_HEAD)
    data = _blocks(features, logits, labels, memory_budget, exact, weights)
    if moments is None:
        dtype = torch.float64 if exact_head else None
        moments = feature_moments(
            features, labels, logits.shape[1], widths, data.block_rows, ranks, dtype, loss, weights
        )
    if not moments.in_float32:
        exact = exact_head = True
        data = _blocks(features, logits, labels, memory_budget, exact, weights)
    of_head = features[:, :d], labels, moments.first(d), options.head_damping
    if positions is None:
        precision = torch.float64 if exact_head else data.dtype
        head = fit_ridge_head(*of_head, data.block_rows, precision, loss, weights)
    else:
        head = fit_position_head(*of_head, positions, loss, weights)
    kind = options.residuals or "both"
    softening = 1.0 if kind == "training" else temperature
    diagonal_only = options.curvature == "identity" or (
        options.curvature == "kronecker" and logits.shape[1] > MOST_CLASSES
    )
    classes = class_moments(data, softening, diagonal_only, ranks, loss)
    ridge = ranks.all_reduce(
        torch.as_tensor(head.square, dtype=torch.float64), "norms of the ridge residuals"
    )
    largest = (
        ridge if kind == "leave-one-out" else torch.as_tensor(classes.residual_square, dtype=torch.float64)
    )
    _check_unit(float(largest.sum()), classes.unit, features)
    form = ClosedFormOperators(
        features=features,
        logits=logits,
        labels=labels,
        widths=list(widths),
        moments=moments,
        scale=moments.scale.to(labels.device, data.dtype),
        head=head,
        ridge_ratio=loss.ridge_ratio(classes.residual_square, ridge),
        curvature=fit_curvature(
            options.curvature, data, softening, moments, classes, options.damping, ranks, loss
        ),
        kind=kind,
        temperature=temperature,
        threshold=options.threshold,
        block_rows=data.block_rows,
        residual_bytes=memory_budget,
        loss=loss,
        weights=weights,
    )
    form.keep_residuals()
    return form


def _blocks(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    memory_budget: int,
    exact: bool,
    weights: Tensor | None,
) -> TrainingBlocks:
    dtype = torch.float64 if exact else working_dtype(features)
    rows = block_rows(memory_budget, features.shape[1], logits.shape[1], dtype)
    return TrainingBlocks(features, logits, labels, dtype, rows, weights)


def _check_unit(square: float, unit: float, features: Tensor) -> None:
    """Refuse residuals so large beside the model's uncertainty that float32 cannot hold their scores."""
    if working_dtype(features) == torch.float32 and math.sqrt(square) > _LARGEST_RESIDUAL * unit:
        raise bad_value(
            "temperature",
            "leave the model some uncertainty beside its errors, for scores that float32 can hold",
            f"a mean variance of {unit:.0e} of a class",
            "Raise it, or give the model and its data in float64.",
        )


def block_rows(memory_budget: int, n_features: int, n_classes: int, dtype: torch.dtype) -> int:
    """Training examples whose temporary arrays fit the budget: 3 of features, 6 of classes in float64."""
    bytes_per_row = 3 * dtype.itemsize * (n_features + 1) + 6 * 8 * n_classes
    most = min(MOST_ROWS, max(_LOGITS // n_classes, _FEW_ROWS))
    return rows_that_fit(memory_budget, bytes_per_row, most)
