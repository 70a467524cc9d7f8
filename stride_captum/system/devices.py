"""Devices: which one is meant, what each can do, and products in full precision."""

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
    """A device as tensors name it: with the index that "cuda" alone leaves out.

    Raises:
        ValueError: There is no such device.
    """
    try:
        # A tensor that is put there says which it is, and whether it is there at all.
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
    """Where the first parameter or buffer of a model is; the CPU where it has none."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return CPU if first is None else first.device


def check_placed(model: nn.Module, on_one: bool) -> None:
    """Refuse a model whose weights are not there, or are on several devices.

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
    """Where float64 work that belongs to a device is done: there, or on the CPU if it has no float64.

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
    """Values in float64, on their device or (if it has no float64) on the CPU."""
    return values.to(float64_device(values.device)).double()


def matching(values: Tensor, like: Tensor) -> Tensor:
    """Values on the device and in the dtype of another tensor, where one of the two devices has no float64.

    >>> matching(torch.ones(2), torch.zeros(1, dtype=torch.float64)).dtype
    torch.float64
    """
    # A device casts what it sends: into float64 it must be cast where it arrives.
    return values.to(like.device).to(like.dtype) if like.dtype == torch.float64 else values.to(like)


def copied_in_background(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on a device; where it can, the host goes on while they are copied.

    Pinned memory is needed for that. It is made anew for each call and left to torch, which gives it to
    no one else before the copy is done. `rows` themselves may be written to at once.
    """
    if device.type in _COPY_IN_BACKGROUND and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def synchronize(device: torch.device) -> None:
    """Wait for the work that a device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever the caller allows.

    Autocast is off for this thread: code inside may turn it on for itself. TF32 and bfloat16 products are
    off for the process, until the last thread that is inside has left; then the settings are what they were
    when the first one entered.

    Args:
        device: Where products are taken.
    """
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            with suppress(RuntimeError):  # of a kind that has no autocast
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_precision.full())
        yield


@contextmanager
def tf32_products() -> Iterator[None]:
    """Products of float32 may be taken in TF32, on devices that have it; for the whole process."""
    with _precision.full():  # whatever state the settings are in, they can be changed now
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class _Precision:
    """The settings of the process for products of float32, kept while somebody needs full precision."""

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
    """A copy of torch's settings for products of float32.

    Torch 2.9 has one for each library and kind of product beside the older two, and lets nobody read an
    older one that says something else: it is then left as it is.
    """

    def __init__(self) -> None:
        self.matmul = _readable(torch.get_float32_matmul_precision)
        self.cudnn = _readable(lambda: torch.backends.cudnn.allow_tf32)
        self.kinds = [(kind, kind.fp32_precision) for kind in _kinds()]

    @staticmethod
    def raise_all() -> None:
        """Full precision everywhere."""
        if _readable(torch.get_float32_matmul_precision) is not None:
            torch.set_float32_matmul_precision("highest")
        if _readable(lambda: torch.backends.cudnn.allow_tf32) is not None:
            torch.backends.cudnn.allow_tf32 = False
        for kind in _kinds():
            if kind.fp32_precision in ("tf32", "bf16"):
                kind.fp32_precision = "ieee"

    def put_back(self) -> None:
        """What it was when the copy was made."""
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn
        for kind, before in self.kinds:
            if kind.fp32_precision != before:
                kind.fp32_precision = "none"  # which takes the setting of all kinds, if that is meant
                if kind.fp32_precision != before:
                    kind.fp32_precision = before


def _readable(read: Any) -> Any:
    """What a setting says; None where torch refuses to tell."""
    with suppress(RuntimeError):
        return read()
    return None


def _kinds() -> list[Any]:
    """What holds a setting of its own for products of float32."""
    found = [getattr(torch.backends.cuda, "matmul", None)]
    for library in (torch.backends.cudnn, torch.backends.mkldnn):
        found += [getattr(library, kind, None) for kind in ("matmul", "conv", "rnn")]
    return [kind for kind in found if hasattr(kind, "fp32_precision")]
