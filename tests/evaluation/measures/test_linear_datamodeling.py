from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from stride_captum.evaluation.measures.linear_datamodeling import (
    difference,
    lds,
    margins,
)
from stride_captum.evaluation.measures.plain_values import plain
from stride_captum.evaluation.measures.statistics import Interval
from stride_captum.subsets import random_subsets

N_TRAIN, N_TEST, N_SUBSETS = 60, 8, 30


@pytest.fixture
def membership():
    return random_subsets(N_TRAIN, N_SUBSETS, N_TRAIN // 2, seed=1)


@pytest.fixture
def effects():
    return np.random.default_rng(0).standard_normal((N_TEST, N_TRAIN))


@pytest.fixture
def responses(membership, effects):
    noise = np.random.default_rng(5).standard_normal((2, N_SUBSETS, N_TEST))
    return membership @ effects.T + 2 * noise


@pytest.fixture
def models(effects):
    generator = np.random.default_rng(7)
    return [effects + generator.standard_normal(effects.shape) for _ in range(3)]


def literal_score(scores, membership, responses, correlation):
    dense, target = membership.toarray(), responses.mean(0)
    return [
        correlation([sum(scores[t] * row) for row in dense], target[:, t])[0] for t in range(target.shape[1])
    ]


def test_is_the_definition_written_out(models, membership, responses):
    result = lds(models, membership, responses, n_resamples=0)
    expected = np.array([literal_score(m, membership, responses, stats.spearmanr) for m in models])
    np.testing.assert_allclose(result.per_test, expected, atol=1e-12)
    np.testing.assert_allclose(result.per_model, expected.mean(1))
    assert result.value == pytest.approx(expected.mean())
    assert result.worst == pytest.approx(expected.mean(1).min())
    other = np.mean([literal_score(m, membership, responses, stats.pearsonr) for m in models])
    assert result.pearson == pytest.approx(other)


def test_models_are_scored_alone_and_scores_never_averaged(models, membership, responses):
    together = lds(models, membership, responses, n_resamples=0)
    alone = [lds(m, membership, responses, n_resamples=0).value for m in models]
    assert together.value == pytest.approx(np.mean(alone))
    ensemble = lds(np.mean(models, axis=0), membership, responses, n_resamples=0)
    assert ensemble.value > together.value + 0.02


def test_planted_additive_responses_score_one(effects, membership):
    result = lds(effects, membership, membership @ effects.T, n_resamples=50)
    assert result.value == pytest.approx(1.0)
    assert result.pearson == pytest.approx(1.0)
    assert (result.interval.low, result.interval.high) == pytest.approx((1.0, 1.0))


def test_flipping_the_sign_negates_and_scaling_a_test_point_changes_nothing(models, membership, responses):
    value = lds(models, membership, responses, n_resamples=0).value
    assert lds([-m for m in models], membership, responses, n_resamples=0).value == pytest.approx(-value)
    scale = np.linspace(0.1, 9, N_TEST)[:, None]
    assert lds([scale * m for m in models], membership, responses, n_resamples=0).value == pytest.approx(
        value
    )


def test_order_of_subsets_and_of_training_examples_does_not_matter(models, membership, responses):
    generator = np.random.default_rng(0)
    rows, cols = generator.permutation(N_SUBSETS), generator.permutation(N_TRAIN)
    one = lds(models, membership, responses, n_resamples=0)
    two = lds([m[:, cols] for m in models], membership[rows][:, cols], responses[:, rows], n_resamples=0)
    np.testing.assert_allclose(one.per_test, two.per_test, atol=1e-12)
    assert one.ceiling == pytest.approx(two.ceiling)


def test_arrays_tensors_stacks_and_lists_are_the_same_scores(models, membership, responses):
    value = lds(models, membership, responses, n_resamples=0).value
    tensors = [torch.tensor(m, requires_grad=True) for m in models]
    assert lds(tensors, membership, torch.tensor(responses), n_resamples=0).value == value
    assert lds(np.stack(models), membership, responses, n_resamples=0).value == value
    assert lds(tuple(models), membership, responses, n_resamples=0).value == value


def test_the_interval_is_the_crossed_bootstrap_of_the_mean_over_models(models, membership, responses):
    result = lds(models, membership, responses, n_resamples=200, level=0.9, seed=4)
    assert result.draws.shape == (200, 3)
    low, high = np.quantile(result.draws.mean(1), [0.05, 0.95])
    assert (result.interval.low, result.interval.high) == pytest.approx((low, high))
    assert result.interval.low < result.value < result.interval.high


def test_ceiling_needs_two_retrainings_and_bounds_perfect_scores(effects, membership, responses):
    assert lds(effects, membership, responses[0], n_resamples=0).ceiling is None
    result = lds(effects, membership, responses, n_resamples=0)
    assert result.value == pytest.approx(result.ceiling, abs=0.03)
    assert result.n_seeds == 2


def test_undefined_correlations_are_counted(models, membership, responses):
    clean = lds(models, membership, responses, n_resamples=0)
    models[0][2] = 0.0
    responses[:, :, 5] = 1.0
    result = lds(models, membership, responses, n_resamples=20)
    assert result.undefined == 1 + 3
    assert np.isnan(result.per_test[0, 2])
    assert np.isnan(result.per_test[:, 5]).all()
    kept = np.delete(clean.per_test[1], 5)
    assert result.per_model[1] == pytest.approx(kept.mean())
    assert result.undefined_as_zero == pytest.approx(np.nansum(result.per_test) / result.per_test.size)
    assert "4 of 24 undefined" in repr(result)


def test_scores_of_zero_have_no_value(membership, responses):
    result = lds(np.zeros((N_TEST, N_TRAIN)), membership, responses, n_resamples=5)
    assert np.isnan(result.value)
    assert np.isnan(result.worst)
    assert result.undefined == N_TEST
    assert result.undefined_as_zero == 0
    assert result.ranks_nothing
    assert repr(result).startswith("LDS undefined [undefined] (95%)")
    assert result.to_dict()["value"] is None


def test_result_is_read_at_a_glance_and_written_as_json(models, membership, responses):
    result = lds(models, membership, responses, n_resamples=20)
    assert repr(result).startswith(f"LDS {result.value:.3f} [{result.interval.low:.3f}, ")
    assert f"3 models, worst {result.worst:.3f}, ceiling {result.ceiling:.3f}, 0 of 24" in repr(result)
    assert "no ceiling" in repr(lds(models, membership, responses[0], n_resamples=0))
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["interval"] == {"low": result.interval.low, "high": result.interval.high, "level": 0.95}
    np.testing.assert_array_equal(read["per_test"], result.per_test)
    assert "draws" not in read


class TestDifference:
    def test_is_the_difference_of_the_values_and_antisymmetric(self, models, effects, membership, responses):
        exact = [effects] * 3
        a, b = (lds(s, membership, responses, n_resamples=100) for s in (exact, models))
        one, two = difference(a, b), difference(b, a)
        assert one.value == pytest.approx(a.value - b.value)
        np.testing.assert_allclose(one.per_model, np.subtract(a.per_model, b.per_model))
        assert (one.interval.low, one.interval.high) == pytest.approx((-two.interval.high, -two.interval.low))
        json.dumps(one.to_dict(), allow_nan=False)

    def test_a_method_does_not_differ_from_itself(self, models, membership, responses):
        result = difference(*(lds(models, membership, responses, n_resamples=20) for _ in range(2)))
        assert (result.value, result.interval.low, result.interval.high) == (0, 0, 0)

    def test_pairing_is_narrower_than_independent_draws(self, models, membership, responses):
        almost = [m + 0.1 * np.roll(m, 1, axis=1) for m in models]
        a, b = (lds(s, membership, responses, n_resamples=300) for s in (models, almost))
        paired = difference(a, b).interval
        shuffled = a.draws.mean(1) - np.random.default_rng(0).permutation(b.draws.mean(1))
        assert paired.high - paired.low < 0.7 * np.subtract(*np.quantile(shuffled, [0.975, 0.025]))

    def test_points_that_one_of_two_leaves_open_count_for_both(self):
        generator = np.random.default_rng(0)
        effects, halves = generator.standard_normal((50, 60)), random_subsets(60, 80, 30)
        measured = halves @ effects.T
        full = effects + np.linspace(0.2, 4, 50)[:, None] * generator.standard_normal(effects.shape)
        few = np.where(np.arange(50)[:, None] < 3, full, 0.0)  # the easy points alone
        a, b = (lds(s, halves, measured, n_resamples=100) for s in (few, full))
        assert a.value > b.value + 0.3
        gap = difference(a, b)
        assert gap.value == pytest.approx(a.undefined_as_zero - b.undefined_as_zero)
        assert gap.per_model == pytest.approx((gap.value,))
        assert gap.interval.low < gap.value < gap.interval.high < 0

    def test_with_a_method_that_ranks_nothing_there_is_none(self, models, membership, responses):
        result = lds(models, membership, responses, n_resamples=5)
        silent = [np.zeros_like(models[0]), *models[1:]]
        one = difference(lds(silent, membership, responses, n_resamples=5), result)
        assert np.isnan(one.per_model[0])
        assert one.per_model[1:] == (0, 0)
        assert one.value == 0
        none = difference(result, lds([0 * m for m in models], membership, responses, n_resamples=5))
        assert np.isnan(none.value)
        assert not none.interval.defined

    def test_without_resamples_there_is_no_interval(self, models, membership, responses):
        result = lds(models, membership, responses, n_resamples=0)
        assert difference(result, result).interval is None

    def test_results_of_other_problems_are_refused(self, models, membership, responses):
        result = lds(models, membership, responses, n_resamples=5)
        with pytest.raises(ValueError, match="`a and b` must have the same models, test points and subsets"):
            difference(result, lds(models[:2], membership, responses, n_resamples=5))
        with pytest.raises(ValueError, match="as many resamples as each other; got 5 and 6"):
            difference(result, lds(models, membership, responses, n_resamples=6))
        with pytest.raises(ValueError, match="one `seed`; got 0 and 1"):
            difference(result, lds(models, membership, responses, n_resamples=5, seed=1))


def test_values_for_json_are_pythons_own():
    found = plain(
        {
            "number": np.float32(0.5),
            1: np.int64(2),
            "flag": np.bool_(True),
            "undefined": [np.nan, float("inf"), np.float64(-np.inf)],
            "interval": Interval(0.1, np.nan),
            "nested": {"array": np.array([[1, 2]]), "names": ("a", None)},
            "device": torch.device("cpu"),
        }
    )
    assert found == {
        "number": 0.5,
        "1": 2,
        "flag": True,
        "undefined": [None] * 3,
        "interval": {"low": 0.1, "high": None, "level": 0.95},
        "nested": {"array": [[1, 2]], "names": ["a", None]},
        "device": "cpu",
    }
    assert [type(found[name]) for name in ("number", "1", "flag")] == [float, int, bool]
    json.dumps(found, allow_nan=False)


class TestMargins:
    def test_is_the_log_odds(self):
        logits = np.random.default_rng(0).standard_normal((2, 3, 5, 4)) * 4
        labels = np.array([0, 3, 1, 2, 0])
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        own = p[..., np.arange(5), labels]
        np.testing.assert_allclose(margins(logits, labels), np.log(own / (1 - own)), atol=1e-10)

    def test_confident_float32_logits_keep_their_digits(self):
        logits = np.array([[90.0, 0.0, -5.0]], dtype=np.float32)
        assert margins(logits, [0])[0] == pytest.approx(90 - np.log1p(np.exp(-5.0)), abs=1e-12)

    def test_logits_are_not_changed(self):
        logits = np.ones((3, 2))
        margins(logits, np.array([0, 1, 1]))
        np.testing.assert_array_equal(logits, np.ones((3, 2)))

    def test_labels_must_match(self):
        with pytest.raises(
            ValueError, match="`labels` must hold one label for each of the 3 test points; got 2"
        ):
            margins(np.ones((3, 2)), [0, 1])
        with pytest.raises(ValueError, match=r"`labels` must hold class indices in \[0, 2\); got 2"):
            margins(np.ones((1, 2)), [2])
        with pytest.raises(ValueError, match=r"`logits` must have shape \(\.\.\., n_test, n_classes\)"):
            margins(np.ones(3), [0, 1, 2])


class TestArguments:
    def test_shapes(self, models, membership, responses):
        with pytest.raises(ValueError, match=r"`scores` must have shape \(n_test, n_train\) = \(8, 60\)"):
            lds(models[0].T, membership, responses)
        with pytest.raises(ValueError, match=r"`responses` must have shape \(n_seeds, 30, n_test\) or"):
            lds(models, membership, responses[:, :-1])
        with pytest.raises(ValueError, match=r"got \(2, 30, 8, 1\)\. `margins` turns logits into responses"):
            lds(models, membership, responses[..., None])
        with pytest.raises(ValueError, match="`scores` must hold one matrix for each attributed model"):
            lds([], membership, responses)

    def test_values(self, models, membership, responses):
        models[1][0, 0] = np.nan
        with pytest.raises(ValueError, match="`scores` must be finite; got 1 values that are not"):
            lds(models, membership, responses)
        with pytest.raises(ValueError, match="`responses` must be finite"):
            lds(models[0], membership, np.where(responses > 0, np.inf, responses))

    def test_membership(self, models, membership, responses):
        with pytest.raises(TypeError, match=r"`membership` must be a scipy CSR matrix .*; got ndarray"):
            lds(models, membership.toarray(), responses)
        with pytest.raises(ValueError, match="`membership` must hold at least 3 subsets; got 2"):
            lds(models, membership[:2], responses[:, :2])

    def test_resampling(self, models, membership, responses):
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0; got -1"):
            lds(models, membership, responses, n_resamples=-1)
        with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\); got 95"):
            lds(models, membership, responses, n_resamples=5, level=95)
