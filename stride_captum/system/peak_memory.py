"""Peak memory: what a piece of work adds to what was there before."""

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

    On a GPU it is what torch has allocated there, elsewhere the anonymous memory of the process. Either is
    read every five milliseconds. What is reused from memory of the process that was free before is not seen
    (`release_free_memory` first). On CUDA the highest value is exact if it is the highest since torch's
    statistics were last reset. They are the caller's, so they are not reset here.
    `bytes` is None where the system does not tell (no /proc).

    Args:
        device: Where the work is done.
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
    """What reads the memory that work on a device uses."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    return torch.mps.current_allocated_memory if device.type == "mps" else resident_bytes


def _recorded_peak(device: torch.device) -> int:
    """The highest value that torch has seen since its statistics were reset; 0 where it keeps none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def resident_bytes() -> int | None:
    """Memory of the process that no file backs, in bytes; None where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except OSError:
        return None
    return (resident - shared) * mmap.PAGESIZE


def release_free_memory() -> None:
    """Give memory that has been freed back to the system, so that using it again is seen as growth.

    Does nothing where the C library cannot (anything but glibc).
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
