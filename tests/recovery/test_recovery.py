from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn import linear_model
from sklearn.exceptions import ConvergenceWarning

from stride_captum import Lasso, Ridge
from stride_captum.recovery import (
    alpha_max,
    choose_alpha,
    lasso,
    lasso_path,
    ridge,
    ridge_scale,
    soft_threshold,
    working_set,
)
from stride_captum.recovery import design as columns_module
from stride_captum.recovery.design import Design
from stride_captum.subsets import partition, random_subsets, singletons

CPU = torch.device("cpu")


def gaussian_matrix(n_subsets: int = 30, n_train: int = 50) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.random.default_rng(3).standard_normal((n_subsets, n_train)))


DESIGNS = {
    "gaussian": gaussian_matrix(),
    "more subsets than examples": gaussian_matrix(60, 20),
    "half subsets": random_subsets(60, 40, 30, seed=1),
    "small subsets": random_subsets(400, 50, 12, seed=2),
    "partition": partition(63, 9, seed=0),
    "paper coverage": partition(90, 8, 5, seed=0),
}


def responses(matrix, n_test: int = 4, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((matrix.shape[1], n_test))
    weights[generator.random(weights.shape) < 0.85] = 0
    y = matrix @ weights + 0.3 * generator.standard_normal((matrix.shape[0], n_test)) + 0.5
    return torch.from_numpy(np.ascontiguousarray(y.T))


def objective(y, matrix, w, alpha, center=False) -> float:
    residual = np.asarray(y) - matrix @ np.asarray(w)
    if center:
        residual = residual - residual.mean()
    return float(0.5 * residual @ residual + alpha * np.abs(np.asarray(w)).sum())


def reference(y, matrix, alpha, center=False) -> np.ndarray:
    """The oracle: scikit-learn divides the squared error by the number of rows."""
    model = linear_model.Lasso(alpha=alpha / matrix.shape[0], fit_intercept=center, tol=1e-13, max_iter=10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(matrix.toarray(), np.asarray(y)).coef_


class TestAgainstScikitLearn:
    @pytest.mark.slow
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01])
    @pytest.mark.parametrize("name", DESIGNS)
    def test_objective_is_the_minimum(self, name, fraction, center):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        alpha = fraction * alpha_max(Y, matrix, center=center)
        fit = lasso(Y, matrix, alpha, center=center)
        for t, y in enumerate(Y):
            best = objective(
                y, matrix, reference(y, matrix, float(alpha[t]), center), float(alpha[t]), center
            )
            own = objective(y, matrix, fit.weights[t], float(alpha[t]), center)
            assert own == pytest.approx(best, rel=1e-6)
            assert own == pytest.approx(float(fit.objective[t]), rel=1e-12)

    def test_weights_and_intercept_where_they_are_unique(self):
        matrix = DESIGNS["more subsets than examples"]
        Y = responses(matrix)
        fit = lasso(Y, matrix, 2.0, center=True, tolerance=1e-12)
        for t, y in enumerate(Y):
            model = linear_model.Lasso(alpha=2.0 / len(y), tol=1e-13, max_iter=10**6).fit(
                matrix.toarray(), y.numpy()
            )
            np.testing.assert_allclose(fit.weights[t], model.coef_, atol=1e-6)
            assert float(fit.intercept[t]) == pytest.approx(model.intercept_, abs=1e-6)

    def test_alpha_is_half_the_lambda_of_equation_7(self):
        matrix, strength = DESIGNS["gaussian"], 3.0
        y = responses(matrix, 1)[0]
        w = lasso(y[None], matrix, strength / 2, tolerance=1e-12).weights[0].numpy()

        def equation_7(v):
            return np.sum((y.numpy() - matrix @ v) ** 2) + strength * np.abs(v).sum()

        generator = np.random.default_rng(0)
        for _ in range(50):
            assert equation_7(w) <= equation_7(w + 1e-3 * generator.standard_normal(len(w))) + 1e-9


