"""Context managers that undo hooks, attributes and process-wide settings, also after exceptions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Held while something changes that belongs to the process: the filters of warnings, what the garbage
#: collector has frozen, the transforms of `torch.func`. One lock for all: no two can wait for each other.
process_wide = threading.RLock()


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Context manager with forward hooks `f(module, args, kwargs, output)` on some modules."""
    with ExitStack() as undo:
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def requiring_gradients(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Context manager in which all parameters require a gradient."""
    chosen = list(parameters)
    with ExitStack() as undo:
        for parameter in chosen:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        yield chosen


@contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Context manager that restores hooks and attributes of modules, and attributes of parameters.

    A network that keeps an activation (`self.attention = ...`) would keep a tensor of `torch.func.vmap`,
    which is dead outside; Captum hangs gradients on parameters and, after an exception, leaves hooks.
    """
    with ExitStack() as undo:
        for owner in _with_attributes(model):
            now = vars(owner)
            for value in now.values():
                if isinstance(value, dict):
                    undo.callback(_put_back, value, dict(value))
                elif isinstance(value, list):
                    undo.callback(_put_back_list, value, list(value))
            undo.callback(_put_back, now, dict(now))
        yield


def _with_attributes(model: nn.Module) -> Iterator[Any]:
    """Modules and parameters with a dictionary of their own; those of TorchScript are elsewhere."""
    yield from (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))
    yield from (parameter for parameter in model.parameters() if hasattr(parameter, "__dict__"))


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(now) != len(before) or any(now.get(name, now) is not value for name, value in before.items()):
        for name in now.keys() - before.keys():
            del now[name]
        now.update(before)


def _put_back_list(now: list[Any], before: list[Any]) -> None:
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        now[:] = before
