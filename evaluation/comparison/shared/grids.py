"""Grids of options that methods are tried with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ....errors import bad_choice, bad_value
from ....losses import Loss
from ....losses.summed_positions import SummedPositions
from ...tasks.task import Task
from ...tasks.task_loss import loss_of_methods
from .methods import METHODS, MethodSpec


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
        ValueError: Options for a method that does not exist, or checkpoints among them.
    """
    known = list(dict.fromkeys([*(c.name for c in every), *METHODS]))
    for name in options:
        if name not in known:
            raise bad_choice("options", name, known)
        if "checkpoints" in options[name]:
            must = "leave `checkpoints` to the comparison, which trains them"
            raise bad_value(f"options[{name!r}]", must, "some", "Name the row 'STRIDE, checkpoints'.")
    found = {}
    for spec in every:
        grid: Sequence[Mapping[str, Any]] = spec.grid
        if spec.name in options:
            grid = [options[spec.name]]
        elif not tuned and len(grid) > 1:
            grid = [spec.default]
        found[spec.name] = for_loss([plain_numbers(point) for point in grid], task.loss)
    return found


def for_loss(grid: list[dict[str, Any]], loss: Loss) -> list[dict[str, Any]]:
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