class TestCertificate:
    @pytest.mark.parametrize("name", DESIGNS)
    @pytest.mark.parametrize("center", [False, True])
    def test_gap_reaches_the_tolerance(self, name, center):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        fit = lasso(Y, matrix, 0.02 * alpha_max(Y, matrix, center=center), center=center)
        assert bool((fit.duality_gap <= 1.0001e-7 * fit.objective).all())

    @pytest.mark.slow
    @pytest.mark.parametrize("tolerance", [0.5, 1e-1, 1e-3])
    def test_gap_bounds_the_suboptimality_of_a_crude_fit(self, tolerance):
        matrix = DESIGNS["small subsets"]
        Y = responses(matrix)
        crude = lasso(Y, matrix, 0.2, tolerance=tolerance)
        best = lasso(Y, matrix, 0.2, tolerance=1e-12).objective
        assert bool((crude.duality_gap >= crude.objective - best - 1e-12).all())

    def test_gap_is_taken_at_the_weights_that_are_returned(self):
        matrix = DESIGNS["small subsets"]
        Y = responses(matrix)
        rounded = lasso(Y.float(), matrix, 0.2)
        exact = lasso(Y.float().double(), matrix, 0.2, tolerance=1e-12)
        assert rounded.weights.dtype == torch.float32
        values = [
            objective(Y[t].float().double(), matrix, rounded.weights[t].double(), 0.2) for t in range(4)
        ]
        np.testing.assert_allclose(rounded.objective, values, rtol=1e-12)
        assert bool((rounded.duality_gap >= rounded.objective - exact.objective - 1e-12).all())

    def test_optimality_conditions_hold(self):
        matrix = DESIGNS["half subsets"]
        Y = responses(matrix)
        alpha = 0.05 * alpha_max(Y, matrix)
        w = lasso(Y, matrix, alpha, tolerance=1e-13).weights
        correlation = (Y - torch.from_numpy((matrix @ w.numpy().T).T)).numpy() @ matrix
        for t in range(len(Y)):
            active = w[t].numpy() != 0
            signs = np.sign(w[t].numpy()[active])
            np.testing.assert_allclose(correlation[t][active], float(alpha[t]) * signs, rtol=1e-5)
            assert np.abs(correlation[t]).max() <= float(alpha[t]) * (1 + 1e-5)

    def test_stopping_early_warns(self):
        matrix = DESIGNS["small subsets"]
        with pytest.warns(
            RuntimeWarning, match=r"4 problems did not reach .* max_rounds = 1; the largest is"
        ):
            fit = lasso(responses(matrix), matrix, 0.01, max_rounds=1, tolerance=1e-12)
        assert bool((fit.duality_gap > 1e-12 * fit.objective).all())

    def test_newton_steps_never_raise_the_objective(self):
        matrix, Y = DESIGNS["small subsets"], responses(DESIGNS["small subsets"])
        columns, alpha = Design(matrix, False, CPU), torch.full((4,), 0.1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(4, columns.n_columns, generator=generator, dtype=torch.float64)
        index = torch.arange(columns.n_columns).expand(4, -1)
        problem = columns.restrict(index)
        step = torch.linalg.eigvalsh(columns.outer())[-1].expand(4, 1)
        before = None
        for _ in range(4):
            residual = Y - columns.forward(w)
            value = residual.square().sum(1) / 2 + 0.1 * w.abs().sum(1)
            assert before is None or bool((value <= before + 1e-12).all())
            before = value
            w = working_set._newton(problem, Y, alpha, w, step, torch.ones(4, dtype=torch.bool), 1e-9)


class TestLaws:
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("factor", [1.0, 1.5])
    def test_alpha_max_gives_exactly_zero_and_less_does_not(self, factor, center):
        matrix, Y = DESIGNS["small subsets"], responses(DESIGNS["small subsets"])
        top = alpha_max(Y, matrix, center=center)
        assert not lasso(Y, matrix, factor * top, center=center).weights.any()
        assert bool(lasso(Y, matrix, 0.99 * top, center=center).weights.any(1).all())

    def test_alpha_max_is_the_largest_correlation(self):
        matrix, Y = DESIGNS["half subsets"], responses(DESIGNS["half subsets"])
        expected = np.abs(Y.numpy() @ matrix.toarray()).max(1)
        np.testing.assert_allclose(alpha_max(Y, matrix), expected)
        centered = matrix.toarray() - matrix.toarray().mean(0)
        expected = np.abs(Y.numpy() @ centered).max(1)
        np.testing.assert_allclose(alpha_max(Y, matrix, center=True), expected)

    def test_singletons_give_the_soft_threshold(self):
        Y = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        fit = lasso(Y, singletons(300), 0.7)
        torch.testing.assert_close(fit.weights, soft_threshold(Y, 0.7), rtol=0, atol=1e-9)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gaussian", "half subsets", "partition"])
    def test_permuting_examples_permutes_the_weights(self, name):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        order = np.random.default_rng(5).permutation(matrix.shape[1])
        plain = lasso(Y, matrix, 0.3, tolerance=1e-13).weights
        permuted = lasso(Y, matrix[:, order], 0.3, tolerance=1e-13).weights
        torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gaussian", "half subsets", "partition"])
    def test_rows_solved_together_equal_rows_solved_alone(self, monkeypatch, name):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name], 7)
        alpha = torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
        together = lasso(Y, matrix, alpha, tolerance=1e-13)
        for t in range(7):
            alone = lasso(Y[t : t + 1], matrix, alpha[t : t + 1], tolerance=1e-13)
            torch.testing.assert_close(alone.weights[0], together.weights[t], rtol=0, atol=1e-6)
        monkeypatch.setattr(working_set, "_BLOCK_CELLS", 20)
        in_blocks = lasso(Y, matrix, alpha, tolerance=1e-13)
        assert len(working_set.row_blocks(Design(matrix, False, CPU), 7)) > 1
        torch.testing.assert_close(in_blocks.weights, together.weights, rtol=0, atol=1e-6)

    def test_explained_responses_are_unique_where_the_weights_are_not(self):
        """{1, 2} + {3, 4} = {1, 3} + {2, 4}: several minimizers, with the same X w and the same norm."""
        matrix = sparse.csr_matrix(np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]))
        Y = torch.tensor([[2.0, 2.1, 1.9, 2.0]], dtype=torch.float64)
        fits = [lasso(Y, matrix[:, order], 0.1, tolerance=1e-13) for order in ([0, 1, 2, 3], [2, 0, 3, 1])]
        first, second = (fit.weights.numpy() for fit in fits)
        np.testing.assert_allclose(matrix @ first[0], matrix[:, [2, 0, 3, 1]] @ second[0], atol=1e-6)
        np.testing.assert_allclose(np.abs(first).sum(), np.abs(second).sum(), atol=1e-6)

    def test_scaling_the_responses_scales_the_weights(self):
        matrix, Y = DESIGNS["half subsets"], responses(DESIGNS["half subsets"])
        plain = lasso(Y, matrix, 0.5, tolerance=1e-13).weights
        scaled = lasso(1e6 * Y, matrix, 0.5e6, tolerance=1e-13).weights
        torch.testing.assert_close(scaled / 1e6, plain, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["gaussian", "small subsets"])
    def test_centering_is_centering_by_hand(self, name):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        by_hand = sparse.csr_matrix(matrix.toarray() - matrix.toarray().mean(0))
        own = lasso(Y + 100, matrix, 0.4, center=True, tolerance=1e-11)
        plain = lasso(Y - Y.mean(1, keepdim=True), by_hand, 0.4, tolerance=1e-11)
        torch.testing.assert_close(own.objective, plain.objective, rtol=1e-8, atol=0)

    @pytest.mark.slow
    def test_tensors_and_arrays_of_every_kind_agree(self):
        matrix, Y = DESIGNS["small subsets"], responses(DESIGNS["small subsets"])
        expected = lasso(Y, matrix, 0.5).weights
        dense = torch.from_numpy(matrix.toarray())
        for membership in (
            dense,
            dense.to_sparse(),
            matrix.toarray(),
            matrix.tocsc(),
            sparse.csr_array(matrix),
        ):
            assert torch.equal(lasso(Y, membership, 0.5).weights, expected)
        assert torch.equal(lasso(Y.numpy(), matrix, 0.5).weights, expected)
        assert lasso((10 * Y).round().long(), matrix, 5.0).weights.dtype == torch.float64

    @pytest.mark.slow
    def test_nothing_of_the_caller_changes(self):
        matrix, Y = DESIGNS["small subsets"].copy(), responses(DESIGNS["small subsets"])
        kept, state = (matrix.copy(), Y.clone()), torch.random.get_rng_state()
        lasso(Y, matrix, 0.3, center=True)
        ridge(Y, matrix, 0.3)
        choose_alpha(Y, matrix, "cross-validation", fractions=(0.5, 0.1))
        assert (matrix != kept[0]).nnz == 0
        assert torch.equal(Y, kept[1])
        assert torch.equal(torch.random.get_rng_state(), state)


