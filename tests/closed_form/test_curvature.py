from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from stride_captum.closed_form.class_moments import class_moments
from stride_captum.closed_form.curvature import (
    forms_of,
    on_raw_features,
    score_block,
)
from stride_captum.closed_form.curvature_fit import centered, fit_curvature
from stride_captum.closed_form.gauss_newton import GaussNewtonCurvature
from stride_captum.closed_form.moments import feature_moments, scaled_features
from stride_captum.closed_form.options import Curvature as CurvatureName
from stride_captum.steering.objective import fidelity, stability
from stride_captum.system.to_device import TrainingBlocks

N, WIDTHS, C = 14, (3, 2), 3
D = sum(WIDTHS) + 1
CURVATURES = get_args(CurvatureName)


class Problem:
    """A small problem in float64, with everything that the definition needs, spelt out."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.features = torch.cat([5 * randn(N, 3) + 1, 0.3 * randn(N, 2)], dim=1)
        self.logits = 1.5 * randn(N, C)
        self.labels = torch.randint(C, (N,), generator=generator)
        self.residuals = F.one_hot(self.labels, C) - self.probabilities
        self.test_features = torch.cat([5 * randn(4, 3), 0.3 * randn(4, 2)], dim=1)
        self.gradients = randn(4, C)
        self.moments = feature_moments(self.features, self.labels, C, WIDTHS)

    @property
    def probabilities(self) -> torch.Tensor:
        return self.logits.softmax(1)

    def phi(self, features: torch.Tensor) -> torch.Tensor:
        """Each layer with unit mean square norm over the training set, and a constant 1."""
        columns, start = [], 0
        for width in WIDTHS:
            train = self.features[:, start : start + width]
            mean_square = sum(float(row @ row) for row in train) / N
            columns.append(features[:, start : start + width] / mean_square**0.5)
            start += width
        return torch.cat([*columns, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)

    def fisher(self) -> torch.Tensor:
        """E[phi phi^T (x) (diag p - p p^T)], `(D C, D C)`."""
        total = torch.zeros(D * C, D * C, dtype=torch.float64)
        for phi, p in zip(self.phi(self.features), self.probabilities, strict=True):
            total += torch.kron(torch.outer(phi, phi), p.diag() - torch.outer(p, p))
        return total / N

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """A, Sigma, and their mean diagonals (Sigma's over the C - 1 dimensions that it can have)."""
        phi = self.phi(self.features)
        a = sum(torch.outer(row, row) for row in phi) / N
        sigma = sum(p.diag() - torch.outer(p, p) for p in self.probabilities) / N
        return a, sigma, float(a.trace()) / D, float(sigma.trace()) / (C - 1)

    def damped(self, name: str, damping: float) -> torch.Tensor:
        """F + lambda I as the option approximates it, dense."""
        a, sigma, mean_a, mean_sigma = self.factors()
        eye_a, eye_sigma = torch.eye(D, dtype=a.dtype), torch.eye(C, dtype=a.dtype)
        damped_a = a + damping * mean_a * eye_a
        if name == "identity":
            return torch.kron(damped_a, mean_sigma * eye_sigma)
        if name == "kronecker":
            return torch.kron(damped_a, sigma + damping * mean_sigma * eye_sigma)
        fisher, penalty = self.fisher(), damping * mean_a * mean_sigma * torch.eye(D * C, dtype=a.dtype)
        if name == "gauss-newton":
            return fisher + penalty
        if name == "class-blocks":
            same_class = torch.kron(torch.ones(D, D, dtype=a.dtype), eye_sigma)
            return fisher * same_class + penalty
        basis = torch.kron(torch.linalg.eigh(a)[1], torch.linalg.eigh(sigma)[1])
        diagonal = (basis.T @ fisher @ basis).diagonal()
        return basis @ diagonal.diag() @ basis.T + penalty

    def blocks(self, dtype: torch.dtype = torch.float64, rows: int = 5) -> TrainingBlocks:
        return TrainingBlocks(self.features.to(dtype), self.logits.to(dtype), self.labels, dtype, rows)

    def fit(self, name: str, damping: float, dtype: torch.dtype = torch.float64):
        data = self.blocks(dtype)
        return fit_curvature(name, data, 1.0, self.moments, class_moments(data, 1.0), damping)


@pytest.mark.parametrize("damping", [0.3, 1e-3])
@pytest.mark.parametrize("name", CURVATURES)
class TestCurvature:
    def test_scores_are_those_of_the_dense_solve(self, name, damping):
        problem = Problem()
        curvature = problem.fit(name, damping)
        phi = scaled_features(problem.test_features, problem.moments.scale)
        terms = on_raw_features(
            curvature.precondition(phi, problem.gradients), problem.moments.scale, weight=N
        )
        scores = score_block(terms, problem.features, problem.residuals)

        matrix, expected = problem.damped(name, damping), torch.zeros(4, N, dtype=torch.float64)
        train = list(zip(problem.phi(problem.features), problem.residuals, strict=True))
        test = list(zip(problem.phi(problem.test_features), problem.gradients, strict=True))
        for i, (phi_i, r) in enumerate(train):
            a = torch.linalg.solve(matrix, torch.kron(phi_i, r)) / N
            for j, (phi_j, g) in enumerate(test):
                expected[j, i] = torch.kron(phi_j, g) @ a
        torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-10)

    def test_quadratic_forms_are_those_of_the_dense_solve(self, name, damping):
        problem = Problem(1)
        left, right = problem.residuals.flip(0), problem.residuals
        curvature = problem.fit(name, damping)
        phi = problem.phi(problem.features)
        forms = forms_of(curvature.precondition(phi, right), phi, left)
        matrix = problem.damped(name, damping)
        for phi, u, v, form in zip(problem.phi(problem.features), left, right, forms, strict=True):
            expected = torch.kron(phi, u) @ torch.linalg.solve(matrix, torch.kron(phi, v))
            torch.testing.assert_close(form, expected, rtol=1e-8, atol=1e-10)

    def test_float32_agrees_with_float64(self, name, damping):
        problem = Problem(2)
        exact = problem.fit(name, damping)
        single = problem.fit(name, damping, torch.float32)
        phi = problem.phi(problem.test_features)
        for (u, v), (u32, v32) in zip(
            exact.precondition(phi, problem.gradients),
            single.precondition(phi.float(), problem.gradients.float()),
            strict=True,
        ):
            assert u32.dtype == v32.dtype == torch.float32
            torch.testing.assert_close(u32.double(), u, rtol=1e-3, atol=1e-4 * u.abs().max().item())
            torch.testing.assert_close(v32.double(), v, rtol=1e-3, atol=1e-4)


