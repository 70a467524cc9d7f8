"""Counterfactual drop: what retraining without the top examples does to a prediction (C.4).

    drop_k(z) = mean over seeds of  softmax(f(z))_c - softmax(f_without_X_k(z))_c

X_k are the k training examples with the highest scores for z, and c is the true class. The intact model f is
retrained with the same seeds (initial weights and order of the batches) as the models without X_k. Every drop
comes with the depletion of the class: the share of the training examples of class c that are in X_k. Removing
many examples of a class lowers its probability, however they are chosen, so a method is also compared with
removing random examples of the class *at equal depletion*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import bad_value, whole_number
from ...responses import class_labels, response_value
from . import statistics
from .linear_datamodeling import finite_array
from .plain_values import plain
from .statistics import Array, Interval, mean_defined


@dataclass(frozen=True, repr=False, eq=False)
class CounterfactualResult:
    """Drops of the true class's probability.

    Attributes:
        counts: How many examples were removed, increasing.
        drop: Mean drop at each count, over attributed models, seeds and test points. If opponents were
            removed, a good method has a *negative* drop: the probability rises.
        intervals: Student's intervals over seeds and test points, for these attributed models; None if they
            were not asked for. With a single seed they are too narrow.
        depletion: Mean share of the class that was removed at each count.
        drops: `(n_models, n_counts, n_seeds, n_test)`.
        depletions: `(n_models, n_counts, n_test)`.
        opponents: Whether the lowest scores were removed instead of the highest.

    >>> result = counterfactual([[0.9]], [[[0.6]]], [[0.5]], counts=[10], n_resamples=0)
    >>> result.counts, result.depletion
    ((10,), (0.5,))
    """

    counts: tuple[int, ...]
    drop: tuple[float, ...]
    intervals: tuple[Interval, ...] | None
    depletion: tuple[float, ...]
    drops: Array
    depletions: Array
    opponents: bool = False

    def __repr__(self) -> str:
        arm = "opponents removed" if self.opponents else "proponents removed"
        parts = []
        for i, k in enumerate(self.counts):
            spread = "" if self.intervals is None else f" {self.intervals[i]}"
            parts.append(f"k={k}: {self.drop[i]:.3f}{spread} at depletion {self.depletion[i]:.3f}")
        return f"Drop ({arm}) " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON; `drops` as means over seeds."""
        values = {**vars(self), "n_seeds": self.drops.shape[2], "drops": self.drops.mean(2)}
        return plain(values)


def resolve_counts(counts: Sequence[int | float], n_train: int) -> tuple[int, ...]:
    """Counts of examples, from integers or from shares of the training set.

    Args:
        counts: Integers in [1, n_train) or shares in (0, 1), increasing.
        n_train: Number of training examples.

    Raises:
        ValueError: A count is out of range, or they do not increase.

    >>> resolve_counts([50, 0.1], 1000)
    (50, 100)
    """
    found = []
    for count in counts:
        number = float(count) if isinstance(count, int | float | np.number) else 0.0
        k = round(number * n_train) if 0 < number < 1 else number
        if isinstance(count, bool) or k % 1 or not 1 <= k < n_train:
            raise bad_value("counts", f"be integers in [1, {n_train}) or shares in (0, 1)", repr(count))
        found.append(int(k))
    if not found or any(b <= a for a, b in pairwise(found)):
        raise bad_value("counts", f"increase (here of {n_train} examples)", tuple(found))
    return tuple(found)


def _check_counts(counts: Sequence[Any]) -> None:
    """Refuse counts that are not increasing integers of at least 1."""
    numbers = [whole_number("counts", k) for k in counts]
    if any(b <= a for a, b in pairwise(numbers)):
        raise bad_value("counts", "be increasing numbers of removed examples", tuple(counts))


def removals(
    scores: Any, counts: Sequence[int | float], opponents: bool = False, *, seed: int = 0
) -> list[NDArray[np.int64]]:
    """The examples that are removed for each test point: those with the k highest scores.

    Args:
        scores: `(n_test, n_train)`.
        counts: As for `resolve_counts`.
        opponents: Take the lowest scores instead of the highest.
        seed: Seed of the random order of equal scores, which differs between test points. (In the order of
            the training set, a method with constant scores could remove one class alone.)

    Returns:
        For each count, indices `(n_test, k)`, strongest first; each set holds those of the smaller counts.

    Raises:
        ValueError: Scores are not a finite matrix, or a count is out of range.

    >>> removals([[0.1, 0.9, 0.5]], [1, 2])
    [array([[1]]), array([[1, 2]])]
    """
    matrix = finite_array("scores", scores)
    if matrix.ndim != 2:
        raise bad_value("scores", "have shape (n_test, n_train)", matrix.shape)
    any_order = np.random.default_rng(seed).random(matrix.shape)
    order = np.lexsort((any_order, matrix if opponents else -matrix), axis=1)
    return [order[:, :k] for k in resolve_counts(counts, matrix.shape[1])]


