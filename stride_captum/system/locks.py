"""Locks of models: one thread at a time works with a model.

A session changes modes, gradients, weights and hooks of a model and restores them. `exclusive` blocks other
threads that want the same model, or one that shares a module or tensor with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Owners:
    """Owner thread of each held object, by address."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.thread_of: dict[int, int] = {}

    @contextmanager
    def holding(self, keys: set[int]) -> Iterator[None]:
        me = threading.get_ident()
        with self.changed:
            self.changed.wait_for(lambda: all(self.thread_of.get(key, me) == me for key in keys))
            new = [key for key in keys if key not in self.thread_of]
            self.thread_of.update(dict.fromkeys(new, me))
        try:
            yield
        finally:
            with self.changed:
                for key in new:
                    del self.thread_of[key]
                self.changed.notify_all()


_owners = _Owners()


def members(model: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter], list[Tensor]]:
    """Submodules, parameters and buffers, each once, in one walk."""
    modules = list(model.modules())
    parameters = {id(p): p for m in modules for _, p in m._parameters.items() if p is not None}
    buffers = {id(b): b for m in modules for _, b in m._buffers.items() if b is not None}
    return modules, list(parameters.values()), list(buffers.values())


@contextmanager
def exclusive(*objects: Any) -> Iterator[None]:
    """Wait until no other thread holds one of some objects, then hold them; may be nested.

    Args:
        *objects: Of a module, all its submodules, parameters and buffers count.
    """
    keys = set()
    for thing in objects:
        keys.add(id(thing))
        if isinstance(thing, nn.Module):
            keys.update(id(member) for members in members(thing) for member in members)
    with _owners.holding(keys):
        yield
