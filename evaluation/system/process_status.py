"""Memory of this process, as Linux reports it in /proc/self/status."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def status_bytes(field: str) -> int | None:
    """A field such as "RssAnon" or "VmData", in bytes; None on a system that does not report it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
