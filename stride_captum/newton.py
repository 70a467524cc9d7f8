"""Owns the closed form of STRIDE: Fisher factors, damping, and scores as products of activations.

The gradient of the fidelity loss (1) at a = 0 is `-(1/|S|) sum_{i in S} phi_i (e_{y_i} - p_i)^T`, and
the Hessian of the stability loss (2) there is the Fisher `F = E[phi phi^T (x) (diag p - p p^T)]`. The
first-order response of an operator to the weight 1/N of one example is therefore

    a_i = 1/N (F + lambda I)^-1 (phi_i (x) r_i),        r_i = e_{y_i} - p_i  (see `residuals`)

additive over the members of a subset, so that singleton subsets lose nothing. With the gradient g of
the response with respect to the logits, the score of training example i for a test point is
`<phi (x) g, a_i>`: the predicted change of the response when i is among the training examples.

phi holds the features of every layer, each scaled to unit mean square norm, and a constant 1. The
features are stored as they come; the scaling acts on the small side of every product. Products are
taken in float32, or float64 where the features are: half precision is only for storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .devices import float64_device, matching
from .errors import bad_value
from .memory_budget import MOST_ROWS, blocks
from .process_group import ALONE, Alone
from .residuals import leave_one_out_residuals, one_hot
from .staging import staged
from .symmetric import add_gram_matrix, inverse_forms

#: Classes up to which Sigma is kept whole.
MOST_CLASSES = 4096
#: Multiplications of a Gram matrix in float64 that take no time to speak of: 0.02 s on one core.
_CHEAP = 2**28
#: Rows that are summed by class in float32 before they join a sum in float64. With 8,192 the leave-one-out
#: residuals lose a digit, and with it the cosine of examples that the model is sure of.
_CLASS_ROWS = 512
#: `(U, V)` with U `(n, n_features + 1)` and V `(n, n_classes)`: one Kronecker term of (F + lambda)^-1.
Term = tuple[Tensor, Tensor]


@dataclass
class Moments:
    """Second moments of the features of the training set, from one pass.

    Attributes:
        gram: `sum_i h_i h_i^T` with h extended by 1, `(n_features + 1, n_features + 1)` float64.
        targets: `sum_i h_i e_{y_i}^T`, `(n_features + 1, n_classes)` float64.
        scale: Factor of each feature that gives every layer unit mean square norm; 1 for the
            constant. `(n_features + 1,)` float64.
        n_train: N.
    """

    gram: Tensor
    targets: Tensor
    scale: Tensor
    n_train: int

    def first(self, n_features: int) -> Moments:
        """The moments of the first features and the constant."""
        kept = [*range(n_features), len(self.scale) - 1]
        return Moments(self.gram[kept][:, kept], self.targets[kept], self.scale[kept], self.n_train)

    @property
    def second_moment(self) -> Tensor:
        """A = E[phi phi^T], `(n_features + 1, n_features + 1)` float64."""
        return self.gram * self.scale[:, None] * self.scale / self.n_train


def working_dtype(features: Tensor) -> torch.dtype:
    """The dtype of all products with these features: float64 for float64, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def feature_moments(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    widths: Sequence[int],
    block_rows: int = MOST_ROWS,
    ranks: Alone = ALONE,
) -> Moments:
    """Accumulate the moments: products in float32, their sums in float64; all float64 where that is cheap.

    Args:
        features: `(n_train, n_features)`, may be memory-mapped, and elsewhere than the labels.
        labels: `(n_train,)` int64; products are taken on their device.
        n_classes: C.
        widths: Widths of the layers, in the order of the columns.
        block_rows: Rows of a chunk.
        ranks: Who else has a share of the training set.

    Raises:
        ValueError: NaN or infinite features.
    """
    n, d = features.shape
    device = float64_device(labels.device)
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
    targets = torch.zeros(d + 1, n_classes, dtype=torch.float64, device=device)
    # The inverse of A magnifies a rounding of the sums to 1e-5 of a score: how the rows are cut would show.
    cheap = device == labels.device and n * d * d <= _CHEAP
    dtype = torch.float64 if cheap else working_dtype(features)
    for rows in blocks(n, block_rows):
        h = staged(features[rows], labels.device, dtype)
        e = one_hot(labels[rows], h.new_empty(0, n_classes))
        add_gram_matrix(gram[:d, :d], h)
        for few in blocks(len(h), block_rows if dtype == torch.float64 else _CLASS_ROWS):
            targets[:d] += matching(h[few].T @ e[few], gram)
        targets[d] += matching(e.sum(0), gram)
    gram[:d, d] = gram[d, :d] = targets[:d].sum(1)  # every example is of one class
    gram[d, d] = n
    gram, targets = ranks.total(gram, "Gram matrix"), ranks.total(targets, "class moments")
    n = int(gram[d, d])
    energy = gram.diagonal()
    finite = torch.isfinite(energy.to(working_dtype(features)))
    if not bool(finite.all()):
        column = int((~finite).nonzero()[0])
        raise bad_value(
            "train_dataset",
            "give finite activations",
            f"NaN or infinity in feature {column}",
            "Look for it in the inputs, or for an overflow in half precision.",
        )
    return Moments(gram, targets, layer_scale(energy, widths, n), n)


