from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from torch.nn import functional as F

from stride_captum.residuals import (
    RIDGE_SHARE,
    choose_residuals,
    match_temperature,
    mean_residual,
    one_hot,
    project_on_simplex,
    tempered_residuals,
)

N, D, C = 30, 5, 4


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.randn(N, D, dtype=torch.float64, generator=generator)
    labels = torch.randint(C, (N,), generator=generator)
    logits = torch.randn(N, C, dtype=torch.float64, generator=generator) + 3 * F.one_hot(labels, C)
    predictions = torch.rand(N, C, dtype=torch.float64, generator=generator)
    return features, logits, labels, predictions / predictions.sum(1, keepdim=True)


class TestTempered:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_is_minus_the_gradient_of_the_loss_at_the_tempered_logits(self, temperature):
        _, logits, labels, _ = problem()
        leaf = (logits / temperature).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(leaf, labels, reduction="sum"), leaf)
        torch.testing.assert_close(tempered_residuals(logits, labels, temperature), -gradient)

    def test_training_residuals_have_temperature_one(self):
        _, logits, labels, _ = problem()
        torch.testing.assert_close(
            tempered_residuals(logits, labels), tempered_residuals(logits, labels, 1.0)
        )

    def test_a_confident_float32_model_keeps_its_residuals(self):
        _, logits, labels, _ = problem()
        logits = logits + 20 * F.one_hot(labels, C)
        exact = tempered_residuals(logits, labels)
        assert exact.abs().max() < 1e-8
        torch.testing.assert_close(
            tempered_residuals(logits.float(), labels).double(), exact, rtol=1e-4, atol=0
        )

    def test_logits_that_are_all_large_keep_their_differences(self):
        _, logits, labels, _ = problem()
        logits = (8 * logits).round() / 8
        found = tempered_residuals((logits + 2.0**16).float(), labels, 3.0)
        torch.testing.assert_close(
            found.double(), tempered_residuals(logits, labels, 3.0), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_rounded_once(self, dtype):
        _, logits, labels, _ = problem()
        half = logits.to(dtype)
        found = tempered_residuals(half, labels, 2.0)
        assert found.dtype == dtype
        assert torch.equal(found, tempered_residuals(half.float(), labels, 2.0).to(dtype))


class TestSimplexProjection:
    def points(self):
        generator = torch.Generator().manual_seed(3)
        return 2 * torch.randn(25, 6, dtype=torch.float64, generator=generator)

    def test_is_the_shift_that_bisection_finds(self):
        points = self.points()
        for point, projected in zip(points.numpy(), project_on_simplex(points).numpy(), strict=True):
            shift = brentq(lambda t, p=point: np.maximum(p - t, 0).sum() - 1, point.min() - 1, point.max())
            np.testing.assert_allclose(projected, np.maximum(point - shift, 0), atol=1e-10)

    def test_is_the_nearest_point_of_the_simplex(self):
        points = self.points()[:4]
        for point, projected in zip(points.numpy(), project_on_simplex(points).numpy(), strict=True):
            nearest = minimize(
                lambda q, p=point: ((q - p) ** 2).sum(),
                np.full(6, 1 / 6),
                jac=lambda q, p=point: 2 * (q - p),
                bounds=[(0, 1)] * 6,
                constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
                method="SLSQP",
                options={"ftol": 1e-14},
            )
            np.testing.assert_allclose(projected, nearest.x, atol=1e-6)

    def test_leaves_probabilities_alone_and_gives_them(self):
        p = self.points().softmax(1)
        torch.testing.assert_close(project_on_simplex(p), p)
        q = project_on_simplex(100 * self.points())
        assert (q >= 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones(25, dtype=torch.float64))


class TestChoice:
    def test_each_option_is_its_formula(self):
        _, logits, labels, q = problem()
        e = one_hot(labels, logits)
        for kind, expected in [
            ("training", e - logits.softmax(1)),
            ("temperature", e - (logits / 2.5).softmax(1)),
            ("leave-one-out", e - q),
        ]:
            torch.testing.assert_close(choose_residuals(kind, logits, labels, q, 2.5)[0], expected)

    def test_both_is_a_mean_of_parts_of_equal_norm(self):
        _, logits, labels, q = problem()
        both, ratio = choose_residuals("both", logits, labels, q, 2.5)
        tempered = tempered_residuals(logits, labels, 2.5)
        ridge = (both - (1 - RIDGE_SHARE) * tempered) / RIDGE_SHARE
        torch.testing.assert_close(ridge.norm(), tempered.norm())
        torch.testing.assert_close(ridge, ratio * (one_hot(labels, logits) - q))

    def test_both_keeps_the_ratio_that_it_is_given(self):
        _, logits, labels, q = problem()
        both, ratio = choose_residuals("both", logits, labels, q, 2.5)
        some, used = choose_residuals("both", logits[:3], labels[:3], q[:3], 2.5, ratio)
        torch.testing.assert_close(some, both[:3])
        assert used is ratio

    def test_a_ridge_without_residuals_does_not_divide_by_zero(self):
        _, logits, labels, _ = problem()
        both, ratio = choose_residuals("both", logits, labels, one_hot(labels, logits), 2.0)
        assert ratio == 1
        torch.testing.assert_close(both, (1 - RIDGE_SHARE) * tempered_residuals(logits, labels, 2.0))

    def test_rows_sum_to_zero(self):
        _, logits, labels, q = problem()
        for kind in ("training", "temperature", "leave-one-out", "both"):
            residuals, _ = choose_residuals(kind, logits, labels, q, 3.0)
            assert residuals.sum(1).abs().max() < 1e-15


class TestTemperature:
    def test_mean_residual_is_half_the_l1_norm_of_the_residuals(self):
        _, logits, labels, _ = problem()
        for temperature in (1.0, 4.0):
            l1 = tempered_residuals(logits, labels, temperature).abs().sum(1)
            assert mean_residual(logits, labels, temperature) == pytest.approx(float(l1.mean()) / 2)

    @pytest.mark.parametrize("planted", [1.2, 3.0, 20.0])
    def test_a_planted_temperature_is_found(self, planted):
        _, logits, labels, _ = problem()
        target = mean_residual(logits, labels, planted)
        assert match_temperature(partial(mean_residual, logits, labels), target) == pytest.approx(
            planted, rel=2e-4
        )

    def test_a_mean_residual_keeps_its_digits_where_the_model_is_sure(self):
        _, logits, labels, _ = problem()
        logits = logits + 45 * F.one_hot(labels, C)
        expected = float(tempered_residuals(logits, labels).gather(1, labels[:, None]).mean())
        assert 0 < expected < 1e-18
        assert mean_residual(logits.float(), labels) == pytest.approx(expected, rel=1e-4)
        assert mean_residual(logits, labels) == pytest.approx(expected, rel=1e-12)

    def test_half_precision_logits_are_widened(self):
        _, logits, labels, _ = problem()
        half = logits.bfloat16()
        assert mean_residual(half, labels, 2.0) == pytest.approx(mean_residual(half.double(), labels, 2.0))

    def test_a_mean_residual_is_read_block_by_block(self, monkeypatch):
        _, logits, labels, _ = problem()
        whole = mean_residual(logits, labels, 2.0)
        monkeypatch.setattr("stride_captum.residuals._LOGITS", 3 * C)
        assert mean_residual(logits, labels, 2.0) == pytest.approx(whole)

    def test_it_is_clipped_to_its_bounds(self):
        _, logits, labels, _ = problem()
        assert match_temperature(partial(mean_residual, logits, labels), 0.0) == 1.0
        assert match_temperature(partial(mean_residual, logits, labels), 0.0, low=0.2) == 0.2
        assert match_temperature(partial(mean_residual, logits, labels), 1.0) == 100.0
