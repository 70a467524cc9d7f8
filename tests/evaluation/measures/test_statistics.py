from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stride_captum.evaluation.measures import statistics
from stride_captum.evaluation.measures.split_halves import _halvings, split_half_ceiling


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
        draws = statistics.crossed_draws(predictions, responses, n_resamples=20, seed=3)[0]
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
        one, two, other = (statistics.crossed_draws(p[None], r, n_resamples=30, seed=s)[0] for s in (0, 0, 1))
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_groups_do_not_change_one_another(self, generator):
        p, r = generator.standard_normal((3, 10, 4)), generator.standard_normal((10, 4))
        together = statistics.crossed_draws(p, r, n_resamples=25)[0]
        alone = statistics.crossed_draws(p[1:2], r, n_resamples=25)[0]
        np.testing.assert_array_equal(together[:, 1], alone[:, 0])

    def test_undefined_columns_are_left_out(self, generator):
        p, r = generator.standard_normal((1, 10, 4)), generator.standard_normal((10, 4))
        p[:, :, 2] = 1.0
        assert np.isfinite(statistics.crossed_draws(p, r, n_resamples=50)[0]).mean() > 0.9
        assert np.isnan(statistics.crossed_draws(np.ones_like(p), r, n_resamples=5)[0]).all()

    def test_undefined_columns_count_as_zero_beside_it(self, generator):
        p, r = generator.standard_normal((1, 10, 4)), generator.standard_normal((10, 4))
        p[:, :, 2] = 1.0
        left_out, as_zero = statistics.crossed_draws(p, r, n_resamples=50)
        weight = statistics.crossed_counts(10, 4, 50, 0)[1][:, 2] / 4
        np.testing.assert_allclose(as_zero[:, 0], np.nan_to_num(left_out[:, 0]) * (1 - weight))
        assert (statistics.crossed_draws(np.ones_like(p), r, n_resamples=5)[1] == 0).all()

    @pytest.mark.slow
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
            draws = statistics.crossed_draws(signal[None], responses, n_resamples=200, seed=trial)[0][:, 0]
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
        statistics.crossed_draws(p[None], r, n_resamples=5)[0]
        split_half_ceiling(generator.standard_normal((12, 5, 2)))
        np.testing.assert_array_equal(before, np.random.get_state()[1])

    def test_bad_arguments_are_refused(self):
        with pytest.raises(
            ValueError, match=r"`predictions` must have shape \(n_groups, n_subsets, n_test\)"
        ):
            statistics.crossed_draws(np.ones((5, 4)), np.ones((5, 4)))[0]
        with pytest.raises(ValueError, match="`n_resamples` must be at least 1; got 0"):
            statistics.crossed_draws(np.ones((1, 5, 4)), np.ones((5, 4)), n_resamples=0)[0]


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


def many_subsets(generator, n_subsets, n_test, width=8):
    """Predictions and responses of subsets that share factors, as retrained models do."""

    def factors():
        mix = generator.standard_normal((n_test, width)) / width**0.5
        shared = generator.standard_normal((n_subsets, width)) @ mix.T
        return 0.7 * shared + 0.7 * generator.standard_normal((n_subsets, n_test))

    effect = factors()
    return effect + 0.3 * generator.uniform(0.3, 1.7, n_test) * factors(), effect + 0.3 * factors()


class TestCoverage:
    """Shares of intervals of 95% that hold the truth, in simulations; printed with -s."""

    @pytest.mark.slow
    def test_of_lds_is_right_on_both_sides_where_percentiles_as_they_are_lie_too_low(self):
        generator = np.random.default_rng(4)
        samples = [many_subsets(generator, 4000, 300) for _ in range(12)]
        truth = np.mean([statistics.spearman(p, r).mean() for p, r in samples])
        trials, misses = 300, {"before": np.zeros(2), "after": np.zeros(2)}
        for trial in range(trials):
            predictions, responses = many_subsets(generator, 60, 80)
            value = statistics.spearman(predictions, responses).mean(0, keepdims=True)
            draws = statistics.crossed_draws(predictions[None], responses, n_resamples=200, seed=trial)[0]
            for name, used in (("before", draws), ("after", statistics.without_bias(draws, value))):
                span = statistics.interval(used[:, 0])
                misses[name] += [truth < span.low, truth > span.high]
        below, above = (misses[name] / trials for name in ("before", "after"))
        print(f"LDS: {1 - below.sum():.1%} before (misses {below}), {1 - above.sum():.1%} after ({above})")
        assert misses["before"].sum() > 0.15 * trials
        assert misses["before"][0] == 0  # the truth is never below the interval
        assert misses["after"].sum() <= 0.07 * trials
        assert misses["after"].max() <= 0.05 * trials

    @pytest.mark.slow
    @pytest.mark.parametrize(("n_seeds", "n_test"), [(2, 6), (3, 10)])
    @pytest.mark.parametrize("spread_of_seeds", [0.0, 0.05])
    def test_of_few_test_points_is_right_where_percentiles_are_too_narrow(
        self, n_seeds, n_test, spread_of_seeds
    ):
        generator = np.random.default_rng(5)
        trials, held = 1500, {"before": 0, "after": 0}
        for _ in range(trials):
            drops = generator.beta(0.8, 1.2, n_test)  # of most points little, of some nearly all
            table = drops + spread_of_seeds * generator.standard_normal((n_seeds, 1))
            table = table + 0.05 * generator.standard_normal((n_seeds, n_test))
            seeds, tests = statistics.crossed_counts(n_seeds, n_test, 200, int(generator.integers(2**31)))
            resampled = np.einsum("rs,st,rt->r", seeds, table, tests) / table.size
            for name, span in (
                ("before", statistics.interval(resampled)),
                ("after", statistics.t_interval(table, table.mean())),
            ):
                held[name] += span.low <= 0.4 <= span.high
        before, after = (held[name] / trials for name in ("before", "after"))
        print(f"{n_test} points, {n_seeds} seeds: {before:.1%} before, {after:.1%} after")
        assert before < 0.925
        assert 0.925 < after < 0.965