class TestIdenticalColumns:
    def test_members_of_the_same_subsets_share_equally(self):
        matrix, Y = DESIGNS["partition"], responses(DESIGNS["partition"])
        w = lasso(Y, matrix, 0.2).weights.numpy()
        subset = np.asarray(matrix.argmax(axis=0)).reshape(-1)
        for k in range(matrix.shape[0]):
            share = w[:, subset == k]
            np.testing.assert_array_equal(share, np.repeat(share[:, :1], share.shape[1], axis=1))
            total = soft_threshold(Y[:, k], 0.2).numpy()
            np.testing.assert_allclose(share.sum(1), total, atol=1e-7)

    def test_uncovered_examples_get_zero(self):
        matrix, Y = DESIGNS["paper coverage"], responses(DESIGNS["paper coverage"])
        uncovered = np.asarray(matrix.sum(axis=0)).reshape(-1) == 0
        assert uncovered.sum() == 50
        assert not lasso(Y, matrix, 0.01).weights[:, uncovered].any()

    @pytest.mark.slow
    def test_examples_in_every_subset_get_zero_with_an_intercept(self):
        everywhere = sparse.hstack([np.ones((50, 1)), DESIGNS["small subsets"]]).tocsr()
        Y = responses(everywhere)
        w = lasso(Y, everywhere, 0.1, center=True).weights
        assert not w[:, 0].any()
        torch.testing.assert_close(w[:, 1:], lasso(Y, everywhere[:, 1:], 0.1, center=True).weights)

    def test_responses_of_zero_give_zero_whatever_alpha(self):
        matrix, Y = DESIGNS["small subsets"], responses(DESIGNS["small subsets"])
        Y[1] = 0
        alpha = 0.1 * alpha_max(Y, matrix)
        assert float(alpha[1]) == 0
        fit = lasso(Y, matrix, alpha)
        assert not fit.weights[1].any()
        assert bool(fit.weights[0].any())

    def test_no_covered_example_gives_zero(self):
        empty = sparse.csr_matrix((3, 4))
        assert not lasso(torch.ones(2, 3), empty, 0.1).weights.any()
        assert not alpha_max(torch.ones(2, 3), empty).any()


