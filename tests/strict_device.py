"""A device that is not there: tensors on it refuse what a GPU refuses, and count what a GPU is waited for.

Inside `strict_device()` torch has the device `lazy:0`, a type of torch that no hardware has. What is on it
is computed on the processor, under the rules of a device of its own:

- An operation on tensors of both devices is refused. Torch's exceptions hold: numbers (tensors without a
  dimension) in elementwise operations, indices on the processor, copies.
- `.numpy()` and generators of the processor are refused. With `float64=False` so is float64, also in a copy
  to the processor that casts: as on Apple's GPUs.
- A copy from pinned memory with `non_blocking=True` is made late: when what it gives is used. Copies to the
  processor may not be `non_blocking`.
- What the host waits for is counted: numbers and arrays that it reads (`item`, `tolist`, `cpu`, `bool`) and
  shapes that depend on values (`nonzero`, masks as indices). Copies to the device are counted on their own.

Autocast of the device is that of the processor.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import stride_captum
from stride_captum import adapters
from stride_captum.system import devices

DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
#: Operations with indices, which may be on the processor.
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
#: Operations that are not elementwise and take numbers of the processor all the same.
_TAKE_NUMBERS = {_aten.fill_.Tensor, _aten.masked_fill.Tensor, _aten.masked_fill_.Tensor, *_INDEXING}
#: Operations that only look at the kinds of their tensors.
_ONLY_COMPARE = {_aten._has_compatible_shallow_copy_type.default}
#: Operations that are waited for without saying so in their tags.
_WAITED_FOR = {_aten._linalg_check_errors.default, _aten._linalg_eigh.default, _aten._linalg_svd.default}
#: Folders of the package.
_OURS = tuple(f"{Path(module.__file__).parent}/" for module in (stride_captum, adapters))
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class StrictTensor(torch.Tensor):
    """A tensor on `DEVICE`; `inner` holds its numbers."""

    _numbers: Tensor | Callable[[], Tensor]

    @staticmethod
    def __new__(cls, inner: Tensor, late: Callable[[], Tensor] | None = None) -> StrictTensor:
        layout: dict[str, Any] = {}
        if inner.layout == torch.strided:
            layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout
        )
        tensor._numbers = late or inner
        return tensor

    @property
    def inner(self) -> Tensor:
        if not isinstance(self._numbers, Tensor):
            self._numbers = self._numbers()
        return self._numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert a {DEVICE} tensor to numpy. Use Tensor.cpu() first.")
        if func in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage):
            return func(args[0].inner)
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.data.__set__:
            args[0]._numbers = args[1].inner
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _current is not None, "outside of `strict_device`"
        return _current.run(func, args, kwargs or {})

    # With these, modules swap their parameters for those on another device.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> StrictTensor:
        return StrictTensor(parts["inner"])


class StrictDevice(TorchDispatchMode):
    """The rules of the device, and what it has seen.

    Attributes:
        waits: Times that the host waited for the device, by the line of the package that asked.
        copies: Copies from the host to the device, likewise.
    """

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation, under the rules where it has to do with the device."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        strict = [t for t in tensors if isinstance(t, StrictTensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if func is _aten._pin_memory.default and not strict:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if not strict and (asked is None or asked.type != DEVICE.type):
            return func(*args, **kwargs)
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        on_device = bool(strict) if asked is None else asked.type == DEVICE.type
        if func in _COPIES:
            return self._copy(func, args, kwargs, on_device)
        self._refuse(func, args, kwargs, tensors, on_device)
        if (
            kwargs.get("check_errors")
            or func in _WAITED_FOR
            or (_has_mask(args[1]) if func in _INDEXING else _READS & set(func.tags))
        ):
            self.waits[_place()] += 1
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        known = {id(t.inner): t for t in strict}
        return tree_map(lambda value: self._outer(value, known, on_device), result)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> Any:
        into = func is _aten.copy_.default
        source = args[1] if into else args[0]
        leaves = isinstance(source, StrictTensor)
        arrives = isinstance(args[0], StrictTensor) if into else on_device
        background = kwargs.get("non_blocking") or (into and len(args) > 2 and args[2])
        if arrives and not leaves:
            self.copies[_place()] += 1
            if background and not into and any(source is pinned for pinned in self._pinned):
                shape = func(source, **kwargs)
                return StrictTensor(shape, late=lambda: func(source, **kwargs))
        if leaves and not arrives:
            if background:
                raise RuntimeError("nobody waits for a non_blocking copy to the processor")
            self.waits[_place()] += 1
            self._refuse_float64(kwargs.get("dtype") or (args[0] if into else source).dtype)
        result = func(*tree_map(_inner, args), **kwargs)
        return args[0] if into else self._outer(result, {}, arrives)

    def _refuse(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], on_device: bool) -> None:
        """Raise for tensors of two devices, or a generator of the other one."""
        if on_device and any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError(f"expected a '{DEVICE.type}' device type for generator but found 'cpu'")
        strict = [t for t in tensors if isinstance(t, StrictTensor)]
        others = [t for t in tensors if not isinstance(t, StrictTensor)]
        if func in _INDEXING and isinstance(args[0], StrictTensor):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)]
            moved = {id(t) for t in indices if not isinstance(t, StrictTensor)}
            others = [t for t in others if id(t) not in moved]
            if moved:
                self.copies[_place()] += len(moved)
        if not strict or not others or func in _ONLY_COMPARE:
            return
        takes_numbers = torch.Tag.pointwise in func.tags or func in _TAKE_NUMBERS
        writes_to_other = func._schema.is_mutable and not isinstance(args[0], StrictTensor)
        if not takes_numbers or writes_to_other or any(t.ndim for t in others):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu"
            )

    def _outer(self, value: Any, known: dict[int, StrictTensor], on_device: bool) -> Any:
        if not isinstance(value, Tensor) or not on_device:
            return value
        if id(value) in known:
            return known[id(value)]
        self._refuse_float64(value.dtype)
        return StrictTensor(value)

    def _refuse_float64(self, dtype: torch.dtype) -> None:
        if not self.float64 and dtype in (torch.float64, torch.complex128):
            raise TypeError(f"cannot convert a {DEVICE} tensor to float64, which it does not have")


_current: StrictDevice | None = None


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, StrictTensor) else value


def _has_mask(indices: Any) -> bool:
    return any(t.dtype in (torch.bool, torch.uint8) for t in indices if isinstance(t, StrictTensor))


def _place() -> str:
    """The line of the package that the present operation stands in."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def strict_device(float64: bool = True) -> Iterator[StrictDevice]:
    """Torch with the device `DEVICE`.

    Args:
        float64: Whether the device has it.
    """
    global _current
    if not hasattr(torch._C, "_set_only_lift_cpu_tensors"):
        pytest.skip("this version of torch makes no tensors on a device of a mode")
    autocast = torch.autocast.__init__

    def on_the_processor(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    _current = StrictDevice(float64)
    try:
        with pytest.MonkeyPatch.context() as patch, _current:
            patch.setattr(torch.autocast, "__init__", on_the_processor)
            patch.setattr(devices, "_COPY_IN_BACKGROUND", (DEVICE.type,))
            torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` is made there
            devices._computes_float64.cache_clear()
            yield _current
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        devices._computes_float64.cache_clear()
        _current = None
