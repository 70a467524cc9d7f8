"""Linear datamodeling score (LDS): do summed scores rank the retrainings? (Park et al., 2023).

    LDS = mean over models and test points of  Spearman_k( sum_{i in S_k} scores[., i],  responses[k, .] )

S_k are subsets of kept examples. `responses[k]` are the margins of the test points by models retrained on
S_k, averaged over independent retrainings. Every attributed model is compared alone: averaging the scores of
several models first would be another method, an ensemble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import bad_value
from ...responses import class_labels, response_value
from ...subsets import Membership, checked_membership
from . import statistics
from .plain_values import plain
from .split_halves import split_half_ceiling
from .statistics import Array, Interval, mean_defined


@dataclass(frozen=True, repr=False, eq=False)
class LDSResult:
    """A linear datamodeling score with its uncertainty.

    Attributes:
        value: Mean over attributed models of the mean over test points of Spearman's correlation.
        per_model: The mean over test points of each model.
        worst: The lowest of `per_model`.
        per_test: Spearman's correlations `(n_models, n_test)`; NaN if undefined.
        undefined: How many of `per_test` are undefined, because predictions or responses are the same for
            all subsets. They are left out of the means above.
        undefined_as_zero: `value` if undefined correlations are counted as 0.
        pearson: Like `value`, with Pearson's correlation.
        interval: Interval of the value that many subsets would give, for these attributed models, by a
            crossed bootstrap over subsets and test points (`statistics.without_bias`); None without
            resamples.
        ceiling: The value that a perfect prediction of the mean response can be expected to have, from split
            halves of the retrainings; None with a single retraining.
        n_subsets: Number of subsets.
        n_seeds: Retrainings of each subset.
        seed: Seed of the bootstrap.
        draws: Bootstrap draws `(n_resamples, n_models)`; those of two results with one seed are paired.
        draws_as_zero: The same with undefined correlations counted as 0.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> result = lds([effects, -effects], halves, halves @ effects.T, n_resamples=0)
    >>> [round(value, 6) for value in result.per_model], round(result.worst, 6)
    ([1.0, -1.0], -1.0)
    """

    value: float
    per_model: tuple[float, ...]
    worst: float
    per_test: Array
    undefined: int
    undefined_as_zero: float
    pearson: float
    interval: Interval | None
    ceiling: float | None
    n_subsets: int
    n_seeds: int
    seed: int = 0
    draws: Array | None = None
    draws_as_zero: Array | None = None

    @property
    def ranks_nothing(self) -> bool:
        """Whether no correlation is defined: predictions or responses are the same for all subsets."""
        return self.undefined == self.per_test.size

    def __repr__(self) -> str:
        text = "LDS undefined" if self.ranks_nothing else f"LDS {self.value:.3f}"
        if self.interval is not None:
            text += f" {self.interval} ({self.interval.level:.0%})"
        text += f", {len(self.per_model)} models, worst {self.worst:.3f}"
        text += ", no ceiling" if self.ceiling is None else f", ceiling {self.ceiling:.3f}"
        return f"{text}, {self.undefined} of {self.per_test.size} undefined"

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON (undefined correlations are None), without the draws."""
        return plain({k: v for k, v in vars(self).items() if k not in ("draws", "draws_as_zero")})