class TestPath:
    @pytest.mark.parametrize("name", ["gaussian", "half subsets", "partition"])
    def test_warm_path_equals_cold_fits_in_the_order_asked(self, name):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        fractions = [0.05, 0.5, 0.2]
        for fraction, warm in zip(fractions, lasso_path(Y, matrix, fractions, tolerance=1e-13), strict=True):
            cold = lasso(Y, matrix, fraction * alpha_max(Y, matrix), tolerance=1e-13)
            torch.testing.assert_close(warm.weights, cold.weights, rtol=0, atol=1e-6)
            torch.testing.assert_close(warm.alpha, cold.alpha)

    @pytest.mark.parametrize("fractions", [[0.5, 0.0], [-1.0], [float("nan")]])
    def test_fractions_must_be_positive(self, fractions):
        with pytest.raises(ValueError, match="`fractions` must be positive numbers"):
            lasso_path(responses(DESIGNS["gaussian"]), DESIGNS["gaussian"], fractions)


class TestChoice:
    @pytest.mark.slow
    @pytest.mark.parametrize("rule", ["bic", "aic", "cross-validation"])
    @pytest.mark.parametrize("center", [False, True])
    def test_the_planted_support_is_recovered(self, rule, center):
        matrix = random_subsets(150, 100, 75, seed=4)
        generator = np.random.default_rng(1)
        planted = np.zeros((3, 150))
        for row in planted:
            row[generator.choice(150, 5, replace=False)] = generator.choice([-2.0, 2.0], 5)
        noise = 0.3 * generator.standard_normal((3, 100))
        Y = torch.from_numpy((matrix @ planted.T).T + noise + (5.0 if center else 0.0))
        alpha = choose_alpha(Y, matrix, rule, center=center)
        w = lasso(Y, matrix, alpha, center=center).weights.numpy()
        for found, row in zip(w, planted, strict=True):
            largest = np.argsort(-np.abs(found))[:5]
            assert set(largest) == set(np.nonzero(row)[0])
            assert np.array_equal(np.sign(found[largest]), np.sign(row[largest]))
            assert (found != 0).sum() <= (100 if rule == "cross-validation" else 50)

    @pytest.mark.slow
    @pytest.mark.parametrize(("rule", "price"), [("bic", np.log(40)), ("aic", 2.0)])
    def test_a_criterion_is_minimised_with_its_own_price(self, rule, price):
        matrix, Y = DESIGNS["half subsets"], responses(DESIGNS["half subsets"], n_test=25)
        fractions = np.geomspace(0.9, 0.03, 15).tolist()
        chosen = choose_alpha(Y, matrix, rule, fractions=fractions, tolerance=1e-10)
        fits = lasso_path(Y, matrix, fractions, tolerance=1e-10)
        squares = [((Y.numpy() - (matrix @ fit.weights.numpy().T).T) ** 2).sum(1) for fit in fits]
        freedom = [(fit.weights != 0).sum(1).numpy() for fit in fits]

        def best(price):
            scores = [40 * np.log(s / 40) + price * f for s, f in zip(squares, freedom, strict=True)]
            allowed = np.where(np.array(freedom) <= 20, scores, np.inf)
            return np.array(fractions)[np.argmin(allowed, 0)]

        np.testing.assert_allclose(chosen / alpha_max(Y, matrix), best(price))
        for other in {2.0, np.log(40), np.log(60)} - {price}:  # AIC's, BIC's, and of the number of examples
            assert (best(other) != best(price)).any()

    @pytest.mark.slow
    @pytest.mark.parametrize("center", [False, True])
    def test_cross_validation_minimises_the_held_out_error(self, center):
        matrix = DESIGNS["more subsets than examples"]  # predictions of the Lasso are unique there
        Y = responses(matrix, n_test=25)
        fractions = np.geomspace(0.9, 0.05, 10).tolist()
        top = alpha_max(Y, matrix, center=center)
        parts = np.array_split(np.random.default_rng(7).permutation(60), 2)

        def best(share):
            """With alphas that are `share` times as large on the kept half of the subsets."""
            errors = np.zeros((len(fractions), len(Y)))
            for part in parts:
                kept = np.setdiff1d(np.arange(60), part)
                for k, fraction in enumerate(fractions):
                    alpha = share * fraction * top
                    fit = lasso(Y[:, kept], matrix[kept], alpha, center=center, tolerance=1e-10)
                    predicted = (matrix[part] @ fit.weights.numpy().T).T + fit.intercept.numpy()[:, None]
                    errors[k] += ((Y.numpy()[:, part] - predicted) ** 2).sum(1)
            return np.array(fractions)[errors.argmin(0)]

        options = {"fractions": fractions, "center": center, "folds": 2, "seed": 7, "tolerance": 1e-10}
        chosen = choose_alpha(Y, matrix, "cross-validation", **options)
        np.testing.assert_allclose(chosen / top, best(0.5))
        assert (best(0.5) != best(1.0)).any()

    @pytest.mark.slow
    def test_wrong_arguments_are_refused(self):
        matrix, Y = DESIGNS["gaussian"], responses(DESIGNS["gaussian"])
        with pytest.raises(ValueError, match=r"`rule` must be one of 'bic', .*; got 'bix'. Nearest: 'bic'"):
            choose_alpha(Y, matrix, "bix")
        with pytest.raises(ValueError, match=r"`folds` must be between 2 and n_subsets = 30; got 31"):
            choose_alpha(Y, matrix, "cross-validation", folds=31)
        for rule in ("aic", "bic"):
            assert choose_alpha(Y, matrix, rule, folds=31).equal(choose_alpha(Y, matrix, rule))
        with pytest.raises(ValueError, match="`fractions` must be positive numbers; got"):
            choose_alpha(Y, matrix, "bic", fractions=[])
        with pytest.raises(ValueError, match="`tolerance` must be positive; got 0"):
            choose_alpha(Y, matrix, "bic", tolerance=0)


