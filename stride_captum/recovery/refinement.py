"""Scores corrected by the responses of a few retrained models: a Gaussian posterior for each test point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from ..errors import bad_type, bad_value
from ..system.devices import as_float64, matching
from .design import Design, read_membership
from .marginal_likelihood import Hyperparameters, MarginalLikelihood

_LEVEL = 0.9  # of `slope_interval`
_EVIDENCE = 6.63  # 99% of chi-square with one degree of freedom
_BLOCK_CELLS = 2**22  # float64 numbers in one array
_GPU_BLOCK_FACTOR = 16
_KEPT_CELLS = 2**27  # float64 numbers of eigenvectors that are kept instead of computed twice


@dataclass(frozen=True, eq=False)
class RefinedScores:
    """Posterior of the effects of training examples, with the hyperparameters that all test points share.

    Attributes:
        scores: Posterior means `(n_test, n_train)`, in units of the measured response. The scores as they
            were given where `supported` is False.
        standard_deviation: Posterior standard deviations `(n_test, n_train)`. NaN where the measurements do
            not determine them: `supported` is False, or `prior_scale` was estimated as 0.
        slope: Response for one unit of the scores. Above 1, the scores predict too little. NaN where no
            test point has scores and measurements that differ between subsets.
        prior_scale: Standard deviation from example to example of its own slope, around `slope`; 0 where
            the measurements do not show that slopes differ. Then the scores are only multiplied by `slope`.
        noise: Standard deviation of the noise of a measurement, for one unit of what the scores predict for
            a random subset (see `refine`). `prior_scale^2 / (prior_scale^2 + noise^2)` is the share of
            what the slope leaves unexplained that is put down to the examples.
        slope_interval: 90% interval of `slope`; both ends NaN where the slope was given.

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
) -> RefinedScores:
    """Correct attribution scores by the responses of models that were retrained on subsets.

    For each test point, with its scores s and X centered over the subsets,

        w ~ N(slope s, prior_scale^2 diag(s^2))
        y = X w + e,  e ~ N(0, noise^2 u^2 I),  u^2 = trace(X diag(s^2) X^T) / (n_subsets - 1)

    and the posterior of w given y is

        V = prior_scale^2 X diag(s^2) X^T + noise^2 u^2 I
        mean = slope s + prior_scale^2 diag(s^2) X^T V^-1 (y - slope X s)
        variance_i = prior_scale^2 s_i^2 (1 - prior_scale^2 s_i^2 x_i^T V^-1 x_i)

    An example with a large score may turn out far from it; one with a score of 0 keeps it. The noise is
    relative to u, the standard deviation that the scores predict over random subsets, since test points
    differ in scale by orders of magnitude: scores and responses of one test point may be multiplied by the
    same number without a change for the others. With noise 0 the posterior is the limit of small noise:
    least squares where X diag(s) has full column rank, which needs n_subsets > n_train.

    What is not given is estimated by the marginal likelihood of all test points together; the noise is at
    least a tenth of the prior scale. Two rules keep measurements that say nothing from doing harm:

    - The prior scale is 0, and the scores are only multiplied by the slope, unless it raises twice the log
      likelihood by 6.6 (the 99% point of chi-square) times a design effect. All test points are measured on
      the same retrained models, so their residuals are correlated; the design effect is the number of test
      points that tell as much as one, from those correlations.
    - Where the lower end of `slope_interval` is not positive, `slope` is still what was measured, but the
      scores come back as they were (`supported` is False).

    The interval of the slope is a Student interval over the subsets, whose whitened contributions are summed
    over the test points first: it stays valid where test points depend on one another. In simulations with
    4 to 20 subsets it covers 86 to 94%.

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
        noise: Fixes the noise, at least 0; 0 only beside both others.

    Returns:
        Scores and standard deviations in the dtype of `scores` (float64 if they are integers). A row with a
        score or measurement that is not finite is NaN, and does not take part in the estimates.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Shapes disagree, there are fewer than 3 subsets, or a fixed value is out of range.

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
    problem = _Problem(scores, membership, measured)
    usable = problem.spectra()
    fixed = given[0] is not None
    if not bool(usable.rows.any()):
        found = Hyperparameters(*(math.nan if v is None else v for v in given))
        interval = (math.nan, math.nan) if fixed else (-math.inf, math.inf)
        return problem.unchanged(found, interval)
    likelihood = usable.likelihood
    found = likelihood.maximum(*given)
    if given[1] is None:
        without = likelihood.without_prior(given[0], given[2])
        gain = 2 * (likelihood.value(found) - likelihood.value(without)) if found.prior_scale > 0 else 0.0
        if gain < _EVIDENCE * _design_effect(usable.measured - without.slope * usable.predicted):
            found = without
    result, contributions = problem.posterior(found, usable, known=given[1] is not None)
    if fixed:
        return RefinedScores(*result, *found, (math.nan, math.nan))
    interval = _interval(found.slope, contributions, likelihood.information(found))
    if interval[0] <= 0:
        return problem.unchanged(found, interval)
    return RefinedScores(*result, *found, interval)


class _Spectra(NamedTuple):
    """What is known of the test points once `X diag(s^2) X^T` is diagonal, in units of u.

    Attributes:
        rows: `(n_test,)` bool, which test points take part in the estimates.
        likelihood: In the coordinates of the eigenvectors, of these test points.
        predicted: X s of these test points, `(n, n_subsets)`.
        measured: y of these test points, `(n, n_subsets)`.
    """

    rows: Tensor
    likelihood: MarginalLikelihood
    predicted: Tensor
    measured: Tensor


class _Block(NamedTuple):
    """Some test points: scores s, their largest size, u for scores of largest size 1, and eigenvectors."""

    scores: Tensor
    size: Tensor
    unit: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    predicted: Tensor
    measured: Tensor


class _Problem:
    """Validated scores, centered columns and centered responses."""

    def __init__(self, scores: Any, membership: Any, measured: Any) -> None:
        matrix = read_membership(membership)
        self.n_subsets, n_train = matrix.shape
        if self.n_subsets < 3:
            raise bad_value("membership", "hold at least 3 subsets", self.n_subsets)
        given = _matrix("scores", scores, n_train, "n_train", "columns")
        y = _matrix("measured", measured, self.n_subsets, "n_subsets", "rows")
        if len(y) != len(given):
            raise bad_value("measured", f"have a row for each of the {len(given)} rows of `scores`", len(y))
        self.scores = given if given.is_floating_point() else given.double()
        y = as_float64(y).to(as_float64(self.scores[:0]).device)
        finite = torch.isfinite(self.scores).all(1).to(y.device) & torch.isfinite(y).all(1)
        self.finite = finite
        y = torch.where(finite[:, None], y, 0.0)
        self.y = y - y.mean(1, keepdim=True)
        self.columns = Design(matrix, True, y.device)
        cells = _BLOCK_CELLS * (1 if y.device.type == "cpu" else _GPU_BLOCK_FACTOR)
        self.n_rows = max(1, cells // max(n_train, self.n_subsets**2))
        self.n_columns = max(1, cells // (self.n_rows * self.n_subsets))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def blocks(self) -> Iterator[tuple[slice, _Block]]:
        """All test points, some at a time."""
        for begin in range(0, len(self.y), self.n_rows):
            rows = slice(begin, begin + self.n_rows)
            s = torch.where(self.finite[rows, None], as_float64(self.scores[rows]), 0.0)
            size = s.abs().amax(1, keepdim=True)
            size = torch.where(size > 0, size, 1.0)
            values, vectors = self._kept.get(begin) or self._eigen((s / size).square())
            if vectors.numel() * len(self.y) <= _KEPT_CELLS * len(s):
                self._kept[begin] = (values, vectors)
            unit = values.mean(1, keepdim=True).sqrt()
            unit = torch.where(unit > 0, unit, 1.0)
            predicted = self.columns.forward(self.columns.collect(s / size)) / unit
            measured = self.y[rows] / (size * unit)
            yield rows, _Block(s, size, unit, values / unit.square(), vectors, predicted, measured)

    def _eigen(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of `X diag(squares) X^T` on the vectors of mean 0."""
        n, n_subsets = len(squares), self.n_subsets
        weights = self.columns.collect(squares)
        gram = squares.new_zeros(n, n_subsets, n_subsets)
        for columns, block in self.columns.blocks(self.n_columns):
            scaled = (weights[:, None, columns] * block).reshape(n * n_subsets, -1)
            gram += (scaled @ block.T).view(n, n_subsets, n_subsets)
        gram = (gram + gram.mT) / 2
        # The constant vector becomes that of the largest eigenvalue, which is left out.
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        above = torch.where(trace > 0, 2 * trace, 1.0)
        values, vectors = torch.linalg.eigh(gram + above[:, None, None] / n_subsets)
        values, vectors = values[:, :-1], vectors[:, :, :-1]
        rounding = n_subsets * torch.finfo(values.dtype).eps * above[:, None]
        return torch.where(values > rounding, values, 0.0), vectors

    def spectra(self) -> _Spectra:
        """The test points whose predictions and measurements can say something, in their own coordinates."""
        used, eigenvalues, predicted, measured, rotated = [], [], [], [], []
        for _, block in self.blocks():
            informed = (block.eigenvalues > 0).any(1)  # not so where the row is not finite
            used.append(informed)
            eigenvalues.append(block.eigenvalues[informed])
            predicted.append(block.predicted[informed])
            measured.append(block.measured[informed])
            pair = torch.stack([block.predicted[informed], block.measured[informed]], 1)
            rotated.append(pair @ block.vectors[informed])
        if not used:
            used, empty = [self.finite], self.y.new_zeros(0, self.n_subsets)
            eigenvalues, predicted, measured = [empty], [empty], [empty]
            rotated = [self.y.new_zeros(0, 2, self.n_subsets)]
        both = torch.cat(rotated)
        likelihood = MarginalLikelihood(torch.cat(eigenvalues), both[:, 0], both[:, 1])
        return _Spectra(torch.cat(used), likelihood, torch.cat(predicted), torch.cat(measured))

    def posterior(
        self, at: Hyperparameters, usable: _Spectra, known: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Means and standard deviations, and what each subset contributes to the slope, `(n_subsets,)`.

        Args:
            at: The hyperparameters.
            usable: Which test points the slope is estimated from.
            known: Whether the prior scale was given, so that 0 is meant.
        """
        mean, deviation = torch.empty_like(self.scores), torch.empty_like(self.scores)
        total = self.y.new_zeros(self.n_subsets)
        if at.prior_scale == 0:
            residual = usable.measured - at.slope * usable.predicted
            if at.noise > 0:
                total = (usable.predicted * residual).sum(0) / at.noise**2
            for part, target in zip(self.scores.split(self.n_rows), mean.split(self.n_rows), strict=True):
                target.copy_(matching(at.slope * as_float64(part), target))
            zero = (self.scores == 0).all(1, keepdim=True)
            deviation.copy_(torch.where(zero | known, 0.0, math.nan).expand_as(deviation))
        else:
            for rows, block in self.blocks():
                effects, errors, contributions = self._solve(at, block)
                total += contributions.sum(0)
                mean[rows] = matching(effects, mean)
                deviation[rows] = matching(errors, deviation)
        lost = ~self.finite.to(mean.device)
        mean[lost], deviation[lost] = math.nan, math.nan
        return (mean, deviation), total

    def _solve(self, at: Hyperparameters, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
        tau2, vectors = at.prior_scale**2, block.vectors
        variance = tau2 * block.eigenvalues + at.noise**2
        inverse = torch.where(variance > 0, 1 / variance, 0.0)
        residual = block.measured - at.slope * block.predicted
        pair = torch.stack([block.predicted, residual], 1) @ vectors
        white = (pair * inverse.sqrt()[:, None]) @ vectors.mT
        dual = ((pair[:, 1] * inverse)[:, None] @ vectors.mT)[:, 0]
        n, columns = len(dual), self.columns
        quadratic = dual.new_zeros(n, columns.n_columns)
        roots = (vectors * inverse.sqrt()[:, None]).mT.reshape(-1, self.n_subsets)
        for index, part in columns.blocks(self.n_columns):
            quadratic[:, index] = (roots @ part).view(n, -1, part.shape[1]).square().sum(1)
        relative = block.scores / (block.size * block.unit)
        own = at.slope + tau2 * relative * columns.expand(columns.adjoint(dual))
        left = 1 - tau2 * relative.square() * columns.expand(quadratic)
        errors = at.prior_scale * block.scores.abs() * left.clamp(min=0).sqrt()
        return block.scores * own, errors, white[:, 0] * white[:, 1]

    def unchanged(self, found: Hyperparameters, interval: tuple[float, float]) -> RefinedScores:
        """The scores as they were."""
        lost = ~self.finite.to(self.scores.device)[:, None]
        zero = (self.scores == 0).all(1, keepdim=True)
        scores = torch.where(lost, math.nan, self.scores)
        deviation = torch.where(zero & ~lost, 0.0, math.nan).to(scores).expand_as(scores).clone()
        return RefinedScores(scores, deviation, *found, interval)


def _interval(slope: float, contributions: Tensor, information: float) -> tuple[float, float]:
    """Student's interval from the contributions of subsets to the score function of the slope."""
    if not information > 0:
        return -math.inf, math.inf
    freedom = len(contributions) - 2
    spread = float(contributions.square().sum()) * len(contributions) / freedom
    half = float(stdtrit(freedom, (1 + _LEVEL) / 2)) * math.sqrt(spread) / information
    return slope - half, slope + half


def _design_effect(residual: Tensor) -> float:
    """How many test points tell as much as one: 1 + the sum of squared correlations with the others.

    The sample's squared correlations are corrected for their mean 1 / (n_subsets - 1) under independence.

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


def _matrix(name: str, values: Any, width: int, size: str, which: str) -> Tensor:
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    if not isinstance(values, Tensor):
        raise bad_type(name, "be a torch tensor or a NumPy array", values)
    if values.ndim != 2 or values.shape[1] != width:
        must = f"be of shape (n_test, {size}) with {size} = {width}, as `membership` has {which}"
        remedy = f"One test point is {name}[None]." if values.ndim == 1 else None
        raise bad_value(name, must, tuple(values.shape), remedy)
    return values.detach()


def _fixed(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    must = "be a finite number" if name == "slope" else "be a finite number, at least 0"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise bad_type(name, f"{must}, or None to be estimated", value)
    if not math.isfinite(value) or (name != "slope" and value < 0):
        raise bad_value(name, must, value, "Leave it out to have it estimated.")
    return float(value)