def layer_scale(energy: Tensor, widths: Sequence[int], n_train: int) -> Tensor:
    """Factor of each feature that gives every layer unit mean square norm; 1 for the constant.

    Args:
        energy: Diagonal of the Gram matrix, `(n_features + 1,)`.
        widths: Widths of the layers, in the order of the columns.
        n_train: N.
    """
    scale, start = torch.ones_like(energy), 0
    for width in widths:
        norm = (energy[start : start + width].sum() / n_train).sqrt()
        scale[start : start + width] = 1 / norm if norm > 0 else 1.0
        start += width
    return scale


def damped_inverse(matrix: Tensor, damping: float, mean_diagonal: Tensor | None = None) -> Tensor:
    """`(matrix + damping * mean_diagonal * I)^-1`, in float64; see `damped_factor`."""
    return torch.cholesky_inverse(damped_factor(matrix, damping, mean_diagonal))


def damped_factor(matrix: Tensor, damping: float, mean_diagonal: Tensor | None = None) -> Tensor:
    """The Cholesky factor L of `matrix + damping * mean_diagonal * I = L L^T`, in float64.

    Args:
        matrix: Symmetric positive semi-definite, `(..., d, d)`.
        damping: Relative to `mean_diagonal`.
        mean_diagonal: `(...)`; the matrix's own by default.

    Raises:
        ValueError: The damping is below the rounding errors of a singular matrix.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1) if mean_diagonal is None else mean_diagonal
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_((damping * mean)[..., None])
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise bad_value(
            "damping",
            "be large enough to make the curvature positive definite in its precision",
            damping,
            "Raise it (the default is 0.3), or give the model and its data in float64.",
        )
    return factor


def leverage_forms(features: Tensor, scale: Tensor, inverse: Tensor, block_rows: int = MOST_ROWS) -> Tensor:
    """`phi_i^T (A + lambda I)^-1 phi_i` of each example, `(n_train,)`: N times its leverage.

    Args:
        features: Raw features `(n_train, n_features)`.
        scale: Factor of each feature, 1 for the constant, `(n_features + 1,)`.
        inverse: `(A + lambda I)^-1`; products are taken on its device.
        block_rows: Rows of a chunk.
    """
    d, dtype = features.shape[1], working_dtype(features)
    scaled = (inverse * scale[:, None] * scale).to(dtype)
    forms = scaled.new_empty(len(features))
    for rows in blocks(len(features), block_rows):
        h = staged(features[rows], scaled.device, dtype)
        product = torch.addmm(2 * scaled[d, :d], h, scaled[:d, :d])
        forms[rows] = torch.einsum("nd,nd->n", product, h) + scaled[d, d]
    return forms


@dataclass
class RidgeHead:
    """Ridge regression of the one-hot labels on phi, and what it says of an example it has not seen.

    Attributes:
        weights: On raw features and the constant, `(n_features + 1, n_classes)`.
        left_out: Leave-one-out residuals `(n_train, n_classes)`.
    """

    weights: Tensor
    left_out: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Predictions for other examples, `(n, n_classes)`; features beyond the head's are ignored."""
        d = len(self.weights) - 1
        return torch.addmm(self.weights[d], features[:, :d].to(self.weights), self.weights[:d])