def test_where_every_example_has_the_same_probabilities_corrected_eigenvalues_are_exact():
    problem = Problem()
    problem.logits = problem.logits[:1].expand(N, C)
    torch.testing.assert_close(
        problem.damped("eigenvalue-corrected", 0.1), problem.damped("gauss-newton", 0.1)
    )
    phi = problem.phi(problem.features)
    corrected, exact = (
        forms_of(problem.fit(name, 0.1).precondition(phi, problem.residuals), phi, problem.residuals)
        for name in ("eigenvalue-corrected", "gauss-newton")
    )
    torch.testing.assert_close(corrected, exact)


def test_conjugate_gradients_take_few_steps_where_features_are_badly_conditioned(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, 40, dtype=torch.float64)
    features = torch.randn(200, 40, dtype=torch.float64, generator=generator) * spectrum
    logits = torch.randn(200, 5, dtype=torch.float64, generator=generator)
    moments = feature_moments(features, logits.argmax(1), 5, [40])
    data = TrainingBlocks(features, logits, logits.argmax(1), torch.float64)
    classes = class_moments(data, 1.0)
    curvature = fit_curvature("gauss-newton", data, 1.0, moments, classes, 1e-6)
    products = []
    multiply = GaussNewtonCurvature.multiply
    monkeypatch.setattr(
        GaussNewtonCurvature, "multiply", lambda self, a: products.append(1) or multiply(self, a)
    )
    phi = scaled_features(features[:3], moments.scale)
    right = phi[:, :, None] * (logits.softmax(1)[:3] - F.one_hot(logits.argmax(1)[:3], 5))[:, None, :]
    solution = curvature._solve(right)
    assert len(products) < 60
    residual = multiply(curvature, solution) - right
    assert (residual.norm(dim=(1, 2)) <= 1e-9 * right.norm(dim=(1, 2))).all()


