"""Closed form of STRIDE: approximations of the damped Fisher, and scores as products of activations.

The gradient of the fidelity loss (1) at a = 0 is `-(1/|S|) sum_{i in S} phi_i (e_{y_i} - p_i)^T`, and
the Hessian of the stability loss (2) there is the Fisher `F = E[phi phi^T (x) (diag p - p p^T)]`. The
first-order response of an operator to the weight 1/N of one example is therefore

    a_i = 1/N (F + lambda I)^-1 (phi_i (x) r_i),        r_i = e_{y_i} - p_i  (see `residuals`)

additive over the members of a subset, so that singleton subsets lose nothing. With the gradient g of
the response with respect to the logits, the score of training example i for a test point is
`<phi (x) g, a_i>`: the predicted change of the response when i is among the training examples.

phi holds the features of every layer, each scaled to unit mean square norm, and a constant 1. The
features are stored as they come; the scaling acts on the small side of every product.

A curvature solves for F / s, where s is the mean of the C - 1 eigenvalues of `E[diag p - p p^T]`. For a
confident model s can be 1e-30. It cancels from the scores because residuals r_i are divided by s too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..system.devices import as_float64
from ..system.memory import blocks
from ..system.saved_values import saved_as
from ..system.to_device import TrainingBlocks

#: `(U, V)` with U `(n, n_features + 1)` and V `(n, n_classes)`: one Kronecker term of (F + lambda)^-1.
Term = tuple[Tensor, Tensor]
#: Scores that the class side multiplies at a time: small enough for the last level of cache.
_CACHED_SCORES = 2**21
#: Test points up to which the product is taken the other way round.
_FEW_POINTS = 8


@saved_as("centered-map")
@dataclass
class CenteredMap:
    """A product of features with a matrix, taken from their mean: `(phi - m) M + m M`.

    The mean dominates phi, and an inverse of A shrinks it by more digits than float32 has. Subtracting the
    mean first keeps the digits of the rest; `m M` is computed in float64.

    Attributes:
        matrix: M, `(n_features + 1, n)`.
        center: m = E[phi], `(n_features + 1,)`.
        image: `m M`, `(n,)`.
    """

    matrix: Tensor
    center: Tensor
    image: Tensor

    def __call__(self, phi: Tensor) -> Tensor:
        """`phi M`, `(n_rows, n)`."""
        return torch.addmm(self.image, phi - self.center, self.matrix)

    def forms(self, data: TrainingBlocks, scale: Tensor) -> Tensor:
        """`phi_i^T M phi_i` of each training example, for a symmetric M, `(n_train,)`.

        Args:
            data: The training set.
            scale: Factor of each feature, 1 for the constant, `(n_features + 1,)`.
        """
        d = len(scale) - 1
        middle = (self.center / scale)[:d]
        quadratic = (self.matrix * scale[:, None] * scale)[:d, :d]
        linear, constant = 2 * (self.image * scale)[:d], as_float64(self.image) @ as_float64(self.center)
        forms = scale.new_empty(len(data.labels))
        for rows in data:
            h = data.features_of(rows) - middle
            forms[rows] = torch.einsum("nd,nd->n", torch.addmm(linear, h, quadratic), h) + constant.to(forms)
        return forms


class Curvature:
    """Base class: an invertible approximation of F + lambda I.

    Attributes:
        scale: s.
    """

    scale: float

    def solve(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """`s (F + lambda I)^-1 (phi (x) v)` as Kronecker terms.

        Args:
            phi: Scaled features with the constant, `(n, n_features + 1)`.
            vectors: Class sides v, `(n, n_classes)`.

        Returns:
            Terms `(U, V)`; the inner product with `phi_i (x) r_i` is `sum (U phi_i) (V r_i)`.
        """
        raise NotImplementedError

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """`(F + lambda I)^-1 (phi (x) v)`, likewise."""
        return self.solve(phi, vectors / self.scale)


@saved_as("curvature.identity")
@dataclass
class IdentityCurvature(Curvature):
    """A (x) s I.

    Attributes:
        scale: s.
        inverse: `(A + damping mean(diag A) I)^-1`.
    """

    scale: float
    inverse: CenteredMap

    def class_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The class side of the quadratic form of each row, times s, `(n,)`."""
        return (left * right).sum(1)

    def solve(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term: `phi (A + lambda)^-1` and v."""
        return [(self.inverse(phi), vectors)]


@saved_as("curvature.kronecker")
@dataclass
class KroneckerCurvature(Curvature):
    """A (x) Sigma with Sigma = E[diag p - p p^T]; each factor is damped relative to its mean diagonal.

    Sigma's mean is over the C - 1 dimensions that it can have. Beyond 4,096 classes only its diagonal is
    kept: the off-diagonal `E[p_a p_b]` is about 1/C of it if probabilities are spread out.

    Attributes:
        scale: s.
        inverse: Damped inverse of A.
        class_side: s times the damped inverse of Sigma, `(n_classes, n_classes)`, or its diagonal
            `(n_classes,)`.
    """

    scale: float
    inverse: CenteredMap
    class_side: Tensor

    def class_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The class side of the quadratic form of each row, times s, `(n,)`."""
        return (self._with_classes(left) * right).sum(1)

    def solve(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term: both sides multiplied by their inverse."""
        return [(self.inverse(phi), self._with_classes(vectors))]

    def _with_classes(self, vectors: Tensor) -> Tensor:
        return vectors * self.class_side if self.class_side.ndim == 1 else vectors @ self.class_side


@saved_as("curvature.eigenvalue-corrected")
@dataclass
class EigenvalueCorrectedCurvature(Curvature):
    """The eigenbasis of A (x) Sigma with the exact diagonal of F in it (George et al., 2018).

    Attributes:
        scale: s.
        basis: Eigenvectors of A, `(n_features + 1, n_features + 1)`.
        class_basis: Eigenvectors of Sigma, `(n_classes, n_classes)`.
        inverse_diagonal: `s / (F_ab + lambda)`, `(n_features + 1, n_classes)`.
    """

    scale: float
    basis: Tensor
    class_basis: Tensor
    inverse_diagonal: Tensor

    def solve(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term per eigenvector of Sigma."""
        rotated, v = phi @ self.basis, vectors @ self.class_basis
        return [
            ((rotated * self.inverse_diagonal[:, b]) @ self.basis.T, v[:, b : b + 1] * self.class_basis[:, b])
            for b in range(v.shape[1])
        ]


def score_block(terms: Sequence[Term], features: Tensor, residuals: Tensor) -> Tensor:
    """`sum_t (U_t h^T) * (V_t r^T)` for one block of training examples.

    Args:
        terms: Preconditioned test points that act on raw features (`on_raw_features`).
        features: Raw features h of the block, `(n_block, n_features)`.
        residuals: `(n_block, n_classes)`.

    Returns:
        `(n_test, n_block)`.
    """
    total: Tensor | None = None
    for u, v in terms:
        block = _feature_product(u, features)
        for columns in blocks(block.shape[1], max(_CACHED_SCORES // max(len(u), 1), 256)):
            block[:, columns] *= v @ residuals[columns].T
        total = block if total is None else total.add_(block)
    assert total is not None, "a curvature gives at least one term"
    return total


def _feature_product(u: Tensor, features: Tensor) -> Tensor:
    """`U [h, 1]^T`, `(n_test, n_block)`."""
    n = len(u)
    if n > _FEW_POINTS or n == 0:
        return torch.addmm(u[:, -1:], u[:, :-1], features.T)
    # A matrix-vector product uses one thread, and few rows are slow; the transposed product uses all threads.
    few = u if n > 1 else u.expand(2, -1)
    columns = few[:, :-1].contiguous().T
    return (features @ columns)[:, :n].T.contiguous().add_(u[:, -1:])


def on_raw_features(terms: Sequence[Term], scale: Tensor, weight: float) -> list[Term]:
    """Fold the scaling of the features and the factor 1/W into the test side."""
    return [(u * scale.to(u), v / weight) for u, v in terms]


def forms_of(terms: Sequence[Term], phi: Tensor, left: Tensor) -> Tensor:
    """The inner product of each row's terms with its `phi (x) left`, `(n,)`."""
    return torch.stack([(u * phi).sum(1) * (v * left).sum(1) for u, v in terms]).sum(0)


@dataclass(frozen=True)
class ClosedFormQuery:
    """Preconditioned test points.

    Attributes:
        terms: Kronecker terms that act on raw training features.
        phi: Scaled features with the constant, `(n_test, n_features + 1)`.
        gradients: Of the response, `(n_test, n_classes)`.
    """

    terms: list[Term]
    phi: Tensor
    gradients: Tensor