def fit_ridge_head(
    features: Tensor, labels: Tensor, moments: Moments, damping: float, block_rows: int = MOST_ROWS
) -> RidgeHead:
    """Fit the head in closed form, with the leave-one-out residuals of all examples at once.

    Args:
        features: Raw features `(n_train, n_features)`.
        labels: `(n_train,)` int64.
        moments: Of the same features.
        damping: lambda relative to the mean diagonal of A.
        block_rows: Rows of a chunk.
    """
    dtype, d = working_dtype(features), features.shape[1]
    scale = moments.scale[:, None]
    factor = damped_factor(moments.second_moment, damping) / scale  # of phi, acting on raw features
    weights = torch.cholesky_solve(moments.targets, factor) / moments.n_train
    factor, weights = factor.to(labels.device, dtype), weights.to(labels.device, dtype)
    left_out = weights.new_empty(len(features), weights.shape[1])
    for rows in blocks(len(features), block_rows):
        h = staged(features[rows], weights.device, dtype)
        fitted = torch.addmm(weights[d], h, weights[:d])
        leverages = inverse_forms(h, factor) / moments.n_train
        left_out[rows] = leave_one_out_residuals(fitted, leverages, labels[rows])
    return RidgeHead(weights, left_out)


class Curvature:
    """An approximation of F + lambda I that can be inverted: what every option has in common."""

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """`(F + lambda I)^-1 (phi (x) v)` as Kronecker terms.

        Args:
            phi: Scaled features with the constant, `(n, n_features + 1)`.
            vectors: Class sides v, `(n, n_classes)`.

        Returns:
            Terms `(U, V)`; the inner product with `phi_i (x) r_i` is `sum (U phi_i) (V r_i)`.
        """
        raise NotImplementedError


@dataclass
class IdentityCurvature(Curvature):
    """A (x) s I, with s the mean of the C - 1 eigenvalues that `E[diag p - p p^T]` can have.

    Attributes:
        inverse: `(A + damping mean(diag A) I)^-1`.
        scale: s, a tensor of one number.
    """

    inverse: Tensor
    scale: Tensor

    def class_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The class side of the quadratic form of each row, `(n,)`."""
        return (left * right).sum(1) / self.scale

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term: `phi (A + lambda)^-1` and `v / s`."""
        return [(phi @ self.inverse, vectors / self.scale)]


@dataclass
class KroneckerCurvature(Curvature):
    """A (x) Sigma with Sigma = E[diag p - p p^T]; each factor is damped relative to its mean diagonal.

    Sigma's mean is over the C - 1 dimensions that it can have. Beyond 4,096 classes only its diagonal is
    kept: what stands beside it, `E[p_a p_b]`, is a part of 1/C of it where probabilities are spread.

    Attributes:
        inverse: Damped inverse of A.
        class_inverse: Damped inverse of Sigma, `(n_classes, n_classes)`, or its diagonal `(n_classes,)`.
    """

    inverse: Tensor
    class_inverse: Tensor

    def class_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The class side of the quadratic form of each row, `(n,)`."""
        return (self._class_side(left) * right).sum(1)

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term: both sides multiplied by their inverse."""
        return [(phi @ self.inverse, self._class_side(vectors))]

    def _class_side(self, vectors: Tensor) -> Tensor:
        return vectors * self.class_inverse if self.class_inverse.ndim == 1 else vectors @ self.class_inverse


@dataclass
class EigenvalueCorrectedCurvature(Curvature):
    """The eigenbasis of A (x) Sigma with the exact diagonal of F in it (George et al., 2018).

    Attributes:
        basis: Eigenvectors of A, `(n_features + 1, n_features + 1)`.
        class_basis: Eigenvectors of Sigma, `(n_classes, n_classes)`.
        inverse_diagonal: `1 / (F_ab + lambda)`, `(n_features + 1, n_classes)`.
    """

    basis: Tensor
    class_basis: Tensor
    inverse_diagonal: Tensor

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term per eigenvector of Sigma."""
        rotated, v = phi @ self.basis, vectors @ self.class_basis
        return [
            ((rotated * self.inverse_diagonal[:, b]) @ self.basis.T, v[:, b : b + 1] * self.class_basis[:, b])
            for b in range(v.shape[1])
        ]


@dataclass
class ClassBlockCurvature(Curvature):
    """The diagonal blocks of F: E[phi phi^T p_c (1 - p_c)] for each class c.

    Attributes:
        inverses: Damped inverses of the blocks, `(n_classes, n_features + 1, n_features + 1)`.
    """

    inverses: Tensor

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term per class."""
        classes = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        return [
            (phi @ inverse, vectors[:, c : c + 1] * classes[c]) for c, inverse in enumerate(self.inverses)
        ]


