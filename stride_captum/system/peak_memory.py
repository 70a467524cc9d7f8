"""Peak memory that a block of code adds."""

from __future__ import annotations

import _thread
import ctypes
import gc
import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import torch

_SECONDS = 0.005


class PeakMemory:
    """Highest memory inside a `with` block less the memory at its start, in `bytes`.

    Memory allocated by torch on a GPU, elsewhere the anonymous memory of the process, sampled every five
    milliseconds. Reuse of memory that the process had freed before is not seen (call `release_free_memory`
    first). On CUDA the peak is exact if it is the highest since torch's statistics were last reset; they
    belong to the caller and are not reset here. `bytes` is None if the system does not report memory (no
    /proc).

    Args:
        device: Working device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._read = _reader(self.device)
        self._record = _recorded_peak(self.device)
        self._before = self._highest = self._read()
        self._done = threading.Event()
        if self._before is not None:
            # `Thread.start` waits until the thread runs, which takes as long as a small query.
            with suppress(RuntimeError):  # no more threads can be started
                _thread.start_new_thread(self._watch, ())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._before is not None and self._highest is not None:
            record = _recorded_peak(self.device)
            broken = record if record > self._record else 0
            self._highest = max(self._highest, self._read() or 0, broken)
            self.bytes = self._highest - self._before

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            now = self._read()
            if now is not None and self._highest is not None:
                self._highest = max(self._highest, now)


def _reader(device: torch.device) -> Callable[[], int | None]:
    """Function that reads the memory in use on a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    return torch.mps.current_allocated_memory if device.type == "mps" else resident_bytes


def _recorded_peak(device: torch.device) -> int:
    """Peak since torch's statistics were reset; 0 if torch keeps none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def resident_bytes() -> int | None:
    """Anonymous memory of the process in bytes; None without /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except OSError:
        return None
    return (resident - shared) * mmap.PAGESIZE


def release_free_memory() -> None:
    """Return freed memory to the system, so that its reuse counts as growth.

    No-op unless the C library is glibc.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
