"""Hessians of losses with respect to the outputs, for some rows of outputs.

Those of the softmax are free of cancellation in `1 - p` and `diag p - p p^T`. `E[diag p - p p^T]` is the
Laplacian of a graph: beside its diagonal stands `-E[p_a p_b]`, and rows sum to 0. So each entry of the
diagonal is a sum of positive numbers. A model that is sure of its training set, with probabilities 1e-100
away from 0 and 1, has a covariance as accurate as any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import add_gram_matrix


class Hessians(ABC):
    """Expected Hessians `E_y[d2 loss / dz2]` of n rows of outputs z, in float64."""

    @abstractmethod
    def residuals(self, labels: Tensor) -> Tensor:
        """Minus the gradients of the loss at the same outputs, `(n, n_outputs)`; of `residual_labels`."""

    @abstractmethod
    def undefined(self) -> Tensor:
        """Which rows have no Hessian because outputs are not finite, `(n,)` bool."""

    @abstractmethod
    def add_to(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add the terms of a sum of them over rows to `total`, from which `Loss.covariance` makes the sum.

        Args:
            total: `(n_outputs, n_outputs)`, or `(n_outputs,)` for the diagonal alone.
            weights: omega of each row, `(n,)`; None for 1.
        """

    @abstractmethod
    def forms_in(self, basis: Tensor) -> Tensor:
        """`v^T H v` of each row's Hessian H and each column v of a basis, `(n, n_columns)`."""


@dataclass
class SoftmaxHessians(Hessians):
    """`diag p - p p^T` for p = softmax of some rows, with each row's largest probability kept apart.

    Attributes:
        others: p with 0 in the place of the largest, `(n, n_classes)` float64.
        first: Where the largest is, `(n, 1)` int64.
        rest: 1 minus the largest, as the sum of the others, `(n, 1)`.
    """

    others: Tensor
    first: Tensor
    rest: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest probability of each row, `(n, 1)`."""
        return 1 - self.rest

    def whole(self) -> Tensor:
        """p, `(n, n_classes)`."""
        return self.others.scatter(1, self.first, self.largest)

    def residuals(self, labels: Tensor) -> Tensor:
        """`y - p`, `(n, n_classes)`; for a hard label, 1 - p_y is the sum of the other classes.

        Args:
            labels: y, `(n,)` int64, or probabilities `(n, n_classes)`.
        """
        if labels.ndim == 2:
            p = self.whole()
            beside = (1 - p).scatter_(1, self.first, self.rest)  # 1 - p
            return labels * beside - (1 - labels) * p
        others = self.whole().scatter_(1, labels[:, None], 0.0)
        return others.neg().scatter_(1, labels[:, None], others.sum(1, keepdim=True))

    def undefined(self) -> Tensor:
        """Rows whose largest logit is not finite, `(n,)` bool."""
        return self.rest.isnan().squeeze(1)

    def variances(self) -> Tensor:
        """`p (1 - p)`, `(n, n_classes)`."""
        small = self.others * (1 - self.others)
        return small.scatter_(1, self.first, self.largest * self.rest)

    def add_to(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add `p p^T`, or the variances (see `laplacian`)."""
        if total.ndim == 1:
            variances = self.variances()
            total += (variances if weights is None else weights[:, None] * variances).sum(0)
        else:
            p = self.whole()
            add_gram_matrix(total, p if weights is None else weights.sqrt()[:, None] * p)

    def forms_in(self, basis: Tensor) -> Tensor:
        """The variance of an entry of v drawn with probabilities p, `(n, n_columns)`.

        Differences to the entry of the likeliest class keep it free of cancellation.
        """
        from_first = basis[self.first.squeeze(1)]
        mean = self.others @ basis - from_first * self.rest
        square = self.others @ basis.square() - 2 * from_first * (self.others @ basis)
        square = square + from_first.square() * self.rest
        return square - mean.square()


def softmax_hessians(logits: Tensor, temperature: float) -> SoftmaxHessians:
    """Of p = `softmax(z / T)`, logits `(n, n_classes)` float64; NaN if the largest logit is not finite."""
    largest, first = logits.max(1, keepdim=True)
    others = ((logits - largest) / temperature).exp_().scatter_(1, first, 0.0)
    rest = others.sum(1, keepdim=True)
    others /= 1 + rest
    return SoftmaxHessians(others, first, torch.where(largest.isfinite(), rest / (1 + rest), torch.nan))


def laplacian(products: Tensor) -> Tensor:
    """`diag p - p p^T` from `p p^T`, both summed over examples: every row of the result sums to 0."""
    beside = products.fill_diagonal_(0.0)
    return beside.sum(1).diag() - beside


@dataclass
class DiagonalHessians(Hessians):
    """Hessians of losses that are a sum over outputs.

    Attributes:
        diagonals: `(n, n_outputs)`.
        residuals_of: Residuals of the same rows, given their labels.
    """

    diagonals: Tensor
    residuals_of: Callable[[Tensor], Tensor]

    def residuals(self, labels: Tensor) -> Tensor:
        """As the loss has them, `(n, n_outputs)`."""
        return self.residuals_of(labels)

    def undefined(self) -> Tensor:
        """Rows with an output that is not finite, `(n,)` bool."""
        return self.diagonals.isnan().any(1)

    def add_to(self, total: Tensor, weights: Tensor | None = None) -> None:
        """Add the diagonals."""
        assert total.ndim == 1, "nothing stands beside the diagonal"
        total += (self.diagonals if weights is None else weights[:, None] * self.diagonals).sum(0)

    def forms_in(self, basis: Tensor) -> Tensor:
        """`sum_c v_c^2 H_cc`."""
        return self.diagonals @ basis.square()
