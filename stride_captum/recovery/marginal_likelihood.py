"""Marginal likelihood of measured responses under a Gaussian prior around scores, and its maximum.

For each test point, in the eigenbasis of the covariance of the response and in units of the standard
deviation that its scores predict for random subsets, with eigenvalues l, predictions p and measurements y:

    y ~ N(slope p, prior_scale^2 diag(l) + noise^2 I)

The test points share slope, prior scale and noise, so their log densities add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from scipy.optimize import brentq
from torch import Tensor

#: The estimated noise is at least this share of the prior scale: with fewer subsets than examples the prior
#: explains everything, and the likelihood may say so.
NOISE_FLOOR = 0.1
_SMALLEST_RATIO = 1e-4  # of prior scale to noise, beside 0
_STEP = 0.25  # of the grid, in logarithms
_EXACT = 1e-12  # noise of measurements that the slope explains exactly, relative to their size


class Hyperparameters(NamedTuple):
    """Slope, prior scale and noise, all in units of the response for one unit of the scores."""

    slope: float
    prior_scale: float
    noise: float


@dataclass(frozen=True)
class MarginalLikelihood:
    """Log density of all measurements, `(n_test, m)` with m = n_subsets - 1, as a function of three numbers.

    Attributes:
        eigenvalues: l, `(n_test, m)` with mean 1 in each row.
        predicted: p, `(n_test, m)`.
        measured: y, `(n_test, m)`.

    >>> import torch
    >>> one = torch.ones(1, 2, dtype=torch.float64)
    >>> round(MarginalLikelihood(one, one, one).value(Hyperparameters(1.0, 0.6, 0.8)), 6)  # -log(2 pi)
    -1.837877
    """

    eigenvalues: Tensor
    predicted: Tensor
    measured: Tensor

    def value(self, at: Hyperparameters) -> float:
        """The log density."""
        variance = self._variance(at.prior_scale, at.noise)
        residual = self.measured - at.slope * self.predicted
        terms = residual.square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * float(terms.sum())

    def gradient(self, at: Hyperparameters) -> tuple[float, float, float]:
        """Derivatives with respect to the slope and to the logarithms of prior scale and noise."""
        variance = self._variance(at.prior_scale, at.noise)
        weighted = (self.measured - at.slope * self.predicted) / variance
        excess = weighted.square() - 1 / variance  # twice the derivative with respect to the variance
        return (
            float((weighted * self.predicted).sum()),
            at.prior_scale**2 * float((excess * self.eigenvalues).sum()),
            at.noise**2 * float(excess.sum()),
        )

    def maximum(
        self, slope: float | None = None, prior_scale: float | None = None, noise: float | None = None
    ) -> Hyperparameters:
        """Hyperparameters of highest density; given ones are fixed.

        Prior scale, noise or their ratio is searched on a grid, then by the root of the derivative. The best
        slope is generalized least squares, and the best noise for a ratio is the mean square of the whitened
        residuals. An estimated noise is at least `NOISE_FLOOR` of the prior
        scale.
        """
        size = float(self.measured.square().mean().sqrt())
        if size == 0:
            scale = prior_scale or 0.0
            return Hyperparameters(slope or 0.0, scale, NOISE_FLOOR * scale if noise is None else noise)
        if noise is not None and prior_scale is not None:
            return self._with_slope(slope, prior_scale, noise)
        if noise is not None:
            given = noise
            found = self._search(
                lambda x: self._with_slope(slope, math.exp(x), given),
                math.log(_SMALLEST_RATIO * given),
                math.log(max(given, 100 * size) / NOISE_FLOOR),
                by=1,
            )
            return max(found, self._with_slope(slope, 0.0, given), key=self.value)
        without = self._scaled(slope, 0.0, size)
        if prior_scale is None:
            found = self._search(
                lambda x: self._scaled(slope, math.exp(x), size),
                math.log(_SMALLEST_RATIO),
                -math.log(NOISE_FLOOR),
                by=1,
            )
            return max(without, found, key=self.value)
        if prior_scale == 0:
            return without
        given_scale, least = prior_scale, max(NOISE_FLOOR * prior_scale, _EXACT * size)
        return self._search(
            lambda x: self._with_slope(slope, given_scale, math.exp(x)),
            math.log(least),
            math.log(max(10 * least, 100 * size)),
            by=2,
        )

    def without_prior(self, slope: float | None, noise: float | None) -> Hyperparameters:
        """Maximum with prior scale 0, where only slope and noise are free."""
        return self.maximum(slope, 0.0, noise)

    def information(self, at: Hyperparameters) -> float:
        """Inverse variance of the slope if the test points were independent."""
        return float((self.predicted.square() / self._variance(at.prior_scale, at.noise)).sum())

    def _variance(self, prior_scale: float, noise: float) -> Tensor:
        return prior_scale**2 * self.eigenvalues + noise**2

    def _with_slope(self, slope: float | None, prior_scale: float, noise: float) -> Hyperparameters:
        if slope is None:
            weighted = self.predicted / self._variance(prior_scale, noise)
            slope = _ratio(weighted, self.measured, self.predicted)
        return Hyperparameters(slope, prior_scale, noise)

    def _scaled(self, slope: float | None, ratio: float, size: float) -> Hyperparameters:
        """Best slope and noise for a ratio of prior scale to noise."""
        best = self._with_slope(slope, ratio, 1.0).slope
        residual = self.measured - best * self.predicted
        square = float((residual.square() / self._variance(ratio, 1.0)).mean())
        noise = max(math.sqrt(square), _EXACT * size)
        return Hyperparameters(best, ratio * noise, noise)

    def _search(
        self, point: Callable[[float], Hyperparameters], low: float, high: float, by: int
    ) -> Hyperparameters:
        """Maximum between two bounds; `by` is the index of the gradient along the search direction."""
        steps = max(2, math.ceil((high - low) / _STEP))
        grid = [low + (high - low) * i / steps for i in range(steps + 1)]
        values = [self.value(point(x)) for x in grid]
        best = max(range(len(grid)), key=values.__getitem__)
        left, right = grid[max(best - 1, 0)], grid[min(best + 1, steps)]
        slope = [self.gradient(point(x))[by] for x in (left, right)]
        if slope[0] > 0 > slope[1]:
            root = brentq(lambda x: self.gradient(point(x))[by], left, right, xtol=1e-13, rtol=1e-13)
            return max(point(root), point(grid[best]), key=self.value)
        return point(grid[best])


def design_effect(residual: Tensor) -> float:
    """Design effect of correlated test points: 1 + the sum of squared correlations with the others.

    The test points are measured on the same retrained models. It is the number of them that carry as much
    information as one independent one. The sample's squared correlations are corrected for their mean
    1 / (n_subsets - 1) under independence.

    Args:
        residual: `(n, n_subsets)`, of mean 0 in each row.
    """
    norms = residual.norm(dim=1, keepdim=True)
    rows = (residual / norms)[norms[:, 0] > 0]
    n, m = len(rows), residual.shape[1] - 1
    if n < 2:
        return 1.0
    off = float((rows.T @ rows).square().sum()) - n
    return 1 + max(0.0, (m * off - n * (n - 1)) / (m - 1)) / n


def _ratio(weighted: Tensor, measured: Tensor, predicted: Tensor) -> float:
    square = float((weighted * predicted).sum())
    return float((weighted * measured).sum()) / square if square > 0 else 0.0
