"""Global random states: put back where code of the user has drawn from them.

Numbers that the package draws come from private generators. Code of the user (a data set, a `forward`) may
draw from the global ones of torch, NumPy and Python: these are put back where it did. While other threads
run, draws from torch are told from theirs by watching the operations. Draws from NumPy and Python cannot be
watched: they are put down to the data set if the state changes whenever it is read, and a `forward` that
draws from these is not put back then.
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
    """Notices operations of this thread that draw random numbers."""

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
    """A piece of code of the user.

    Attributes:
        what: What it does, in a word.
        did_something: To be set to False where it turns out that there was nothing to do.
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
        """Around a forward pass, while other threads run; the first one of a model shows whether it draws."""
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
        """Around other code of the user, while other threads run."""
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
        """Put back what was drawn from: all of it, where no other thread can have drawn."""
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
    """Draw from the global random states of torch, NumPy and Python, and put them back.

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
    """Put the global random states back at the end, where code of the user has drawn from them.

    Inside, such code is marked by `user_code`; without other threads that is not needed.

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
    """Mark code of the user, whose draws from global random states are to be put back.

    Args:
        what: The network that is called, or a word for what the code does.
    """
    states, code = getattr(_here, "states", None), UserCode(str(what) if isinstance(what, str) else "forward")
    if states is None or (states.alone and _alone()):
        yield code
        return
    with states.watching_forward(what) if isinstance(what, nn.Module) else states.watching(code):
        yield code
