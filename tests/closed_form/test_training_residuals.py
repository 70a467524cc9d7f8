"""Out-of-sample residuals as a plain function of features, logits and labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stride_captum import STRIDE, ClosedForm
from stride_captum.closed_form import moments
from stride_captum.closed_form.training_residuals import out_of_sample_residuals
from stride_captum.residuals import RIDGE_SHARE, project_on_simplex, tempered_residuals

N, C, WIDTHS = 24, 3, [2, 4, 3]


def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, sum(WIDTHS), dtype=torch.float64, generator=generator)
    logits = torch.randn(N, C, dtype=torch.float64, generator=generator)
    return features, logits, torch.randint(C, (N,), generator=generator)


def left_out(features, labels, weights, damping=0.1):
    """Residuals of one ridge regression an example, on all layers but the last."""
    total, parts = weights.sum(), []
    for layer in features.split(WIDTHS, 1)[:-1]:
        parts.append(layer / ((weights[:, None] * layer.square()).sum() / total).sqrt())
    phi = torch.cat([*parts, torch.ones(N, 1)], 1)
    gram = phi.T @ (weights[:, None] * phi)
    penalty = damping * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    e, residuals = F.one_hot(labels, C).double(), []
    for i in range(N):
        omega = weights * (torch.arange(N) != i)
        own = phi.T @ (omega[:, None] * phi) + penalty
        prediction = phi[i] @ torch.linalg.solve(own, phi.T @ (omega[:, None] * e))
        residuals.append(e[i] - project_on_simplex(prediction[None])[0])
    return torch.stack(residuals)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["leave-one-out", "both"])
def test_they_are_those_of_heads_without_the_example(kind, weighted):
    features, logits, labels = problem()
    weights = torch.arange(N).remainder(3).double() if weighted else torch.ones(N).double()
    given = weights if weighted else None
    found = out_of_sample_residuals(features, logits, labels, WIDTHS, kind, 2.0, weights=given)
    wanted = ridge = left_out(features, labels, weights)
    if kind == "both":
        tempered = tempered_residuals(logits, labels, 2.0)
        above, below = ((weights[:, None] * part.square()).sum() for part in (tempered, ridge))
        wanted = (1 - RIDGE_SHARE) * tempered + RIDGE_SHARE * (above / below).sqrt() * ridge
    torch.testing.assert_close(found, weights[:, None] * wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["leave-one-out", "both"])
def test_they_are_those_of_stride(kind):
    features, logits, labels = problem()
    operators = ClosedForm(residuals=kind, temperature=2.0)
    stride = STRIDE.from_features(features, logits, labels, widths=WIDTHS, operators=operators).fit()
    found = out_of_sample_residuals(features, logits, labels, WIDTHS, kind, 2.0)
    torch.testing.assert_close(found, stride.operators_.residuals, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["training", "temperature"])
def test_residuals_that_need_no_head_are_fitted_without_one(kind, tmp_path):
    features, logits, labels = problem()

    def method(kind):
        operators = ClosedForm(residuals=kind, temperature=2.0)
        return STRIDE.from_features(features, logits, labels, widths=WIDTHS, operators=operators)

    without = method(kind).fit()
    assert without.operators_.head is None
    assert without.influence((features[:2], logits[:2], labels[:2])).shape == (2, N)
    assert "ridge_head" not in vars(without.operators_)
    without.save(tmp_path / "saved")
    loaded = STRIDE.load(tmp_path / "saved", without.model, without.train_dataset)
    for asked in (without, loaded):  # a head is fitted when it is asked for
        torch.testing.assert_close(asked.mislabel_scores(), method("both").mislabel_scores(), rtol=0, atol=0)
    assert without.operators_.head is None


def test_a_small_damping_takes_products_in_float64(monkeypatch):
    monkeypatch.setattr(moments, "_CHEAP", 0)  # or all would be float64
    features, logits, labels = problem()
    features = (features + 30).float()
    exact, rounded = (
        out_of_sample_residuals(given, logits, labels, WIDTHS, "leave-one-out", head_damping=1e-5)
        for given in (features.double(), features)
    )
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 2**20])
def test_blocks_do_not_show(budget):
    features, logits, labels = problem()
    found = out_of_sample_residuals(features, logits, labels, WIDTHS, memory_budget=budget)
    whole = out_of_sample_residuals(features, logits, labels, WIDTHS)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_a_damping_too_small_for_the_features_is_refused():
    features, logits, labels = problem()
    with pytest.raises(ValueError, match="`head_damping` must be"):
        out_of_sample_residuals(features, logits, labels, WIDTHS, head_damping=1e-40)
