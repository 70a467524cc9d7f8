"""Engines of retrainings: one model after the other ("processes"), or several at once ("stacked")."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import bad_choice, bad_value
from ..tasks.new_network import built
from ..tasks.task import Task
from . import stacked

ENGINES = ("auto", "processes", "stacked")
#: Limits of the engine "auto", as measured by `benchmarks.retraining`. On the CPU a stack is faster than
#: joblib's processes if the overhead of a step exceeds its arithmetic: for fully connected networks up to
#: about 250,000 parameters. Mapped convolutions are slower than single ones.
_CPU_PARAMETERS = 250_000
_CPU_STACK, _DEVICE_STACK = 16, 256
_SMALLEST_STACK = 8
#: Part of the name of a stack; increased whenever `train_stacked` changes what it computes.
STACK_RECIPE = 1


def check_engine(engine: str, task: Task) -> None:
    """Refuse an engine that does not exist, and stacks of a network that cannot be stacked."""
    if engine not in ENGINES:
        raise bad_choice("engine", engine, ENGINES)
    if engine == "stacked":
        reason = why_not_stacked(task)
        if reason is not None:
            raise bad_value("engine", "be 'processes' for this network", "'stacked'", reason)


def takes_stacks(
    engine: str, task: Task, n_stored: Callable[[bool], int], n_alike: int, device: torch.device | str
) -> bool:
    """Whether trainings are done in stacks; "auto" goes on with the engine that did most of them before.

    Args:
        engine: One of `ENGINES`.
        task: What is trained.
        n_stored: How many of the trainings the store has, in stacks or one by one.
        n_alike: Trainings on subsets of one size.
        device: Where.
    """
    check_engine(engine, task)
    if engine != "auto":
        return engine == "stacked"
    single, together = n_stored(False), n_stored(True)
    if not single and not together:
        return stacks_are_faster(task, n_alike, device)
    return together > single


def largest_stack(device: torch.device | str) -> int:
    """Most models of one stack."""
    return _CPU_STACK if torch.device(device).type == "cpu" else _DEVICE_STACK


def stacks_are_faster(task: Task, n_alike: int, device: torch.device | str) -> bool:
    """Whether "auto" trains stacks.

    Args:
        task: What is trained.
        n_alike: Trainings on subsets of one size.
        device: Where.
    """
    if n_alike < _SMALLEST_STACK:
        return False
    if torch.device(device).type == "cpu":
        weights = list(built(task).parameters())
        if sum(w.numel() for w in weights) > _CPU_PARAMETERS or any(w.dim() > 2 for w in weights):
            return False
    return why_not_stacked(task) is None


def why_not_stacked(task: Task) -> str | None:
    """Why the network of a task cannot be trained in stacks; None if it can."""
    if not task.has_classes:
        return f"Stacks are trained with cross-entropy, and this task with {task.loss.name!r}."
    return stacked.why_not_stacked(task.build_model, task.train.tensors[0][:2])
