from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stride_captum.evaluation.measures.calibration import (
    calibration,
    calibration_of_removals,
    predicted_changes,
)
from stride_captum.evaluation.measures.counterfactual_drop import removals
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
    return 7 + 2 * (membership @ effects.T) + 0.5 * noise


class TestSubsets:
    def test_the_slope_of_an_additive_response_is_found_exactly(self, effects, membership):
        result = calibration(effects, membership, 3 + 2.5 * (membership @ effects.T), n_resamples=50)
        assert result.slope == pytest.approx(2.5)
        np.testing.assert_allclose(result.per_test, 2.5)
        assert (result.interval.low, result.interval.high) == pytest.approx((2.5, 2.5))
        assert result.r2 == pytest.approx(1)
        assert result.r2_as_predicted == pytest.approx(1 - 1.5**2 / 2.5**2)

    def test_scores_in_units_of_the_response_have_slope_one_and_explain_all(self, effects, membership):
        result = calibration(effects, membership, membership @ effects.T - 4, n_resamples=0)
        assert (result.slope, result.r2, result.r2_as_predicted) == pytest.approx((1, 1, 1))

    def test_scaling_the_scores_divides_the_slope(self, effects, membership, responses):
        one = calibration(effects, membership, responses, n_resamples=40)
        ten = calibration(10 * effects, membership, responses, n_resamples=40)
        assert ten.slope == pytest.approx(one.slope / 10)
        assert ten.interval.low == pytest.approx(one.interval.low / 10)
        assert ten.r2 == pytest.approx(one.r2)
        assert calibration(-effects, membership, responses, n_resamples=0).slope == pytest.approx(-one.slope)

    def test_slopes_are_those_of_least_squares(self, effects, membership, responses):
        scores = effects + np.random.default_rng(2).standard_normal(effects.shape)
        result = calibration(scores, membership, responses, n_resamples=0)
        predicted, measured = membership @ scores.T, responses.mean(0)
        for t in range(N_TEST):
            assert result.per_test[0, t] == pytest.approx(np.polyfit(predicted[:, t], measured[:, t], 1)[0])
        # One slope with an intercept for each test point.
        design = np.kron(np.eye(N_TEST), np.ones((N_SUBSETS, 1)))
        design = np.column_stack([predicted.T.reshape(-1), design])
        expected = np.linalg.lstsq(design, measured.T.reshape(-1), rcond=None)[0][0]
        assert result.slope == pytest.approx(expected)

    def test_noise_of_the_retrainings_does_not_bias_the_slope_but_noise_of_the_scores_does(
        self, effects, membership, responses
    ):
        assert calibration(effects, membership, responses, n_resamples=0).slope == pytest.approx(2, abs=0.02)
        noisy = effects + np.random.default_rng(2).standard_normal(effects.shape)
        assert calibration(noisy, membership, responses, n_resamples=0).slope == pytest.approx(1, abs=0.15)

    def test_the_intercept_is_what_the_scores_miss_of_the_change_from_the_intact_model(
        self, effects, membership
    ):
        intact = 5 + effects.sum(1)
        responses = 5 + membership @ effects.T - 0.75
        result = calibration(effects, membership, responses, intact=np.stack([intact - 1, intact + 1]))
        assert (result.slope, result.intercept) == pytest.approx((1, -0.75))
        assert calibration(effects, membership, responses, n_resamples=0).intercept is None

    def test_the_interval_is_the_crossed_bootstrap_written_out(self, effects, membership, responses):
        result = calibration([effects, 2 * effects], membership, responses, n_resamples=60, seed=3)
        generator = np.random.default_rng(3)
        rows = generator.multinomial(N_SUBSETS, np.full(N_SUBSETS, 1 / N_SUBSETS), size=60)
        tests = generator.multinomial(N_TEST, np.full(N_TEST, 1 / N_TEST), size=60)
        measured = responses.mean(0)
        for r in range(0, 60, 7):
            rows_r = np.repeat(np.arange(N_SUBSETS), rows[r])
            tests_r = np.repeat(np.arange(N_TEST), tests[r])
            p, m = (membership @ effects.T)[rows_r][:, tests_r], measured[rows_r][:, tests_r]
            p, m = p - p.mean(0), m - m.mean(0)
            expected = (p * m).sum() / (p * p).sum()
            np.testing.assert_allclose(result.draws[r], [expected, expected / 2])
        assert result.interval.low < result.slope < result.interval.high

    def test_models_are_fitted_alone(self, effects, membership, responses):
        result = calibration([effects, 4 * effects], membership, responses, n_resamples=0)
        assert result.per_model[0] == pytest.approx(4 * result.per_model[1])
        assert result.slope == pytest.approx(np.mean(result.per_model))

    def test_predictions_that_do_not_vary_have_no_slope(self, effects, membership, responses):
        effects[2] = 0
        result = calibration(torch.tensor(effects), membership, responses, n_resamples=0)
        assert result.undefined == 1
        assert np.isnan(result.per_test[0, 2])
        nothing = calibration(0 * effects, membership, responses, n_resamples=5)
        assert np.isnan(nothing.slope)
        assert nothing.to_dict()["slope"] is None

    def test_what_is_wrong_is_said(self, effects, membership, responses):
        with pytest.raises(ValueError, match=r"`scores` must have shape \(n_test, n_train\) = \(8, 60\)"):
            calibration(effects.T, membership, responses)
        with pytest.raises(ValueError, match=r"`intact` must have shape \(n_seeds, 8\); got \(7,\)"):
            calibration(effects, membership, responses, intact=np.zeros(7))
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0; got -1"):
            calibration(effects, membership, responses, n_resamples=-1)


