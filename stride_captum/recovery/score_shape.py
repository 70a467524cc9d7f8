"""The shape of scores: which power of them, and which slope of opponents, fits measured responses best.

Scores of any method may rank examples well and still be too even, or too small for examples that count
against a test point. Both are properties of the method on a task, so that all test points together determine
them from a few retrained models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .design import Design
from .marginal_likelihood import design_effect

#: Standard deviations of the logarithms of the power and of the slope of opponents before measurements.
_DEVIATIONS = (0.12, 0.35)
_EXACT = 1e-24  # share of variance from which a shape explains the responses exactly
_DIGITS = 2  # of a shape that was estimated


class Shape(NamedTuple):
    """What the scores of a test point are replaced by before they are scaled by the slope.

    Attributes:
        power: Of their absolute value. Above 1, large scores gain on small ones.
        opponents: What negative scores are multiplied by.
    """

    power: float = 1.0
    opponents: float = 1.0


def shaped(scores: Tensor, shape: Shape, squares: Tensor) -> Tensor:
    """`|s|^power sign(s)`, negative ones times `opponents`, scaled so that `sum squares s^2` stays.

    Args:
        scores: s, `(n, n_train)` float64.
        shape: (1, 1) returns the scores themselves.
        squares: Sum of squares of each centered column of the membership, `(n_train,)`.
    """
    if shape == Shape():
        return scores
    s, size = relative(scores)
    found = s.abs().pow(shape.power).copysign(s)
    found = torch.where(s < 0, shape.opponents * found, found)
    before, after = (part.square() @ squares for part in (s, found))
    factor = torch.where(after > 0, before / after, 1.0).sqrt()
    return found * (size * factor[:, None])


def relative(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each row in units of the largest, and that, `(n, 1)`; 1 where all are 0."""
    size = scores.abs().amax(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    return scores / size, size


def fit_shape(
    scores: Tensor,
    columns: Design,
    measured: Tensor,
    power: float | None = None,
    opponents: float | None = None,
) -> Shape:
    """The most likely shape, given the responses.

    The logarithms of both numbers have a normal prior around 0, with standard deviations .12 and .35, so that
    few measurements leave the scores as they are. What a shape leaves unexplained is noise of one size, in
    units of the deviation that the scores of a test point predict. The log likelihood is divided by the
    design effect of `marginal_likelihood`. The order of the scores of a test point never changes.

    Args:
        scores: s, `(n, n_train)` float64, finite.
        columns: Centered columns of the membership.
        measured: Responses minus their mean, `(n, n_subsets)` float64.
        power: Fixes the power.
        opponents: Fixes the slope of opponents.
    """
    given = power, opponents
    start = Shape(*(1.0 if value is None else value for value in given))
    free = [i for i, value in enumerate(given) if value is None]
    if not free:
        return start
    squares = columns.squares
    s, size = relative(scores)
    units = (s.square() @ squares / (columns.n_subsets - 1)).sqrt()[:, None]
    informed = units[:, 0] > 0
    s, units = s[informed], units[informed]
    y = measured[informed] / (size[informed] * units)

    def residual(shape: Shape) -> tuple[Tensor, float]:
        predicted = columns.forward(columns.collect(shaped(s, shape, squares))) / units
        square = float(predicted.square().sum())
        slope = float((predicted * y).sum()) / square if square > 0 else 0.0
        return y - slope * predicted, slope

    def with_free(logarithms: np.ndarray) -> Shape:
        values = list(start)
        for place, value in zip(free, logarithms, strict=True):
            values[place] = float(np.exp(value))
        return Shape(*values)

    before, slope = residual(start)
    if not slope > 0 or not bool(before.any()):  # also if no scores differ between subsets
        return start
    freedom: float = len(s) * min(columns.n_subsets - 1, columns.n_columns) / design_effect(before)

    def surprise(logarithms: np.ndarray) -> float:
        after, _ = residual(with_free(logarithms))
        fit = float(after.square().sum() / before.square().sum())
        prior: float = sum((float(x) / _DEVIATIONS[i]) ** 2 for i, x in zip(free, logarithms, strict=True))
        return freedom * math.log(max(fit, _EXACT)) + prior

    found = minimize(
        surprise,
        np.zeros(len(free)),
        method="Nelder-Mead",
        bounds=[(-3 * _DEVIATIONS[i], 3 * _DEVIATIONS[i]) for i in free],
        options={"xatol": 0.002, "fatol": 1e-6, "initial_simplex": np.eye(len(free) + 1, len(free), -1) / 10},
    )
    values = with_free(found.x)
    return Shape(*(round(v, _DIGITS) if i in free else v for i, v in enumerate(values)))