class TestWithoutBias:
    def test_draws_move_by_twice_their_distance_from_the_estimate(self):
        draws = np.array([[0.4, np.nan], [0.5, 0.1], [np.nan, 0.3]])
        found = statistics.without_bias(draws, np.array([0.5, 0.2]))
        np.testing.assert_allclose(found, [[0.5, np.nan], [0.6, 0.1], [np.nan, 0.3]])


class TestStudent:
    def test_without_seeds_it_is_the_interval_of_a_mean(self, generator):
        values = generator.standard_normal(7)
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
        found = statistics.t_interval(values[None], values.mean(), 0.9)
        assert (found.low, found.high, found.level) == pytest.approx((low, high, 0.9))

    def test_the_variance_is_that_of_the_two_way_layout(self, generator):
        table = generator.standard_normal((4, 6)) + 3 * generator.standard_normal((4, 1))
        by_test, by_seed = table.mean(0), table.mean(1)
        rest = [
            (table[s, t] - by_test[t] - by_seed[s] + table.mean()) ** 2 for s in range(4) for t in range(6)
        ]
        squares = 4 * by_test.var(ddof=1) + 6 * by_seed.var(ddof=1) - sum(rest) / (3 * 5)
        half = stats.t.ppf(0.975, 5) * (squares / 24) ** 0.5
        found = statistics.t_interval(table, table.mean())
        assert (found.low, found.high) == pytest.approx((table.mean() - half, table.mean() + half))

    def test_seeds_that_agree_more_than_by_chance_do_not_narrow_it(self, generator):
        points = generator.standard_normal(6)
        table = points + np.array([[1.0], [-1.0]]) * np.array([1, -1, 1, -1, 1, -1])
        alone = statistics.t_interval(points[None], 0.0)
        found = statistics.t_interval(table, 0.0)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))

    def test_test_points_with_a_missing_value_are_left_out(self, generator):
        table = generator.standard_normal((3, 6))
        table[1, 2] = np.nan
        whole = np.delete(table, 2, axis=1)
        assert statistics.t_interval(table, 0.1) == statistics.t_interval(whole, 0.1)

    def test_a_single_test_point_has_none(self):
        found = statistics.t_interval([[0.3], [0.4]], 0.35)
        assert not found.defined
        assert str(found) == "[undefined]"

    def test_level_must_be_a_fraction(self):
        with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\); got 95"):
            statistics.t_interval([[0.3, 0.4]], 0.35, 95)


class TestSplitHalfCeiling:
    @pytest.mark.parametrize("n_seeds", [2, 3, 4])
    def test_is_what_the_noiseless_response_scores(self, n_seeds):
        generator = np.random.default_rng(2)
        truth = generator.standard_normal((200, 300))
        responses = truth + 0.8 * generator.standard_normal((n_seeds, *truth.shape))
        achieved = statistics.spearman(truth, responses.mean(0)).mean()
        assert split_half_ceiling(responses) == pytest.approx(achieved, abs=0.012)

    def test_is_the_formula_for_two_retrainings(self, generator):
        responses = generator.standard_normal((50, 6)) + generator.standard_normal((2, 50, 6))
        r = np.mean([stats.spearmanr(responses[0][:, j], responses[1][:, j])[0] for j in range(6)])
        assert split_half_ceiling(responses) == pytest.approx(np.sqrt(2 * r / (1 + r)))

    def test_one_retraining_has_none(self, generator):
        assert split_half_ceiling(generator.standard_normal((1, 20, 3))) is None

    def test_constant_responses_have_none(self):
        assert split_half_ceiling(np.ones((2, 20, 3))) is None

    def test_halves_that_disagree_have_zero(self):
        up = np.arange(20.0)[:, None]
        assert split_half_ceiling(np.stack([up, -up])) == 0.0

    def test_identical_retrainings_have_one(self, generator):
        one = generator.standard_normal((20, 3))
        assert split_half_ceiling(np.stack([one] * 5)) == pytest.approx(1.0)

    @pytest.mark.parametrize(("n", "count"), [(2, 2), (3, 3), (4, 6), (40, 100)])
    def test_halvings_are_disjoint_cover_all_and_are_bounded(self, n, count):
        halvings = list(_halvings(n))
        assert len(halvings) == count
        for half, rest in halvings:
            assert len(half) == n // 2
            assert sorted(half + rest) == list(range(n))

    def test_shape_is_checked(self):
        with pytest.raises(ValueError, match=r"`responses` must have shape \(n_seeds, n_subsets, n_test\)"):
            split_half_ceiling(np.ones(3))
