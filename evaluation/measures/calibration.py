"""Calibration: do predicted effects match measured ones in size, not only in rank?

    measured = slope * predicted + intercept

for the change of the margin of a test point. It is measured in two ways: on random halves S, where the
predicted value is the sum of the scores of S; and on removed groups, where it is minus the sum of the removed
scores. A slope of 1 means that scores are in units of the response; above 1, they predict too little. Noise
of the retrainings does not bias the slope, since it is in the measurement alone; noise of the scores pulls it
towards 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import bad_value
from ...subsets import Membership
from . import statistics
from .linear_datamodeling import check_inputs, finite_array
from .plain_values import plain
from .statistics import Array, Interval, mean_defined


@dataclass(frozen=True, repr=False, eq=False)
class CalibrationResult:
    """Regression of measured effects on predicted ones.

    Attributes:
        slope: One slope for all test points, mean over attributed models.
        per_model: The slope of each model.
        per_test: Slopes of single test points `(n_models, n_test)`; NaN if their predictions do not vary.
        undefined: How many of `per_test` are NaN.
        intercept: Measured change at a predicted change of 0, mean over models; None if only differences
            between subsets were measured.
        r2: Share of the variance of the measurement that the fitted line explains, mean over models.
        r2_as_predicted: The same for the line with slope 1 and intercept 0, relative to predicting no change;
            negative if predicting no change is better.
        per_count: For removed groups, the ratio of measured to predicted change at each count, both summed
            over test points; None for subsets.
        interval: Crossed bootstrap of `slope`; None without resamples.
        n_groups: Number of subsets, or of counts of removed examples.
        n_seeds: Retrainings of each.
        seed: Seed of the bootstrap.
        draws: Bootstrap draws of the slopes `(n_resamples, n_models)`; those of two results with one seed are
            paired.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> result = calibration(effects, halves, halves @ effects.T, n_resamples=0)
    >>> result.interval is None, result.n_groups
    (True, 40)
    """

    slope: float
    per_model: tuple[float, ...]
    per_test: Array
    undefined: int
    intercept: float | None
    r2: float
    r2_as_predicted: float
    per_count: tuple[float, ...] | None
    interval: Interval | None
    n_groups: int
    n_seeds: int
    seed: int = 0
    draws: Array | None = None

    def __repr__(self) -> str:
        text = f"slope {self.slope:.3f}"
        if self.interval is not None:
            text += f" {self.interval} ({self.interval.level:.0%})"
        return f"{text}, R2 {self.r2:.3f} ({self.r2_as_predicted:.3f} as predicted)"

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON (what is undefined is None); `draws` is left out."""
        return plain({k: v for k, v in vars(self).items() if k != "draws"})


