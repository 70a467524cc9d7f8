"""`Question`: the checked arguments of a comparison, that is methods, task, measures and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....errors import bad_value, whole_number
from ....subsets import random_subsets
from ...retraining.attributed_models import log_epochs
from ...retraining.plan import RetrainingPlan
from ...retraining.task_parts import HALVES, Split
from ...tasks.task import Task
from .methods import MethodSpec, models_needed


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """The checked arguments of a comparison; `plan.settle` makes one.

    Attributes:
        task: The task.
        specs: The methods, each with the option sets that are tried.
        measures: By name of the measure, the options that were given.
        halves: The retrained halves that LDS is measured on; they are trained only if `on_halves`.
        on_halves: Whether a measure needs them.
        on_models: The methods that measures build on the attributed models.
        store: Folder of the retrainings, the trained models and the scores.
        n_models: Number of attributed models.
        n_spiked: Number of additional ones, stopped on a spike of their training loss.
        n_jobs: As for `RetrainingPlan.execute`, as is `engine`.
        engine: See there.
        device: Where models are trained and methods are run.
        n_resamples: Bootstrap draws.
        show_progress: Whether to show bars.
        options: By name of a method, options that were given instead of a grid.
        chosen_on: On how many of the first test points these were chosen, if it is known.
        note: A warning that a report shows, or "".
        skipped: By name of a method that is left out, the reason.
        cross_fitted: By `Split`, the number of partitions that measures need.
        along: Whether a measure needs checkpoints along the training of every attributed model.
    """

    task: Task
    specs: Sequence[MethodSpec]
    measures: Mapping[str, Mapping[str, Any]]
    halves: RetrainingPlan
    on_halves: bool
    store: Path
    n_models: int = 3
    n_spiked: int = 0
    n_jobs: int = -1
    engine: str = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    n_resamples: int = 1000
    show_progress: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chosen_on: int = 0
    note: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    cross_fitted: Mapping[Split, int] = field(default_factory=dict)
    along: bool = False
    on_models: Sequence[MethodSpec] = ()

    @property
    def reported(self) -> range:
        """Indices of the test points that are reported; options are chosen on those before."""
        return range(self.halves.n_test // 2, self.halves.n_test)

    @property
    def methods(self) -> dict[str, MethodSpec]:
        """The methods by name."""
        return {spec.name: spec for spec in self.specs}

    @property
    def partitions(self) -> dict[Split, int]:
        """By `Split`, the number of partitions that measures and methods need for every attributed model."""
        wanted = dict(self.cross_fitted)
        _, wanted[HALVES] = models_needed(self.on_models, self.task.training.epochs, wanted.get(HALVES, 0))
        return {split: n for split, n in wanted.items() if n}

    @property
    def epochs(self) -> list[int]:
        """Epochs before the last after which checkpoints of every attributed model are needed."""
        epochs = self.task.training.epochs
        of_methods, _ = models_needed(self.on_models, epochs)
        return sorted({*of_methods, *(log_epochs(epochs) if self.along else ())})


def halves(task: Task, store: str | Path, n_subsets: int, n_seeds: int, n_test: int) -> RetrainingPlan:
    """The plan of the retrained halves that LDS is measured on.

    Args:
        task: The task.
        store: Folder of the retrainings.
        n_subsets: Random halves of the training set.
        n_seeds: Retrainings of each.
        n_test: Test points; at most all of the test set are used.

    Raises:
        ValueError: Fewer than 2 test points.
    """
    whole_number("n_subsets", n_subsets, 1)
    n_test = min(n_test, len(task.test))
    if n_test < 2:
        raise bad_value("n_test", "be at least 2: one half tunes, the other reports", n_test)
    membership = random_subsets(task.n_train, n_subsets, task.n_train // 2, seed=0)
    return RetrainingPlan(task, membership, n_seeds, Path(store), n_test)
