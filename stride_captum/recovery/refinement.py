"""Scores corrected by the responses of a few retrained models: a Gaussian posterior for each test point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

from ..errors import bad_type, bad_value
from .effect_posterior import EffectPosterior
from .marginal_likelihood import Hyperparameters, design_effect

_LEVEL = 0.9  # of `slope_interval`
_EVIDENCE = 6.63  # 99% of chi-square with one degree of freedom
#: Smallest value of each number that can be fixed, and how an error says so.
_RANGES = {
    "slope": (-math.inf, ""),
    "prior_scale": (0.0, ", at least 0"),
    "noise": (0.0, ", at least 0"),
    "power": (math.ulp(0.0), " above 0"),
    "opponents": (math.ulp(0.0), " above 0"),
}


@dataclass(frozen=True, eq=False)
class RefinedScores:
    """Posterior of the effects of training examples, with the hyperparameters that all test points share.

    Attributes:
        scores: Posterior means `(n_test, n_train)`, in units of the measured response. The scores as they
            were given where `supported` is False.
        standard_deviation: Posterior standard deviations `(n_test, n_train)`. NaN where the measurements do
            not determine them: `supported` is False, or `prior_scale` was estimated as 0.
        slope: Response for one unit of the scores, in their shape. Above 1, the scores predict too little.
            NaN where no test point has scores and measurements that differ between subsets.
        prior_scale: Standard deviation from example to example of its own slope, around `slope`; 0 where
            the measurements do not show that slopes differ. Then the scores are only multiplied by `slope`.
        noise: Standard deviation of the noise of a measurement, for one unit of what the scores predict for
            a random subset (see `refine`). `prior_scale^2 / (prior_scale^2 + noise^2)` is the share of
            the variance left by the slope that is attributed to examples.
        slope_interval: 90% interval of `slope`, for this shape; both ends NaN where the slope was given.
        power: Of the absolute scores. Above 1, the scores are too even: large ones should gain on small ones.
        opponents: What negative scores are multiplied by. Above 1, they are too small beside positive ones.

    >>> import torch
    >>> scores = torch.tensor([[1.0, -2.0, 4.0]])
    >>> halves = torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]])
    >>> measured = scores @ halves.T + torch.tensor([[0.5, -0.5, 0.5, -0.5]])  # an effect of 2, not of 1
    >>> refine(scores, halves, measured, slope=1, prior_scale=1, noise=0).scores.round(decimals=3)
    tensor([[ 2., -2.,  4.]])
    """

    scores: Tensor
    standard_deviation: Tensor
    slope: float
    prior_scale: float
    noise: float
    slope_interval: tuple[float, float]
    power: float = 1.0
    opponents: float = 1.0

    @property
    def supported(self) -> bool:
        """Whether the slope was given, or the measurements show that it is positive."""
        return not self.slope_interval[0] <= 0


def refine(
    scores: Any,
    membership: Any,
    measured: Any,
    *,
    slope: float | None = None,
    prior_scale: float | None = None,
    noise: float | None = None,
    power: float | None = None,
    opponents: float | None = None,
) -> RefinedScores:
    """Correct attribution scores by the responses of models that were retrained on subsets.

    For each test point, with X centered over the subsets and f the scores in their shape (`|s|^power
    sign(s)`, negative ones times `opponents`, scaled so that u is that of s),

        w ~ N(slope f, prior_scale^2 diag(f^2))
        y = X w + e,  e ~ N(0, noise^2 u^2 I),  u^2 = trace(X diag(f^2) X^T) / (n_subsets - 1)

    and the posterior of w given y is

        V = prior_scale^2 X diag(f^2) X^T + noise^2 u^2 I
        mean = slope f + prior_scale^2 diag(f^2) X^T V^-1 (y - slope X f)
        variance_i = prior_scale^2 f_i^2 (1 - prior_scale^2 f_i^2 x_i^T V^-1 x_i)

    Large scores may change by much; a score of 0 does not change. The noise is relative to u, the standard
    deviation that the scores predict over random subsets, since test points differ in scale by orders of
    magnitude: rescaling scores and responses of one test point does not affect the others. With noise 0 the
    posterior is the limit of small noise: least squares if X diag(s) has full column rank, which needs
    n_subsets > n_train.

    Hyperparameters that are not given maximize the marginal likelihood of all test points together; the noise
    is at least a tenth of the prior scale. The shape is found first, by least squares with a prior around 1
    (`score_shape.fit_shape`). It changes sums of scores, never their order. Two rules protect against
    uninformative measurements:

    - The prior scale is 0, and the scores are only multiplied by the slope, unless it raises twice the log
      likelihood by 6.6 (the 99% point of chi-square) times a design effect. All test points are measured on
      the same retrained models, so their residuals are correlated; the design effect is the number of test
      points that carry as much information as one independent one.
    - If the lower end of `slope_interval` is not positive, `slope` is still the estimate, but the scores are
      returned unchanged (`supported` is False).

    The interval of the slope is a Student interval over the subsets, whose whitened contributions are summed
    over the test points first, so that it is valid for correlated test points. In simulations with 4 to 20
    subsets it covers 86 to 94%; with 10 and an estimated shape, whose error it leaves out, 85 to 89%.

    A test point costs O(n_subsets^2 n_train) operations, for as many columns of X as are distinct.

    Args:
        scores: `(n_test, n_train)` of any method, tensor or array: the predicted change of the response when
            the example is included, up to one common factor. Positive scores are proponents. The work is
            done on its device in float64.
        membership: X `(n_subsets, n_train)`, at least 3 subsets: SciPy sparse, an array or a tensor. Two
            complementary halves tell more than two random ones.
        measured: Responses `(n_test, n_subsets)` of models retrained on the subsets, of the same sign:
            higher where proponents are included.
        slope: Fixes the slope.
        prior_scale: Fixes the prior scale, at least 0.
        noise: Fixes the noise, at least 0; 0 only beside slope and prior scale.
        power: Fixes the power, above 0. None estimates it, or is 1 where the slope is fixed.
        opponents: Fixes what negative scores are multiplied by, above 0. None likewise.

    Returns:
        Scores and standard deviations in the dtype of `scores` (float64 if they are integers). A row with a
        score or measurement that is not finite is NaN, and does not take part in the estimates.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Shapes disagree, there are fewer than 3 subsets, or a fixed value is out of range.

    >>> import torch
    >>> from stride_captum.subsets import random_subsets
    >>> generator = torch.Generator().manual_seed(0)
    >>> scores = torch.randn(20, 100, generator=generator)
    >>> effects = scores * (2 + torch.randn(20, 100, generator=generator))
    >>> halves = random_subsets(100, 40, 50)
    >>> measured = effects @ torch.from_numpy(halves.toarray()).float().T
    >>> found = refine(scores, halves, measured + 5 * torch.randn(20, 40, generator=generator))
    >>> round(found.slope), round(found.prior_scale)
    (2, 1)
    >>> bool((found.scores - effects).square().mean() < (2 * scores - effects).square().mean())
    True
    """
    given = [_fixed(*v) for v in (("slope", slope), ("prior_scale", prior_scale), ("noise", noise))]
    if noise == 0 and (slope is None or prior_scale is None):
        raise bad_value(
            "noise", "be positive where slope or prior scale are estimated", noise, "Fix all three."
        )
    fixed = given[0] is not None
    of_shape = [_fixed("power", power), _fixed("opponents", opponents)]
    if fixed:
        of_shape = [1.0 if value is None else value for value in of_shape]
    problem = EffectPosterior(scores, membership, measured, *of_shape)
    shape, usable = problem.shape, problem.spectra()
    if not bool(usable.rows.any()):
        found = Hyperparameters(*(math.nan if v is None else v for v in given))
        interval = (math.nan, math.nan) if fixed else (-math.inf, math.inf)
        return RefinedScores(*problem.unchanged(), *found, interval, *shape)
    likelihood = usable.likelihood
    found = likelihood.maximum(*given)
    if given[1] is None:
        without = likelihood.without_prior(given[0], given[2])
        gain = 2 * (likelihood.value(found) - likelihood.value(without)) if found.prior_scale > 0 else 0.0
        if gain < _EVIDENCE * design_effect(usable.measured - without.slope * usable.predicted):
            found = without
    result, contributions = problem.posterior(found, usable, known=given[1] is not None)
    if fixed:
        return RefinedScores(*result, *found, (math.nan, math.nan), *shape)
    interval = _interval(found.slope, contributions, likelihood.information(found))
    if interval[0] <= 0:
        return RefinedScores(*problem.unchanged(), *found, interval, *shape)
    return RefinedScores(*result, *found, interval, *shape)


def _interval(slope: float, contributions: Tensor, information: float) -> tuple[float, float]:
    """Student interval from the contributions of subsets to the score function of the slope."""
    if not information > 0:
        return -math.inf, math.inf
    freedom = len(contributions) - 2
    spread = float(contributions.square().sum()) * len(contributions) / freedom
    half = float(stdtrit(freedom, (1 + _LEVEL) / 2)) * math.sqrt(spread) / information
    return slope - half, slope + half


def _fixed(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    least, range_in_words = _RANGES[name]
    must = f"be a finite number{range_in_words}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise bad_type(name, f"{must}, or None to be estimated", value)
    if not math.isfinite(value) or value < least:
        raise bad_value(name, must, value, "Leave it out to have it estimated.")
    return float(value)
