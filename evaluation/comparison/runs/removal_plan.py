"""Retrainings for the counterfactual drop: which sets are removed, and an upper bound of the cost."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....subsets import membership_from_indices
from ...measures.counterfactual_drop import resolve_counts
from ...retraining import workers as retraining_workers
from ...retraining.estimate import RetrainingEstimate
from ...retraining.plan import RetrainingPlan
from ...tasks.task import Task

Removed = Sequence[NDArray[np.int64]]


def cost(
    task: Task,
    *,
    n_methods: int,
    counts: Sequence[int | float],
    n_test: int,
    n_seeds: int,
    n_models: int = 1,
    n_jobs: int = -1,
    device: torch.device | str = "cpu",
) -> RetrainingEstimate:
    """An upper bound of the number and the time of the retrainings, before anything is fitted or trained.

    There are fewer if methods agree on a set, or if the store holds it. Once the scores are known,
    `counterfactual_plan(...)[0].estimate()` is exact.

    Args:
        task: The task.
        n_methods: Number of methods.
        counts: As for `removals`.
        n_test: Number of test points.
        n_seeds: Retrainings without each set.
        n_models: Number of attributed models.
        n_jobs: As for `RetrainingPlan.execute`, as is `device`.
        device: See there.
    """
    n, n_sets = task.n_train, n_methods * n_models * n_test
    numbers = resolve_counts(counts, n)
    with tempfile.TemporaryDirectory() as nothing:
        whole = membership_from_indices([np.arange(n)], n)
        of_whole = RetrainingPlan(task, whole, n_seeds, Path(nothing), 1).estimate(1, device=device)
    n_subsets = 1 + n_sets * len(numbers)
    workers = min(retraining_workers.count(n_jobs, device), n_subsets * n_seeds)
    share = (n + n_sets * sum(n - k for k in numbers)) / n
    return replace(
        of_whole,
        n_subsets=n_subsets,
        n_workers=workers,
        seconds=of_whole.seconds * max(share / workers, 1 / n_seeds),
        n_bytes=of_whole.n_bytes * n_subsets,
        at_most="how many sets differ, and which are in the store, is known once the methods have answered",
    )


def counterfactual_plan(
    task: Task,
    removed: Mapping[Any, Removed],
    test_points: Sequence[int],
    *,
    n_seeds: int,
    store: str | Path,
) -> tuple[RetrainingPlan, dict[Any, NDArray[np.int64]]]:
    """The plan that retrains without each removed set, and the place of each set in it.

    Args:
        task: The task.
        removed: The result of `removals` for `test_points`, by any key.
        test_points: Indices in the test set, one for each row of the removals.
        n_seeds: Retrainings without each set.
        store: Folder of the retrainings.

    Returns:
        The plan, whose subset 0 is the whole training set; and by key the number of the subset for each
        count and test point, `(n_counts, n_test)`.
    """
    kept = [np.arange(task.n_train)]
    known: dict[bytes, int] = {}
    places = {}
    for name, by_count in removed.items():
        found = np.empty((len(by_count), len(test_points)), dtype=np.int64)
        for c, rows in enumerate(by_count):
            for t, row in enumerate(rows):
                key = np.sort(row).tobytes()
                if key not in known:
                    known[key] = len(kept)
                    kept.append(np.setdiff1d(kept[0], row))
                found[c, t] = known[key]
        places[name] = found
    n_test = 1 + max(test_points)
    membership = membership_from_indices(kept, task.n_train)
    return RetrainingPlan(task, membership, n_seeds, Path(store), n_test, common_seeds=True), places