def test_conjugate_gradients_give_zero_for_zero():
    problem = Problem()
    curvature = problem.fit("gauss-newton", 0.3)
    vectors = torch.zeros(4, C, dtype=torch.float64)
    vectors[1] = problem.gradients[1]
    solution = torch.stack(
        [u for u, _ in curvature.precondition(problem.phi(problem.test_features), vectors)]
    )
    assert torch.isfinite(solution).all()
    assert (solution[:, [0, 2, 3]] == 0).all()
    assert (solution[:, 1] != 0).any()


class TestObjectiveAtZero:
    """What the closed form takes from the objective of stage 1, against autograd."""

    def test_gradient_of_the_fidelity_loss(self):
        problem = Problem()
        phi, members = problem.phi(problem.features), [0, 3, 4, 9]
        a = torch.zeros(D, C, dtype=torch.float64, requires_grad=True)
        loss = fidelity(problem.logits[members], phi[members] @ a, problem.labels[members])
        (gradient,) = torch.autograd.grad(loss, a)
        expected = -sum(torch.outer(phi[i], problem.residuals[i]) for i in members) / len(members)
        torch.testing.assert_close(gradient, expected)

    def test_stability_loss_has_no_gradient_and_the_fisher_as_hessian(self):
        problem = Problem()
        phi = problem.phi(problem.features)

        def loss(a):
            return stability(problem.logits, phi @ a.reshape(D, C))

        zero = torch.zeros(D * C, dtype=torch.float64)
        assert loss(zero) == 0
        assert torch.autograd.functional.jacobian(loss, zero).abs().max() < 1e-15
        torch.testing.assert_close(torch.autograd.functional.hessian(loss, zero), problem.fisher())


def minimize(problem, members, weight, penalty):
    """The minimizer of `weight L_fid(S) + L_stab(all) + penalty/2 |a|^2`, by Newton's method."""
    phi = problem.phi(problem.features)

    def loss(a):
        shift = phi @ a.reshape(D, C)
        fit = fidelity(problem.logits[members], shift[members], problem.labels[members])
        return weight * fit + stability(problem.logits, shift) + penalty / 2 * a.square().sum()

    a = torch.zeros(D * C, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, a)
        if gradient.norm() < 1e-13 * weight:
            break
        a = a - torch.linalg.solve(torch.autograd.functional.hessian(loss, a), gradient)
    assert gradient.norm() < 1e-13 * weight
    return a


def test_trained_operators_tend_to_the_closed_form_as_the_weight_of_the_subset_falls():
    problem = Problem()
    members, (_, _, mean_a, mean_sigma) = [1, 2, 5, 6, 11], problem.factors()
    curvature = problem.fit("gauss-newton", 0.3)
    phi = problem.phi(problem.features)
    solutions = torch.stack([u for u, _ in curvature.precondition(phi, problem.residuals)], dim=-1)
    limit = solutions[members].mean(0).flatten()
    errors = []
    for weight in (0.1, 0.01, 0.001):
        trained = minimize(problem, members, weight, 0.3 * mean_a * mean_sigma)
        errors.append(float((trained / weight - limit).norm() / limit.norm()))
    assert errors[0] < 0.5
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(10, rel=0.15)


def test_leverages_are_forms_of_the_inverse():
    problem = Problem()
    phi = problem.phi(problem.features)
    a, _, mean_a, _ = problem.factors()
    inverse = torch.linalg.inv(a + 0.3 * mean_a * torch.eye(D))
    mapped = centered(inverse, problem.moments, problem.blocks())
    expected = (phi @ inverse * phi).sum(1)
    torch.testing.assert_close(mapped.forms(problem.blocks(), problem.moments.scale), expected)
    torch.testing.assert_close(mapped(phi), phi @ inverse)
