"""Devices: resolution, float64 support, and products in full float32 precision."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad_value

CPU = torch.device("cpu")
#: Kinds of devices to which memory that is pinned is copied while the host goes on.
_COPY_IN_BACKGROUND = ("cuda",)


def existing_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Resolve a device, with its index: "cuda" becomes "cuda:0".

    Raises:
        ValueError: There is no such device.
    """
    try:
        # A tensor on the device has its index, and fails if there is no such device.
        found = torch.empty(0, device=device)
        found.cpu()  # "meta" holds no numbers
        return found.device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"]
        if torch.cuda.is_available():
            there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise bad_value(
            name, "be a device that torch can use here", repr(str(device)), f"Here: {', '.join(there)}."
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer of a model; the CPU if it has none."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return CPU if first is None else first.device


def check_placed(model: nn.Module, on_one: bool) -> None:
    """Refuse a model with weights on the meta device, or on several devices.

    Args:
        model: The network.
        on_one: Whether all weights must be on one device.

    Raises:
        ValueError: Weights on the meta device, or on several devices.
    """
    named = dict(model.named_parameters())
    absent = [name for name, parameter in named.items() if parameter.is_meta]
    if absent:
        remedy = "Load it without offloading (`device_map`)."
        raise bad_value("model", "hold its weights", f"{absent[0]!r} on the meta device, without any", remedy)
    places = sorted({str(parameter.device) for parameter in named.values()})
    if on_one and len(places) > 1:
        remedy = "Write model.to(device), or give `device`: a copy of the model goes there."
        raise bad_value(
            "model", "have all its weights on one device", f"weights on {' and '.join(places)}", remedy
        )


def float64_device(device: torch.device) -> torch.device:
    """Device for float64 work: the device itself, or the CPU if it has no float64.

    Apple's GPUs (mps) and some of Intel's have none.

    >>> float64_device(torch.device("cpu"))
    device(type='cpu')
    """
    return device if device.type in ("cpu", "cuda") or _computes_float64(device) else CPU


@cache
def _computes_float64(device: torch.device) -> bool:
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def as_float64(values: Tensor) -> Tensor:
    """Cast to float64, on the same device, or on the CPU if the device has no float64."""
    return values.to(float64_device(values.device)).double()


def matching(values: Tensor, like: Tensor) -> Tensor:
    """`values.to(other)`, also if one of the two devices has no float64.

    >>> matching(torch.ones(2), torch.zeros(1, dtype=torch.float64)).dtype
    torch.float64
    """
    # The sending device casts; a cast to float64 must happen on the receiving one.
    return values.to(like.device).to(like.dtype) if like.dtype == torch.float64 else values.to(like)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device, in float32 where it has no float64."""
    wide = values.dtype == torch.float64 and float64_device(device) != device
    return (values.float() if wide else values).to(device)


def copied_in_background(rows: Tensor, device: torch.device) -> Tensor:
    """Copy rows to a device, without blocking the host if possible.

    The copy goes through pinned memory, allocated for each call; torch does not reuse it before the copy is
    done. `rows` may be written to right away.
    """
    if device.type in _COPY_IN_BACKGROUND and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context manager for full float32 products, whatever the caller's settings are.

    Autocast is off in this thread; code inside may turn it on again. TF32 and bfloat16 products are off for
    the whole process until the last thread leaves; the settings of the time before the first one entered are
    then restored.

    Args:
        device: Compute device.
    """
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            with suppress(RuntimeError):  # device type without autocast
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_precision.full())
        yield


@contextmanager
def tf32_products() -> Iterator[None]:
    """Context manager that allows TF32 products on devices that have them, process-wide."""
    with _precision.full():  # from here on the settings can be changed
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class _Precision:
    """Reference-counted switch of the process-wide precision settings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: _Settings | None = None

    @contextmanager
    def full(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._before = _Settings()
                _Settings.raise_all()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._before is not None:
                    self._before.put_back()


_precision = _Precision()


class _Settings:
    """Snapshot of torch's precision settings for float32 products.

    Torch 2.9 has one setting per library and kind of product besides the two older ones, and raises an error
    if an older one that contradicts them is read; such a setting is left as it is.
    """

    def __init__(self) -> None:
        self.matmul = _readable(torch.get_float32_matmul_precision)
        self.cudnn = _readable(lambda: torch.backends.cudnn.allow_tf32)
        self.kinds = [(kind, kind.fp32_precision) for kind in _kinds()]

    @staticmethod
    def raise_all() -> None:
        """Set full precision everywhere."""
        if _readable(torch.get_float32_matmul_precision) is not None:
            torch.set_float32_matmul_precision("highest")
        if _readable(lambda: torch.backends.cudnn.allow_tf32) is not None:
            torch.backends.cudnn.allow_tf32 = False
        for kind in _kinds():
            if kind.fp32_precision in ("tf32", "bf16"):
                kind.fp32_precision = "ieee"

    def put_back(self) -> None:
        """Restore the snapshot."""
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn
        for kind, before in self.kinds:
            if kind.fp32_precision != before:
                kind.fp32_precision = "none"  # inherits the setting of all kinds
                if kind.fp32_precision != before:
                    kind.fp32_precision = before


def _readable(read: Any) -> Any:
    """Value of a setting; None if torch refuses to read it."""
    with suppress(RuntimeError):
        return read()
    return None


def _kinds() -> list[Any]:
    """Objects with their own precision setting for float32 products."""
    found = [getattr(torch.backends.cuda, "matmul", None)]
    for library in (torch.backends.cudnn, torch.backends.mkldnn):
        found += [getattr(library, kind, None) for kind in ("matmul", "conv", "rnn")]
    return [kind for kind in found if hasattr(kind, "fp32_precision")]
