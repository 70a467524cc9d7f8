"""Which methods a comparison runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...errors import bad_type, bad_value
from ...losses.summed_positions import SummedPositions
from ..tasks.new_network import built
from ..tasks.task import Task
from ..tasks.task_loss import loss_of_methods
from .shared.methods import DEFAULT_METHODS, MethodSpec, find_method


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


def left_out(every: Sequence[MethodSpec], task: Task) -> dict[str, str]:
    """The methods that are not run on a task unless they are named, and why.

    Args:
        every: The methods.
        task: The task.

    Returns:
        By name of a method, the reason: the end of a sentence that begins with the name.
    """
    skipped = {}
    network = built(task).eval()
    for spec in every:
        if spec.named_at_positions and isinstance(task.loss, SummedPositions):
            skipped[spec.name] = "takes minutes for several positions an example: name it"
            continue
        if not task.has_classes:
            why = _refusal(spec, task, network)
            if why is not None:
                skipped[spec.name] = why
                continue
        if not spec.available:
            skipped[spec.name] = f"needs {spec.needs}"
        elif task.training.epochs < spec.fewest_epochs:
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
