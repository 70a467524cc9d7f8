"""One training on data of a measure's own, and the further models that a method is given beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from .methods import MethodSpec


class OneTraining:
    """A model trained on a task with a seed; its checkpoints and models of halves are trained when asked for.

    Args:
        task: The task, with the data of the measure.
        seed: Seed of the training; it is also the number of the partitions.
        store: Folder of trained models; None keeps nothing.
        device: Where models are trained.
        n_jobs: Workers for the models of halves.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        store: str | Path | None,
        *,
        device: torch.device | str = "cpu",
        n_jobs: int = 1,
    ) -> None:
        self.task, self.seed, self.store, self.device, self.n_jobs = task, seed, store, device, n_jobs
        self._halves: dict[int, CrossFitted] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model after the last epoch."""
        return train_attributed(self.task, self.seed, self.store, device=self.device)

    def halves(self, partitions: int) -> CrossFitted:
        """Models of the halves of so many partitions."""
        if partitions not in self._halves:
            how: dict[str, Any] = {"n_jobs": self.n_jobs, "device": self.device}
            self._halves[partitions] = cross_fit(self.task, self.seed, partitions, self.store, HALVES, **how)
        return self._halves[partitions]

    def checkpoints(self, method: Any) -> Sequence[Any] | None:
        """The `checkpoints` of a method: models of halves, those along the training, or None.

        Args:
            method: A `MethodSpec`; other builders get None.
        """
        return further_models(
            method,
            self.task.training.epochs,
            lambda partitions: self.halves(partitions).checkpoints,
            self._along,
        )

    def _along(self, epochs: Sequence[int]) -> list[Any]:
        before = train_checkpoints(self.task, self.seed, self.store, epochs, device=self.device)
        return [*before, self.model.state_dict()]


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
    runs: Iterable[tuple[Task, int]],
    methods: Iterable[MethodSpec],
    store: str | Path,
    purpose: str,
    *,
    partitions: int = 0,
    device: torch.device | str = "cpu",
    n_jobs: int = 1,
) -> list[RetrainingEstimate]:
    """What `OneTraining` would train for some methods.

    Args:
        runs: Task and seed of each training, at least one.
        methods: The methods that are given its models.
        store: Folder of trained models; it is only read.
        purpose: What the models are for.
        partitions: Partitions into halves that are needed beside those of the methods.
        device: Where models are trained.
        n_jobs: Workers for the models of halves.
    """
    known, chosen = list(runs), list(methods)
    found = [estimate_attributed(known, store, purpose=purpose, device=device)]
    found += _further(known, chosen, store, partitions, device, n_jobs)
    return [found[0], *(replace(e, purpose=f"{purpose}, {e.purpose}") for e in found[1:])]


def _further(
    runs: Sequence[tuple[Task, int]],
    methods: Sequence[MethodSpec],
    store: str | Path,
    partitions: int,
    device: torch.device | str,
    n_jobs: int,
) -> Iterator[RetrainingEstimate]:
    """Checkpoints and models of halves, for each task."""
    partitions = max([partitions, *(method.partitions for method in methods)])
    for task, seed in runs:
        epochs = sorted({e for method in methods for e in method.epochs(task.training.epochs)})
        if epochs:
            yield estimate_checkpoints(task, {seed: epochs}, store, device=device)
        if partitions:
            how: dict[str, Any] = {"n_jobs": n_jobs, "device": device}
            yield estimate_cross_fitted(task, [seed], partitions, store, HALVES, **how)