@dataclass(frozen=True)
class LDSDifference:
    """LDS of one method minus that of another, on the same models and retrainings.

    An undefined correlation counts as 0: otherwise a method would win by scoring only the easy test points.
    An attributed model for which all correlations of a method are undefined has no difference.

    Attributes:
        value: Difference, mean over attributed models.
        per_model: Difference for each attributed model; NaN if it has none.
        interval: Of a paired crossed bootstrap, in which both methods see the same resamples; None without
            resamples.
    """

    value: float
    per_model: tuple[float, ...]
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON."""
        return plain(vars(self))


def lds(
    scores: Any,
    membership: Membership,
    responses: Any,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LDSResult:
    """The linear datamodeling score of attribution scores.

    Args:
        scores: `(n_test, n_train)`, or a list with one such matrix for each attributed model. Arrays
            or tensors; a positive score is a proponent.
        membership: CSR `(n_subsets, n_train)` of the examples each retraining kept.
        responses: `(n_subsets, n_test)`, or `(n_seeds, n_subsets, n_test)`, averaged over seeds.
        n_resamples: Draws of the crossed bootstrap; 0 leaves the interval out. 1,000 draws take 1 to 2
            seconds with 100 subsets, 400 test points and 3 models (linear in each).
        level: Level of the interval.
        seed: Seed of the bootstrap. Results with one seed are paired.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or there are fewer than 3 subsets.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> measured = halves @ effects.T  # (n_subsets, n_test): here a sum of effects
    >>> round(lds(effects, halves, measured, n_resamples=0).value, 6)
    1.0
    """
    matrices, membership, responses = check_inputs(scores, membership, responses)
    if n_resamples < 0:
        raise bad_value("n_resamples", "be at least 0", n_resamples)
    target = responses.mean(0)
    predictions = np.stack([membership @ m.T for m in matrices])
    per_test = np.stack([statistics.spearman(p, target) for p in predictions])
    per_model = mean_defined(per_test, axis=1)
    draws = as_zero = None
    if n_resamples:
        draws, as_zero = statistics.crossed_draws(predictions, target, n_resamples=n_resamples, seed=seed)
        draws = statistics.without_bias(draws, per_model)
        as_zero = statistics.without_bias(as_zero, np.nan_to_num(per_test).mean(1))
    return LDSResult(
        value=float(mean_defined(per_model)),
        per_model=tuple(per_model.tolist()),
        worst=float(np.nan if np.isnan(per_model).all() else np.nanmin(per_model)),
        per_test=per_test,
        undefined=int(np.isnan(per_test).sum()),
        undefined_as_zero=float(np.nan_to_num(per_test).mean()),
        pearson=_mean_over_models(statistics.pearson, predictions, target),
        interval=None
        if draws is None
        else statistics.interval(np.clip(mean_defined(draws, axis=1), -1, 1), level),
        ceiling=split_half_ceiling(responses),
        n_subsets=responses.shape[1],
        n_seeds=responses.shape[0],
        seed=seed,
        draws=draws,
        draws_as_zero=as_zero,
    )


def difference(a: LDSResult, b: LDSResult, *, level: float = 0.95) -> LDSDifference:
    """LDS of `a` minus LDS of `b`, with a paired interval from the draws of both.

    Args:
        a: Result of `lds`.
        b: Result on the same models, subsets and test points, with the same `seed` and `n_resamples`.
        level: Level of the interval.

    Raises:
        ValueError: The results differ in models, test points, subsets, resamples or seed.
    """
    if a.per_test.shape != b.per_test.shape or a.n_subsets != b.n_subsets:
        raise bad_value(
            "a and b",
            "have the same models, test points and subsets",
            f"{(*a.per_test.shape, a.n_subsets)} and {(*b.per_test.shape, b.n_subsets)}",
        )
    silent = [np.isnan(r.per_test).all(1) for r in (a, b)]
    both = np.where(silent[0] | silent[1], np.nan, 0.0)
    means = [np.nan_to_num(r.per_test).mean(1) for r in (a, b)]
    per_model = means[0] - means[1] + both
    spread = None
    if a.draws_as_zero is not None and b.draws_as_zero is not None:
        if a.draws_as_zero.shape != b.draws_as_zero.shape:
            counts = f"{len(a.draws_as_zero)} and {len(b.draws_as_zero)}"
            raise bad_value("a and b", "have as many resamples as each other", counts)
        if a.seed != b.seed:
            raise bad_value("a and b", "be drawn with one `seed`", f"{a.seed} and {b.seed}")
        gaps = mean_defined(a.draws_as_zero - b.draws_as_zero + both, axis=1)
        spread = statistics.interval(gaps, level)
    return LDSDifference(float(mean_defined(per_model)), tuple(per_model.tolist()), spread)


def margins(logits: Any, labels: Any) -> Array:
    """Margin (log odds of the true class) of every test point, `z_y - log sum_{j != y} exp z_j`, in float64.

    Args:
        logits: `(..., n_test, n_classes)`, for instance what `RetrainingPlan.execute` returns.
        labels: `(n_test,)`.

    Returns:
        `(..., n_test)`.

    Raises:
        ValueError: Labels do not match the logits, or logits are not finite.
    """
    z = torch.from_numpy(finite_array("logits", logits))
    if z.ndim < 2:
        raise bad_value("logits", "have shape (..., n_test, n_classes)", tuple(z.shape))
    y = class_labels(torch.as_tensor(labels), z.shape[-1], "labels")
    if len(y) != z.shape[-2]:
        raise bad_value("labels", f"hold one label for each of the {z.shape[-2]} test points", len(y))
    return np.asarray(response_value(z, y, "margin").numpy())


def check_inputs(
    scores: Any, membership: Membership, responses: Any
) -> tuple[list[Array], Membership, Array]:
    """Check and convert the arguments of `lds`.

    Returns:
        A float64 matrix `(n_test, n_train)` for each model, the membership, and responses
        `(n_seeds, n_subsets, n_test)`.

    Raises:
        TypeError: `membership` is not a scipy sparse matrix.
        ValueError: Shapes do not match, a value is not finite, an entry of `membership` is neither 0 nor 1,
            or there are fewer than 3 subsets.

    """
    membership = checked_membership(membership)
    n_subsets, n_train = membership.shape
    if n_subsets < 3:
        raise bad_value("membership", "hold at least 3 subsets", n_subsets)
    responses = finite_array("responses", responses)
    if responses.ndim == 2:
        responses = responses[None]
    if responses.ndim != 3 or responses.shape[1] != n_subsets or not responses.size:
        raise bad_value(
            "responses",
            f"have shape (n_seeds, {n_subsets}, n_test) or ({n_subsets}, n_test)",
            responses.shape,
            "`margins` turns logits into responses." if responses.ndim == 4 else None,
        )
    single = not isinstance(scores, list | tuple) and np.ndim(scores) == 2
    matrices = [finite_array("scores", s) for s in ([scores] if single else scores)]
    if not matrices:
        raise bad_value("scores", "hold one matrix for each attributed model", "none")
    expected = (responses.shape[2], n_train)
    for matrix in matrices:
        if matrix.shape != expected:
            raise bad_value("scores", f"have shape (n_test, n_train) = {expected}", matrix.shape)
    return matrices, membership, responses


def finite_array(name: str, values: Any) -> Array:
    """An array or tensor as float64.

    Raises:
        ValueError: A value is not finite.

    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise bad_value(name, "be finite", f"{int((~np.isfinite(array)).sum())} values that are not")
    return array


def _mean_over_models(
    correlation: Callable[[Array, Array], Array], predictions: Array, target: Array
) -> float:
    return float(mean_defined([float(mean_defined(correlation(p, target))) for p in predictions]))
