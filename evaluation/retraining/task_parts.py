"""Cross-fitting of a task: its network trained on the parts of random partitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..tasks.networks import TrainingSettings
from ..tasks.new_network import built, check_restored
from ..tasks.task import Task
from . import store as run_store
from .attributed_models import log_epochs
from .cross_fitting import CrossFitted, cross_fitted
from .engines import STACK_RECIPE, largest_stack, takes_stacks
from .parts import PartTraining, keep_states, part_trainings, stacks_of, train_part, training_paths
from .stacked import StackedModels, train_stacked
from .store import State
from .training import single_thread, train_model
from .workers import ONE_AT_A_TIME, count

#: Seed of the first partition for attributed model 0; for model i it is `_FIRST + _APART * i`.
_FIRST, _APART = 50_000, 1_000


@dataclass(frozen=True)
class Split:
    """How a task is cross-fitted.

    Attributes:
        parts: Parts of each partition.
        epochs: Epochs of a training on a part; None for those of the task.

    >>> Split(parts=3).trainings(2, epochs=30), Split(epochs=10).trainings(2, epochs=40)
    (2.0, 0.5)
    """

    parts: int = 2
    epochs: int | None = None

    def trainings(self, repeats: int, epochs: int) -> float:
        """Cost of `repeats` partitions in trainings on the whole training set for `epochs` epochs."""
        return repeats * (1.0 if self.epochs is None else self.epochs / epochs)


#: Two complementary halves.
HALVES = Split()


@dataclass(frozen=True)
class TaskTraining:
    """The training of a task, as a `train_function` for `retrain`.

    Attributes:
        task: Data, network and settings.
        epochs: Epochs; None for those of the task.
        along: Whether to return checkpoints along the training, after epochs 1, 2, 3, 5, 8, 12, ...
        device: Where models are trained.
        stacked: Whether several models are trained at once, by `stack`.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> len(TaskTraining(task, along=True)(np.arange(20), 0))
    2
    """

    task: Task
    epochs: int | None = None
    along: bool = False
    device: str = "cpu"
    stacked: bool = False

    @property
    def version(self) -> str:
        """Digest of everything that determines a training, except indices and seed."""
        facts = [f"{k}={v}" for k, v in (("epochs", self.epochs), ("along", self.along)) if v]
        kind = torch.device(self.device).type
        if kind != "cpu":
            facts.append(f"device={kind}")
        if self.stacked:
            facts.append(f"stacked={STACK_RECIPE}")
        return run_store.Fingerprints(self.task).of(0, None, " ".join(["cross-fitted", *facts]))

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the buffers of the network, which may be infinite."""
        return frozenset(name for name, _ in built(self.task).named_buffers())

    @property
    def settings(self) -> TrainingSettings:
        """Those of the task, with the epochs of a part."""
        settings: TrainingSettings = self.task.training
        return settings if self.epochs is None else replace(settings, epochs=self.epochs)

    def __call__(self, indices: NDArray[np.int64], seed: int) -> list[State]:
        """Train on some examples of the task; returns the state dicts, the last one last."""
        settings = self.settings
        x, y = (t[torch.from_numpy(indices)] for t in self.task.train.tensors)
        kept = log_epochs(settings.epochs) if self.along else []
        states: list[State] = []

        def keep(epoch: int, model: nn.Module) -> None:
            if epoch in kept:
                states.append({name: t.clone() for name, t in model.state_dict().items()})

        how = {"loss": self.task.loss, "after_epoch": keep, "device": self.device}
        model = train_model(self.task.build_model, x, y, settings, seed, **how)  # type: ignore[arg-type]
        return [*states, dict(model.state_dict())]

    def stack(self, jobs: Sequence[PartTraining]) -> StackedModels:
        """Train models on parts of one size at once."""
        x, y = self.task.train.tensors
        rows, seeds = [job.rows for job in jobs], [job.seed for job in jobs]
        return train_stacked(self.task.build_model, x, y, rows, self.settings, seeds, device=self.device)


def cross_fit(
    task: Task,
    number: int,
    repeats: int,
    store: str | Path | None,
    split: Split = HALVES,
    *,
    engine: str = "auto",
    n_jobs: int = 1,
    device: torch.device | str = "cpu",
) -> CrossFitted:
    """Models on the parts of `repeats` partitions; each attributed model, by `number`, has its own ones.

    Args:
        task: What is trained.
        number: Of the attributed model.
        repeats: Number of partitions.
        store: Folder for the weights; None keeps nothing.
        split: How the training set is split, and for how many epochs a part is trained.
        engine: As for `RetrainingPlan.execute`: "stacked" trains up to 16 models at once (256 on a GPU) in
            each worker. Each has a file of its own, so that a call with more partitions trains the new ones
            only; in which stack it is trained changes a model by rounding, which training amplifies.
        n_jobs: Workers; -1 takes all cores on the CPU, and one worker on another device.
        device: Where models are trained.

    Raises:
        ValueError: As for `retrain`; the `state_dict` of the network does not restore it, or the engine
            cannot train it.
    """
    how: dict[str, Any] = {"engine": engine, "device": device}
    function, jobs, paths = cross_fit_training(task, number, repeats, store, split, **how)
    check_restored(task.build_model, task.train.tensors[0][:2])

    def train(todo: Sequence[PartTraining]) -> list[list[State]]:
        groups = stacks_of(todo, largest_stack(device)) if function.stacked else [[job] for job in todo]
        parallel = joblib.Parallel(n_jobs=max(min(count(n_jobs, device), len(groups)), 1))
        done = parallel(
            joblib.delayed(_train_group)(function, group, [paths[job.number] for job in group])
            for group in groups
        )
        of_number = {
            job.number: states
            for group, found in zip(groups, done, strict=True)
            for job, states in zip(group, found, strict=True)
        }
        return [of_number[job.number] for job in todo]

    found = cross_fitted(jobs, paths, train, task.n_train)
    return replace(found, trainings=split.trainings(repeats, task.training.epochs))


def _train_group(
    function: TaskTraining, jobs: Sequence[PartTraining], paths: Sequence[Path | None]
) -> list[list[State]]:
    """Do the trainings of one stack, or a single one, and write them."""
    if not function.stacked:
        return [train_part(function, job, path) for job, path in zip(jobs, paths, strict=True)]
    with ONE_AT_A_TIME, single_thread():
        models = function.stack(jobs)
    found = [[run_store.whole_state(models.state_dict(i))] for i in range(len(jobs))]
    for states, job, path in zip(found, jobs, paths, strict=True):
        keep_states(states, function.buffers, job, path)
    return found


def cross_fit_training(
    task: Task,
    number: int,
    repeats: int,
    store: str | Path | None,
    split: Split = HALVES,
    *,
    engine: str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[TaskTraining, list[PartTraining], list[Path | None]]:
    """How `cross_fit` trains, its trainings, and the file of each; None without a store."""
    jobs = part_trainings(task.n_train, split.parts, repeats, _FIRST + _APART * number)

    def way(stacked: bool) -> TaskTraining:
        return TaskTraining(task, epochs=split.epochs, device=str(device), stacked=stacked)

    def paths(function: TaskTraining) -> list[Path | None]:
        return training_paths(function, jobs, store, function.version)

    def n_stored(stacked: bool) -> int:
        return sum(path is not None and path.exists() for path in paths(way(stacked)))

    n_alike = max(Counter(len(job.rows) for job in jobs).values())
    function = way(takes_stacks(engine, task, n_stored, n_alike, device))
    return function, jobs, paths(function)
