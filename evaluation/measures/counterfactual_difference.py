"""Differences between the drops of two methods, at equal counts and at equal depletion of the class.

Removing many examples of a class lowers its probability, however they are chosen. A method that removes half
of a class is therefore compared with removing a random half of that class, not with removing as many random
examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import bad_value
from .counterfactual_drop import CounterfactualResult, drop_intervals
from .plain_values import plain
from .statistics import Array, Interval, mean_defined


@dataclass(frozen=True)
class DropDifference:
    """Drop of one method minus that of another.

    Attributes:
        counts: How many examples were removed.
        value: Difference of the mean drops at each count; NaN if it is undefined for all test points.
        intervals: Student's intervals of the paired differences, over seeds and test points; None if they
            were not asked for.
        undefined: At each count, how many pairs of an attributed model and a test point have no difference.
    """

    counts: tuple[int, ...]
    value: tuple[float, ...]
    intervals: tuple[Interval, ...] | None
    undefined: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON."""
        return plain(vars(self))


def difference(
    a: CounterfactualResult,
    b: CounterfactualResult,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> DropDifference:
    """Drop of `a` minus drop of `b` at each count, on the same models, seeds and test points.

    Args:
        a: Result of `counterfactual`.
        b: Another one.
        n_resamples: 0 leaves the intervals out.
        level: Level of the intervals.

    Raises:
        ValueError: The results differ in counts, shapes, or in whether opponents were removed.
    """
    _check_pair(a, b)
    if a.counts != b.counts:
        raise bad_value("a and b", "remove the same counts", f"{a.counts} and {b.counts}")
    return _difference(a, a.drops - b.drops, n_resamples, level)


def difference_at_equal_depletion(
    a: CounterfactualResult,
    reference: CounterfactualResult,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> DropDifference:
    """Drop of `a` minus the drop of `reference` at the same depletion of the class.

    For every attributed model, seed and test point, the curve of the reference's drop against its depletion
    is interpolated linearly at the depletion of `a`. The curve starts at (0, 0), since removing nothing
    changes nothing; of several counts with the same depletion (an emptied class) it takes the smallest.
    Nothing is
    extrapolated: beyond the end of the curve the difference is undefined. With `ClassRandom` as the reference
    that does not happen, since no method depletes a class faster at the same counts.

    Args:
        a: Result of `counterfactual`.
        reference: Another one.
        n_resamples: 0 leaves the intervals out.
        level: Level of the intervals.

    Raises:
        ValueError: The results differ in shapes, or opponents were removed.
    """
    _check_pair(a, reference)
    if a.opponents:
        raise bad_value(
            "a",
            "be a result of removing proponents",
            "one of removing opponents",
            "Opponents are of other classes: compare at equal counts with `difference`.",
        )
    gaps = np.full(a.drops.shape, np.nan)
    for m, t in np.ndindex(len(a.drops), a.drops.shape[3]):
        known = np.concatenate([[0.0], reference.depletions[m, :, t]])
        if np.isnan(known).any():
            continue
        places, first = np.unique(known, return_index=True)
        for s in range(a.drops.shape[2]):
            curve = np.concatenate([[0.0], reference.drops[m, :, s, t]])[first]
            expected = np.interp(a.depletions[m, :, t], places, curve, right=np.nan)
            gaps[m, :, s, t] = a.drops[m, :, s, t] - expected
    return _difference(a, gaps, n_resamples, level)


def _difference(a: CounterfactualResult, gaps: Array, n_resamples: int, level: float) -> DropDifference:
    per_count = gaps.swapaxes(0, 1).reshape(len(a.counts), -1)
    value = mean_defined(per_count, axis=1).tolist()
    return DropDifference(
        counts=a.counts,
        value=tuple(value),
        intervals=drop_intervals(gaps, value, n_resamples, level),
        undefined=tuple(np.isnan(gaps).any(2).sum((0, 2)).tolist()),
    )


def _check_pair(a: CounterfactualResult, b: CounterfactualResult) -> None:
    shapes = [(len(r.drops), *r.drops.shape[2:]) for r in (a, b)]
    if shapes[0] != shapes[1]:
        raise bad_value(
            "a and b", "have the same models, seeds and test points", f"{shapes[0]} and {shapes[1]}"
        )
    if a.opponents != b.opponents:
        raise bad_value("a and b", "both remove proponents or both opponents", "one of each")
