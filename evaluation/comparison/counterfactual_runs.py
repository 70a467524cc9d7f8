"""Retrainings behind the counterfactual drop: which sets, what they cost, and reading them back.

Every attributed model, method, test point and count asks for one training from scratch a seed, on the
training set less the removed examples. Sets that coincide are trained once, and each run is a file of a
`RetrainingPlan` with `common_seeds`, so that the intact model and all others of one seed are paired.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...errors import bad_choice, bad_value, whole_number
from ...subsets import membership_from_indices
from ..measures.calibration import CalibrationResult, calibration_of_removals, predicted_changes
from ..measures.cost import Build, Cost, forward_seconds, median_cost
from ..measures.counterfactual_difference import DropDifference, difference, difference_at_equal_depletion
from ..measures.counterfactual_drop import (
    CounterfactualResult,
    class_depletion,
    counterfactual,
    probabilities,
    removals,
    resolve_counts,
)
from ..measures.linear_datamodeling import finite_array, margins
from ..retraining.estimate import RetrainingEstimate
from ..retraining.plan import ENGINES, RetrainingPlan, without_diverged
from ..tasks.checks import check_task
from ..tasks.tasks import Task
from .score_cache import CachedMethod

Removed = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class CounterfactualRow:
    """One method's figures.

    Attributes:
        name: The method.
        result: Drops, intervals and depletion.
        against_reference: Drop less that of the reference at the same counts; None for the reference.
        at_equal_depletion: Drop less that of the reference at the same depletion of the class; None for the
            reference and where opponents are removed.
        calibration: Measured change of the margin against the one that the scores predict.
        cost: Median over attributed models of setup and queries.
    """

    name: str
    result: CounterfactualResult
    against_reference: DropDifference | None
    at_equal_depletion: DropDifference | None
    calibration: CalibrationResult
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in vars(self).items()}


def cost(
    task: Task,
    *,
    n_methods: int,
    counts: Sequence[int | float],
    n_test: int,
    n_seeds: int,
    n_models: int = 1,
    n_jobs: int = -1,
    engine: str = "processes",
    device: torch.device | str = "cpu",
) -> RetrainingEstimate:
    """How many retrainings an evaluation takes at most, and how long, before anything is fitted or trained.

    At most: methods may agree on a set, or the store may hold it. Once the scores are known,
    `counterfactual_plan(...)[0].estimate()` tells what is left to do.

    Args:
        task: The task.
        n_methods: Methods.
        counts: As for `removals`.
        n_test: Test points.
        n_seeds: Retrainings of each set.
        n_models: Attributed models.
        n_jobs: As for `RetrainingPlan.execute`, as are `engine` and `device`.
        engine: See there.
        device: See there.
    """
    numbers = resolve_counts(counts, task.n_train)
    sizes = [task.n_train, *[task.n_train - k for k in numbers] * (n_methods * n_models * n_test)]
    membership = membership_from_indices([np.arange(size) for size in sizes], task.n_train)
    with tempfile.TemporaryDirectory() as nothing:
        plan = RetrainingPlan(task, membership, n_seeds, Path(nothing), 1, common_seeds=True)
        return plan.estimate(n_jobs, engine=engine, device=device)


def counterfactual_plan(
    task: Task,
    removed: Mapping[Any, Removed],
    test_points: Sequence[int],
    *,
    n_seeds: int,
    store: str | Path,
) -> tuple[RetrainingPlan, dict[Any, NDArray[np.int64]]]:
    """The plan that retrains without each removed set, and where to find which.

    Args:
        task: The task.
        removed: By any name, what `removals` gives for `test_points`.
        test_points: Places in the test set, one for each row of the removals.
        n_seeds: Retrainings of each set.
        store: Folder of the runs.

    Returns:
        The plan, whose first subset is the whole training set, and for each name the subset of each count
        and test point `(n_counts, n_test)`.
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