class TestRidge:
    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("name", DESIGNS)
    def test_it_solves_the_normal_equations(self, name, center):
        matrix, Y = DESIGNS[name], responses(DESIGNS[name])
        X, y = matrix.toarray(), Y.numpy()
        if center:
            X, y = X - X.mean(0), y - y.mean(1, keepdims=True)
        expected = np.linalg.solve(X.T @ X + 0.7 * np.eye(X.shape[1]), X.T @ y.T).T
        np.testing.assert_allclose(ridge(Y, matrix, 0.7, center=center), expected, atol=1e-10)

    def test_every_row_may_have_its_own_penalty(self):
        matrix, Y = DESIGNS["half subsets"], responses(DESIGNS["half subsets"])
        Y[3] = 0
        penalty = torch.tensor([0.1, 1.0, 10.0, 0.0])
        own = ridge(Y, matrix, penalty)
        for t in range(3):
            alone = ridge(Y[t : t + 1], matrix, float(penalty[t]))
            torch.testing.assert_close(own[t : t + 1], alone, rtol=1e-6, atol=1e-8)
        assert not own[3].any()
        assert ridge(Y.float(), matrix, 1.0).dtype == torch.float32

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("name", DESIGNS)
    def test_its_scale_is_the_mean_of_the_eigenvalues_that_can_differ_from_zero(self, name, center):
        X = DESIGNS[name].toarray()
        X = X - X.mean(0) if center else X
        values = np.sort(np.linalg.eigvalsh(X @ X.T))[::-1]
        expected = values[: min(len(X) - center, X.shape[1])].mean()
        assert ridge_scale(DESIGNS[name], center=center) == pytest.approx(expected)
        dense = torch.from_numpy(DESIGNS[name].toarray())
        assert ridge_scale(dense, center=center) == pytest.approx(expected)

    def test_a_penalty_in_its_scale_does_not_change_with_the_units_of_the_problem(self):
        matrix, Y = DESIGNS["gaussian"], responses(DESIGNS["gaussian"])
        one = ridge(Y, matrix, 0.3 * ridge_scale(matrix))
        other = ridge(Y, 10 * matrix, 0.3 * ridge_scale(10 * matrix))
        torch.testing.assert_close(10 * other, one)
        assert ridge_scale(matrix.astype(bool).astype(np.int8)) == ridge_scale(
            matrix.astype(bool).astype(float)
        )

    def test_penalty_must_be_positive(self):
        with pytest.raises(ValueError, match=r"`penalty` must be positive and finite; got 0\.0\."):
            ridge(responses(DESIGNS["gaussian"]), DESIGNS["gaussian"], 0.0)


