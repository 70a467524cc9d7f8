from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import multivariate_normal, spearmanr
from strict_device import DEVICE, strict_device
from torch import Tensor

import stride_captum
from stride_captum.recovery import RefinedScores, effect_posterior, refine
from stride_captum.recovery.marginal_likelihood import Hyperparameters, MarginalLikelihood
from stride_captum.subsets import membership_from_indices, random_subsets

FIXED = {"slope": 1.7, "prior_scale": 0.8, "noise": 1.3}


class Problem(NamedTuple):
    scores: Tensor
    membership: sparse.csr_matrix
    measured: Tensor
    effects: Tensor

    def refined(self, **fixed) -> RefinedScores:
        return refine(self.scores, self.membership, self.measured, **fixed)


def complementary(n_train: int, n_subsets: int, seed: int = 0) -> sparse.csr_matrix:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(n_subsets // 2):
        rows += np.array_split(generator.permutation(n_train), 2)
    return membership_from_indices(rows, n_train)


def planted(
    n_test: int = 30,
    n_train: int = 80,
    n_subsets: int = 24,
    *,
    slope: float = 2.0,
    prior_scale: float = 2.0,
    noise: float = 0.5,
    shared: int = 0,
    seed: int = 0,
    membership: sparse.csr_matrix | None = None,
) -> Problem:
    """Responses as the model has them, for test points of very different scales.

    Args:
        noise: Standard deviation relative to that of `X w`.
        shared: Number of noises of which that of all test points are mixtures; 0 for one each.
    """
    generator = np.random.default_rng(seed)
    scale = np.exp(2 * generator.standard_normal((n_test, 1)))
    scores = scale * generator.standard_normal((n_test, n_train))
    effects = scores * (slope + prior_scale * generator.standard_normal((n_test, n_train)))
    matrix = random_subsets(n_train, n_subsets, n_train // 2, seed) if membership is None else membership
    e = generator.standard_normal((n_test, matrix.shape[0]))
    if shared:
        mixture = generator.standard_normal((n_test, shared))
        mixture /= np.linalg.norm(mixture, axis=1, keepdims=True)
        e = mixture @ e[:shared]
    size = np.sqrt(slope**2 + prior_scale**2) * np.linalg.norm(scores, axis=1, keepdims=True) / 2
    measured = (
        effects @ matrix.toarray().T + noise * size * e + scale * generator.standard_normal((n_test, 1))
    )
    return Problem(*map(torch.from_numpy, (scores,)), matrix, *map(torch.from_numpy, (measured, effects)))


def contrasts(n_subsets: int) -> np.ndarray:
    """An orthonormal basis `(n_subsets - 1, n_subsets)` of the vectors of mean 0."""
    start = np.eye(n_subsets)
    start[:, 0] = 1
    return np.linalg.qr(start)[0][:, 1:].T


def dense(s: np.ndarray, matrix: sparse.csr_matrix, y: np.ndarray, slope, prior_scale, noise):
    """Means and variances of the contrasts of y, X and the prior, all written out for one test point."""
    Q = contrasts(len(y))
    X = Q @ matrix.toarray()
    prior = prior_scale**2 * np.diag(s**2)
    unit2 = np.trace(X @ np.diag(s**2) @ X.T) / len(X)
    V = X @ prior @ X.T + noise**2 * unit2 * np.eye(len(X))
    return X, prior, V, Q @ y


class TestPosterior:
    @pytest.mark.parametrize("n_train", [80, 12])
    @pytest.mark.parametrize("density", ["halves", "complementary", "sparse"])
    def test_is_the_dense_gaussian_posterior(self, n_train, density):
        matrix = {
            "halves": random_subsets(n_train, 24, n_train // 2),
            "complementary": complementary(n_train, 24),
            "sparse": random_subsets(n_train, 24, n_train // 8),
        }[density]
        p = planted(6, n_train, membership=matrix)
        found = p.refined(**FIXED)
        for t in range(6):
            s, y = p.scores[t].numpy(), p.measured[t].numpy()
            X, prior, V, z = dense(s, matrix, y, **FIXED)
            gain = prior @ X.T @ np.linalg.inv(V)
            mean = 1.7 * s + gain @ (z - 1.7 * X @ s)
            variance = np.diag(prior - gain @ X @ prior)
            np.testing.assert_allclose(found.scores[t], mean, rtol=1e-9, atol=1e-9 * np.abs(s).max())
            np.testing.assert_allclose(found.standard_deviation[t], np.sqrt(variance), rtol=1e-9)
        assert (found.slope, found.prior_scale, found.noise) == (1.7, 0.8, 1.3)
        assert found.supported
        assert all(map(math.isnan, found.slope_interval))

    def test_without_noise_and_with_columns_of_full_rank_it_is_least_squares(self):
        p = planted(5, 10, 30)
        assert np.linalg.matrix_rank(contrasts(30) @ p.membership.toarray()) == 9  # sizes are all 5
        X = p.membership[:, :9].toarray()
        scores = p.scores[:, :9]
        found = refine(scores, X, p.measured, slope=1.0, prior_scale=0.5, noise=0.0)
        design = np.column_stack([X, np.ones(30)])
        best = np.linalg.lstsq(design, p.measured.numpy().T, rcond=None)[0][:9].T
        np.testing.assert_allclose(found.scores, best, rtol=1e-7)
        assert bool((found.standard_deviation < 1e-6 * scores.abs()).all())

    def test_a_small_prior_scale_leaves_the_scores_times_the_slope(self):
        p = planted()
        small = p.refined(slope=1.7, prior_scale=1e-6, noise=1.0)
        torch.testing.assert_close(small.scores, 1.7 * p.scores, rtol=1e-9, atol=0)
        none = p.refined(slope=1.7, prior_scale=0, noise=1.0)
        assert torch.equal(none.scores, 1.7 * p.scores)
        assert not none.standard_deviation.any()

    def test_an_example_in_all_subsets_or_in_none_keeps_its_prior(self):
        p = planted()
        X = p.membership.toarray()
        X[:, 3], X[:, 5] = 1, 0
        found = refine(p.scores, X, p.measured, **FIXED)
        for i in (3, 5):
            torch.testing.assert_close(found.scores[:, i], 1.7 * p.scores[:, i])
            torch.testing.assert_close(found.standard_deviation[:, i], 0.8 * p.scores[:, i].abs())

    @pytest.mark.parametrize(("name", "value"), [("_BLOCK_CELLS", 700), ("_KEPT_CELLS", 0)])
    def test_neither_blocks_nor_kept_eigenvectors_change_it(self, name, value, monkeypatch):
        p = planted()
        expected = p.refined()
        monkeypatch.setattr(effect_posterior, name, value)
        found = p.refined()
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.standard_deviation, expected.standard_deviation, rtol=1e-9, atol=0)
        assert found.slope_interval == pytest.approx(expected.slope_interval, rel=1e-9)


class TestMarginalLikelihood:
    @pytest.mark.parametrize("density", ["halves", "complementary"])
    def test_is_the_dense_log_density(self, density):
        matrix = complementary(80, 12) if density == "complementary" else random_subsets(80, 12, 40)
        p = planted(4, membership=matrix)
        likelihood = spectra(p).likelihood
        expected = 0.0
        for s, y in zip(p.scores.numpy(), p.measured.numpy(), strict=True):
            X, _, V, z = dense(s, matrix, y, **FIXED)
            unit = math.sqrt(np.trace(X @ np.diag(s**2) @ X.T) / len(X))
            # the density of y / unit, whose units are those of the likelihood
            expected += multivariate_normal.logpdf(z / unit, 1.7 * X @ s / unit, V / unit**2)
        assert likelihood.value(Hyperparameters(**FIXED)) == pytest.approx(expected, rel=1e-10)

    def test_gradient_is_that_of_the_value(self):
        likelihood, at = spectra(planted()).likelihood, Hyperparameters(**FIXED)
        step = 1e-5
        numerical = [
            (likelihood.value(up) - likelihood.value(down)) / (2 * step)
            for up, down in (
                (at._replace(slope=1.7 + step), at._replace(slope=1.7 - step)),
                *(
                    tuple(at._replace(**{name: getattr(at, name) * math.exp(d)}) for d in (step, -step))
                    for name in ("prior_scale", "noise")
                ),
            )
        ]
        assert likelihood.gradient(at) == pytest.approx(numerical, rel=1e-6)

    @pytest.mark.parametrize(
        "fixed",
        [{}, {"slope": 1.5}, {"prior_scale": 0.7}, {"noise": 2.0}, {"slope": 1.5, "noise": 2.0}],
        ids=lambda fixed: "+".join(fixed) or "none",
    )
    def test_what_is_estimated_is_a_maximum(self, fixed):
        p = planted(membership=complementary(80, 24))
        likelihood, found = spectra(p).likelihood, p.refined(**fixed, power=1, opponents=1)
        at = Hyperparameters(found.slope, found.prior_scale, found.noise)
        assert at.prior_scale > 0
        for k, name in enumerate(at._fields):
            if name in fixed:
                assert getattr(at, name) == fixed[name]
                continue
            for factor in (0.5, 0.99, 1.01, 2.0):
                assert likelihood.value(at._replace(**{name: factor * at[k]})) < likelihood.value(at)
        scale = likelihood.measured.numel()
        free = [g for name, g in zip(at._fields, likelihood.gradient(at), strict=True) if name not in fixed]
        np.testing.assert_allclose(free, 0, atol=1e-8 * scale)

    def test_hyperparameters_are_recovered(self):
        found = planted(200, 100, 60, prior_scale=1.0, noise=0.5, seed=3).refined()
        size = 0.5 * math.sqrt(2**2 + 1)
        assert (found.slope, found.prior_scale, found.noise) == pytest.approx((2, 1, size), rel=0.05)

    def test_noise_has_a_floor(self):
        p = planted(noise=0.0, membership=complementary(80, 24))
        found = p.refined()
        assert found.noise == pytest.approx(0.1 * found.prior_scale)


def spectra(p: Problem) -> effect_posterior.Spectra:
    return effect_posterior.EffectPosterior(p.scores, p.membership, p.measured).spectra()


class TestCalibration:
    def test_intervals_have_their_coverage(self):
        """200 test points, 100 examples, 40 halves, noise as large as the signal."""
        covered = []
        for seed in range(3):
            p = planted(200, 100, 40, seed=seed)
            found = p.refined()
            covered.append(
                ((found.scores - p.effects).abs() < 1.645 * found.standard_deviation).double().mean()
            )
        assert np.mean(covered) == pytest.approx(0.9, abs=0.02)

    @pytest.mark.slow
    @pytest.mark.parametrize("shared", [0, 3])
    @pytest.mark.parametrize("design", ["random", "complementary"])
    def test_the_interval_of_the_slope_has_its_coverage(self, shared, design):
        """Also where test points share their noise, which pooled standard errors do not see."""
        covered = []
        for seed in range(100):
            matrix = complementary(60, 10, seed) if design == "complementary" else None
            p = planted(20, 60, 10, noise=1.0, shared=shared, seed=seed, membership=matrix)
            low, high = p.refined(power=1, opponents=1).slope_interval
            covered.append(low <= 2 <= high)
        assert 0.84 <= np.mean(covered) <= 0.96

    @pytest.mark.slow
    def test_the_interval_of_the_slope_leaves_out_little_where_the_shape_is_estimated(self):
        covered = []
        for seed in range(300):
            low, high = planted(20, 60, 10, noise=1.0, seed=seed).refined().slope_interval
            covered.append(low <= 2 <= high)
        assert 0.82 <= np.mean(covered) <= 0.94

    def test_the_correction_brings_scores_nearer_to_the_effects(self):
        p = planted(50, 100, 40, membership=complementary(100, 40))
        found = p.refined()
        scale = p.effects.square().sum(1)
        before = ((2 * p.scores - p.effects).square().sum(1) / scale).mean()
        after = ((found.scores - p.effects).square().sum(1) / scale).mean()
        assert after < 0.9 * before


class TestDoesNoHarm:
    @pytest.mark.slow
    @pytest.mark.parametrize("shared", [0, 3])
    def test_measurements_of_nothing_leave_the_ranks(self, shared):
        for seed in range(10):
            p = planted(40, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            nothing = torch.randn(40, 24, generator=generator, dtype=torch.float64)
            if shared:
                nothing = nothing[:, :shared] @ torch.randn(shared, 24, generator=generator).double()
            found = refine(p.scores, p.membership, p.scores.norm(dim=1, keepdim=True) * nothing)
            ranks = [spearmanr(a, b).statistic for a, b in zip(found.scores, p.scores, strict=True)]
            assert min(ranks) > 0.99
            assert abs(found.slope) < 0.5
            low, high = found.slope_interval
            assert low < found.slope < high
            assert found.supported == (low > 0)

    def test_a_slope_that_may_be_negative_is_reported_and_not_applied(self):
        p = planted()
        found = refine(p.scores, p.membership, -p.measured)
        assert (found.power, found.opponents) == (1, 1)
        assert found.slope == pytest.approx(-p.refined(power=1, opponents=1).slope)
        assert found.slope_interval[1] < 0
        assert not found.supported
        assert torch.equal(found.scores, p.scores)
        assert bool(found.standard_deviation.isnan().all())

    def test_noise_that_test_points_share_is_not_taken_for_effects(self):
        applied = []
        for seed in range(20):
            found = planted(
                100,
                200,
                12,
                prior_scale=0.0,
                noise=1.0,
                shared=3,
                membership=complementary(200, 12, seed),
                seed=seed,
            ).refined()
            applied.append(found.prior_scale > 0)
            if not applied[-1]:
                assert found.standard_deviation.isnan().all()
        assert sum(applied) <= 1

    def test_exact_measurements_give_the_slope(self):
        p = planted(noise=0.0, prior_scale=0.0)
        found = p.refined()
        assert found.slope == pytest.approx(2, rel=1e-9)
        torch.testing.assert_close(found.scores, 2 * p.scores, rtol=1e-9, atol=0)

    def test_residuals_of_exactly_zero(self):
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (5, 20), generator=generator).double() * 2 - 1
        halves = random_subsets(20, 4, 10)
        found = refine(signs, halves, torch.from_numpy((halves @ signs.numpy().T).T), slope=1)
        assert torch.equal(found.scores, signs)
        assert found.prior_scale == 0
        assert 0 < found.noise < 1e-9

    def test_responses_that_are_all_the_same_have_the_slope_0(self):
        p = planted()
        for fixed, expected in (({}, (0, 0, 0)), ({"prior_scale": 0.5}, (0, 0.5, 0.05))):
            found = refine(p.scores, p.membership, torch.ones(30, 24), **fixed)
            assert (found.slope, found.prior_scale, found.noise) == expected
            assert not found.supported

    @pytest.mark.parametrize("what", ["measured", "scores"])
    def test_what_does_not_differ_between_subsets_supports_nothing(self, what):
        p = planted()
        p = p._replace(**{what: torch.ones_like(getattr(p, what))})
        found = p.refined()
        assert not found.supported
        assert torch.equal(found.scores, p.scores)


class TestLaws:
    def test_permutations(self):
        p = planted()
        expected = p.refined()
        rng = np.random.default_rng(0)
        tests, examples, subsets = (rng.permutation(n) for n in (30, 80, 24))
        found = refine(
            p.scores[tests][:, examples], p.membership[subsets][:, examples], p.measured[tests][:, subsets]
        )
        assert_same(found, expected, lambda x: x[tests][:, examples])

    def test_scale_of_the_responses(self):
        p = planted()
        assert p.refined().prior_scale > 0
        scaled = refine(p.scores, p.membership, 7 * p.measured)
        assert_same(scaled, p.refined(), lambda x: 7 * x, 7)

    def test_scale_and_offset_of_one_test_point(self):
        p = planted()
        factor = torch.ones(30, 1, dtype=torch.float64)
        factor[3], factor[4] = 1e6, 1e-200
        found = refine(factor * p.scores, p.membership, factor * (p.measured + 5))
        assert_same(found, p.refined(), lambda x: factor * x)

    @pytest.mark.parametrize("where", ["scores", "measured"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_row_that_is_not_finite_is_nan_and_alone(self, where, value):
        p = planted()
        rest = torch.arange(30) != 4
        getattr(p, where)[4, 2] = value
        found = p.refined()
        assert bool(found.scores[4].isnan().all())
        assert bool(found.standard_deviation[4].isnan().all())
        alone = refine(p.scores[rest], p.membership, p.measured[rest])
        assert found.prior_scale > 0
        torch.testing.assert_close(found.scores[rest], alone.scores, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            found.standard_deviation[rest], alone.standard_deviation, rtol=1e-9, atol=0
        )
        unchanged = refine(p.scores, p.membership, -p.measured).scores
        assert unchanged[4].isnan().all()
        assert torch.equal(unchanged[rest], p.scores[rest])

    def test_a_row_of_zeros_stays_and_is_alone(self):
        p = planted()
        expected = p.refined()
        scores, measured = (torch.cat([x, 0 * x[:1] + v]) for x, v in ((p.scores, 0), (p.measured, 3)))
        measured[-1, 0] = 9
        found = refine(scores, p.membership, measured)
        assert_same(found, expected, lambda x: torch.cat([x, torch.zeros_like(x[:1])]))
        unchanged = refine(scores, p.membership, -measured)
        assert not unchanged.supported
        assert not unchanged.standard_deviation[-1].any()

    @pytest.mark.parametrize("rows", [0, 1])
    def test_nothing_to_learn_from(self, rows):
        p = planted()
        found = refine(0 * p.scores[:rows], p.membership, p.measured[:rows])
        assert found.scores.shape == (rows, 80)
        assert not found.scores.any()
        assert not found.standard_deviation.any()
        assert math.isnan(found.slope)
        assert found.slope_interval == (-math.inf, math.inf)
        assert not found.supported


def assert_same(found: RefinedScores, expected: RefinedScores, move, factor: float = 1) -> None:
    torch.testing.assert_close(found.scores, move(expected.scores), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.standard_deviation, move(expected.standard_deviation), rtol=1e-8, atol=0)
    for name in ("slope", "prior_scale", "noise", "slope_interval"):
        value = np.multiply(factor, getattr(expected, name))
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-8)


class TestInputs:
    @pytest.mark.parametrize("kind", ["numpy", "dense", "sparse", "scipy"])
    def test_arrays_and_tensors_are_alike(self, kind):
        p = planted()
        expected = p.refined()
        X = torch.from_numpy(p.membership.toarray())
        given = {"numpy": X.numpy(), "dense": X, "sparse": X.to_sparse(), "scipy": p.membership.tocsc()}[kind]
        arrays = [x.numpy() if kind == "numpy" else x for x in (p.scores, p.measured)]
        found = refine(arrays[0], given, arrays[1])
        assert torch.equal(found.scores, expected.scores)
        assert found.slope == expected.slope

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_dtype_of_the_scores_comes_back(self, dtype):
        p = planted()
        p = p._replace(scores=torch.nn.functional.normalize(p.scores).to(dtype))
        found = p.refined()
        exact = p._replace(scores=p.scores.double()).refined()
        assert found.scores.dtype == found.standard_deviation.dtype == dtype
        assert torch.equal(found.scores, exact.scores.to(dtype))
        assert torch.equal(found.standard_deviation, exact.standard_deviation.to(dtype))
        assert found.slope == exact.slope

    def test_whole_numbers_give_float64(self):
        p = planted()
        whole = (100 * torch.nn.functional.normalize(p.scores)).round().long()
        assert p._replace(scores=whole).refined().scores.dtype == torch.float64

    def test_nothing_given_is_changed(self):
        p = planted()
        before = [x.clone() for x in (p.scores, p.measured)]
        p.scores.requires_grad_(True)
        found = p.refined()
        assert not found.scores.requires_grad
        assert torch.equal(p.scores, before[0])
        assert torch.equal(p.measured, before[1])
        assert refine(p.scores, p.membership, -p.measured).scores.data_ptr() != p.scores.data_ptr()

    @pytest.mark.slow
    @pytest.mark.parametrize("float64", [True, False])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_tensors_on_a_device(self, float64, sign):
        p = planted()
        p = p._replace(scores=p.scores.float(), measured=sign * p.measured.float())
        expected = p.refined()
        assert expected.supported == (sign > 0)
        with strict_device(float64):
            found = refine(p.scores.to(DEVICE), p.membership, p.measured.to(DEVICE))
            assert found.scores.device == found.standard_deviation.device == DEVICE
            scores, deviation = found.scores.cpu(), found.standard_deviation.cpu()
        torch.testing.assert_close(scores, expected.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(deviation, expected.standard_deviation, rtol=1e-6, atol=0, equal_nan=True)

    def test_the_device_is_that_of_the_scores(self):
        p = planted()
        with strict_device():
            assert refine(p.scores, p.membership, p.measured.to(DEVICE)).scores.device.type == "cpu"
            assert refine(p.scores.to(DEVICE), p.membership, p.measured).scores.device == DEVICE

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"scores": [[1.0]]}, TypeError, "`scores` must be a torch tensor or a NumPy array; got list"),
            (
                {"scores": torch.ones(30, 79)},
                ValueError,
                r"`scores` must be of shape \(n_test, n_train\) with n_train = 80, .*; got \(30, 79\)",
            ),
            ({"scores": torch.ones(80)}, ValueError, r"got \(80,\)\. One test point is scores\[None\]\."),
            (
                {"measured": torch.ones(24, 30)},
                ValueError,
                r"`measured` must be of shape \(n_test, n_subsets\) with n_subsets = 24, .*; got \(24, 30\)",
            ),
            (
                {"measured": torch.ones(29, 24)},
                ValueError,
                "`measured` must have a row for each of the 30 rows",
            ),
            ({"measured": None}, TypeError, "`measured` must be a torch tensor .*; got NoneType"),
            (
                {"membership": random_subsets(80, 2, 40), "measured": torch.ones(30, 2)},
                ValueError,
                "`membership` must hold at least 3 subsets; got 2",
            ),
            ({"membership": "halves"}, TypeError, "`membership` must be a SciPy sparse matrix"),
            ({"slope": math.nan}, ValueError, "`slope` must be a finite number; got nan. Leave it out"),
            ({"slope": "1"}, TypeError, "`slope` must be a finite number, or None to be estimated; got str"),
            ({"prior_scale": -1}, ValueError, "`prior_scale` must be a finite number, at least 0; got -1"),
            ({"noise": -0.1}, ValueError, "`noise` must be a finite number, at least 0; got -0.1"),
            ({"noise": True}, TypeError, "`noise` must be a finite number, at least 0, or None .*; got bool"),
            ({"noise": 0}, ValueError, "`noise` must be positive where .* estimated; got 0. Fix all three."),
            ({"noise": 0, "slope": 1}, ValueError, "`noise` must be positive where"),
        ],
    )
    def test_refusals(self, changes, error, message):
        given = {**planted()._asdict(), **changes}
        given.pop("effects")
        with pytest.raises(error, match=message):
            refine(**given)

    def test_it_is_exported(self):
        assert stride_captum.refine is refine
        assert stride_captum.RefinedScores is RefinedScores
        assert dataclasses.is_dataclass(RefinedScores)
        assert isinstance(spectra(planted(3)).likelihood, MarginalLikelihood)
