"""Restoration of global random states after user code has drawn from them.

The package itself draws from private generators. User code (a data set, a `forward`) may draw from the global
generators of torch, NumPy and Python, whose states are then restored. While other threads run, torch draws of
this thread are detected by watching its operations. NumPy and Python draws cannot be watched: they are
attributed to the data set if the state changes every time it is read, and those of a `forward` are not
restored.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Threads that draw no random numbers, beside tqdm's monitor: queues of loaders.
_QUIET = "QueueFeederThread"


def _alone() -> bool:
    """Whether no other thread can be drawing random numbers."""
    here = threading.current_thread()
    return all(
        thread is here or thread.name == _QUIET or type(thread).__name__ == "TMonitor"
        for thread in threading.enumerate()
    )


class _Draws(TorchDispatchMode):
    """Dispatch mode that detects random operations of this thread."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen = True
        return func(*args, **(kwargs or {}))


#: Whether a model draws random numbers in its forward pass, once a second thread has made that a question.
_drawing_models: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_here = threading.local()


@dataclass
class UserCode:
    """One call of user code.

    Attributes:
        what: What it does, in one word.
        did_something: To be set to False if there was nothing to do.
    """

    what: str
    did_something: bool = True


class _RandomStates:
    """The global random states at the start of a session.

    Args:
        devices: CUDA devices whose states count as well.
    """

    def __init__(self, devices: Sequence[int]) -> None:
        self.devices = list(devices)
        self.torch, self.cuda = self._torch_states()
        self.numpy, self.python = np.random.get_state(), random.getstate()
        self.alone = _alone()
        self.drawn: set[str] = set()
        self._changes: dict[str, list[set[str]]] = {}

    def _torch_states(self) -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def watching_forward(self, model: nn.Module) -> Iterator[None]:
        """Context manager around a forward pass; a model's first one tells whether it draws."""
        known = _drawing_models.get(model)
        if known is None:
            with _Draws() as draws:  # type: ignore[no-untyped-call]
                yield
            known = _drawing_models[model] = draws.seen
        else:
            yield
        if known:
            self.drawn.add("torch")

    @contextmanager
    def watching(self, code: UserCode) -> Iterator[None]:
        """Context manager around other user code while other threads run."""
        numpy, python = np.random.get_state(), random.getstate()
        draws = _Draws()  # type: ignore[no-untyped-call]
        try:
            with draws:
                yield
        finally:
            if draws.seen:
                self.drawn.add("torch")
            changed = set() if _equal(np.random.get_state(), numpy) else {"numpy"}
            changed |= set() if random.getstate() == python else {"python"}
            if code.did_something:
                self._changes.setdefault(code.what, []).append(changed)

    def put_back(self) -> None:
        """Restore the states that were drawn from; all of them if no other thread can have drawn."""
        alone = self.alone and _alone()
        for changes in self._changes.values():
            self.drawn |= set.intersection(*changes)
        if alone or "torch" in self.drawn:
            now, cuda = self._torch_states()
            if not torch.equal(now, self.torch):
                torch.set_rng_state(self.torch)
            for device, before, after in zip(self.devices, self.cuda, cuda, strict=True):
                if not torch.equal(before, after):
                    torch.cuda.set_rng_state(before, device)
        if alone or "numpy" in self.drawn:
            np.random.set_state(self.numpy)
        if alone or "python" in self.drawn:
            random.setstate(self.python)


def _equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def same_random_state(devices: Sequence[int] = ()) -> Iterator[None]:
    """Context manager that restores the global random states of torch, NumPy and Python.

    Args:
        devices: CUDA devices whose states are kept as well.
    """
    states = _RandomStates(devices)
    states.drawn |= {"torch", "numpy", "python"}
    try:
        yield
    finally:
        states.put_back()


@contextmanager
def draws_put_back(devices: Sequence[int] = ()) -> Iterator[None]:
    """Context manager that restores the global random states if user code has drawn from them.

    User code inside is marked by `user_code`, which matters only while other threads run.

    Args:
        devices: CUDA devices whose states count as well.
    """
    outer = getattr(_here, "states", None)
    states = _here.states = _RandomStates(devices)
    try:
        yield
    finally:
        _here.states = outer
        states.put_back()


@contextmanager
def user_code(what: Any) -> Iterator[UserCode]:
    """Mark user code whose draws from global random states are to be undone.

    Args:
        what: The network that is called, or a word for what the code does.
    """
    states, code = getattr(_here, "states", None), UserCode(str(what) if isinstance(what, str) else "forward")
    if states is None or (states.alone and _alone()):
        yield code
        return
    with states.watching_forward(what) if isinstance(what, nn.Module) else states.watching(code):
        yield code
