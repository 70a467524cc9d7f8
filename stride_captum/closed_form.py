"""Owns what the closed form keeps of a training set, and how scores come from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .config import STRIDEConfig
from .memory_budget import MOST_ROWS, blocks, parse_bytes, rows_that_fit
from .newton import (
    Curvature,
    IdentityCurvature,
    KroneckerCurvature,
    Moments,
    RidgeHead,
    Term,
    damped_inverse,
    feature_moments,
    fit_curvature,
    fit_ridge_head,
    leverage_forms,
    on_raw_features,
    quadratic_forms,
    scaled_features,
    score_block,
    working_dtype,
)
from .process_group import ALONE, Alone
from .residuals import choose_residuals, project_on_simplex, tempered_residuals, training_residuals
from .staging import staged


@dataclass
class ClosedForm:
    """Closed-form operators of all singleton subsets.

    Attributes:
        features: Raw features h of the training set, `(n_train, n_features)`, as they were stored.
        residuals: r_i, `(n_train, n_classes)`.
        logits: z, `(n_train, n_classes)`.
        labels: y, `(n_train,)` int64.
        widths: Widths of the layers, in the order of the columns.
        moments: What `update` changes when examples come or go.
        scale: Factor of each feature, 1 for the constant, `(n_features + 1,)`.
        head: Ridge head on all layers but the last.
        ridge_ratio: Factor of the ridge part of the residuals "both".
        curvature: Approximation of F + lambda I.
        kind: The option `residuals`.
        temperature: T.
        block_rows: Training examples that are read at a time, where that needs memory.
    """

    features: Tensor
    residuals: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]
    moments: Moments
    scale: Tensor
    head: RidgeHead
    ridge_ratio: Tensor
    curvature: Curvature
    kind: str
    temperature: float
    block_rows: int = MOST_ROWS

    @property
    def n_train(self) -> int:
        """N, all training examples: more than there are features where processes share them."""
        return self.moments.n_train

    @property
    def loss_residuals(self) -> Tensor:
        """e_y - p at temperature 1, `(n_train, n_classes)`."""
        return _by_blocks(
            self.logits, self.residuals, self.block_rows, lambda z, b: tempered_residuals(z, self.labels[b])
        )

    def prepare(self, features: Tensor, gradients: Tensor) -> tuple[list[Term], Tensor, Tensor]:
        """What the scores of test points need.

        Args:
            features: Raw features of the test points, `(n_test, n_features)`.
            gradients: Of the response with respect to the logits, `(n_test, n_classes)`.

        Returns:
            The preconditioned terms, acting on raw training features, and both sides as they came.
        """
        phi = scaled_features(features.to(self.scale), self.scale)
        gradients = gradients.to(phi)
        terms = self.curvature.precondition(phi, gradients)
        return on_raw_features(terms, self.scale, self.n_train), phi, gradients

    def scores(self, terms: Sequence[Term], columns: slice) -> Tensor:
        """Scores `(n_test, n_columns)` against a slice of the training set."""
        features, residuals, like = self.features[columns], self.residuals[columns], terms[0][0]
        if features.dtype == like.dtype and features.device == like.device:
            return score_block(terms, features, residuals)
        scores = like.new_empty(len(like), len(features))
        for rows in blocks(len(features), self.block_rows):
            scores[:, rows] = score_block(
                terms, staged(features[rows], like.device, like.dtype), residuals[rows]
            )
        return scores

    def train_norms(self) -> Tensor:
        """`sqrt(<phi_i (x) r_i, (F + lambda)^-1 (phi_i (x) r_i)> / N)`, `(n_train,)`."""
        return self._train_norms

    @cached_property
    def _train_norms(self) -> Tensor:
        sizes, units = _sizes_and_units(self.residuals)
        return _norms(self._forms(units, units), sizes)

    def test_norms(self, phi: Tensor, gradients: Tensor) -> Tensor:
        """The same norm of the test points, `(n_test,)`."""
        sizes, units = _sizes_and_units(gradients)
        return _norms(quadratic_forms(self.curvature, phi, units, units) / self.n_train, sizes)

    def self_influence(self) -> Tensor:
        """`<phi_i (x) (e_y - p), (F + lambda)^-1 (phi_i (x) r_i)> / N`, `(n_train,)`."""
        return self._forms(self.loss_residuals, self.residuals)

    def self_influence_of(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The self-influence that other examples would have, `(n,)`.

        The ridge part of their residuals is out of sample as it is: nothing is left out.
        """
        phi = scaled_features(features.to(self.scale), self.scale)
        predictions = project_on_simplex(self.head.predict(features))
        residuals, _ = choose_residuals(
            self.kind, logits.to(phi), labels, predictions, self.temperature, self.ridge_ratio
        )
        loss_residuals = tempered_residuals(logits.to(phi), labels)
        return quadratic_forms(self.curvature, phi, loss_residuals, residuals) / self.n_train

    @cached_property
    def _leverage_forms(self) -> Tensor:
        assert isinstance(self.curvature, IdentityCurvature | KroneckerCurvature)
        return leverage_forms(self.features, self.scale, self.curvature.inverse, self.block_rows)

    def suspicion(self) -> Tensor:
        """Norm of the leave-one-out residual of the ridge head, `(n_train,)`."""
        norms: Tensor = torch.linalg.vector_norm(self.head.left_out, dim=1)
        return norms

    def _forms(self, left: Tensor, right: Tensor) -> Tensor:
        if isinstance(self.curvature, IdentityCurvature | KroneckerCurvature):
            product, every = self.curvature.class_product, blocks(len(self.residuals), self.block_rows)
            products = torch.cat([product(left[rows], right[rows]) for rows in every])
            return self._leverage_forms * products / self.n_train
        parts = []
        for rows in blocks(len(self.residuals), 256):
            phi = scaled_features(self.features[rows], self.scale)
            parts.append(quadratic_forms(self.curvature, phi, left[rows], right[rows]))
        return torch.cat(parts) / self.n_train