def class_depletion(removed: Sequence[Any], train_labels: Any, test_labels: Any) -> Array:
    """The share of the training examples of each test point's class that was removed.

    Args:
        removed: For each count, indices `(n_test, k)`.
        train_labels: `(n_train,)`.
        test_labels: `(n_test,)`.

    Returns:
        `(n_counts, n_test)`; NaN for a class without training examples.

    >>> class_depletion([[[0]], [[0, 2]]], [1, 1, 0, 1], [1]).round(3).tolist()
    [[0.333], [0.333]]
    """
    train, test = np.asarray(train_labels), np.asarray(test_labels)
    sizes = (train[None] == test[:, None]).sum(1)
    taken = np.stack([(train[np.asarray(rows)] == test[:, None]).sum(1) for rows in removed])
    return np.asarray(np.where(sizes > 0, taken / np.maximum(sizes, 1), np.nan))


def probabilities(logits: Any, labels: Any) -> Array:
    """The softmax probability of every test point's class, `(..., n_test)` float64.

    Args:
        logits: `(..., n_test, n_classes)`.
        labels: `(n_test,)`.
    """
    z = torch.from_numpy(finite_array("logits", logits))
    y = class_labels(torch.as_tensor(labels), z.shape[-1], "labels")
    return np.asarray(response_value(z, y, "probability").numpy())


def counterfactual(
    intact: Any,
    removed: Any,
    depletions: Any,
    *,
    counts: Sequence[int],
    opponents: bool = False,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> CounterfactualResult:
    """The drop of the true class's probability when examples are removed.

    Args:
        intact: Probabilities of models retrained on everything, `(n_seeds, n_test)`.
        removed: Probabilities of models retrained without the examples that were removed for each test
            point, `(n_counts, n_seeds, n_test)`, or with n_models in front: the same seeds in the same order.
        depletions: `(n_counts, n_test)` from `class_depletion`, or with n_models in front.
        counts: How many examples were removed, increasing.
        opponents: Whether they had the lowest scores.
        n_resamples: 0 leaves the intervals out. They are Student's intervals, which need no draws.
        level: Level of the intervals.

    Raises:
        ValueError: Shapes do not match, counts do not increase, or a value is not a probability.

    >>> intact = [[0.9, 0.8]]  # one seed, two test points
    >>> without_ten, without_twenty = [[0.6, 0.7]], [[0.3, 0.6]]
    >>> depletions = [[0.1, 0.1], [0.2, 0.2]]
    >>> result = counterfactual(
    ...     intact, [without_ten, without_twenty], depletions, counts=[10, 20], n_resamples=0
    ... )
    >>> [round(drop, 6) for drop in result.drop]
    [0.2, 0.4]
    """
    _check_counts(counts)
    whole, without = _probability("intact", intact), _probability("removed", removed)
    shares = np.asarray(depletions, dtype=np.float64)
    without = without[None] if without.ndim == 3 else without
    shares = shares[None] if shares.ndim == 2 else shares
    n_models = len(without)
    if whole.ndim != 2 or without.shape != (n_models, len(counts), *whole.shape) or not whole.size:
        raise bad_value(
            "removed",
            f"have shape (n_models, {len(counts)}, n_seeds, n_test) beside intact (n_seeds, n_test)",
            f"{without.shape} beside {whole.shape}",
        )
    if shares.shape != (n_models, len(counts), whole.shape[1]):
        raise bad_value("depletions", "have shape (n_models, n_counts, n_test)", shares.shape)
    drops = whole - without
    drop = drops.mean((0, 2, 3)).tolist()
    return CounterfactualResult(
        counts=tuple(counts),
        drop=tuple(drop),
        intervals=drop_intervals(drops, drop, n_resamples, level),
        depletion=tuple(mean_defined(shares.swapaxes(0, 1).reshape(len(counts), -1), axis=1).tolist()),
        drops=drops,
        depletions=shares,
        opponents=opponents,
    )


def drop_intervals(
    values: Array, means: Sequence[float], n_resamples: int, level: float
) -> tuple[Interval, ...] | None:
    """Student's interval for each count.

    Args:
        values: `(n_models, n_counts, n_seeds, n_test)`; averaged over models first, without NaN.
        means: Mean for each count, the center of its interval.
        n_resamples: 0 returns None.
        level: Level of the intervals.
    """
    if n_resamples < 0:
        raise bad_value("n_resamples", "be at least 0", n_resamples)
    if not n_resamples:
        return None
    tables = mean_defined(values, axis=0)
    return tuple(statistics.t_interval(t, m, level) for t, m in zip(tables, means, strict=True))


def _probability(name: str, values: Any) -> Array:
    array = finite_array(name, values)
    if ((array < 0) | (array > 1 + 1e-9)).any():  # rounding may leave a little more than 1
        raise bad_value(name, "hold probabilities", "a value outside [0, 1]")
    return array
