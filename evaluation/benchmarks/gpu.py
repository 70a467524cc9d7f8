"""All benchmarks for a GPU, in one run of a few minutes whose results are saved as they come.

    training    operators with fused Adam, TF32 and bfloat16, against float32 without them
    queries     one point, 1,000 points and the top 100, against one matrix product (`benchmarks.core`)
    retraining  stacks of models, against models one by one (`benchmarks.retraining`)
    transfers   blocks of stored features through pinned memory, against plain copies and features on the GPU
    nccl        a process group of one rank, against no group
    scaling     models of Table 5 up to 1 B parameters (`benchmarks.scalability`)

Every part has its own process and a share of the time. It is ended when its time is over; time that it does
not need goes to the later parts. A row is written as soon as it is measured. A row that does not fit into the
time, or fails, has the reason in its place. The two sides of a comparison are timed in turns.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import bad_choice, bad_value
from ...system.devices import existing_device
from ..system.environment import describe
from ..system.text_files import write_text
from .gpu_jobs import Clock, Job
from .gpu_parts import FULL, JOBS, TOY
from .scalability.measure import what_failed

#: Share of the time of each part.
SHARES = {
    "training": 0.13,
    "queries": 0.15,
    "retraining": 0.13,
    "transfers": 0.08,
    "nccl": 0.06,
    "scaling": 0.45,
}
PARTS = tuple(SHARES)


def bench_gpu(
    path: Path,
    *,
    device: torch.device | str | None = None,
    parts: Sequence[str] = PARTS,
    minutes: float = 8.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure all parts, and write every row as soon as it is measured.

    Args:
        path: A JSON file: "environment", "settings" and, by part, "status", "seconds", "detail" and "rows".
        device: None takes a GPU if there is one. On the CPU all sizes are tiny.
        parts: From `PARTS`.
        minutes: Time for everything.
        say: Called with a line of text for each part.

    Returns:
        The content of the file.

    Raises:
        ValueError: A part or the device does not exist, or `minutes` is not positive.
    """
    for part in parts:
        if part not in PARTS:
            raise bad_choice("part", part, PARTS)
    if not 0 < minutes < float("inf"):
        raise bad_value("minutes", "be a positive number", minutes)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = existing_device(device)
    file, clock = Results(path), Clock(60 * minutes)
    file.start(where, parts, minutes)
    for i, part in enumerate(parts):
        share = SHARES[part] / sum(SHARES[later] for later in parts[i:])
        seconds = share * clock.left
        if part == "scaling":  # whose cases have processes of their own
            measure(part, str(where), seconds, path)
        else:
            _in_a_process(part, str(where), seconds, path)
        found = file.read()["parts"][part]
        skipped = sum("skipped" in row for row in found["rows"])
        rows = f"{len(found['rows'])} rows, {skipped} of them skipped"
        say(f"{part}: {found['status']}, {rows} {found['detail']}".rstrip())
    return file.read()


def measure(part: str, device: str, seconds: float, path: Path) -> None:
    """Measure a part in this process, as far as its time allows.

    Args:
        part: One of `PARTS`.
        device: Device to measure on.
        seconds: Time for the part.
        path: File of the results, which exists.
    """
    file, clock = Results(path), Clock(seconds)
    sizes = (TOY if torch.device(device).type == "cpu" else FULL)[part]
    file.begin(part, sizes)
    started = time.monotonic()
    status, detail = "ok", ""
    try:
        for row in within(clock, JOBS[part](torch.device(device), clock, **sizes)):
            file.add(part, row)
    except Exception as error:
        status, detail = what_failed(error)
    file.end(part, status, time.monotonic() - started, detail)


def within(clock: Clock, jobs: Iterator[Job]) -> Iterator[dict[str, Any]]:
    """The rows of jobs. A job that fails, or would take longer than the time left, has "skipped" instead."""
    pace = 0.0  # seconds for each unit of work, of the slowest job so far
    for job in jobs:
        needed = pace * job.work
        if needed > clock.left or not clock.left:
            yield {**job.head, "skipped": f"{clock.left:.0f} s are left, and it takes about {needed:.0f} s"}
            continue
        started = time.monotonic()
        try:
            figures = job.run()
        except Exception as error:
            figures = {"skipped": ": ".join(what_failed(error))}
        pace = max(pace, (time.monotonic() - started) / job.work)
        yield {**job.head, **figures}


class Results:
    """The file of results, to which the parts write in turn; it is complete at any moment.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Its content."""
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def start(self, device: torch.device, parts: Sequence[str], minutes: float) -> None:
        """Write a new file without rows."""
        environment = {**describe(device), "gpu": _properties(device)}
        settings = {"device": str(device), "minutes": minutes, "parts": list(parts)}
        nothing = {"status": "not run", "seconds": 0.0, "detail": "", "sizes": {}, "rows": []}
        self._write(
            {
                "command": ["stride-captum", *sys.argv[1:]],
                "environment": environment,
                "settings": settings,
                "parts": dict.fromkeys(parts, nothing),
            }
        )

    def begin(self, part: str, sizes: dict[str, Any]) -> None:
        """Mark a part as running."""
        self._change(part, status="running", sizes=sizes)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row to a part."""
        self._change(part, rows=[*self.read()["parts"][part]["rows"], row])

    def end(self, part: str, status: str, seconds: float, detail: str = "") -> None:
        """Mark a part as ended."""
        self._change(part, status=status, seconds=seconds, detail=detail)

    def _change(self, part: str, **values: Any) -> None:
        found = self.read()
        found["parts"][part].update(values)
        self._write(found)

    def _write(self, found: dict[str, Any]) -> None:
        write_text(self.path, json.dumps(found, indent=1, allow_nan=False))


def _in_a_process(part: str, device: str, seconds: float, path: Path) -> None:
    """Measure a part in a process that is killed when its time is over."""
    started = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(part, device, seconds, path))
    process.start()
    try:
        process.join(seconds + _GRACE)
    finally:
        process.kill()
    process.join()
    if process.exitcode:
        over = (
            process.exitcode in (-signal.SIGALRM, -signal.SIGKILL) and time.monotonic() - started >= seconds
        )
        status, detail = "failed", f"the process ended with code {process.exitcode}"
        if over:
            status, detail = "over time", f"more than {seconds:.0f} s"
        Results(path).end(part, status, time.monotonic() - started, detail)


#: Seconds that a process may take to end by itself after its time is over.
_GRACE = 2.0


def _child(part: str, device: str, seconds: float, path: Path) -> None:
    # Without a Python handler the alarm ends the process at once, even inside a library call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    measure(part, device, seconds, path)


def _properties(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "bytes": found.total_memory,
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def tables(found: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and cells of a table for each part with rows; most sizes are only in the file."""
    for part, result in found["parts"].items():
        rows = result["rows"]
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row if _is_shown(name)))
            cells = [[_cell(row.get(name)) for name in columns] for row in rows]
            yield f"{part} ({result['status']})", [name.replace("_", " ") for name in columns], cells


def _is_shown(name: str) -> bool:
    """Whether a figure is in the table; sizes, extremes and parts of a ratio are only in the file."""
    if name.startswith(("smallest", "largest", "product", "fingerprint")):
        return False
    named = ("what", "other", "n_params", "difference", "skipped", "paper_seconds", "setup_bytes")
    return name in named or name.endswith(("ratio", "speedup", "seconds", "single", "dense", "per_second"))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