def _sizes_and_units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row, and the rows divided by it: tiny residuals have no tiny squares."""
    sizes = vectors.abs().amax(1)
    return sizes, vectors / torch.where(sizes > 0, sizes, 1.0)[:, None]


def _norms(forms: Tensor, sizes: Tensor) -> Tensor:
    """Norms of rows from the forms of their units; 0 where the inverse would overflow."""
    norms = forms.clamp_min(0).sqrt() * sizes
    return torch.where(norms >= torch.finfo(norms.dtype).tiny, norms, 0.0)


def fit_closed_form(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    config: STRIDEConfig,
    temperature: float,
    ranks: Alone = ALONE,
    moments: Moments | None = None,
) -> ClosedForm:
    """Fit the closed form: two products of n_train x n_features x n_features, or less.

    Args:
        features: Raw features `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`, likewise.
        labels: `(n_train,)` int64, on the device where products are taken; blocks of features go there.
        widths: Widths of the layers, in the order of the columns.
        config: `residuals`, `damping`, `head_damping`, `curvature`, `memory_budget`.
        temperature: T of the tempered residuals; also of p in the curvature, unless the residuals are
            those of training.
        ranks: Who else has a share of the training set.
        moments: Of the features, where they are known: one of the two products is saved.
    """
    dtype, n_classes = working_dtype(features), logits.shape[1]
    rows = block_rows(config, features.shape[1], n_classes, dtype, labels.device)
    if moments is None:
        moments = feature_moments(features, labels, n_classes, widths, rows, ranks)
    # The last layer has memorised the training labels: what it says of them is not out of sample.
    d = sum(widths[:-1]) if len(widths) > 1 else features.shape[1]
    head = fit_ridge_head(features[:, :d], labels, moments.first(d), config.head_damping, rows)
    residuals, ratio = training_residuals(
        config.residuals, logits, labels, head.left_out, temperature, rows, ranks
    )
    softening = 1.0 if config.residuals == "training" else temperature
    curvature = fit_curvature(
        config.curvature,
        features,
        _by_blocks(logits, residuals, rows, lambda z, _: (z / softening).softmax(-1)),
        moments,
        config.damping,
        damped_inverse(moments.second_moment, config.damping),
        rows,
        ranks,
    )
    return ClosedForm(
        features=features,
        residuals=residuals,
        logits=logits,
        labels=labels,
        widths=list(widths),
        moments=moments,
        scale=moments.scale.to(residuals),
        head=head,
        ridge_ratio=ratio,
        curvature=curvature,
        kind=config.residuals,
        temperature=temperature,
        block_rows=rows,
    )


def block_rows(
    config: STRIDEConfig, n_features: int, n_classes: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Training examples whose temporary arrays (three of features, six of classes) fit `memory_budget`."""
    bytes_per_row = dtype.itemsize * (3 * (n_features + 1) + 6 * n_classes)
    return rows_that_fit(parse_bytes(config.memory_budget, device), bytes_per_row)


def _by_blocks(
    logits: Tensor, like: Tensor, size: int, function: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """A function of logits, row by row; `(n_train, n_classes)` in the dtype and on the device of `like`."""
    result = torch.empty_like(like)
    for rows in blocks(len(logits), size):
        result[rows] = function(staged(logits[rows], like.device, like.dtype), rows)
    return result
