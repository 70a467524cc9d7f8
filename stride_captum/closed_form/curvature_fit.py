"""Fit of each approximation of the damped Fisher, reading the training set block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.hessians import DiagonalHessians, SoftmaxHessians
from ..system.devices import matching
from ..system.to_device import TrainingBlocks
from .class_moments import ClassMoments
from .curvature import (
    CenteredMap,
    Curvature,
    EigenvalueCorrectedCurvature,
    IdentityCurvature,
    KroneckerCurvature,
)
from .damping import damped_inverse
from .gauss_newton import GaussNewtonCurvature
from .moments import Moments, scaled_features


@dataclass
class Spectrum:
    """The Fisher F in the eigenbasis of A (x) Sigma.

    Attributes:
        feature_basis: Eigenvectors of A, `(n_features + 1, n_features + 1)` float64.
        class_basis: Eigenvectors of Sigma, `(n_classes, n_classes)` float64.
        squares: Sum over training examples; divided by W it is the diagonal of F / s in this basis,
            `(n_features + 1, n_classes)` float64.
    """

    feature_basis: Tensor
    class_basis: Tensor
    squares: Tensor


def fit_curvature(
    name: str,
    data: TrainingBlocks,
    temperature: float,
    moments: Moments,
    classes: ClassMoments,
    damping: float,
    spectrum: Spectrum | None = None,
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
        spectrum: For "eigenvalue-corrected", if it is known; None reads the training set.
    """
    a, sigma = moments.second_moment, classes.covariance
    if name in ("identity", "kronecker"):
        inverse = centered(damped_inverse(a, damping), moments, data)
        if name == "identity":
            return IdentityCurvature(classes.unit, inverse)
        one = sigma.new_ones(())  # in units of s
        if sigma.ndim == 1:
            side = 1 / (sigma + damping * classes.on_diagonal)
        else:
            side = damped_inverse(sigma, damping, one)
        return KroneckerCurvature(classes.unit, inverse, side.to(data.device, data.dtype))
    if name == "gauss-newton":
        return _gauss_newton(data, temperature, moments, classes, damping)
    if spectrum is None:
        bases = eigenbases(moments, classes)
        spectrum = Spectrum(*bases, squares_in(bases, data, temperature, moments, classes))
    diagonal = spectrum.squares / moments.weight
    eigenvalues = diagonal + damping * a.diagonal().mean() * classes.level
    parts = (spectrum.feature_basis, spectrum.class_basis, 1 / eigenvalues)
    return EigenvalueCorrectedCurvature(classes.unit, *(part.to(data.device, data.dtype) for part in parts))


def eigenbases(moments: Moments, classes: ClassMoments) -> tuple[Tensor, Tensor]:
    """Eigenvectors of A and of Sigma; the identity if the loss treats outputs separately."""
    feature_basis = torch.linalg.eigh(moments.second_moment)[1]
    sigma = classes.covariance
    if classes.loss.apart:
        return feature_basis, torch.eye(len(sigma)).to(sigma)
    return feature_basis, torch.linalg.eigh(sigma.diag() if sigma.ndim == 1 else sigma)[1]


def squares_in(
    bases: tuple[Tensor, Tensor],
    data: TrainingBlocks,
    temperature: float,
    moments: Moments,
    classes: ClassMoments,
) -> Tensor:
    """`Spectrum.squares` of some training examples."""
    basis, v = bases
    squares = basis.new_zeros(len(basis), len(v))
    for rows in data:
        phi = scaled_features(data.features_of(rows), moments.scale)
        forms = classes.loss.hessians(data.logits_of(rows), temperature).forms_in(v) / classes.unit
        omega = data.weights_of(rows, forms)
        forms = forms if omega is None else forms * omega[:, None]
        squares += matching((phi @ basis.to(phi)).square().T @ forms.to(phi), basis)
    return squares


def _gauss_newton(
    data: TrainingBlocks,
    temperature: float,
    moments: Moments,
    classes: ClassMoments,
    damping: float,
) -> GaussNewtonCurvature:
    n, a, loss = len(data.labels), moments.second_moment, classes.loss
    phi = torch.empty(n, len(a), dtype=data.dtype, device=data.device)
    others = phi.new_empty(n, data.logits.shape[1])
    first = None if loss.apart else torch.empty(n, 1, dtype=torch.int64, device=data.device)
    for rows in data:
        hessians = loss.hessians(data.logits_of(rows), temperature)
        phi[rows] = scaled_features(data.features_of(rows), moments.scale)
        omega = data.weights_of(rows, phi)
        if omega is not None:
            phi[rows] *= omega.sqrt()[:, None]
        if isinstance(hessians, DiagonalHessians):
            others[rows] = (hessians.diagonals / classes.unit).to(others)
        else:
            assert isinstance(hessians, SoftmaxHessians)
            assert first is not None
            others[rows], first[rows] = (hessians.others / classes.unit).to(others), hessians.first.to(first)
    level, mean = classes.level, float(a.diagonal().mean())
    return GaussNewtonCurvature(
        classes.unit,
        phi,
        others,
        first,
        damping=damping * mean * (level.to(phi) if isinstance(level, torch.Tensor) else level),
        inverse=damped_inverse(a, damping).to(phi),
        tolerance=1e-10 if phi.dtype == torch.float64 else 1e-6,
        weight=moments.weight,
    )


def centered(matrix: Tensor, moments: Moments, data: TrainingBlocks) -> CenteredMap:
    """A `CenteredMap` in the precision and on the device of `data`, from a matrix in float64."""
    center = moments.mean
    return CenteredMap(*(part.to(data.device, data.dtype) for part in (matrix, center, center @ matrix)))
