"""The ridge head: its leave-one-out residuals are those of a head that is fitted without the example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stride_captum.closed_form.moments import feature_moments
from stride_captum.closed_form.ridge_head import fit_ridge_head
from stride_captum.residuals import project_on_simplex

N, D, C = 30, 5, 4


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.randn(N, D, dtype=torch.float64, generator=generator)
    return features, torch.randint(C, (N,), generator=generator)


def left_out(features, labels, widths, damping):
    """N fits without one example each, in numpy."""
    layers = features.double().split(widths, 1)
    norms = [layer.square().sum(1).mean().sqrt() for layer in layers]
    parts = [layer / norm for layer, norm in zip(layers, norms, strict=True)]
    phi = torch.cat([*parts, torch.ones(len(features), 1)], 1).numpy()
    y = np.eye(C)[labels.numpy()]
    penalty = damping * np.mean(np.diag(phi.T @ phi)) * np.eye(phi.shape[1])
    residuals = []
    for i in range(len(phi)):
        others = np.arange(len(phi)) != i
        gram = phi[others].T @ phi[others] + penalty
        residuals.append(y[i] - phi[i] @ np.linalg.solve(gram, phi[others].T @ y[others]))
    return torch.from_numpy(np.stack(residuals))


@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_residuals_are_those_of_heads_without_the_example(damping):
    features, labels = problem()
    head = fit_ridge_head(features, labels, feature_moments(features, labels, C, [2, 3]), damping, 7)
    expected = left_out(features, labels, [2, 3], damping)
    torch.testing.assert_close(head.norms, expected.norm(dim=1), rtol=1e-10, atol=1e-10)
    e = F.one_hot(labels, C)
    for rows in (slice(0, N), slice(3, 9)):
        found = head.residuals(features[rows], labels[rows], rows)
        wanted = (e - project_on_simplex(e - expected))[rows]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert head.square == pytest.approx(float((e - project_on_simplex(e - expected)).square().sum()))


def test_slack_is_one_minus_the_leverage_and_predictions_are_those_of_the_ridge():
    features, labels = problem()
    moments = feature_moments(features, labels, C, [D])
    phi = torch.cat([features * moments.scale[:-1], torch.ones(N, 1)], 1)
    a = phi.T @ phi / N
    hat = phi @ torch.linalg.inv(a + 0.3 * a.diagonal().mean() * torch.eye(D + 1)) @ phi.T / N
    head = fit_ridge_head(features, labels, moments, 0.3)
    torch.testing.assert_close(head.slack, 1 - hat.diagonal())
    wider = torch.cat([features, features[:, :2]], 1).float()
    torch.testing.assert_close(head.predict(wider), hat @ F.one_hot(labels, C).double(), rtol=1e-5, atol=1e-6)


class TestFloat32:
    def test_an_example_that_is_alone_with_its_features_keeps_its_digits(self):
        """1 - H of an example a thousand times as large as the others is 1e-5: float32 lacks its digits."""
        features, labels = problem()
        features[4] *= 1e3
        single = features.float()
        moments = feature_moments(single, labels, C, [D])
        head = fit_ridge_head(single, labels, moments, 1e-4)
        expected = left_out(single, labels, [D], 1e-4)
        assert bool(head.delicate[4])
        assert float(head.slack[4]) < 1e-4
        torch.testing.assert_close(head.norms.double(), expected.norm(dim=1), rtol=1e-4, atol=0)
        e = F.one_hot(labels, C)
        found = head.residuals(single, labels, slice(0, N)).double()
        torch.testing.assert_close(found, e - project_on_simplex(e - expected), rtol=1e-4, atol=1e-6)

    def test_a_residual_that_is_nearly_nothing_keeps_its_digits(self):
        features, labels = problem()
        clear = F.one_hot(labels, D) + 1e-5 * features
        single = clear.float()
        moments = feature_moments(single, labels, C, [D])
        head = fit_ridge_head(single, labels, moments, 1e-4)
        e = F.one_hot(labels, C)
        expected = e - project_on_simplex(e - left_out(single, labels, [D], 1e-4))
        small = (expected.abs().amax(1) < 1e-3) & (expected.abs().amax(1) > 0)
        assert int(small.sum()) > N // 2
        found = head.residuals(single, labels, slice(0, N)).double()
        sizes = expected.abs().amax(1, keepdim=True).clamp_min(1e-300)
        assert float(((found - expected) / sizes).abs().max()) < 1e-4


def test_a_damping_too_small_is_refused_by_its_own_name():
    features, labels = torch.zeros(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    features[:, 0] = features[:, 1] = 1.0
    moments = feature_moments(features, labels, C, [2])
    with pytest.raises(ValueError, match="`head_damping` must be large enough to make the curvature"):
        fit_ridge_head(features, labels, moments, 1e-17)
