"""Which methods a comparison runs, and the options that each is tried with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ...errors import bad_choice, bad_type, bad_value
from ...losses import Loss
from ...losses.summed_positions import SummedPositions
from ..tasks.new_network import built
from ..tasks.task import Task
from ..tasks.task_loss import loss_of_methods
from .shared.methods import DEFAULT_METHODS, METHODS, MethodSpec, find_method


def specs_of(methods: Sequence[str | MethodSpec] | None) -> list[MethodSpec]:
    """The methods that are compared.

    Args:
        methods: Names and specs; None takes `DEFAULT_METHODS`.

    Raises:
        ValueError: A name that does not exist or is there twice, or no method at all.
        TypeError: A single name instead of a sequence.
    """
    if isinstance(methods, str | MethodSpec):
        raise bad_type("methods", "be a sequence of names and MethodSpecs", methods, "Write [method].")
    every = [find_method(m) for m in (DEFAULT_METHODS if methods is None else methods)]
    if not every:
        raise bad_value("methods", "name at least one method", "none")
    names = [c.name for c in every]
    for name in names:
        if names.count(name) > 1:
            raise bad_value("methods", "have names of their own", f"{name!r} twice", "Give each a `name`.")
    return every


def impossible(every: Sequence[MethodSpec], task: Task, on_halves: bool) -> dict[str, str]:
    """The methods that cannot be run on a task, and why.

    Args:
        every: The methods.
        task: The task.
        on_halves: Whether methods that want checkpoints along the training are given them.

    Returns:
        By name of a method, the reason: the end of a sentence that begins with the name.
    """
    skipped = {}
    network = built(task).eval()
    for spec in every:
        if not task.has_classes:
            why = _refusal(spec, task, network)
            if why is not None:
                skipped[spec.name] = why
                continue
        if not spec.available:
            skipped[spec.name] = f"needs {spec.needs}"
        elif on_halves and task.training.epochs < spec.fewest_epochs:
            skipped[spec.name] = f"needs at least {spec.fewest_epochs} epochs"
    return skipped


def _refusal(spec: MethodSpec, task: Task, network: nn.Module) -> str | None:
    """Why a method does not take the loss of a task; None where it does."""
    try:
        options = {**spec.grid[0], "loss": loss_of_methods(task.loss)}
        spec(network, task.train, options).check_loss(task.loss)
    except ValueError as error:
        return f"does not take this task: {error}"
    return None


def grids(
    every: Sequence[MethodSpec],
    task: Task,
    options: Mapping[str, Mapping[str, Any]],
    tuned: bool,
) -> dict[str, list[dict[str, Any]]]:
    """The option sets that each method is tried with.

    Args:
        every: The methods.
        task: Options that its loss does not have are dropped.
        options: By name of a method, options that are given: they are its only set.
        tuned: Whether there are retrained halves to choose by; without them a method with several sets has
            its `default` alone.

    Raises:
        ValueError: Options for a method that does not exist.
    """
    known = list(dict.fromkeys([*(c.name for c in every), *METHODS]))
    for name in options:
        if name not in known:
            raise bad_choice("options", name, known)
    found = {}
    for spec in every:
        grid: Sequence[Mapping[str, Any]] = spec.grid
        if spec.name in options:
            grid = [options[spec.name]]
        elif not tuned and len(grid) > 1:
            grid = [spec.default]
        found[spec.name] = _for_loss([plain_numbers(point) for point in grid], task.loss)
    return found


def _for_loss(grid: list[dict[str, Any]], loss: Loss) -> list[dict[str, Any]]:
    """The option sets that a loss has.

    A loss without a temperature loses the sets that need one. With several positions the empirical Fisher
    replaces the exact one, which takes a backward pass for each output of each position.
    """
    if isinstance(loss, SummedPositions):
        grid = [{**p, "fisher": "empirical"} if p.get("fisher") == "exact" else p for p in grid]
    if loss_of_methods(loss).tempered:
        return grid
    found: list[dict[str, Any]] = []
    for point in grid:
        kept = {name: value for name, value in point.items() if name != "temperature"}
        if kept.get("residuals") != "temperature" and kept not in found:
            found.append(kept)
    return found or grid  # which the method then refuses, with a reason


def plain_numbers(value: Any) -> Any:
    """A value with NumPy's numbers as Python's, also inside mappings and sequences."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: plain_numbers(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_numbers(part) for part in value)
    return value