class TestRecoveryOfOperators:
    """The penalty is relative to the problem, for the Lasso and for ridge."""

    matrix = random_subsets(40, 20, 8, seed=3)

    @pytest.mark.parametrize("center", [False, True])
    def test_the_lasso_takes_a_fraction_of_alpha_max(self, center):
        Y = responses(self.matrix)
        alpha = 0.1 * alpha_max(Y, self.matrix, center=center)
        expected = lasso(Y, self.matrix, alpha, center=center).weights
        torch.testing.assert_close(Lasso(alpha=0.1, center=center).weights(Y, self.matrix), expected)
        assert not Lasso(alpha=1.0, center=center).weights(Y, self.matrix).any()
        assert Lasso(alpha=0.999, center=center).weights(Y, self.matrix).any()

    @pytest.mark.parametrize("center", [False, True])
    def test_ridge_takes_a_multiple_of_its_scale(self, center):
        Y = responses(self.matrix)
        expected = ridge(Y, self.matrix, 0.1 * ridge_scale(self.matrix, center=center), center=center)
        torch.testing.assert_close(Ridge(alpha=0.1, center=center).weights(Y, self.matrix), expected)

    @pytest.mark.parametrize("kind", [Lasso, Ridge])
    def test_responses_in_other_units_give_scores_in_other_units(self, kind):
        Y = responses(self.matrix)
        one, other = (kind(alpha=0.1).weights(c * Y, self.matrix) for c in (1.0, 1000.0))
        torch.testing.assert_close(other, 1000 * one, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


class TestSoftThreshold:
    def test_it_shrinks_towards_zero(self):
        scores = torch.tensor([[-3.0, -0.5, 0.0, 0.5, 3.0]])
        assert soft_threshold(scores, 1.0).tolist() == [[-2.0, 0.0, 0.0, 0.0, 2.0]]
        assert torch.equal(soft_threshold(scores, 0.0), scores)
        per_row = soft_threshold(scores.repeat(2, 1), torch.tensor([[1.0], [2.0]]))
        assert per_row[:, 0].tolist() == [-2.0, -1.0]

    def test_a_negative_alpha_is_refused(self):
        with pytest.raises(ValueError, match=r"`alpha` must be at least 0; got -1\.0"):
            soft_threshold(torch.zeros(2), -1.0)


class TestRefusals:
    matrix = DESIGNS["gaussian"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_responses_that_are_not_finite(self, value):
        Y = responses(self.matrix)
        Y[1, 2] = value
        with pytest.raises(ValueError, match="`Y` must hold finite numbers; got NaN or infinity"):
            lasso(Y, self.matrix, 1.0)

    @pytest.mark.parametrize("shape", [(30,), (4, 31), (50, 4), (1, 4, 30)])
    @pytest.mark.parametrize("function", [lasso, ridge])
    def test_responses_of_another_shape(self, function, shape):
        with pytest.raises(
            ValueError, match=r"`Y` must be of shape \(n_test, n_subsets\) with n_subsets = 30"
        ):
            function(torch.ones(shape), self.matrix, 1.0)

    def test_one_test_point_gets_a_remedy(self):
        with pytest.raises(ValueError, match=r"One test point is Y\[None\]"):
            lasso(torch.ones(30), self.matrix, 1.0)

    def test_other_types(self):
        with pytest.raises(TypeError, match="`Y` must be a torch tensor or a NumPy array; got list"):
            lasso([[1.0]], self.matrix, 1.0)
        with pytest.raises(TypeError, match="`membership` must be a SciPy sparse matrix or a torch tensor"):
            lasso(torch.ones(1, 2), [[0], [1]], 1.0)

    @pytest.mark.parametrize("membership", [torch.ones(3), np.ones(3), torch.ones(0, 3), torch.ones(1, 2, 3)])
    def test_memberships_of_another_shape(self, membership):
        with pytest.raises(ValueError, match=r"`membership` must be of shape \(n_subsets, n_train\)"):
            lasso(torch.ones(1, 3), membership, 1.0)

    def test_memberships_that_are_not_finite(self):
        with pytest.raises(ValueError, match="`membership` must hold finite numbers; got NaN or infinity"):
            lasso(torch.ones(1, 2), torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1.0)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
    def test_alphas_that_are_not_positive(self, alpha):
        with pytest.raises(ValueError, match=r"`alpha` must be positive and finite; got .*: use `ridge`"):
            lasso(responses(self.matrix), self.matrix, alpha)

    def test_alphas_of_another_length(self):
        with pytest.raises(
            ValueError, match=r"`alpha` must be a number or of shape \(n_test,\) = \(4,\); got"
        ):
            lasso(responses(self.matrix), self.matrix, torch.ones(3))

    def test_limits(self):
        Y = responses(self.matrix)
        with pytest.raises(ValueError, match=r"`tolerance` must be positive; got 0\.0"):
            lasso(Y, self.matrix, 1.0, tolerance=0.0)
        with pytest.raises(ValueError, match="`max_rounds` must be at least 1; got 0"):
            lasso(Y, self.matrix, 1.0, max_rounds=0)


class TestMemory:
    @pytest.mark.slow
    @pytest.mark.parametrize("center", [False, True])
    def test_sparse_memberships_are_never_made_dense(self, monkeypatch, center):
        """The dense array would take 0.8 GB: no NumPy allocation and no tensor may come near it."""
        matrix = random_subsets(50_000, 2_000, 20, seed=0)
        largest = 0
        allocate = torch.Tensor.new_zeros

        def counted(tensor, *shape, **options):
            nonlocal largest
            result = allocate(tensor, *shape, **options)
            largest = max(largest, result.numel())
            return result

        monkeypatch.setattr(torch.Tensor, "new_zeros", counted)
        monkeypatch.setattr(sparse.csc_matrix, "toarray", None)
        columns = Design(matrix, center, CPU)
        assert not columns.dense
        Y = responses(matrix, 2)
        tracemalloc.start()
        lasso(Y, matrix, 0.5 * alpha_max(Y, matrix, center=center), center=center)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 80e6
        assert largest < 2_000 * 50_000 / 20

    @pytest.mark.parametrize("center", [False, True])
    def test_gram_matrices_of_any_number_of_columns_are_those_of_the_dense_ones(self, center):
        columns = Design(random_subsets(60, 30, 5, seed=3), center, CPU)
        index = torch.tensor([[4, 1, 9], [0, 7, 3], [8, 2, 5]])  # of three test points, three columns each
        rows, own = torch.tensor([1, 2]), torch.tensor([[2, 0], [1, 2]])
        valid = torch.tensor([[True, True], [True, False]])
        found = columns.restrict(index).gram(rows, own, valid)
        (_, every), *_ = columns.blocks(columns.n_columns)
        for gram, row, few, kept in zip(found, rows, own, valid, strict=True):
            dense = every[:, index[row, few]] * kept
            torch.testing.assert_close(gram, dense.T @ dense)

    def test_products_on_a_device_equal_those_of_scipy(self, monkeypatch):
        matrix, Y = DESIGNS["small subsets"], responses(DESIGNS["small subsets"])
        expected = lasso(Y, matrix, 0.3, center=True).objective
        initialise = columns_module.SparseMatrix.__init__

        def as_on_a_gpu(own, scipy_matrix, device):
            initialise(own, scipy_matrix, device)
            own._on_device, own._matrix = columns_module._to_torch(scipy_matrix), None

        monkeypatch.setattr(columns_module.SparseMatrix, "__init__", as_on_a_gpu)
        torch.testing.assert_close(lasso(Y, matrix, 0.3, center=True).objective, expected)

    def test_half_subsets_are_dense(self):
        assert Design(DESIGNS["half subsets"], False, CPU).dense
