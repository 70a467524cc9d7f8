"""One training on data of a measure's own, and the further models that methods are given beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...retraining.attributed_estimates import (
    estimate_attributed,
    estimate_checkpoints,
    estimate_cross_fitted,
)
from ...retraining.attributed_models import train_attributed, train_checkpoints
from ...retraining.cross_fitting import CrossFitted
from ...retraining.estimate import RetrainingEstimate
from ...retraining.task_parts import HALVES, cross_fit
from ...tasks.task import Task
from .methods import MethodSpec, models_needed


class OneTraining:
    """A model trained on a task with a seed; its checkpoints and models of halves are trained when asked for.

    Args:
        task: The task, with the data of the measure.
        seed: Seed of the training; it is also the number of the partitions.
        store: Folder of trained models; None keeps nothing.
        methods: Those that will ask for `checkpoints`; builders that are no `MethodSpec` ask for none.
        partitions: Partitions into halves that are needed beside those of the methods.
        device: Where models are trained.
        n_jobs: Workers for the models of halves.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        store: str | Path | None,
        methods: Iterable[Any],
        *,
        partitions: int = 0,
        device: torch.device | str = "cpu",
        n_jobs: int = 1,
    ) -> None:
        self.task, self.seed, self.store, self.device, self.n_jobs = task, seed, store, device, n_jobs
        self.epochs, self.partitions = models_needed(methods, task.training.epochs, partitions)

    @cached_property
    def model(self) -> nn.Module:
        """The model after the last epoch."""
        return train_attributed(self.task, self.seed, self.store, device=self.device)

    @cached_property
    def _along(self) -> dict[int, Any]:
        """Checkpoints by epoch, of all epochs that a method asks for."""
        kept = train_checkpoints(self.task, self.seed, self.store, self.epochs, device=self.device)
        return dict(zip(self.epochs, kept, strict=True))

    @cached_property
    def _halves(self) -> CrossFitted:
        """The models of all halves that a method asks for."""
        how: dict[str, Any] = {"n_jobs": self.n_jobs, "device": self.device}
        return cross_fit(self.task, self.seed, self.partitions, self.store, HALVES, **how)

    def halves(self, partitions: int) -> Sequence[Any]:
        """Models of the halves of so many partitions."""
        return self._halves.checkpoints[: HALVES.parts * partitions]

    def checkpoints(self, method: Any) -> Sequence[Any] | None:
        """The `checkpoints` of a method: those along the training, models of halves, both or None.

        Args:
            method: A `MethodSpec`; other builders get None.
        """
        return further_models(
            method,
            self.task.training.epochs,
            self.halves,
            lambda epochs: [*(self._along[epoch] for epoch in epochs), self.model.state_dict()],
        )


def further_models(
    method: Any,
    epochs: int,
    halves: Callable[[int], Sequence[Any]],
    along: Callable[[Sequence[int]], Sequence[Any]],
) -> Sequence[Any] | None:
    """The `checkpoints` that a method is given beside a model; None for the model alone.

    Args:
        method: A `MethodSpec`; other builders get None.
        epochs: Epochs of the training.
        halves: Gives the models of the halves of so many partitions.
        along: Gives the checkpoints after these epochs and the last one.
    """
    if not isinstance(method, MethodSpec) or method.uses_model_alone:
        return None
    return [
        *(along(method.epochs(epochs)) if method.n_checkpoints != 1 else ()),
        *(halves(method.partitions) if method.partitions else ()),
    ]


def with_checkpoints(options: Mapping[str, Any], checkpoints: Sequence[Any] | None) -> dict[str, Any]:
    """Options of a method, with its checkpoints if it is given some."""
    return {**options, **({} if checkpoints is None else {"checkpoints": list(checkpoints)})}


def estimates(
    runs: Callable[[], Iterable[tuple[Task, int]]],
    methods: Iterable[Any],
    store: str | Path,
    purpose: str,
    *,
    partitions: int = 0,
    device: torch.device | str = "cpu",
    n_jobs: int = 1,
) -> list[RetrainingEstimate]:
    """What `OneTraining` would train for some methods.

    Args:
        runs: Gives task and seed of each training, at least one, one after the other.
        methods: As for `OneTraining`, as are all others.
        store: See there; it is only read.
        purpose: What the models are for.
        partitions: See there.
        device: See there.
        n_jobs: See there.
    """
    epochs, partitions = models_needed(methods, next(iter(runs()))[0].training.epochs, partitions)
    found = [estimate_attributed(runs(), store, purpose=purpose, device=device)]
    if epochs:
        along = estimate_checkpoints(((*run, epochs) for run in runs()), store, device=device)
        found.append(replace(along, purpose=f"{purpose}, {along.purpose}"))
    if partitions:
        how: dict[str, Any] = {"n_jobs": n_jobs, "device": device}
        halves = estimate_cross_fitted(runs(), partitions, store, HALVES, **how)
        found.append(replace(halves, purpose=f"{purpose}, {halves.purpose}"))
    return found
