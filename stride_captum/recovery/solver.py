"""Lasso of stage 2: from responses of subsets to scores of examples.

The responses y in R^K of one test point to the K operators are regressed on the membership, y ~ X w with
sparse w (equation 7 of Appendix E.1, Algorithm 1, line 10):

    min_w  1/2 ||y - X w||^2 + alpha ||w||_1

The paper writes `||y - M w||^2 + lambda ||w||_1`: that is `alpha = lambda / 2`. For singleton subsets,
X = I, the solution is a soft threshold of the responses.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_value
from ..system.devices import float64_device, matching
from .problem import Problem
from .working_set import certify, largest_correlation, row_blocks, solve


@dataclass(frozen=True)
class LassoFit:
    """Minimizers of `1/2 ||y - X w||^2 + alpha ||w||_1` with their certificates.

    Attributes:
        weights: `(n_test, n_train)`, in the dtype of Y (float64 if Y holds integers).
        duality_gap: `(n_test,)` float64, at least `objective` minus the minimum: the objective at the
            returned weights minus the dual objective at a feasible point.
        objective: `(n_test,)` float64, at the returned weights.
        alpha: `(n_test,)` float64.
        intercept: `(n_test,)` float64; 0 without `center`.

    >>> fit = lasso(torch.tensor([[3.0, -5.0]]), torch.eye(2), 1.0)
    >>> fit.weights, bool(fit.duality_gap < 1e-6)
    (tensor([[ 2., -4.]]), True)
    """

    weights: Tensor
    duality_gap: Tensor
    objective: Tensor
    alpha: Tensor
    intercept: Tensor


def lasso(
    Y: Any,
    membership: Any,
    alpha: float | Tensor,
    *,
    center: bool = False,
    tolerance: float = 1e-7,
    max_rounds: int = 1000,
) -> LassoFit:
    """Minimize `1/2 ||y - X w||^2 + alpha ||w||_1` for every row y of Y.

    Examples that belong to the same subsets have identical columns, and the objective only determines
    the sum of their weights, which is split equally (minimum norm). Examples in no subset
    get 0. Other affine dependences between columns (members of {1, 2} and of {3, 4} against members of
    {1, 3} and of {2, 4}) can leave several minimizers too: X w, the norm and the objective are unique,
    the weights are those of one minimizer. All rows are solved together in float64; a sparse X is never made
    dense.

    Args:
        Y: Responses `(n_test, n_subsets)`, tensor or array. The work is done on its device.
        membership: X `(n_subsets, n_train)`: SciPy sparse, or a dense or sparse tensor.
        alpha: Penalty, for all rows or `(n_test,)`. Absolute; see `alpha_max`. Half the lambda of
            equation 7.
        center: Remove from the responses and from the columns of X their means over the subsets, which
            is an unpenalized intercept.
        tolerance: Duality gap to reach, relative to the objective.
        max_rounds: Safety limit on the rounds of the solver. Reaching it warns.

    Raises:
        TypeError: Y or membership is of another type.
        ValueError: Shapes disagree, a value is not finite, or alpha or tolerance is not positive.

    >>> lasso(torch.tensor([[3.0, 0.5]]), torch.eye(2), 1.0).weights
    tensor([[2., 0.]])

    """
    problem = _Lasso(Y, membership, center)
    penalty = problem.per_row("alpha", alpha, "Least squares has no unique solution: use `ridge`.")
    return problem.fit([penalty], tolerance, max_rounds)[0]


def lasso_path(
    Y: Any,
    membership: Any,
    fractions: Sequence[float],
    *,
    center: bool = False,
    tolerance: float = 1e-7,
    max_rounds: int = 1000,
) -> list[LassoFit]:
    """`lasso` at `fraction * alpha_max` for each of the fractions, each started from the next larger one.

    Args:
        Y: `(n_test, n_subsets)`.
        membership: X `(n_subsets, n_train)`.
        fractions: Positive numbers, in any order.
        center: As in `lasso`.
        tolerance: As in `lasso`.
        max_rounds: As in `lasso`.

    Returns:
        One fit per fraction, in the order of `fractions`.

    Raises:
        ValueError: As in `lasso`, or a fraction is not positive.

    >>> path = lasso_path(torch.tensor([[3.0, -5.0]]), torch.eye(2), [1.0, 0.2])
    >>> [fit.weights.tolist() for fit in path]
    [[[0.0, 0.0]], [[2.0, -4.0]]]
    """
    values = [float(fraction) for fraction in fractions]
    if not all(0 < value < float("inf") for value in values):
        raise bad_value("fractions", "be positive numbers", fractions)
    problem = _Lasso(Y, membership, center)
    top = largest_correlation(problem.columns, problem.y)
    descending = sorted(range(len(values)), key=lambda k: -values[k])
    fits = problem.fit([values[k] * top for k in descending], tolerance, max_rounds)
    return [fits[descending.index(k)] for k in range(len(values))]


def alpha_max(Y: Any, membership: Any, *, center: bool = False) -> Tensor:
    """The smallest alpha for which all weights are 0, `max_j |X_j^T y|`: `(n_test,)` float64.

    >>> alpha_max(torch.tensor([[3.0, -5.0]]), torch.eye(2))
    tensor([5.], dtype=torch.float64)

    """
    problem = _Lasso(Y, membership, center)
    return largest_correlation(problem.columns, problem.y)


def soft_threshold(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """`sign(s) max(|s| - alpha, 0)`, the Lasso for X = I.

    Args:
        scores: Any shape.
        alpha: At least 0; a number or a tensor that broadcasts.

    Raises:
        ValueError: alpha is negative.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2.,  0.,  1.])

    """
    threshold = torch.as_tensor(alpha, dtype=scores.dtype, device=scores.device)
    if not bool((threshold >= 0).all()):
        raise bad_value("alpha", "be at least 0", alpha)
    return scores - torch.maximum(torch.minimum(scores, threshold), -threshold)


class _Lasso(Problem):
    """Lasso fits of the problem, with certificates."""

    def fit(self, alphas: list[Tensor], tolerance: float, max_rounds: int) -> list[LassoFit]:
        """Fits for each `(n_test,)` penalty of a list, warm-started in its order."""
        if not tolerance > 0:
            raise bad_value("tolerance", "be positive", tolerance)
        if max_rounds < 1:
            raise bad_value("max_rounds", "be at least 1", max_rounds)
        pieces: list[list[LassoFit]] = [[] for _ in alphas]
        unsettled = 0
        for rows in row_blocks(self.columns, len(self.y)):
            weights = self.y.new_zeros(len(self.y[rows]), self.columns.n_columns)
            for piece, alpha in zip(pieces, alphas, strict=True):
                weights, settled = solve(
                    self.columns, self.y[rows], alpha[rows], weights, tolerance, max_rounds
                )
                unsettled += int((~settled).sum())
                piece.append(self._certified(rows, alpha[rows], weights))
        fits = [_concatenate(piece) for piece in pieces]
        if unsettled:
            worst = max(float((fit.duality_gap / fit.objective).nan_to_num().max()) for fit in fits)
            warnings.warn(
                f"lasso: {unsettled} problems did not reach the relative duality gap {tolerance:g} in "
                f"max_rounds = {max_rounds}; the largest is {worst:.1e}. See `duality_gap`.",
                RuntimeWarning,
                stacklevel=3,
            )
        return fits

    def _certified(self, rows: slice, alpha: Tensor, weights: Tensor) -> LassoFit:
        """Final fit: weights split among equal columns, rounded to the dtype of Y, then certified."""
        y, columns = self.y[rows], self.columns
        residual = y - columns.forward(weights)
        exact = certify(y, residual, largest_correlation(columns, residual), weights.abs().sum(1), alpha)
        shared = columns.expand(weights / columns.counts).to(self.home)
        rounded = matching(shared, weights)
        collected = columns.collect(rounded)
        residual = y - columns.forward(collected)
        objective = (residual * residual).sum(1) / 2 + alpha * rounded.abs().sum(1)
        gap = (objective - (exact.objective - exact.gap)).clamp(min=0)
        certified = float64_device(self.home.device)
        intercept = self.mean[rows] - (collected @ columns.means if columns.center else 0)
        return LassoFit(shared, *(v.to(certified) for v in (gap, objective, alpha, intercept)))


def _concatenate(fits: list[LassoFit]) -> LassoFit:
    if len(fits) == 1:
        return fits[0]
    names = ("weights", "duality_gap", "objective", "alpha", "intercept")
    return LassoFit(*(torch.cat([getattr(fit, name) for fit in fits]) for name in names))
