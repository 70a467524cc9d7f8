"""Choice of the Lasso's alpha: information criteria and cross-validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_choice, bad_value
from ..subsets import Membership
from .design import Design, read_membership, read_responses
from .working_set import largest_correlation, row_blocks, solve

RULES = ("bic", "aic", "cross-validation")
DEFAULT_FRACTIONS = tuple(float(f) for f in np.geomspace(1.0, 0.01, 13))


def choose_alpha(
    Y: Any,
    membership: Any,
    rule: str,
    *,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    center: bool = False,
    folds: int = 5,
    seed: int = 0,
    tolerance: float = 1e-4,
    max_rounds: int = 1000,
) -> Tensor:
    """Choose alpha for every row of Y among `fraction * alpha_max`.

    "bic" and "aic" minimize `K log(RSS / K) + c df` with c = log K and c = 2, where df is the number of
    distinct columns with a nonzero weight (unbiased for the Lasso: Zou, Hastie and Tibshirani 2007).
    With more columns than subsets the residual sum of squares goes to 0 and so the criterion to minus
    infinity, whatever the truth: fits with df > K / 2 are not considered.

    "cross-validation" leaves out one of `folds` parts of the subsets (rows of X) after the other and
    minimizes the squared error on them. A fit on fewer subsets uses a proportionally smaller alpha.

    Args:
        Y: Responses `(n_test, n_subsets)`.
        membership: X `(n_subsets, n_train)`.
        rule: "bic", "aic" or "cross-validation".
        fractions: The candidates.
        center: As in `lasso`.
        folds: Parts of the cross-validation.
        seed: Which subsets form a part. The global random state is not used.
        tolerance: Relative duality gap of the fits; a choice needs no more than the default.
        max_rounds: Safety limit of each fit.

    Returns:
        `(n_test,)` float64, on the device of Y if it has float64; 0 where all of `X^T y` is 0.

    Raises:
        TypeError: Y or membership is of another type.
        ValueError: The rule does not exist, or an argument is out of range.

    >>> from stride_captum.subsets import random_subsets
    >>> generator = torch.Generator().manual_seed(0)
    >>> noise = 0.1 * torch.randn(1, 40, generator=generator, dtype=torch.float64)
    >>> subsets = random_subsets(60, 40, 6)
    >>> y = torch.from_numpy(subsets[:, :3].sum(1).T) + noise  # three of 60 examples matter
    >>> alpha = choose_alpha(y, subsets, "bic")
    >>> from stride_captum.recovery.solver import lasso
    >>> bool((lasso(y, subsets, alpha).weights[0, :3] > 0).all())
    True
    """
    if rule not in RULES:
        raise bad_choice("rule", rule, RULES)
    candidates = sorted((float(f) for f in fractions), reverse=True)
    if not candidates or not all(0 < f < float("inf") for f in candidates):
        raise bad_value("fractions", "be positive numbers", fractions)
    if not tolerance > 0:
        raise bad_value("tolerance", "be positive", tolerance)
    matrix = read_membership(membership).tocsr()
    y = read_responses(Y, matrix.shape[0])
    if rule == "cross-validation" and not 2 <= folds <= matrix.shape[0]:
        raise bad_value("folds", f"be between 2 and n_subsets = {matrix.shape[0]}", folds)
    columns = Design(matrix, center, y.device)
    top = largest_correlation(columns, _centered(y, center))
    alphas = [f * top for f in candidates]
    if rule == "cross-validation":
        scores = _held_out_error(y, matrix, alphas, center, folds, seed, tolerance, max_rounds)
    else:
        price = 2.0 if rule == "aic" else float(np.log(matrix.shape[0]))
        scores = _criterion(columns, _centered(y, center), alphas, price, tolerance, max_rounds)
    chosen: Tensor = torch.stack(alphas).gather(0, scores.argmin(0, keepdim=True))[0]
    return chosen


def _centered(y: Tensor, center: bool) -> Tensor:
    return y - y.mean(1, keepdim=True) if center else y


def _path(
    columns: Design, y: Tensor, alphas: list[Tensor], tolerance: float, max_rounds: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """The candidate's number, the rows, and the weights of distinct columns of each fit."""
    for rows in row_blocks(columns, len(y)):
        weights = y.new_zeros(len(y[rows]), columns.n_columns)
        for k, alpha in enumerate(alphas):
            weights, _ = solve(columns, y[rows], alpha[rows], weights, tolerance, max_rounds)
            yield k, rows, weights


def _criterion(
    columns: Design, y: Tensor, alphas: list[Tensor], price: float, tolerance: float, max_rounds: int
) -> Tensor:
    """`K log(RSS / K) + price df`, `(n_alphas, n_test)`."""
    n_subsets = columns.n_subsets
    scores = y.new_full((len(alphas), len(y)), torch.inf)
    for k, rows, weights in _path(columns, y, alphas, tolerance, max_rounds):
        square = (y[rows] - columns.forward(weights)).square().sum(1)
        freedom = (weights != 0).sum(1)
        score = n_subsets * (square / n_subsets).log() + price * freedom
        scores[k, rows] = torch.where(2 * freedom <= n_subsets, score, torch.inf)
    return scores


def _held_out_error(
    y: Tensor,
    matrix: Membership,
    alphas: list[Tensor],
    center: bool,
    folds: int,
    seed: int,
    tolerance: float,
    max_rounds: int,
) -> Tensor:
    """Squared error on the subsets left out, `(n_alphas, n_test)`."""
    n_subsets = matrix.shape[0]
    errors = y.new_zeros(len(alphas), len(y))
    for part in np.array_split(np.random.default_rng(seed).permutation(n_subsets), folds):
        kept = np.setdiff1d(np.arange(n_subsets), part)
        columns = Design(matrix[kept], center, y.device)
        held_out = columns.applied_to(matrix[part])
        train, test = y[:, torch.from_numpy(kept)], y[:, torch.from_numpy(part)]
        if center:
            test = test - train.mean(1, keepdim=True)
        smaller = [alpha * len(kept) / n_subsets for alpha in alphas]
        for k, rows, weights in _path(columns, _centered(train, center), smaller, tolerance, max_rounds):
            predicted = held_out.times(weights.T.contiguous()).T
            if center:
                predicted = predicted - (weights @ columns.means)[:, None]
            errors[k, rows] += (test[rows] - predicted).square().sum(1)
    return errors
