"""Owns the measurement of peak memory: what a piece of work adds to what was there before."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
from contextlib import suppress
from types import TracebackType

import torch

from .restoring import QUIET_THREAD

_SECONDS = 0.005


class PeakMemory:
    """Highest memory inside a `with` block less the memory at its start, in `bytes`.

    On CUDA it is what torch has allocated on the device. Elsewhere it is the anonymous memory of the
    process, read every five milliseconds: what is reused from memory that was free before is not seen
    (`release_free_memory` first).
    `bytes` is None where the system does not tell (no /proc).

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
            return self
        self._before = self._highest = resident_bytes()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if self._before is not None:
            self._thread = threading.Thread(target=self._watch, name=QUIET_THREAD, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            assert self._before is not None
            self.bytes = max(torch.cuda.max_memory_allocated(self.device) - self._before, 0)
            return
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if self._before is not None and self._highest is not None:
            self._highest = max(self._highest, resident_bytes() or 0)
            self.bytes = self._highest - self._before

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            now = resident_bytes()
            if now is not None and self._highest is not None:
                self._highest = max(self._highest, now)


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