def calibration(
    scores: Any,
    membership: Membership,
    responses: Any,
    *,
    intact: Any = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationResult:
    """Calibration over subsets of kept examples: the arguments are those of `lds`.

    Predicted and measured values are centered over the subsets of each test point, so that the slope
    compares subsets with one another:
    `slope = sum_{k, t} p_kt m_kt / sum_{k, t} p_kt^2`, for one test point without the sum over t.

    Args:
        scores: `(n_test, n_train)`, or a list with one such matrix for each attributed model, in units
            of the response.
        membership: CSR `(n_subsets, n_train)` of the examples each retraining kept.
        responses: `(n_subsets, n_test)`, or `(n_seeds, n_subsets, n_test)`, averaged over seeds.
        intact: Responses of models trained on the whole training set, `(n_test,)` or `(n_seeds, n_test)`.
            With them there is an intercept: the mean change from the intact model, minus slope times its
            prediction (minus the sum of the scores that a subset lacks).
        n_resamples: Draws of the crossed bootstrap over subsets and test points; 0 leaves the interval out.
        level: Level of the interval.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or there are fewer than 3 subsets.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> twice_too_large = 2 * effects
    >>> round(calibration(twice_too_large, halves, halves @ effects.T, n_resamples=0).slope, 6)
    0.5
    """
    matrices, membership, responses = check_inputs(scores, membership, responses)
    _check_resamples(n_resamples)
    kept = [np.asarray(membership @ s.T) for s in matrices]
    target = responses.mean(0)
    predicted, measured = np.stack([p - p.mean(0) for p in kept]), target - target.mean(0)
    per_test = _ratio((predicted * measured).sum(1), (predicted**2).sum(1))
    slopes = _ratio((predicted * measured).sum((1, 2)), (predicted**2).sum((1, 2)))
    intercept = None
    if intact is not None:
        whole = finite_array("intact", intact)
        if whole.shape[-1:] != target.shape[1:] or whole.ndim > 2:
            raise bad_value("intact", f"have shape (n_seeds, {target.shape[1]})", whole.shape)
        change = (target - whole.reshape(-1, target.shape[1]).mean(0)).mean()
        lacking = [(p - s.sum(1)).mean() for p, s in zip(kept, matrices, strict=True)]
        intercept = float(mean_defined(change - slopes * np.array(lacking)))
    draws = None
    if n_resamples:
        draws = _resample_subsets(predicted, measured, n_resamples, seed)
    return CalibrationResult(
        slope=float(mean_defined(slopes)),
        per_model=tuple(slopes.tolist()),
        per_test=per_test,
        undefined=int(np.isnan(per_test).sum()),
        intercept=intercept,
        **_explained(predicted, np.broadcast_to(measured, predicted.shape), slopes, np.zeros(len(slopes))),
        per_count=None,
        interval=None if draws is None else statistics.interval(mean_defined(draws, axis=1), level),
        n_groups=len(target),
        n_seeds=len(responses),
        seed=seed,
        draws=draws,
    )


def calibration_of_removals(
    predicted: Any,
    measured: Any,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationResult:
    """Calibration over removed groups; every test point has its own groups.

    One line with an intercept is fitted to all counts and test points. The line of a single test point goes
    through the origin, since removing nothing changes nothing.

    Args:
        predicted: `(n_counts, n_test)` from `predicted_changes`, or `(n_models, n_counts, n_test)`.
        measured: Change of the response against the intact model of the same seed,
            `(n_counts, n_seeds, n_test)`, or with n_models in front.
        n_resamples: Draws of the crossed bootstrap over seeds and test points; 0 leaves the interval out.
        level: Level of the interval.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Shapes do not match, or a value is not finite.
    """
    _check_resamples(n_resamples)
    p, m = finite_array("predicted", predicted), finite_array("measured", measured)
    p, m = (p[None] if p.ndim == 2 else p), (m[None] if m.ndim == 3 else m)
    if p.ndim != 3 or m.ndim != 4 or p.shape != (m.shape[0], m.shape[1], m.shape[3]) or not m.size:
        raise bad_value(
            "measured",
            "have shape (n_models, n_counts, n_seeds, n_test) beside predicted (n_models, n_counts, n_test)",
            f"{m.shape} beside {p.shape}",
        )
    mean = m.mean(2)
    slopes, intercepts = _line(p, mean, np.ones((1, p.shape[2])))
    per_test = _ratio((p * mean).sum(1), (p**2).sum(1))
    draws = None
    if n_resamples:
        seeds, tests = statistics.crossed_counts(m.shape[2], p.shape[2], n_resamples, seed)
        resampled = np.einsum("mcst,rs->mrct", m, seeds / m.shape[2])
        draws = np.stack(
            [_line(a[None], b, tests.astype(np.float64))[0] for a, b in zip(p, resampled, strict=True)],
            axis=1,
        )
    return CalibrationResult(
        slope=float(mean_defined(slopes)),
        per_model=tuple(slopes.tolist()),
        per_test=per_test,
        undefined=int(np.isnan(per_test).sum()),
        intercept=float(mean_defined(intercepts)),
        **_explained(p, mean, slopes, intercepts),
        per_count=tuple(_ratio(mean.sum((0, 2)), p.sum((0, 2))).tolist()),
        interval=None if draws is None else statistics.interval(mean_defined(draws, axis=1), level),
        n_groups=p.shape[1],
        n_seeds=m.shape[2],
        seed=seed,
        draws=draws,
    )


def predicted_changes(scores: Any, removed: Sequence[Any]) -> Array:
    """Predicted change of the response: minus the sum of the removed scores of each test point.

    Args:
        scores: `(n_test, n_train)`.
        removed: For each count, the removed examples of every test point `(n_test, k)`.

    Returns:
        `(n_counts, n_test)`.

    >>> predicted_changes([[1.0, 2.0, 4.0]], [[[2]], [[2, 0]]]).tolist()
    [[-4.0], [-5.0]]
    """
    scores = finite_array("scores", scores)
    return -np.stack([np.take_along_axis(scores, np.asarray(rows), axis=1).sum(1) for rows in removed])


def _line(p: Array, m: Array, weights: Array) -> tuple[Array, Array]:
    """Least squares slope and intercept of m on p, both `(r, n_counts, n_test)`, with test point weights."""
    w = weights[:, None, :]
    total = weights.sum(1) * p.shape[1]
    p_mean, m_mean = (w * p).sum((1, 2)) / total, (w * m).sum((1, 2)) / total
    dp, dm = p - p_mean[:, None, None], m - m_mean[:, None, None]
    slope = _ratio((w * dp * dm).sum((1, 2)), (w * dp**2).sum((1, 2)))
    return slope, m_mean - slope * p_mean


def _explained(p: Array, m: Array, slopes: Array, intercepts: Array) -> dict[str, float]:
    """Both R2 of predictions `(n_models, n_groups, n_test)`, means over models."""
    fitted = slopes[:, None, None] * p + intercepts[:, None, None]
    spread = ((m - m.mean((1, 2), keepdims=True)) ** 2).sum((1, 2))
    return {
        "r2": float(mean_defined(1 - _ratio(((m - fitted) ** 2).sum((1, 2)), spread))),
        "r2_as_predicted": float(mean_defined(1 - _ratio(((m - p) ** 2).sum((1, 2)), (m**2).sum((1, 2))))),
    }


def _resample_subsets(predicted: Array, measured: Array, n_resamples: int, seed: int) -> Array:
    """Slopes `(n_resamples, n_models)` of resampled subsets and test points, centered anew in each draw."""
    counts, tests = statistics.crossed_counts(len(measured), measured.shape[1], n_resamples, seed)
    subsets = counts / len(measured)
    m_mean = subsets @ measured
    draws = []
    for p in predicted:
        p_mean = subsets @ p
        cross = subsets @ (p * measured) - p_mean * m_mean
        square = subsets @ (p * p) - p_mean**2
        draws.append(_ratio((tests * cross).sum(1), (tests * square).sum(1)))
    return np.stack(draws, axis=1)


def _ratio(numerator: Array, denominator: Array) -> Array:
    out = np.full(np.shape(numerator), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0))


def _check_resamples(n_resamples: int) -> None:
    if n_resamples < 0:
        raise bad_value("n_resamples", "be at least 0", n_resamples)
