from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stride_captum.evaluation import statistics


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture(params=["distinct", "ties"])
def columns(request, generator):
    a, b = generator.standard_normal((2, 40, 7))
    b += a * generator.uniform(-2, 2, 7)
    return (a, b) if request.param == "distinct" else (np.round(a), np.round(b))


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (statistics.spearman, stats.spearmanr),
        (statistics.pearson, stats.pearsonr),
        (statistics.kendall, stats.kendalltau),
    ],
)
class TestCorrelations:
    def test_every_column_agrees_with_scipy(self, ours, oracle, columns):
        a, b = columns
        expected = [oracle(a[:, j], b[:, j])[0] for j in range(a.shape[1])]
        np.testing.assert_allclose(ours(a, b), expected, atol=1e-12)

    def test_further_axes_are_columns(self, ours, oracle, columns):
        a, b = columns
        shape = (len(a), 7, 1)
        np.testing.assert_array_equal(ours(a.reshape(shape), b.reshape(shape))[:, 0], ours(a, b))

    def test_constant_and_nan_columns_are_undefined_and_others_untouched(self, ours, oracle, columns):
        a, b = (v.copy() for v in columns)
        expected = ours(a, b)
        a[:, 1] = 0.1
        b[:, 3] = -7.0
        a[5, 4] = np.nan
        result = ours(a, b)
        assert np.isnan(result[[1, 3, 4]]).all()
        kept = [0, 2, 5, 6]
        np.testing.assert_array_equal(result[kept], expected[kept])

    def test_scale_shift_and_sign(self, ours, oracle, columns):
        a, b = columns
        np.testing.assert_allclose(ours(3 * a + 2, b), ours(a, b), atol=1e-12)
        np.testing.assert_allclose(ours(-a, b), -ours(a, b), atol=1e-12)
        np.testing.assert_allclose(ours(a * 1e-200, b), ours(a, b), atol=1e-12)

    def test_wrong_shapes_are_refused(self, ours, oracle):
        with pytest.raises(ValueError, match=r"`a and b` must have one shape; got \(3,\) and \(4,\)"):
            ours(np.ones(3), np.ones(4))
        with pytest.raises(ValueError, match="at least 2 entries along axis 0"):
            ours(np.ones((1, 3)), np.ones((1, 3)))


@pytest.mark.parametrize("decimals", [8, 0])
def test_ranks_agree_with_scipy(generator, decimals):
    values = np.round(generator.standard_normal((30, 4, 3)), decimals)
    np.testing.assert_array_equal(statistics.ranks(values), stats.rankdata(values, axis=0))


def test_mean_defined_skips_nan_and_says_where_nothing_is_left():
    result = statistics.mean_defined([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]], axis=1)
    np.testing.assert_array_equal(result, [2.0, np.nan])


