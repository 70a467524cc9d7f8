"""The shape of scores: its definition, its recovery from planted effects, and how little noise moves it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from stride_captum.recovery import effect_posterior, refine
from stride_captum.recovery.design import Design
from stride_captum.recovery.marginal_likelihood import design_effect
from stride_captum.recovery.score_shape import Shape, shaped
from stride_captum.subsets import random_subsets

N_TEST, N_TRAIN, N_SUBSETS = 60, 200, 20


def in_shape(scores: np.ndarray, power: float, opponents: float, membership: np.ndarray) -> np.ndarray:
    """The definition for each score."""
    squares = ((membership - membership.mean(0)) ** 2).sum(0)
    rows = []
    for s in scores:
        f = np.array([math.copysign(abs(v) ** power, v) * (opponents if v < 0 else 1) for v in s])
        rows.append(f * math.sqrt((squares * s**2).sum() / (squares * f**2).sum()))
    return np.stack(rows)


def planted(
    power: float,
    opponents: float,
    seed: int = 0,
    noise: float = 0.5,
    n_subsets: int = N_SUBSETS,
    few: bool = False,
):
    """Scores, membership, responses of effects in another shape than the scores, and these effects.

    With `few`, half of the test points have twenty large scores and small ones, and only they have effects in
    another shape.
    """
    generator = np.random.default_rng(seed)
    scores = np.exp(2 * generator.standard_normal((N_TEST, 1))) * generator.standard_normal((N_TEST, N_TRAIN))
    if few:
        scores[::2, 20:] *= 1e-2
    X = random_subsets(N_TRAIN, n_subsets, N_TRAIN // 2, seed).toarray()
    effects = 3 * in_shape(scores, power, opponents, X)
    if few:
        effects[1::2] = 3 * scores[1::2]
    signal = effects @ (X - X.mean(0)).T
    size = signal.std(1, keepdims=True)
    measured = signal + noise * size * generator.standard_normal(signal.shape)
    return torch.from_numpy(scores), X, torch.from_numpy(measured), torch.from_numpy(effects)


def columns_of(X: np.ndarray) -> Tensor:
    return Design(X, True, torch.device("cpu")).squares


class TestDefinition:
    @pytest.mark.parametrize("shape", [Shape(1.3, 1.5), Shape(0.7, 1.0), Shape(1.0, 0.6)], ids=str)
    def test_of_every_score(self, shape):
        scores, X, _, _ = planted(1.0, 1.0)
        X[:, :3], X[:, 3] = 1, 0  # examples in all subsets, and in none
        found = shaped(scores, shape, columns_of(X))
        np.testing.assert_allclose(found, in_shape(scores.numpy(), *shape, X), rtol=1e-12)

    def test_the_order_stays(self):
        scores, X, _, _ = planted(1.0, 1.0)
        found = shaped(scores, Shape(1.4, 2.0), columns_of(X))
        assert np.array_equal(rankdata(found, axis=1), rankdata(scores, axis=1))

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_scores_of_every_size(self, size):
        scores, X, _, _ = planted(1.0, 1.0)
        wanted = shaped(scores, Shape(1.4, 2.0), columns_of(X))
        torch.testing.assert_close(shaped(size * scores, Shape(1.4, 2.0), columns_of(X)) / size, wanted)

    def test_zeros_stay(self):
        X = planted(1.0, 1.0)[1]
        nothing = torch.zeros(2, N_TRAIN).double()
        assert torch.equal(shaped(nothing, Shape(1.4, 2.0), columns_of(X)), nothing)


def surprise(scores, X, measured, power, opponents) -> float:
    """Twice the negative log posterior of a shape, up to a constant, written out."""
    centered, y = X - X.mean(0), measured - measured.mean(1, keepdims=True)

    def residuals(*shape):
        f = in_shape(scores, *shape, X) if shape != (1, 1) else scores
        p, units = f @ centered.T, np.sqrt((f**2 @ (centered**2).sum(0)) / (len(X) - 1))[:, None]
        p, z = p / units, y / units
        return z - (p * z).sum() / (p * p).sum() * p

    before, after = residuals(1, 1), residuals(power, opponents)
    freedom = len(scores) * (len(X) - 1) / design_effect(torch.from_numpy(before))
    prior = (math.log(power) / 0.12) ** 2 + (math.log(opponents) / 0.35) ** 2
    return freedom * math.log((after**2).sum() / (before**2).sum()) + prior


class TestRefine:
    def test_it_is_the_most_likely_shape(self):
        scores, X, measured, _ = planted(1.3, 1.6, noise=2.0, few=True)
        found = refine(scores, X, measured)
        arrays = scores.numpy(), X, measured.numpy()
        best = surprise(*arrays, found.power, found.opponents)
        for power in (-0.02, 0, 0.02):
            for opponents in (-0.04, 0, 0.04):
                if power or opponents:
                    assert surprise(*arrays, found.power + power, found.opponents + opponents) > best
        assert found.opponents > 1.1

    def test_a_planted_shape_is_found(self):
        scores, X, measured, effects = planted(1.3, 1.6)
        found = refine(scores, X, measured)
        assert found.power == pytest.approx(1.3, abs=0.06)
        assert found.opponents == pytest.approx(1.6, abs=0.12)
        assert found.slope == pytest.approx(3, rel=0.05)
        torch.testing.assert_close(found.scores, effects, rtol=0.3, atol=0.1 * float(effects.abs().mean()))
        before = refine(scores, X, measured, power=1, opponents=1)
        errors = [((r.scores - effects).square().sum(1) / effects.square().sum(1)) for r in (found, before)]
        assert float(errors[0].mean()) < 0.3 * float(errors[1].mean())

    @pytest.mark.parametrize("fixed", ["power", "opponents"])
    def test_each_number_can_be_fixed(self, fixed):
        scores, X, measured, _ = planted(1.3, 1.6)
        found = refine(scores, X, measured, **{fixed: 0.9})
        assert getattr(found, fixed) == 0.9
        assert found.power != 1
        assert found.opponents != 1

    def test_a_fixed_shape_is_the_refinement_of_scores_in_it(self):
        scores, X, measured, _ = planted(1.0, 1.0)
        wanted = refine(
            torch.from_numpy(in_shape(scores.numpy(), 1.3, 1.5, X)), X, measured, power=1, opponents=1
        )
        found = refine(scores, X, measured, power=1.3, opponents=1.5)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-9, atol=0)
        assert found.slope_interval == pytest.approx(wanted.slope_interval, rel=1e-9)
        assert (found.slope, found.noise) == pytest.approx((wanted.slope, wanted.noise), rel=1e-9)

    def test_with_a_fixed_slope_the_scores_keep_their_shape(self):
        scores, X, measured, _ = planted(1.3, 1.6)
        found = refine(scores, X, measured, slope=3)
        assert (found.power, found.opponents) == (1, 1)

    def test_four_measurements_of_scores_that_are_right_hardly_change_them(self):
        shapes = [
            refine(*planted(1.0, 1.0, seed, noise=2.0, n_subsets=4)[:3], prior_scale=0) for seed in range(20)
        ]
        logarithms = np.log([[found.power, found.opponents] for found in shapes])
        assert np.abs(logarithms).mean(0).max() < 0.15
        assert np.abs(logarithms.mean(0)).max() < 0.1

    def test_noise_that_test_points_share_moves_it_no_more(self):
        """Sixty test points with one noise are one measurement, and not sixty."""
        logarithms = []
        for seed in range(20):
            scores, X, measured, _ = planted(1.0, 1.0, seed, noise=0.0, n_subsets=8)
            centered = measured - measured.mean(1, keepdim=True)
            noise = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
            found = refine(scores, X, centered + 2 * centered.std(1, keepdim=True) * noise, prior_scale=0)
            logarithms.append(np.log([found.power, found.opponents]))
        assert np.abs(logarithms).mean(0).max() < 0.1

    def test_scores_that_measurements_contradict_come_back(self):
        scores, X, measured, _ = planted(1.3, 1.6)
        found = refine(scores, X, -measured)
        assert not found.supported
        assert (found.power, found.opponents) == (1, 1)
        assert torch.equal(found.scores, scores)

    def test_sums_over_subsets_agree_better_with_new_ones(self):
        scores, X, measured, effects = planted(1.3, 1.6, noise=1.0)
        others = random_subsets(N_TRAIN, 50, N_TRAIN // 2, 99).toarray().T
        found, before = (refine(scores, X, measured, **f).scores for f in ({}, {"power": 1, "opponents": 1}))
        truth = effects.numpy() @ others
        lds = [
            np.mean([spearmanr(a, b).statistic for a, b in zip(s.numpy() @ others, truth, strict=True)])
            for s in (found, before)
        ]
        assert lds[0] > lds[1] + 0.02

    def test_two_hundred_test_points_determine_it(self, monkeypatch):
        """Evenly spaced ones whose scores and responses are finite."""
        scores, X, measured, _ = planted(1.3, 1.6)
        scores, measured = scores.repeat(5, 1), measured.repeat(5, 1)
        scores[-1, 0] = math.nan
        read = []
        monkeypatch.setattr(effect_posterior, "fit_shape", lambda s, *rest: read.append(s) or Shape(1.2, 1.1))
        found = refine(scores, X, measured)
        assert (found.power, found.opponents) == (1.2, 1.1)
        (s,) = read
        assert len(s) == 200
        assert torch.equal(s[[0, -1]], scores[[0, -2]])

    @pytest.mark.parametrize("name", ["power", "opponents"])
    @pytest.mark.parametrize(
        ("value", "error"), [(0, ValueError), (-1, ValueError), (math.nan, ValueError), ("2", TypeError)]
    )
    def test_refusals(self, name, value, error):
        scores, X, measured, _ = planted(1.0, 1.0)
        with pytest.raises(error, match=f"`{name}` must be"):
            refine(scores, X, measured, **{name: value})
