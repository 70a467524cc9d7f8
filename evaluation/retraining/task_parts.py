"""Cross-fitting of a task: its network trained on the parts of random partitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..tasks.networks import TrainingSettings
from ..tasks.new_network import built, check_restored
from ..tasks.task import Task
from . import store as run_store
from .attributed_models import log_epochs
from .cross_fitting import CrossFitted, part_trainings, retrain, training_paths
from .store import State
from .training import train_model
from .workers import count

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

    @property
    def version(self) -> str:
        """Digest of everything that determines a training, except indices and seed."""
        facts = [f"{k}={v}" for k, v in (("epochs", self.epochs), ("along", self.along)) if v]
        kind = torch.device(self.device).type
        if kind != "cpu":
            facts.append(f"device={kind}")
        return run_store.Fingerprints(self.task).of(0, None, " ".join(["cross-fitted", *facts]))

    @property
    def buffers(self) -> frozenset[str]:
        """Names of the buffers of the network, which may be infinite."""
        return frozenset(name for name, _ in built(self.task).named_buffers())

    def __call__(self, indices: NDArray[np.int64], seed: int) -> list[State]:
        """Train on some examples of the task; returns the state dicts, the last one last."""
        settings: TrainingSettings = self.task.training
        if self.epochs is not None:
            settings = replace(settings, epochs=self.epochs)
        x, y = (t[torch.from_numpy(indices)] for t in self.task.train.tensors)
        kept = log_epochs(settings.epochs) if self.along else []
        states: list[State] = []

        def keep(epoch: int, model: nn.Module) -> None:
            if epoch in kept:
                states.append({name: t.clone() for name, t in model.state_dict().items()})

        how = {"loss": self.task.loss, "after_epoch": keep, "device": self.device}
        model = train_model(self.task.build_model, x, y, settings, seed, **how)  # type: ignore[arg-type]
        return [*states, dict(model.state_dict())]


def cross_fit(
    task: Task,
    number: int,
    repeats: int,
    store: str | Path | None,
    split: Split = HALVES,
    *,
    n_jobs: int = 1,
    device: torch.device | str = "cpu",
) -> CrossFitted:
    """Models on the parts of `repeats` partitions; each attributed model, by `number`, has its own ones.

    Raises:
        ValueError: As for `retrain`; or the `state_dict` of the network does not restore it.
    """
    check_restored(task.build_model, task.train.tensors[0][:2])
    function = TaskTraining(task, epochs=split.epochs, device=str(device))
    found = retrain(
        function,
        task.n_train,
        parts=split.parts,
        repeats=repeats,
        seed=_FIRST + _APART * number,
        store=store,
        version=function.version,
        n_jobs=count(n_jobs, device),
    )
    return replace(found, trainings=split.trainings(repeats, task.training.epochs))


def cross_fit_paths(
    task: Task,
    number: int,
    repeats: int,
    store: str | Path,
    split: Split = HALVES,
    *,
    device: torch.device | str = "cpu",
) -> list[Path]:
    """The files that `cross_fit` writes, one for each model."""
    function = TaskTraining(task, epochs=split.epochs, device=str(device))
    jobs = part_trainings(task.n_train, split.parts, repeats, _FIRST + _APART * number)
    paths = training_paths(function, jobs, store, function.version)
    return [path for path in paths if path is not None]
