"""Ceiling of a correlation with noisy responses, estimated from split halves of the retrainings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from ...errors import bad_value
from .statistics import mean_defined, spearman

_MAX_SPLITS = 100


def split_half_ceiling(responses: Any) -> float | None:
    """The highest correlation with the mean response that any prediction can be expected to have.

    It is `sqrt(2 r / (1 + r))`, where r is the mean Spearman correlation between the averages of two halves
    of the retrainings: the Spearman-Brown formula, and a square root since only one side is noisy. With an
    odd number of retrainings the halves are unequal and the value is slightly low.

    Args:
        responses: `(n_seeds, n_subsets, n_test)`, or any `(n_seeds, n, ...)`.

    Returns:
        The ceiling; 0 if the halves disagree (r <= 0); None with a single retraining, or if no correlation is
        defined.

    Raises:
        ValueError: `responses` has fewer than two dimensions.
    """
    responses = np.asarray(responses, dtype=np.float64)
    if responses.ndim < 2:
        raise bad_value("responses", "have shape (n_seeds, n_subsets, n_test)", responses.shape)
    if len(responses) < 2:
        return None
    halves = [
        float(mean_defined(spearman(responses[half].mean(0), responses[rest].mean(0))))
        for half, rest in _halvings(len(responses))
    ]
    return ceiling_of(float(mean_defined(halves)))


def ceiling_of(reliability: float) -> float | None:
    """`sqrt(2 r / (1 + r))`; 0 for r <= 0, None for NaN.

    >>> ceiling_of(0.5) ** 2 * 3
    2.0
    """
    if np.isnan(reliability):
        return None
    return float(np.sqrt(2 * reliability / (1 + reliability))) if reliability > 0 else 0.0


def _halvings(n: int) -> Iterator[tuple[list[int], list[int]]]:
    """Every way to split `range(n)` into halves, or 100 random ones if there are more."""
    if comb(n, n // 2) <= 2 * _MAX_SPLITS:
        choices: Iterable[Sequence[int]] = combinations(range(n), n // 2)
    else:
        generator = np.random.default_rng(0)
        choices = (generator.permutation(n)[: n // 2].tolist() for _ in range(_MAX_SPLITS))
    for half in choices:
        yield list(half), [i for i in range(n) if i not in half]