class TestRemovals:
    counts = (2, 5, 9)

    @pytest.fixture
    def removed(self, effects):
        return removals(effects, self.counts)

    def test_predicted_changes_are_minus_the_sums(self, effects, removed):
        predicted = predicted_changes(effects, removed)
        for c, k in enumerate(self.counts):
            np.testing.assert_allclose(predicted[c], -np.sort(effects, axis=1)[:, -k:].sum(1))

    def test_a_linear_model_has_its_true_slope_and_intercept(self, effects, removed):
        predicted = predicted_changes(effects, removed)
        offsets = np.array([-0.1, 0.0, 0.1])
        measured = (3 * predicted + 0.4)[:, None] + offsets[:, None]
        result = calibration_of_removals(predicted, measured, n_resamples=50)
        assert (result.slope, result.intercept, result.r2) == pytest.approx((3, 0.4, 1))
        assert (result.interval.low, result.interval.high) == pytest.approx((3, 3))
        assert (result.n_groups, result.n_seeds) == (3, 3)

    def test_what_saturates_has_a_ratio_that_falls_with_the_count(self, effects, removed):
        predicted = predicted_changes(effects, removed)
        result = calibration_of_removals(predicted, np.tanh(predicted / 5)[:, None] * 5, n_resamples=0)
        assert result.per_count[0] > result.per_count[1] > result.per_count[2]
        exact = calibration_of_removals(predicted, predicted[:, None], n_resamples=0)
        assert exact.per_count == pytest.approx((1, 1, 1))
        assert (exact.slope, exact.intercept, exact.r2_as_predicted) == pytest.approx((1, 0, 1), abs=1e-12)

    def test_the_line_is_that_of_least_squares_and_a_single_point_goes_through_the_origin(
        self, effects, removed
    ):
        predicted = predicted_changes(effects, removed)
        measured = predicted[:, None] + np.random.default_rng(3).standard_normal((3, 2, N_TEST))
        result = calibration_of_removals(predicted, measured, n_resamples=30, seed=1)
        mean = measured.mean(1)
        slope, intercept = np.polyfit(predicted.reshape(-1), mean.reshape(-1), 1)
        assert (result.slope, result.intercept) == pytest.approx((slope, intercept))
        for t in range(N_TEST):
            own = np.linalg.lstsq(predicted[:, t : t + 1], mean[:, t], rcond=None)[0][0]
            assert result.per_test[0, t] == pytest.approx(own)
        generator = np.random.default_rng(1)
        seeds = generator.multinomial(2, [0.5, 0.5], size=30)
        tests = generator.multinomial(N_TEST, np.full(N_TEST, 1 / N_TEST), size=30)
        for r in range(0, 30, 5):
            columns = np.repeat(np.arange(N_TEST), tests[r])
            p = predicted[:, columns]
            m = measured[:, np.repeat([0, 1], seeds[r])].mean(1)[:, columns]
            assert result.draws[r, 0] == pytest.approx(np.polyfit(p.reshape(-1), m.reshape(-1), 1)[0])

    def test_result_is_read_at_a_glance_and_written_as_json(self, effects, removed):
        predicted = predicted_changes(effects, removed)
        result = calibration_of_removals(predicted, predicted[:, None], n_resamples=10)
        assert repr(result) == "slope 1.000 [1.000, 1.000] (95%), R2 1.000 (1.000 as predicted)"
        read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert read["per_count"] == pytest.approx([1, 1, 1])
        assert "draws" not in read

    def test_what_is_wrong_is_said(self, effects, removed):
        predicted = predicted_changes(effects, removed)
        with pytest.raises(ValueError, match=r"`measured` must have shape .*; got \(1, 3, 2, 7\) beside"):
            calibration_of_removals(predicted, np.zeros((3, 2, 7)))
        with pytest.raises(ValueError, match="`measured` must be finite; got 48 values that are not"):
            calibration_of_removals(predicted, np.full((3, 2, 8), np.nan))
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0"):
            calibration_of_removals(predicted, np.zeros((3, 2, 8)), n_resamples=-1)
