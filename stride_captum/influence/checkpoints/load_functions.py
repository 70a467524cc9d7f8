"""Custom `checkpoints_load_func`: call, and check that it has loaded the weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import bad_type, bad_value
from .checkpoint import LoadCheckpoint, load_checkpoint, named
from .state_dicts import first_few


def load_with(load: LoadCheckpoint, model: nn.Module, checkpoint: Any) -> float:
    """Load a checkpoint with a custom function, and check that it has loaded it.

    A function that writes no parameters, such as `load_state_dict(..., strict=False)` without matching keys,
    would silently give the scores of other weights. If parameters have kept their values, they are changed
    and the function is called again: those that are then overwritten were loaded.

    Args:
        load: `f(model, checkpoint)`.
        model: Receives the weights.
        checkpoint: As given by the user.

    Returns:
        The learning rate that the function returned, 1 if it returned none.

    Raises:
        ValueError: It loaded nothing, or returned a learning rate that is negative or not finite.
        TypeError: It returned something that is not a learning rate.
    """
    if load is load_checkpoint:
        return load_checkpoint(model, checkpoint)
    parameters = {
        key: p
        for key, p in model.named_parameters()
        if p.is_floating_point() and p.element_size() > 1 and not p.is_inference()
    }
    watched = {key: p for key, p in parameters.items() if p.requires_grad} or parameters
    before = {key: (p, p._version, p.detach().clone()) for key, p in watched.items()}
    rate = learning_rate_of(load(model, checkpoint), checkpoint, model)
    left = _left_alone(load, model, checkpoint, before)
    if left and len(left) == len(watched):
        raise bad_value(
            "checkpoints_load_func",
            "load the checkpoint into the model that it is given",
            f"a model whose parameters are as before, for {named(checkpoint)}",
            "strict=False loads nothing if no key fits: compare the keys of the file with those of "
            "model.state_dict().",
        )
    if left:
        warnings.warn(
            f"`checkpoints_load_func` left {len(left)} of {len(watched)} trainable parameters as they were "
            f"for {named(checkpoint)}: {first_few(left)}. Freeze them (requires_grad_(False)) if that is "
            "meant.",
            stacklevel=2,
        )
    return rate


def _left_alone(
    load: LoadCheckpoint, model: nn.Module, checkpoint: Any, before: Mapping[str, tuple[Any, int, Tensor]]
) -> list[str]:
    """Names of the parameters that the function does not write."""
    there = set(map(id, model.parameters()))
    same: dict[str, tuple[Any, Tensor]] = {}
    for key, (parameter, version, old) in before.items():
        if id(parameter) in there and parameter._version == version and torch.equal(parameter, old):
            same[key] = (parameter, old)
    if not same:
        return []
    with torch.no_grad():
        for parameter, old in same.values():
            parameter.copy_(_other(old))
    left = list(same)
    try:
        load(model, checkpoint)
        there = set(map(id, model.parameters()))
        left = [key for key, (p, old) in same.items() if id(p) in there and torch.equal(p, _other(old))]
    finally:
        with torch.no_grad():
            for key in left:
                parameter, old = same[key]
                parameter.copy_(old)
    return left


def _other(values: Tensor) -> Tensor:
    """Values that differ from the given ones everywhere."""
    return values + values.abs() + 1


def learning_rate_of(returned: Any, checkpoint: Any, model: nn.Module | None = None) -> float:
    """Learning rate that a load function returned.

    It is 1 for None, the model itself, or the result of `load_state_dict`.

    Args:
        returned: Return value of the function.
        checkpoint: The checkpoint that it loaded.
        model: The model that it was given.

    Raises:
        TypeError: Another model, or not a number.
        ValueError: A number that is negative or not finite.
    """
    keys = getattr(returned, "missing_keys", None)
    if returned is None or returned is model or isinstance(keys, list):
        return 1.0
    must = f"return the learning rate at {named(checkpoint)}, or None"
    if isinstance(returned, nn.Module):
        remedy = "Load into the model that it is given: model.load_state_dict(other.state_dict())."
        raise bad_type("checkpoints_load_func", must, returned, remedy)
    if isinstance(returned, Tensor | np.ndarray) and math.prod(returned.shape) == 1:
        returned = returned.item()
    if isinstance(returned, bool | np.bool_) or not isinstance(
        returned, int | float | np.integer | np.floating
    ):
        raise bad_type("checkpoints_load_func", must, returned)
    if not 0 <= returned < math.inf:
        raise bad_value("checkpoints_load_func", must, returned)
    return float(returned)
