"""Speed of stage 2: the batched Lasso, against a loop over scikit-learn's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...recovery.solver import alpha_max, lasso
from ...subsets import Membership, random_subsets

RESPONSES = ("gaussian", "planted")


def bench_lasso(
    *,
    n_test: int = 200,
    n_subsets: int = 500,
    n_train: int = 50_000,
    subset_size: int = 100,
    fractions: Sequence[float] = (0.1, 0.01),
    n_reference: int = 5,
    tolerance: float = 1e-7,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time `lasso` and a loop over `sklearn.linear_model.Lasso` on the same problems, in one run.

    scikit-learn gets the same matrix in CSC form and, for each test point, the `tol` at which its stopping
    rule is the same duality gap. It is timed on `n_reference` test points, and its time for all of them is
    extrapolated; a field of the row says so.

    Args:
        n_test: Test points.
        n_subsets: K.
        n_train: N.
        subset_size: |S_k|, of random subsets.
        fractions: alpha, relative to alpha_max.
        n_reference: Test points solved by scikit-learn.
        tolerance: Relative duality gap of both.
        seed: Seed of subsets and responses.

    Returns:
        A row for Gaussian and for planted responses (1,000 influential examples and noise) at each fraction:
        sizes, seconds, their ratio (scikit-learn / ours), the largest relative duality gap of both, and the
        largest relative difference of the objectives (ours minus scikit-learn's).
    """
    membership = random_subsets(n_train, n_subsets, subset_size, seed)
    n_reference = min(n_reference, n_test)
    rows = []
    for kind in RESPONSES:
        Y = _responses(kind, membership, n_test, seed)
        for fraction in fractions:
            alpha = fraction * alpha_max(Y, membership)
            begin = time.perf_counter()
            fit = lasso(Y, membership, alpha, tolerance=tolerance)
            ours = time.perf_counter() - begin
            seconds, weights = _reference(Y[:n_reference], membership, alpha, fit.objective, tolerance)
            objective, gap = _certificate(Y[:n_reference], membership, alpha[:n_reference], weights)
            difference = fit.objective[:n_reference].numpy() / objective - 1
            rows.append(
                {
                    "responses": kind,
                    "n_test": n_test,
                    "n_subsets": n_subsets,
                    "n_train": n_train,
                    "subset_size": subset_size,
                    "alpha_fraction": fraction,
                    "threads": torch.get_num_threads(),
                    "seconds": ours,
                    "sklearn_seconds": seconds * n_test / n_reference,
                    "sklearn_measured_seconds": seconds,
                    "sklearn_measured_points": n_reference,
                    "sklearn_extrapolated": n_reference < n_test,
                    "ratio": seconds * n_test / n_reference / ours,
                    "relative_gap": float((fit.duality_gap / fit.objective).max()),
                    "sklearn_relative_gap": float((gap / objective).max()),
                    "objective_difference": float(difference[np.abs(difference).argmax()]),
                }
            )
    return rows


def _responses(kind: str, membership: Membership, n_test: int, seed: int) -> Tensor:
    generator = np.random.default_rng([seed, RESPONSES.index(kind)])
    n_subsets, n_train = membership.shape
    noise = generator.standard_normal((n_test, n_subsets))
    if kind == "gaussian":
        return torch.from_numpy(noise)
    weights = np.zeros((n_test, n_train))
    for row in weights:
        chosen = generator.choice(n_train, min(1_000, n_train), replace=False)
        row[chosen] = generator.standard_normal(len(chosen))
    signal = (membership @ weights.T).T
    return torch.from_numpy(signal + 0.1 * signal.std(axis=1, keepdims=True) * noise)


def _reference(
    Y: Tensor, membership: Membership, alpha: Tensor, objective: Tensor, tolerance: float
) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    columns = membership.tocsc()
    seconds, found = 0.0, []
    for t, y in enumerate(Y.numpy()):
        stop = tolerance * float(objective[t]) / float(y @ y)  # scikit-learn's gap is relative to y.y
        model = Lasso(
            alpha=float(alpha[t]) / len(y), fit_intercept=False, tol=stop, max_iter=10_000_000, copy_X=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the duality gap is reported instead
            begin = time.perf_counter()
            model.fit(columns, y)
            seconds += time.perf_counter() - begin
        found.append(np.asarray(model.coef_, dtype=np.float64))
    return seconds, np.stack(found)


def _certificate(
    Y: Tensor, membership: Membership, alpha: Tensor, weights: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Objective and duality gap at given weights, in code of its own, as an independent check."""
    y, penalty = Y.numpy(), alpha.numpy()
    residual = y - (membership @ weights.T).T
    objective = (residual**2).sum(1) / 2 + penalty * np.abs(weights).sum(1)
    peak = np.abs(membership.T @ residual.T).max(0)
    bound = penalty / peak
    scale = np.clip((y * residual).sum(1) / (residual**2).sum(1), -bound, bound)
    dual = scale * (y * residual).sum(1) - scale**2 * (residual**2).sum(1) / 2
    return objective, objective - dual