def measure_counterfactual(
    task: Task,
    methods: Mapping[str, Build],
    models: Mapping[str, nn.Module],
    *,
    store: str | Path,
    counts: Sequence[int | float] = (50, 100, 500),
    test_points: Sequence[int] = range(10),
    n_seeds: int = 3,
    opponents: bool = False,
    reference: str = "ClassRandom",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_jobs: int = -1,
    engine: str = "processes",
    device: torch.device | str = "cpu",
    n_resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[CounterfactualRow]:
    """Remove the top examples of every method, retrain, and measure what happens to the test points.

    Args:
        task: The task.
        methods: By name, how each is built.
        models: The attributed models, trained on all of `task.train`.
        store: Folder of the retrainings and of what methods answer: what is there is not done again.
        counts: How many examples are removed: numbers or shares of the training set, increasing.
        test_points: Places in the test set.
        n_seeds: Retrainings of the intact set and of each other.
        opponents: Remove the lowest scores instead: the probability should rise.
        reference: The method that the others are compared with, where it is among them.
        options: By name, what `build` is given beside the model and the data.
        n_jobs: Workers for the retrainings; as for `RetrainingPlan.execute`, as are `engine` and `device`.
        engine: See there.
        device: See there.
        n_resamples: Of the bootstraps of the calibration; 0 leaves all intervals out.
        seed: Of the bootstrap of the calibration.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: A count or a test point out of range, inputs or labels that the network cannot read, or a
            retraining that diverges.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> import tempfile
    >>> from stride_captum.adapters import Similarity
    >>> from stride_captum.evaluation import train_attributed
    >>> from stride_captum.evaluation.comparison.methods import adapter
    >>> with tempfile.TemporaryDirectory() as store:
    ...     (row,) = measure_counterfactual(
    ...         task,
    ...         {"Similarity": adapter(Similarity)},
    ...         {"seed 0": train_attributed(task, 0)},
    ...         store=store,
    ...         counts=(20,),
    ...         test_points=[0],
    ...         n_seeds=1,
    ...         n_jobs=1,
    ...     )
    >>> row.name, row.result.counts
    ('Similarity', (20,))
    """
    points = [int(t) for t in test_points]
    if not points or len(set(points)) < len(points) or not 0 <= min(points) <= max(points) < len(task.test):
        raise bad_value("test_points", f"be distinct places in [0, {len(task.test)})", points)
    numbers = resolve_counts(counts, task.n_train)
    whole_number("n_seeds", n_seeds, 1)
    if engine not in ENGINES:
        raise bad_choice("engine", engine, ENGINES)
    check_task(task)
    x, y = (t[points] for t in task.test.tensors)
    removed: dict[tuple[str, str], Removed] = {}
    predicted: dict[tuple[str, str], NDArray[np.float64]] = {}
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    for model_name, model in models.items():
        forward = forward_seconds(model, task.train)
        for name, build in methods.items():
            method = CachedMethod(build, model, task, (options or {}).get(name, {}), store, forward)
            answer = method.margins((x, y))
            scores = finite_array("scores", answer.values)
            costs[name].append(answer.cost(len(points)))
            removed[name, model_name] = removals(scores, numbers, opponents)
            predicted[name, model_name] = predicted_changes(scores, removed[name, model_name])
    plan, places = counterfactual_plan(task, removed, points, n_seeds=n_seeds, store=store)
    logits = plan.execute(n_jobs, show_progress, engine=engine, device=device)[:, :, points]
    without_diverged(plan, logits, at_most=0.0)
    labels = y.numpy()
    p, m = probabilities(logits, labels), margins(logits, labels)
    own = np.arange(len(points))
    results, calibrated = {}, {}
    for name in methods:
        keys = [(name, model_name) for model_name in models]
        # (n_seeds, n_counts, n_test) of each model, to (n_models, n_counts, n_seeds, n_test)
        without, changes = (np.stack([v[:, places[key], own] for key in keys]).swapaxes(1, 2) for v in (p, m))
        results[name] = counterfactual(
            p[:, 0],
            without,
            np.stack([class_depletion(removed[key], task.train.tensors[1], labels) for key in keys]),
            counts=numbers,
            opponents=opponents,
            n_resamples=n_resamples,
        )
        calibrated[name] = calibration_of_removals(
            np.stack([predicted[key] for key in keys]), changes - m[:, 0], n_resamples=n_resamples, seed=seed
        )
    rows = []
    for name, result in results.items():
        plain_gap = equal_gap = None
        if name != reference and reference in results:
            other = results[reference]
            plain_gap = difference(result, other, n_resamples=n_resamples)
            if not opponents:
                equal_gap = difference_at_equal_depletion(result, other, n_resamples=n_resamples)
        rows.append(
            CounterfactualRow(name, result, plain_gap, equal_gap, calibrated[name], median_cost(costs[name]))
        )
    return rows
