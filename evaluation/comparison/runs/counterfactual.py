"""Counterfactual drop: retrain without the top examples of every method (C.4, Tables 8 and 9).

Each attributed model, method, test point and count needs one training from scratch for each seed, without the
removed examples. Equal sets are trained once. A `RetrainingPlan` with `common_seeds` does the trainings, so
that all models of one seed, with and without removed examples, are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ....errors import bad_choice, bad_value, whole_number
from ...measures.calibration import CalibrationResult, calibration_of_removals, predicted_changes
from ...measures.cost import Build, Cost, forward_seconds, median_cost
from ...measures.counterfactual_difference import DropDifference, difference, difference_at_equal_depletion
from ...measures.counterfactual_drop import (
    CounterfactualResult,
    class_depletion,
    counterfactual,
    probabilities,
    removals,
    resolve_counts,
)
from ...measures.linear_datamodeling import finite_array, margins
from ...retraining.engines import ENGINES
from ...retraining.estimate import RetrainingEstimate
from ...retraining.plan import without_diverged
from ...tasks.checks import check_task
from ...tasks.task import Task
from ..shared.measure import Measure, defaults_of
from ..shared.methods import METHODS, MethodSpec
from ..shared.one_training import with_checkpoints
from ..shared.question import Question
from ..shared.score_cache import CachedMethod
from ..shared.shared import Shared
from .lds import given
from .removal_plan import Removed, cost, counterfactual_plan

#: Which end of the scores is removed: the highest, or the lowest.
ARMS = ("proponents", "opponents")


@dataclass(frozen=True)
class CounterfactualRow:
    """One method's figures.

    Attributes:
        name: The method.
        result: Drops, intervals and depletion.
        against_reference: Drop minus that of the reference at the same counts; None for the reference.
        at_equal_depletion: Drop minus that of the reference at the same depletion of the class; None for the
            reference, and if opponents are removed.
        calibration: Measured change of the margin against the change that the scores predict.
        cost: Setup and queries, medians over attributed models.
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
    checkpoints: Callable[[Build, str], Sequence[Any] | None] = lambda method, name: None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_jobs: int = -1,
    engine: str = "processes",
    device: torch.device | str = "cpu",
    n_resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[CounterfactualRow]:
    """Remove the top examples of every method, retrain, and measure the probabilities of the test points.

    Args:
        task: The task.
        methods: Builders by name.
        models: The attributed models by name, trained on all of `task.train`.
        store: Folder of the retrainings and of scores: what is there is not computed again.
        counts: How many examples are removed, increasing: integers, or shares of the training set in (0, 1).
        test_points: Indices in the test set.
        n_seeds: Retrainings of the whole training set and of each reduced one.
        opponents: Remove the lowest scores instead; the probability should then rise.
        reference: Name of the method that the others are compared with, if it is among them.
        checkpoints: Called with a builder and the name of a model, gives the option `checkpoints` of the
            method; None for the model alone.
        options: By name of a method, the options that its builder is given.
        n_jobs: Workers for the retrainings; as for `RetrainingPlan.execute`, as are `engine` and `device`.
        engine: See there.
        device: See there.
        n_resamples: Bootstrap draws for the calibration; 0 leaves all intervals out.
        seed: Seed of these draws.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: A count or a test point is out of range, the network cannot read the inputs or labels, or
            a retraining diverges.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> import tempfile
    >>> from stride_captum.adapters import Similarity
    >>> from stride_captum.evaluation import train_attributed
    >>> from stride_captum.evaluation.comparison.shared.methods import adapter
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
            given = with_checkpoints((options or {}).get(name, {}), checkpoints(build, model_name))
            method = CachedMethod(build, model, task, given, store, forward)
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


class Counterfactual(Measure):
    """`measure_counterfactual` for one arm or both, by default at the first reported test points."""

    name = "counterfactual"
    defaults: Mapping[str, Any] = {
        **defaults_of(measure_counterfactual),
        "methods": None,
        "arms": ARMS[:1],
        "n_points": 10,
        "test_points": None,
    }

    def settings(self, question: Question) -> dict[str, Any]:
        """The options; test points and workers that are not given are those of the question."""
        found = super().settings(question)
        if found["test_points"] is None:
            found["test_points"] = question.reported[: found["n_points"]]
        return found

    def methods(self, question: Question) -> dict[str, MethodSpec]:
        """The methods whose top examples are removed, and the controls."""
        chosen = self.settings(question)["methods"] or list(question.methods)
        return {n: c for n, c in question.methods.items() if n in {*chosen, "ClassRandom", "Similarity"}}

    def on_models(self, question: Question) -> list[MethodSpec]:
        """The methods whose top examples are removed."""
        return list(self.methods(question).values())

    def check(self, question: Question) -> None:
        """Refuse names that do not exist, and test points on which options are chosen."""
        settings, given = self.settings(question), question.measures[self.name]
        resolve_counts(settings["counts"], question.task.n_train)
        if settings["methods"] is not None and not settings["methods"]:
            must = "name at least one method"
            raise bad_value("measures['counterfactual']['methods']", must, "none", "Leave it out for all.")
        named, kept = settings["methods"] or (), list(self.methods(question))
        for option, values, choices in (
            ("arms", settings["arms"], ARMS),
            ("methods", named, list(dict.fromkeys([*question.methods, *METHODS]))),
            ("methods", () if set(named) & set(kept) else named[:1], list(question.methods)),
            ("reference", [given["reference"]] if "reference" in given else (), kept),
            ("engine", [settings["engine"]], ENGINES),
        ):
            for value in values:
                if value not in choices:
                    raise bad_choice(f"measures['counterfactual'][{option!r}]", value, choices)
        self._check_points(question, given)

    def _check_points(self, question: Question, given: Mapping[str, Any]) -> None:
        points, reported = given.get("test_points"), question.reported
        if points is None:
            if given.get("n_points", 0) > len(reported):
                must = f"be at most the {len(reported)} reported test points"
                raise bad_value("measures['counterfactual']['n_points']", must, given["n_points"])
            return
        if "n_points" in given:
            raise bad_value("measures['counterfactual']", "have `test_points` or `n_points`", "both")
        places = range(reported.start if question.on_halves else 0, len(question.task.test))
        if not len(points) or len(set(points)) < len(points) or not set(points) <= set(places):
            must = f"be distinct places in [{places.start}, {places.stop})"
            why = "Options are chosen on the test points before these." if places.start else None
            raise bad_value("measures['counterfactual']['test_points']", must, list(points), why)

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The attributed models, and at most one set for each model, method, test point and count."""
        question, settings = shared.question, self.settings(shared.question)
        found = cost(
            question.task,
            n_methods=len(self.methods(question)),
            counts=settings["counts"],
            n_test=len(settings["test_points"]),
            n_seeds=settings["n_seeds"],
            n_models=question.n_models + question.n_spiked,
            n_jobs=settings["n_jobs"],
            device=question.device,
        )
        arms = [replace(found, purpose=f"counterfactual drop, {arm}") for arm in settings["arms"]]
        return [*shared.model_estimates, *arms]

    def run(self, shared: Shared) -> list[CounterfactualRow]:
        """A row for each method and arm."""
        question, settings = shared.question, self.settings(shared.question)
        arms = settings.pop("arms")
        del settings["n_points"], settings["methods"]
        return [
            row
            for arm in arms
            for row in measure_counterfactual(
                question.task,
                self.methods(question),
                shared.models,
                opponents=arm == "opponents",
                checkpoints=shared.checkpoints_of,
                show_progress=question.show_progress,
                **given(shared),
                **settings,
            )
        ]