@dataclass
class GaussNewtonCurvature(Curvature):
    """F itself, solved by conjugate gradients over the training set for each block of test points.

    Preconditioned by A (x) s I, which leaves tens of steps where there were hundreds.

    Attributes:
        phi: Scaled features of the training set, `(n_train, n_features + 1)`.
        probabilities: p of the training set, `(n_train, n_classes)`.
        damping: lambda, absolute, a tensor of one number.
        inverse: `(A + damping mean(diag A) I)^-1`.
        scale: s, a tensor of one number.
        tolerance: Relative residual at which the solver stops.
    """

    phi: Tensor
    probabilities: Tensor
    damping: Tensor
    inverse: Tensor
    scale: Tensor
    tolerance: float = 1e-6

    def precondition(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term per class: the columns of the solution."""
        right = phi[:, :, None] * vectors[:, None, :]
        solution = self._solve(right)
        classes = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        return [(solution[:, :, c], classes[c].expand_as(vectors)) for c in range(vectors.shape[1])]

    def multiply(self, a: Tensor) -> Tensor:
        """(F + lambda I) a for a `(n, n_features + 1, n_classes)`."""
        result = self.damping * a
        for rows in blocks(len(self.phi), 1024):
            phi, p = self.phi[rows], self.probabilities[rows]
            moved = torch.einsum("id,ndc->nic", phi, a)
            moved = p * (moved - (p * moved).sum(-1, keepdim=True))
            result += torch.einsum("id,nic->ndc", phi, moved) / len(self.phi)
        return result

    def _solve(self, right: Tensor) -> Tensor:
        """Conjugate gradients, all right-hand sides at once; stops when each residual is small."""
        x = 0 * right  # not zeros: a right-hand side with NaN has no solution
        r = right.clone()
        direction = z = self.inverse @ r / self.scale
        rho = (r * z).sum((1, 2))
        goal = self.tolerance * r.norm(dim=(1, 2))
        for _ in range(10 * right.shape[1] * right.shape[2]):
            if not bool((r.norm(dim=(1, 2)) > goal).any()):  # one with NaN must not keep the others going
                break
            product = self.multiply(direction)
            step = _ratio(rho, (direction * product).sum((1, 2)))
            x += step * direction
            r -= step * product
            z = self.inverse @ r / self.scale
            rho, previous = (r * z).sum((1, 2)), rho
            direction = z + _ratio(rho, previous) * direction
        return x


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient for each right-hand side, 0 where one has converged to nothing; `(n, 1, 1)`."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)[:, None, None]


def fit_curvature(
    name: str,
    features: Tensor,
    probabilities: Tensor,
    moments: Moments,
    damping: float,
    inverse: Tensor,
    block_rows: int = MOST_ROWS,
    ranks: Alone = ALONE,
) -> Curvature:
    """Fit one of the approximations of F.

    lambda is `damping` times the mean diagonal of A (x) Sigma over the `(n_features + 1) (C - 1)`
    dimensions that F can have: softmax does not see a shift of all logits. The two options with a
    single Kronecker product damp its factors instead: s lambda I beside A, and both of A (x) Sigma.

    Args:
        name: An option of `STRIDEConfig.curvature`.
        features: `(n_train, n_features)`.
        probabilities: p in the working dtype, `(n_train, n_classes)`.
        moments: Of the features.
        damping: Relative.
        inverse: `(A + damping mean(diag A) I)^-1` in float64.
        block_rows: Rows of a chunk.
        ranks: Who else has a share of the training set.

    Raises:
        ValueError: Logits with NaN, or a model without any uncertainty left.
    """
    n_classes = probabilities.shape[1]
    diagonal_only = n_classes > MOST_CLASSES and name in ("identity", "kronecker")
    sigma = _softmax_covariance(probabilities, inverse, block_rows, diagonal_only, moments.n_train, ranks)
    mean_sigma = (sigma.sum() if diagonal_only else sigma.trace()) / (n_classes - 1)
    if not mean_sigma > 0:
        raise bad_value(
            "temperature",
            "leave the model some uncertainty",
            "probabilities that are all 0 or 1",
            "Raise it.",
        )
    if name == "identity":
        return IdentityCurvature(inverse.to(probabilities), mean_sigma.to(probabilities))
    if name == "kronecker" and diagonal_only:
        return KroneckerCurvature(
            inverse.to(probabilities), (1 / (sigma + damping * mean_sigma)).to(probabilities)
        )
    if name == "kronecker":
        class_inverse = damped_inverse(sigma, damping, mean_sigma)
        return KroneckerCurvature(inverse.to(probabilities), class_inverse.to(probabilities))
    a = moments.second_moment
    mean_diagonal = a.diagonal().mean() * mean_sigma
    if name == "gauss-newton":
        phi = scaled_features(features, moments.scale)
        return GaussNewtonCurvature(
            phi,
            probabilities,
            damping=(damping * mean_diagonal).to(phi),
            inverse=inverse.to(phi),
            scale=mean_sigma.to(phi),
            tolerance=1e-10 if phi.dtype == torch.float64 else 1e-6,
        )
    if name == "eigenvalue-corrected":
        return _eigenvalue_corrected(
            features, matching(probabilities, inverse), moments, a, sigma, damping * mean_diagonal, ranks
        )
    blocks_of_f = torch.zeros(n_classes, *a.shape, dtype=a.dtype, device=a.device)
    weights = probabilities * (1 - probabilities)
    for rows in blocks(len(features), block_rows):
        phi = scaled_features(features[rows], moments.scale)
        for c in range(n_classes):
            blocks_of_f[c] += matching((phi * weights[rows, c : c + 1]).T @ phi, a) / moments.n_train
    blocks_of_f = ranks.total(blocks_of_f, "blocks of the Fisher")
    inverses = damped_inverse(blocks_of_f, damping, mean_diagonal.expand(n_classes))
    return ClassBlockCurvature(inverses.to(probabilities))


def _softmax_covariance(
    probabilities: Tensor, like: Tensor, block_rows: int, diagonal_only: bool, n_train: int, ranks: Alone
) -> Tensor:
    """Sigma = E[diag p - p p^T] or its diagonal, in the dtype and on the device of `like`."""
    n, n_classes = probabilities.shape
    total = like.new_zeros(n_classes)
    second = total.clone() if diagonal_only else like.new_zeros(n_classes, n_classes)
    for rows in blocks(n, block_rows):
        p = matching(probabilities[rows], like)
        total += p.sum(0)
        second += p.square().sum(0) if diagonal_only else p.T @ p
    if not bool(torch.isfinite(total).all()):
        wrong = int((~torch.isfinite(probabilities).all(1)).nonzero()[0])
        raise bad_value("model", "return logits without NaN", f"NaN for training example {wrong}")
    covariance = (total if diagonal_only else total.diag()) - second
    return ranks.total(covariance, "class covariance") / n_train


def _eigenvalue_corrected(
    features: Tensor, p: Tensor, moments: Moments, a: Tensor, sigma: Tensor, damping: Tensor, ranks: Alone
) -> EigenvalueCorrectedCurvature:
    # Other hardware may turn eigenvectors, and what is summed below must be in one basis.
    basis, class_basis = (ranks.same(torch.linalg.eigh(m)[1], "eigenvectors") for m in (a, sigma))
    diagonal = torch.zeros(a.shape[0], p.shape[1], dtype=a.dtype, device=a.device)
    for rows in blocks(len(features), MOST_ROWS):
        phi = scaled_features(features[rows], moments.scale)
        rotated = phi @ basis.to(phi)
        v = class_basis
        weights = p[rows] @ v.square() - (p[rows] @ v).square()
        diagonal += matching(rotated.square().T @ weights.to(phi), a) / moments.n_train
    diagonal = ranks.total(diagonal, "corrected eigenvalues")
    device, dtype = features.device, working_dtype(features)
    parts = (basis, class_basis, 1 / (diagonal + damping))
    return EigenvalueCorrectedCurvature(*(part.to(device, dtype) for part in parts))


def scaled_features(features: Tensor, scale: Tensor) -> Tensor:
    """phi: features times their scale, and the constant 1; `(n, n_features + 1)` in the working dtype."""
    features = features.to(working_dtype(features))
    ones = features.new_ones(len(features), 1)
    return torch.cat([features * scale[:-1].to(features), ones], dim=1)


#: Scores that the class side multiplies at a time: small enough for the last level of cache.
_CACHED_SCORES = 2**21
#: Test points up to which the product is taken the other way round.
_FEW_POINTS = 8


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
    # A product of one vector runs on one thread, and few rows are slow: few columns use all of them.
    few = u if n > 1 else u.expand(2, -1)
    columns = few[:, :-1].contiguous().T
    return (features @ columns)[:, :n].T.contiguous().add_(u[:, -1:])


def on_raw_features(terms: Sequence[Term], scale: Tensor, n_train: int) -> list[Term]:
    """Fold the scaling of the features and the weight 1/N of one example into the test side."""
    return [(u * scale.to(u), v / n_train) for u, v in terms]


def quadratic_forms(curvature: Curvature, phi: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`<phi (x) left, (F + lambda I)^-1 (phi (x) right)>` of each row, `(n,)`."""
    terms = curvature.precondition(phi, right)
    return torch.stack([(u * phi).sum(1) * (v * left).sum(1) for u, v in terms]).sum(0)
