from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from stride_captum.config import Curvature as CurvatureName
from stride_captum.newton import (
    GaussNewtonCurvature,
    Moments,
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
from stride_captum.objective import fidelity, stability

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
        self.probabilities = self.logits.softmax(1)
        self.residuals = F.one_hot(self.labels, C) - self.probabilities
        self.test_features = torch.cat([5 * randn(4, 3), 0.3 * randn(4, 2)], dim=1)
        self.gradients = randn(4, C)
        self.moments = feature_moments(self.features, self.labels, C, WIDTHS)

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

    def fit(self, name: str, damping: float, dtype: torch.dtype = torch.float64):
        inverse = damped_inverse(self.moments.second_moment, damping)
        return fit_curvature(
            name, self.features.to(dtype), self.probabilities.to(dtype), self.moments, damping, inverse
        )


@pytest.mark.parametrize("damping", [0.3, 1e-3])
@pytest.mark.parametrize("name", CURVATURES)
class TestCurvature:
    def test_scores_are_those_of_the_dense_solve(self, name, damping):
        problem = Problem()
        curvature = problem.fit(name, damping)
        phi = scaled_features(problem.test_features, problem.moments.scale)
        terms = on_raw_features(
            curvature.precondition(phi, problem.gradients), problem.moments.scale, n_train=N
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
        forms = quadratic_forms(problem.fit(name, damping), problem.phi(problem.features), left, right)
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
    problem.probabilities = problem.probabilities[:1].expand(N, C)
    torch.testing.assert_close(
        problem.damped("eigenvalue-corrected", 0.1), problem.damped("gauss-newton", 0.1)
    )
    torch.testing.assert_close(
        quadratic_forms(
            problem.fit("eigenvalue-corrected", 0.1),
            problem.phi(problem.features),
            problem.residuals,
            problem.residuals,
        ),
        quadratic_forms(
            problem.fit("gauss-newton", 0.1),
            problem.phi(problem.features),
            problem.residuals,
            problem.residuals,
        ),
    )


def test_conjugate_gradients_take_few_steps_where_features_are_badly_conditioned(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -4, 40, dtype=torch.float64)
    features = torch.randn(200, 40, dtype=torch.float64, generator=generator) * spectrum
    logits = torch.randn(200, 5, dtype=torch.float64, generator=generator)
    moments = feature_moments(features, logits.argmax(1), 5, [40])
    inverse = damped_inverse(moments.second_moment, 1e-6)
    curvature = fit_curvature("gauss-newton", features, logits.softmax(1), moments, 1e-6, inverse)
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


def minimise(problem, members, weight, penalty):
    """The minimiser of `weight L_fid(S) + L_stab(all) + penalty/2 |a|^2`, by Newton's method."""
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
        trained = minimise(problem, members, weight, 0.3 * mean_a * mean_sigma)
        errors.append(float((trained / weight - limit).norm() / limit.norm()))
    assert errors[0] < 0.5
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(10, rel=0.15)


class TestMoments:
    def test_sums_over_chunks_are_those_of_the_definition(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(9000, 3, dtype=torch.float64, generator=generator)
        labels = torch.randint(4, (9000,), generator=generator)
        moments = feature_moments(features, labels, 4, [2, 1])
        h = torch.cat([features, torch.ones(9000, 1)], dim=1)
        torch.testing.assert_close(moments.gram, h.T @ h)
        torch.testing.assert_close(moments.targets, h.T @ F.one_hot(labels, 4).double())
        phi = h * moments.scale
        torch.testing.assert_close(moments.second_moment, phi.T @ phi / 9000)
        for layer in (phi[:, :2], phi[:, 2:3], phi[:, 3:]):
            assert float(layer.square().sum(1).mean()) == pytest.approx(1)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_every_dtype_is_summed_in_float32_or_more(self, dtype):
        features = torch.full((9000, 2), 30.0, dtype=dtype)
        moments = feature_moments(features, torch.zeros(9000, dtype=torch.long), 2, [2])
        assert moments.gram.tolist() == [[8.1e6, 8.1e6, 2.7e5], [8.1e6, 8.1e6, 2.7e5], [2.7e5, 2.7e5, 9000]]
        assert moments.targets.dtype == torch.float64
        assert working_dtype(features) == torch.float32
        assert scaled_features(features, moments.scale).dtype == torch.float32

    def test_sums_by_class_lose_no_digits_to_many_rows(self, monkeypatch):
        """Features behind a ReLU are of one sign: a sum in float32 over all rows would be off by 2e-6."""
        monkeypatch.setattr("stride_captum.newton._CHEAP", 0)  # or all would be float64
        features = torch.rand(8192, 6, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(8192, dtype=torch.long)
        moments = feature_moments(features, labels, 2, [6])
        exact = features.double().sum(0)
        assert float((moments.targets[:6, 0] / exact - 1).abs().max()) < 3e-7

    def test_a_layer_of_zeros_is_left_alone(self):
        features = torch.cat([torch.zeros(5, 2), torch.ones(5, 1)], dim=1)
        moments = feature_moments(features, torch.zeros(5, dtype=torch.long), 2, [2, 1])
        assert moments.scale.tolist() == [1, 1, 1, 1]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_features_that_are_not_finite_or_overflow_are_refused(self, bad):
        features = torch.ones(5, 3)
        features[4, 1] = bad
        with pytest.raises(
            ValueError, match="`train_dataset` must give finite activations; got NaN or infinity in feature 1"
        ):
            feature_moments(features, torch.zeros(5, dtype=torch.long), 2, [3])


def test_ridge_head_gives_leverages_and_predictions():
    problem = Problem()
    phi, y = problem.phi(problem.features), F.one_hot(problem.labels, C).double()
    a, _, mean_a, _ = problem.factors()
    inverse = torch.linalg.inv(a + 0.3 * mean_a * torch.eye(D))
    hat = phi @ inverse @ phi.T / N
    moments = problem.moments
    forms = leverage_forms(problem.features, moments.scale, damped_inverse(moments.second_moment, 0.3))
    torch.testing.assert_close(forms / N, hat.diagonal())
    head = fit_ridge_head(problem.features, problem.labels, moments, 0.3)
    torch.testing.assert_close(head.predict(problem.features), hat @ y)
    torch.testing.assert_close(head.left_out, (y - hat @ y) / (1 - hat.diagonal())[:, None])


def test_the_moments_of_the_first_features_are_those_of_the_features_alone():
    problem = Problem()
    few = problem.features[:, :2]
    kept = feature_moments(problem.features, problem.labels, C, [2, D - 3]).first(2)
    alone = feature_moments(few, problem.labels, C, [2])
    for name in ("gram", "targets", "scale"):
        torch.testing.assert_close(getattr(kept, name), getattr(alone, name))


class TestRefusals:
    def test_a_damping_below_rounding_errors(self):
        matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-9]], dtype=torch.float64)
        with pytest.raises(
            ValueError, match=r"`damping` must be large enough .*got 1e-12. Raise it \(the default is 0.3\)"
        ):
            damped_inverse(matrix, 1e-12)
        assert torch.isfinite(damped_inverse(matrix, 1e-6)).all()

    @pytest.mark.parametrize("name", CURVATURES)
    def test_probabilities_without_uncertainty(self, name):
        problem = Problem()
        problem.probabilities = F.one_hot(problem.labels, C).double()
        with pytest.raises(
            ValueError,
            match="`temperature` must leave the model some uncertainty; got probabilities that are",
        ):
            problem.fit(name, 0.3)

    def test_logits_with_nan(self):
        problem = Problem()
        problem.probabilities[3, 1] = float("nan")
        with pytest.raises(
            ValueError, match="`model` must return logits without NaN; got NaN for training example 3"
        ):
            problem.fit("identity", 0.3)


def test_moments_are_a_plain_value():
    moments = Moments(torch.eye(2), torch.zeros(2, 1), torch.tensor([3.0, 1.0]), 2)
    assert moments.second_moment.tolist() == [[4.5, 0.0], [0.0, 0.5]]
