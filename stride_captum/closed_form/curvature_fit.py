"""Fit of each approximation of the damped Fisher to a training set, which is read block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..system.devices import matching
from ..system.processes import SINGLE_PROCESS, SingleProcess
from ..system.to_device import TrainingBlocks
from .class_moments import ClassMoments, Probabilities, probabilities
from .curvature import (
    CenteredMap,
    Curvature,
    EigenvalueCorrectedCurvature,
    GaussNewtonCurvature,
    IdentityCurvature,
    KroneckerCurvature,
)
from .damping import damped_inverse
from .moments import Moments, scaled_features


def fit_curvature(
    name: str,
    data: TrainingBlocks,
    temperature: float,
    moments: Moments,
    classes: ClassMoments,
    damping: float,
    ranks: SingleProcess = SINGLE_PROCESS,
) -> Curvature:
    """Fit one of the approximations of F.

    lambda is `damping` times the mean diagonal of A (x) Sigma over the `(n_features + 1) (C - 1)`
    dimensions that F can have: softmax does not see a shift of all logits. The two options with a
    single Kronecker product damp its factors instead: s lambda I beside A, and both of A (x) Sigma.

    Args:
        name: An option of `ClosedForm.curvature`.
        data: The training set.
        temperature: T of `p = softmax(z / T)`.
        moments: Of the features.
        classes: Of the probabilities at the same T.
        damping: Relative.
        ranks: Who else has a share of the training set.
    """
    a, sigma = moments.second_moment, classes.covariance
    if name in ("identity", "kronecker"):
        inverse = centered(damped_inverse(a, damping), moments, data)
        if name == "identity":
            return IdentityCurvature(classes.unit, inverse)
        one = sigma.new_ones(())  # in units of s
        side = 1 / (sigma + damping) if sigma.ndim == 1 else damped_inverse(sigma, damping, one)
        return KroneckerCurvature(classes.unit, inverse, side.to(data.device, data.dtype))
    if name == "gauss-newton":
        return _gauss_newton(data, temperature, moments, classes, damping)
    return _eigenvalue_corrected(data, temperature, moments, classes, damping, ranks)


def _gauss_newton(
    data: TrainingBlocks, temperature: float, moments: Moments, classes: ClassMoments, damping: float
) -> GaussNewtonCurvature:
    n, a = len(data.labels), moments.second_moment
    phi = torch.empty(n, len(a), dtype=data.dtype, device=data.device)
    others = phi.new_empty(n, data.logits.shape[1])
    first = torch.empty(n, 1, dtype=torch.int64, device=data.device)
    for rows in data:
        p = probabilities(data.logits_of(rows), temperature)
        phi[rows] = scaled_features(data.features_of(rows), moments.scale)
        others[rows], first[rows] = (p.others / classes.unit).to(others), p.first.to(first)
    return GaussNewtonCurvature(
        classes.unit,
        phi,
        others,
        first,
        damping=damping * float(a.diagonal().mean()),
        inverse=damped_inverse(a, damping).to(phi),
        tolerance=1e-10 if phi.dtype == torch.float64 else 1e-6,
    )


def _eigenvalue_corrected(
    data: TrainingBlocks,
    temperature: float,
    moments: Moments,
    classes: ClassMoments,
    damping: float,
    ranks: SingleProcess,
) -> EigenvalueCorrectedCurvature:
    a = moments.second_moment
    # Other hardware may turn eigenvectors, and what is summed below must be in one basis.
    basis, v = (ranks.broadcast(torch.linalg.eigh(m)[1], "eigenvectors") for m in (a, classes.covariance))
    diagonal = a.new_zeros(len(a), len(v))
    for rows in data:
        phi = scaled_features(data.features_of(rows), moments.scale)
        weights = _variances_in(v, probabilities(data.logits_of(rows), temperature)) / classes.unit
        diagonal += matching((phi @ basis.to(phi)).square().T @ weights.to(phi), a) / moments.n_train
    diagonal = ranks.all_reduce(diagonal, "corrected eigenvalues")
    parts = (basis, v, 1 / (diagonal + damping * a.diagonal().mean()))
    return EigenvalueCorrectedCurvature(classes.unit, *(part.to(data.device, data.dtype) for part in parts))


def _variances_in(basis: Tensor, p: Probabilities) -> Tensor:
    """`v^T (diag p - p p^T) v` of each row p and each column v of a basis, `(n, n_classes)`.

    It is the variance of an entry of v drawn with probabilities p. Differences to the entry of the likeliest
    class keep it free of cancellation.
    """
    from_first = basis[p.first.squeeze(1)]
    mean = p.others @ basis - from_first * p.rest
    square = p.others @ basis.square() - 2 * from_first * (p.others @ basis) + from_first.square() * p.rest
    return square - mean.square()


def centered(matrix: Tensor, moments: Moments, data: TrainingBlocks) -> CenteredMap:
    """A `CenteredMap` in the precision and on the device of `data`, from a matrix in float64."""
    center = moments.mean
    return CenteredMap(*(part.to(data.device, data.dtype) for part in (matrix, center, center @ matrix)))
