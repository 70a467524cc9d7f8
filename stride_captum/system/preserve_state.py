"""The promise that the caller's model and random states come back bit for bit as they were, on any thread.

A model can be used by one thread at a time: its modes, gradients and weights are changed and put back, and
hooks are on it meanwhile. `exclusive` makes other threads wait that want the same model, or one that shares
a module or a tensor with it. Other code that reads the model meanwhile sees it in eval mode.

Numbers that the package draws come from private generators. Code of the user (a data set, a `forward`) may
draw from the global ones of torch, NumPy and Python: these are put back where it did. While other threads
run, draws from torch are told from theirs by watching the operations. Draws from NumPy and Python cannot be
watched: they are put down to the data set if the state changes whenever it is read, and a `forward` that
draws from these is not put back then.
"""

from __future__ import annotations

import hashlib
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Value = TypeVar("Value")


class _Owners:
    """Which thread holds which objects; objects are known by their address while someone holds them."""

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


def _members(model: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter], list[Tensor]]:
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
            keys.update(id(member) for members in _members(thing) for member in members)
    with _owners.holding(keys):
        yield


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


@contextmanager
def preserve_state(model: nn.Module, *, weights: bool = False) -> Iterator[nn.Module]:
    """Evaluate a model without leaving a trace, also after an exception.

    Inside, every module is in eval mode, no parameter has a gradient, and no other thread has the model
    (`exclusive`). Afterwards training modes, `requires_grad`, gradients, buffers (and parameters, with
    `weights`) and the random states are what they were; a parameter or buffer that was replaced is put back.

    Args:
        model: The caller's model.
        weights: Whether other weights will be loaded into it meanwhile, so that parameters must be
            copied and put back.
    """
    with exclusive(model), ExitStack() as undo:
        modules, parameters, buffers = _members(model)
        devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
        undo.enter_context(draws_put_back(devices))
        # Each step is undone whatever happens to the others, the last one first.
        changing = [*buffers, *(parameters if weights else ())]
        held = [m for module in modules for m in (module._parameters, module._buffers) if isinstance(m, dict)]
        for function, before in (
            (_restore_gradient, [(p, p.requires_grad, p.grad) for p in parameters]),
            (_restore_values, _copies(changing)),
            (_restore_storage, [(tensor, tensor.data) for tensor in [*parameters, *buffers]]),
            (_put_back, [(members, dict(members)) for members in held]),
            (_restore_mode, [(module, module.training) for module in modules]),
        ):
            undo.callback(_for_each, function, before)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = None
        model.eval()
        yield model


def _for_each(function: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    """Call a function for all items; the first error is raised after the last call."""
    failed: Exception | None = None
    for item in items:
        try:
            function(*item)
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _restore_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:
        module.training = training


def _put_back(now: dict[str, Value], before: dict[str, Value]) -> None:
    if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
        now.clear()
        now.update(before)


def _restore_storage(tensor: Tensor, place: Tensor) -> None:
    if tensor.data_ptr() != place.data_ptr() or tensor.dtype != place.dtype:
        tensor.data = place


def _copies(tensors: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Tensors and copies of them, by device."""
    found = []
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        found.append((here, [tensor.detach().clone() for tensor in here]))
    return found


def _restore_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put back what was changed; the tensors are on one device, which is waited for once."""
    pairs = list(zip(tensors, values, strict=True))
    same = torch.stack([(tensor.detach() == before).all() for tensor, before in pairs]).tolist()
    _for_each(_copy_into, [pair for pair, unchanged in zip(pairs, same, strict=True) if not unchanged])


def _copy_into(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)


def _restore_gradient(parameter: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not gradient:
        parameter.grad = gradient


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, `(n_bytes,)` uint8 on the CPU."""
    return tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name, dtype, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def weights_version(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Changes whenever a parameter or buffer is replaced or written to, in practice also through `.data`.

    Reads the weights once, on their device. A change that keeps the addresses, torch's own counters and
    the sum of the bits and of the values of every tensor goes unseen.
    """
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()]]
    places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    sums: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            sums.setdefault(t.device, []).append(_sums(t))
    read = [
        torch.stack(found).reshape(-1).tolist() for found in sums.values()
    ]  # each device is waited for once
    return (*places, tuple(number for numbers in read for number in numbers))


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).contiguous().view(_SAME_SIZE[tensor.element_size()])
    total = flat.sum(dtype=torch.int64)
    if not tensor.is_floating_point():
        return torch.stack([total, total])
    value = tensor.sum(dtype=torch.float32)
    return torch.stack([total, value.view(torch.int32).long()])
