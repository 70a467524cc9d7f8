"""Fidelity as in the paper (C.1): scores against per-example effects estimated from the retrainings.

C.1 correlates scores w in R^N with "the linearized influence score per training example", LDS in R^N,
without saying how that is obtained. Here it is the ridge regression of the responses on the membership,

    min_{theta, b}  sum_k (y_k - b - sum_{i in S_k} theta_i)^2 + penalty |theta|^2,

with one penalty for all test points, chosen by leave-one-subset-out error. With fewer subsets than examples
the effects are poorly determined. The ceiling shows how poorly: it comes from the agreement of two halves of
the subsets.

This is not the linear datamodeling score of Park et al. (`linear_datamodeling.lds`), which compares sums of
scores with retrainings directly. Figures of the two cannot be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import bad_value
from ...subsets import Membership, checked_membership
from . import statistics
from .linear_datamodeling import check_inputs
from .plain_values import plain
from .split_halves import ceiling_of
from .statistics import Array, Interval, mean_defined

#: Penalties that cross-validation tries, relative to the mean non-zero eigenvalue of the design.
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-6, 7))


@dataclass(frozen=True, repr=False, eq=False)
class LinearizedInfluenceResult:
    """Correlation of scores with per-example effects (C.1).

    Attributes:
        spearman: Spearman's correlation, mean over test points and attributed models.
        pearson: The same with Pearson's correlation.
        per_model: Mean Spearman correlation of each model.
        worst: The lowest of `per_model`.
        per_test: Spearman's correlations `(n_models, n_test)`; NaN if undefined.
        undefined: How many of `per_test` are undefined; they are left out of the means.
        interval: Bootstrap over test points alone, for the effects as they were estimated. It is too narrow,
            since it does not cover the randomness of the retrainings.
        ceiling: `sqrt(2 r / (1 + r))`, r the mean Spearman correlation between the effects estimated from
            two halves of the subsets.
        penalty: The ridge penalty that cross-validation chose.
        n_items: Number of correlated values for each test point: n_train, or the number of `groups`.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> result = linearized_influence_correlation(effects, halves, halves @ effects.T, n_resamples=10)
    >>> result.n_items
    20
    """

    spearman: float
    pearson: float
    per_model: tuple[float, ...]
    worst: float
    per_test: Array
    undefined: int
    interval: Interval
    ceiling: float | None
    penalty: float
    n_items: int

    def __repr__(self) -> str:
        ceiling = "no ceiling" if self.ceiling is None else f"ceiling {self.ceiling:.3f}"
        return (
            f"C.1 Spearman {self.spearman:.3f} {self.interval} (test points only), "
            f"Pearson {self.pearson:.3f}, {len(self.per_model)} models, worst {self.worst:.3f}, {ceiling}, "
            f"{self.n_items} items, {self.undefined} of {self.per_test.size} undefined"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON."""
        return plain(vars(self))


