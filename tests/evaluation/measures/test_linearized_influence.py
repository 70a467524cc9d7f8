from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from stride_captum.evaluation.measures.linearized_influence import (
    PENALTIES,
    linearized_influence,
    linearized_influence_correlation,
)
from stride_captum.subsets import partition, random_subsets

N_TRAIN, N_TEST = 20, 5


def problem(n_subsets, noise=0.5):
    generator = np.random.default_rng(0)
    membership = random_subsets(N_TRAIN, n_subsets, N_TRAIN // 2, seed=2)
    effects = generator.standard_normal((N_TEST, N_TRAIN))
    responses = 4 + membership @ effects.T + noise * generator.standard_normal((2, n_subsets, N_TEST))
    return membership, effects, responses


@pytest.mark.slow
@pytest.mark.parametrize("n_subsets", [12, 40])
def test_effects_are_the_ridge_whose_leave_one_out_error_is_least(n_subsets):
    membership, _, responses = problem(n_subsets)
    y = responses.mean(0)
    effects, penalty = linearized_influence(membership, y)
    dense = membership.toarray()
    reference = Ridge(alpha=penalty).fit(dense, y)
    np.testing.assert_allclose(effects, reference.coef_, atol=1e-9)

    centered = dense - dense.mean(0)
    scale = np.trace(centered @ centered.T) / (n_subsets - 1)
    errors = [
        ((cross_val_predict(Ridge(alpha=p * scale), dense, y, cv=LeaveOneOut()) - y) ** 2).sum()
        for p in PENALTIES
    ]
    assert penalty == pytest.approx(scale * PENALTIES[int(np.argmin(errors))])


def test_many_retrainings_recover_the_planted_effects_up_to_their_sum():
    membership, effects, responses = problem(120, noise=0.01)
    found, _ = linearized_influence(membership, responses.mean(0))
    centered = effects - effects.mean(1, keepdims=True)  # subsets of one size say nothing of the sum
    np.testing.assert_allclose(found, centered, atol=0.02)
    result = linearized_influence_correlation(effects, membership, responses)
    assert result.spearman > 0.99
    assert result.ceiling > 0.99


def test_correlations_are_those_of_scipy_for_each_test_point():
    membership, effects, responses = problem(30)
    models = [effects + np.random.default_rng(s).standard_normal(effects.shape) for s in range(3)]
    truth, _ = linearized_influence(membership, responses.mean(0))
    result = linearized_influence_correlation(models, membership, responses)
    expected = np.array([[stats.spearmanr(s, t)[0] for s, t in zip(m, truth, strict=True)] for m in models])
    np.testing.assert_allclose(result.per_test, expected, atol=1e-12)
    assert result.spearman == pytest.approx(expected.mean())
    assert result.worst == pytest.approx(expected.mean(1).min())
    pearson = [stats.pearsonr(s, t)[0] for m in models for s, t in zip(m, truth, strict=True)]
    assert result.pearson == pytest.approx(np.mean(pearson))
    assert result.n_items == N_TRAIN


def test_subset_level_reading_sums_scores_and_effects():
    membership, effects, responses = problem(30)
    groups = partition(N_TRAIN, 6, seed=3)
    truth, _ = linearized_influence(membership, responses.mean(0))
    result = linearized_influence_correlation(effects, membership, responses, groups=groups)
    dense = groups.toarray()
    expected = [stats.spearmanr(dense @ s, dense @ t)[0] for s, t in zip(effects, truth, strict=True)]
    np.testing.assert_allclose(result.per_test[0], expected, atol=1e-12)
    assert result.n_items == 6


def test_few_retrainings_have_a_low_ceiling_and_more_raise_it():
    ceilings = [
        linearized_influence_correlation(effects, membership, responses).ceiling
        for membership, effects, responses in (problem(n, noise=2.0) for n in (8, 30, 100))
    ]
    assert ceilings == sorted(ceilings)
    assert ceilings[-1] > ceilings[0] + 0.2


def test_same_seed_same_result_and_json():
    membership, effects, responses = problem(20)
    one, two = (linearized_influence_correlation(effects, membership, responses, seed=1) for _ in range(2))
    assert json.dumps(one.to_dict(), allow_nan=False) == json.dumps(two.to_dict(), allow_nan=False)
    assert f"ceiling {one.ceiling:.3f}, 20 items, 0 of 5 undefined" in repr(one)


def test_undefined_correlations_are_counted():
    membership, effects, responses = problem(20)
    effects[3] = 0
    responses[:, :, 1] = 2.0
    result = linearized_influence_correlation(effects, membership, responses)
    assert result.undefined == 2
    nothing = linearized_influence_correlation(0 * effects, membership, 0 * responses)
    assert nothing.undefined == N_TEST
    assert nothing.ceiling is None
    assert "no ceiling" in repr(nothing)


def test_bad_arguments_are_refused():
    membership, effects, responses = problem(20)
    with pytest.raises(ValueError, match="`membership` must hold at least 6 subsets, to be halved; got 5"):
        linearized_influence_correlation(effects, membership[:5], responses[:, :5])
    with pytest.raises(ValueError, match="`groups` must have 20 columns, as `membership`; got 21"):
        linearized_influence_correlation(effects, membership, responses, groups=partition(21, 3))
    with pytest.raises(ValueError, match="`n_splits` must be at least 1; got 0"):
        linearized_influence_correlation(effects, membership, responses, n_splits=0)
    with pytest.raises(ValueError, match="`n_resamples` must be at least 1; got 0"):
        linearized_influence_correlation(effects, membership, responses, n_resamples=0)