class TestCrossedBootstrap:
    @pytest.mark.parametrize("decimals", [8, 0])
    def test_each_draw_is_the_score_of_literally_repeated_rows_and_columns(self, generator, decimals):
        predictions = np.round(generator.standard_normal((2, 12, 5)), decimals)
        responses = np.round(predictions[0] + generator.standard_normal((12, 5)), decimals)
        draws = statistics.crossed_bootstrap(predictions, responses, n_resamples=20, seed=3)
        replay = np.random.default_rng(3)
        subsets = replay.multinomial(12, np.full(12, 1 / 12), size=20)
        tests = replay.multinomial(5, np.full(5, 1 / 5), size=20)
        for r in range(20):
            rows, cols = np.repeat(np.arange(12), subsets[r]), np.repeat(np.arange(5), tests[r])
            for g in range(2):
                one = statistics.spearman(predictions[g][np.ix_(rows, cols)], responses[np.ix_(rows, cols)])
                np.testing.assert_allclose(draws[r, g], statistics.mean_defined(one), atol=1e-12)

    def test_same_seed_same_bits_another_seed_other_draws(self, generator):
        p, r = generator.standard_normal((2, 10, 4))
        one, two, other = (
            statistics.crossed_bootstrap(p[None], r, n_resamples=30, seed=s) for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_groups_do_not_change_one_another(self, generator):
        p, r = generator.standard_normal((3, 10, 4)), generator.standard_normal((10, 4))
        together = statistics.crossed_bootstrap(p, r, n_resamples=25)
        alone = statistics.crossed_bootstrap(p[1:2], r, n_resamples=25)
        np.testing.assert_array_equal(together[:, 1], alone[:, 0])

    def test_undefined_columns_are_left_out(self, generator):
        p, r = generator.standard_normal((1, 10, 4)), generator.standard_normal((10, 4))
        p[:, :, 2] = 1.0
        assert np.isfinite(statistics.crossed_bootstrap(p, r, n_resamples=50)).mean() > 0.9
        assert np.isnan(statistics.crossed_bootstrap(np.ones_like(p), r, n_resamples=5)).all()

    def test_intervals_cover_the_planted_value_where_test_points_alone_do_not(self):
        generator = np.random.default_rng(1)
        n_subsets, n_test, width, trials = 40, 30, 3, 60
        truth = 6 / np.pi * np.arcsin(np.linspace(0.3, 0.9, 20_001) / 2).mean()
        crossed = test_points_alone = 0
        for trial in range(trials):
            mix = generator.standard_normal((width, n_test))
            mix /= np.linalg.norm(mix, axis=0)
            rho = generator.uniform(0.3, 0.9, n_test)
            signal, noise = generator.standard_normal((2, n_subsets, width)) @ mix
            responses = rho * signal + np.sqrt(1 - rho**2) * noise
            draws = statistics.crossed_bootstrap(signal[None], responses, n_resamples=200, seed=trial)[:, 0]
            span = statistics.interval(draws)
            crossed += span.low <= truth <= span.high
            values = statistics.spearman(signal, responses)
            naive = statistics.interval(values[generator.integers(0, n_test, (200, n_test))].mean(1))
            test_points_alone += naive.low <= truth <= naive.high
        assert crossed >= 0.87 * trials
        assert test_points_alone <= 0.8 * trials

    def test_global_random_state_is_left_alone(self, generator):
        before = np.random.get_state()[1].copy()
        p, r = generator.standard_normal((2, 10, 4))
        statistics.crossed_bootstrap(p[None], r, n_resamples=5)
        statistics.split_half_ceiling(generator.standard_normal((12, 5, 2)))
        np.testing.assert_array_equal(before, np.random.get_state()[1])

    def test_bad_arguments_are_refused(self):
        with pytest.raises(
            ValueError, match=r"`predictions` must have shape \(n_groups, n_subsets, n_test\)"
        ):
            statistics.crossed_bootstrap(np.ones((5, 4)), np.ones((5, 4)))
        with pytest.raises(ValueError, match="`n_resamples` must be at least 1; got 0"):
            statistics.crossed_bootstrap(np.ones((1, 5, 4)), np.ones((5, 4)), n_resamples=0)


class TestInterval:
    def test_percentiles_of_the_defined_draws(self):
        draws = np.append(np.arange(101.0), np.nan)
        assert statistics.interval(draws, 0.5) == statistics.Interval(25.0, 75.0, 0.5)
        assert str(statistics.interval(draws, 0.5)) == "[25.000, 75.000]"

    def test_no_defined_draw_gives_an_undefined_interval(self):
        assert np.isnan(statistics.interval([np.nan]).low)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95, np.nan])
    def test_level_must_be_a_fraction(self, level):
        with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\)"):
            statistics.interval([1.0], level)


class TestSplitHalfCeiling:
    @pytest.mark.parametrize("n_seeds", [2, 3, 4])
    def test_is_what_the_noiseless_response_scores(self, n_seeds):
        generator = np.random.default_rng(2)
        truth = generator.standard_normal((200, 300))
        responses = truth + 0.8 * generator.standard_normal((n_seeds, *truth.shape))
        achieved = statistics.spearman(truth, responses.mean(0)).mean()
        assert statistics.split_half_ceiling(responses) == pytest.approx(achieved, abs=0.012)

    def test_is_the_formula_for_two_retrainings(self, generator):
        responses = generator.standard_normal((50, 6)) + generator.standard_normal((2, 50, 6))
        r = np.mean([stats.spearmanr(responses[0][:, j], responses[1][:, j])[0] for j in range(6)])
        assert statistics.split_half_ceiling(responses) == pytest.approx(np.sqrt(2 * r / (1 + r)))

    def test_one_retraining_has_none(self, generator):
        assert statistics.split_half_ceiling(generator.standard_normal((1, 20, 3))) is None

    def test_constant_responses_have_none(self):
        assert statistics.split_half_ceiling(np.ones((2, 20, 3))) is None

    def test_halves_that_disagree_have_zero(self):
        up = np.arange(20.0)[:, None]
        assert statistics.split_half_ceiling(np.stack([up, -up])) == 0.0

    def test_identical_retrainings_have_one(self, generator):
        one = generator.standard_normal((20, 3))
        assert statistics.split_half_ceiling(np.stack([one] * 5)) == pytest.approx(1.0)

    @pytest.mark.parametrize(("n", "count"), [(2, 2), (3, 3), (4, 6), (40, 100)])
    def test_halvings_are_disjoint_cover_all_and_are_bounded(self, n, count):
        halvings = list(statistics._halvings(n))
        assert len(halvings) == count
        for half, rest in halvings:
            assert len(half) == n // 2
            assert sorted(half + rest) == list(range(n))

    def test_shape_is_checked(self):
        with pytest.raises(ValueError, match=r"`responses` must have shape \(n_seeds, n_subsets, n_test\)"):
            statistics.split_half_ceiling(np.ones(3))