def linearized_influence_correlation(
    scores: Any,
    membership: Membership,
    responses: Any,
    *,
    groups: Membership | None = None,
    n_splits: int = 5,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LinearizedInfluenceResult:
    """Correlate scores with the per-example effects of the retrainings, C.1 of the paper.

    Args:
        scores: `(n_test, n_train)`, or a list with one such matrix for each attributed model.
        membership: CSR `(n_subsets, n_train)` of the examples each retraining kept.
        responses: `(n_subsets, n_test)`, or `(n_seeds, n_subsets, n_test)`, averaged over seeds.
        groups: None correlates the effects of the n_train examples. With a membership matrix, such as
            `partition(n_train, 50)`, scores and effects are first summed over each of its subsets.
        n_splits: Random halvings of the subsets for the ceiling.
        n_resamples: Draws of the bootstrap over test points.
        level: Level of the interval.
        seed: Seed of the halvings and of the bootstrap.

    Raises:
        ValueError: Shapes do not match, a value is not finite, a count is below 1, or there are fewer than 6
            subsets.

    >>> import numpy as np
    >>> from stride_captum.subsets import random_subsets
    >>> effects = np.random.default_rng(0).normal(size=(4, 20))  # (n_test, n_train)
    >>> halves = random_subsets(20, 40, 10)
    >>> result = linearized_influence_correlation(effects, halves, halves @ effects.T, n_resamples=10)
    >>> result.spearman > 0.9
    True
    """
    matrices, membership, responses = check_inputs(scores, membership, responses)
    target = responses.mean(0)
    n_subsets, n_test = target.shape
    if n_subsets < 6:
        raise bad_value("membership", "hold at least 6 subsets, to be halved", n_subsets)
    for name, count in (("n_splits", n_splits), ("n_resamples", n_resamples)):
        if count < 1:
            raise bad_value(name, "be at least 1", count)
    groups = None if groups is None else checked_membership(groups, "groups")
    if groups is not None and groups.shape[1] != membership.shape[1]:
        raise bad_value("groups", f"have {membership.shape[1]} columns, as `membership`", groups.shape[1])

    def items(values: Array) -> Array:
        return np.asarray(values.T if groups is None else groups @ values.T)

    effects, penalty = linearized_influence(membership, target)
    truth = items(effects)
    per_test = np.stack([statistics.spearman(items(m), truth) for m in matrices])
    per_model = mean_defined(per_test, axis=1)
    generator = np.random.default_rng(seed)
    agreement = []
    for _ in range(n_splits):
        order = generator.permutation(n_subsets)
        halves = np.array_split(order, 2)
        one, other = (items(linearized_influence(membership[h], target[h])[0]) for h in halves)
        agreement.append(float(mean_defined(statistics.spearman(one, other))))
    resampled = generator.integers(0, n_test, (n_resamples, n_test))
    draws = mean_defined(mean_defined(per_test, axis=0)[resampled], axis=1)
    return LinearizedInfluenceResult(
        spearman=float(mean_defined(per_model)),
        pearson=float(
            mean_defined([float(mean_defined(statistics.pearson(items(m), truth))) for m in matrices])
        ),
        per_model=tuple(per_model.tolist()),
        worst=float(np.nan if np.isnan(per_model).all() else np.nanmin(per_model)),
        per_test=per_test,
        undefined=int(np.isnan(per_test).sum()),
        interval=statistics.interval(draws, level),
        ceiling=ceiling_of(float(mean_defined(agreement))),
        penalty=penalty,
        n_items=len(truth),
    )


def linearized_influence(membership: Membership, responses: Any) -> tuple[Array, float]:
    """Per-example effects by ridge regression of the responses on the centered membership.

    It is solved in the space of subsets: one eigendecomposition of X X^T, where X is the centered design,
    gives the exact leave-one-out error of every penalty.

    Args:
        membership: CSR `(n_subsets, n_train)` of kept examples.
        responses: `(n_subsets, n_test)`.

    Returns:
        The effects `(n_test, n_train)`, positive where keeping the example raises the response, and the
        chosen penalty.

    """
    y = np.asarray(responses, dtype=np.float64)
    n_subsets = len(y)
    gram = np.asarray((membership @ membership.T).toarray(), dtype=np.float64)
    gram -= gram.mean(0)
    gram -= gram.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh(gram)
    values = np.clip(values, 0, None)
    residual_y = y - y.mean(0)
    rotated = vectors.T @ residual_y
    scale = max(float(values.sum()) / (n_subsets - 1), np.finfo(float).tiny)

    def leave_one_out(penalty: float) -> float:
        shrink = values / (values + penalty)
        leverage = 1 / n_subsets + (vectors**2) @ shrink
        return float(
            (((residual_y - vectors @ (shrink[:, None] * rotated)) / (1 - leverage)[:, None]) ** 2).sum()
        )

    penalty = min((scale * p for p in PENALTIES), key=leave_one_out)
    dual = vectors @ (rotated / (values + penalty)[:, None])
    return np.asarray(membership.T @ dual).T, penalty
