"""Class probabilities of a model that is sure of its training set: nothing cancels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stride_captum.closed_form.class_moments import class_moments, probabilities
from stride_captum.system.to_device import TrainingBlocks

N, C = 23, 5


def logits_with_margin(margin: float, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=generator)
    z = torch.randn(N, C, generator=generator).to(dtype)
    return (z + margin * F.one_hot(labels, C)).to(dtype), labels


def blocks(logits, labels, rows=7):
    return TrainingBlocks(torch.zeros(len(labels), 1), logits, labels, torch.float32, rows)


def exact(logits, labels, temperature):
    """Sums over pairs of classes, where no number is taken from another."""
    import math

    sigma, square = torch.zeros(C, C, dtype=torch.float64), 0.0
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        powers = [math.exp((v - max(z)) / temperature) for v in z]
        p = [v / math.fsum(powers) for v in powers]
        for a in range(C):
            for b in range(C):
                if a != b:
                    sigma[a, b] -= p[a] * p[b] / N
                    sigma[a, a] += p[a] * p[b] / N
        others = [v for c, v in enumerate(p) if c != y]
        square += math.fsum(v * v for v in others) + math.fsum(others) ** 2
    return sigma, square


@pytest.mark.parametrize("margin", [0.0, 30.0, 60.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_moments_of_every_margin_have_all_their_digits(margin, dtype, temperature):
    logits, labels = logits_with_margin(margin, dtype)
    sigma, square = exact(logits, labels, temperature)
    found = class_moments(blocks(logits, labels), temperature)
    assert found.unit == pytest.approx(float(sigma.trace()) / (C - 1), rel=1e-12)
    torch.testing.assert_close(found.covariance * found.unit, sigma, rtol=1e-12, atol=0)
    assert found.residual_square == pytest.approx(square, rel=1e-12)
    diagonal = class_moments(blocks(logits, labels), temperature, diagonal_only=True)
    torch.testing.assert_close(diagonal.covariance * diagonal.unit, sigma.diagonal(), rtol=1e-12, atol=0)
    assert diagonal.unit == pytest.approx(found.unit, rel=1e-12)


def test_probabilities_are_the_softmax():
    logits, labels = logits_with_margin(2.0)
    p = probabilities(logits, 1.5)
    expected = (logits / 1.5).softmax(1)
    torch.testing.assert_close(p.whole(), expected)
    torch.testing.assert_close(p.residuals(labels), F.one_hot(labels, C) - expected)
    torch.testing.assert_close(p.variances(), expected * (1 - expected))


def test_a_large_offset_of_all_logits_changes_nothing():
    logits, labels = logits_with_margin(3.0)
    logits = logits.round(decimals=2)
    found, wanted = (class_moments(blocks(z, labels), 3.0) for z in (logits + 2.0**20, logits))
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-8, atol=0)


def test_a_class_that_is_masked_has_no_variance():
    logits, labels = logits_with_margin(0.0)
    logits[:, 2] = -torch.inf
    labels[labels == 2] = 0
    found = class_moments(blocks(logits, labels), 1.0)
    assert bool((found.covariance[2] == 0).all())
    assert torch.isfinite(found.covariance).all()


@pytest.mark.parametrize(("bad", "what"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_logits_that_are_not_finite_are_refused(bad, what):
    logits, labels = logits_with_margin(0.0)
    logits[11, 2] = bad
    with pytest.raises(
        ValueError, match=f"`model` must return logits without {what}; got {what} for training example 11"
    ):
        class_moments(blocks(logits, labels), 1.0)


@pytest.mark.parametrize("diagonal_only", [False, True])
def test_where_nothing_is_uncertain_the_error_says_how_far_to_raise_the_temperature(diagonal_only):
    logits, labels = logits_with_margin(1200.0)
    message = (
        r"`temperature` must leave the model some uncertainty; got probabilities that are all 0 or 1 at a "
        r"temperature of 2\. Raise it to 40 or more, with `residuals` other than 'training'\."
    )
    data = blocks(logits, labels)
    with pytest.raises(ValueError, match=message):
        class_moments(data, 2.0, diagonal_only).checked(data, 2.0)
    assert class_moments(blocks(logits, labels), 40.0).unit > 1e-14
