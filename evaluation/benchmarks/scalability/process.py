"""One process for each case of the scalability benchmark, with its limits and its file.

What has been measured is on disk before the next phase begins, so that neither running out of memory nor
being killed loses it, and a benchmark that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from contextlib import suppress
from copy import copy
from pathlib import Path

import torch

from ....system.atomic import atomic_write
from ....system.memory import parse_bytes
from .case import PHASES, Case, CaseResult, Outcome
from .measure import measure


def run_case(case: Case, folder: Path) -> CaseResult:
    """Measure a case in a process of its own, unless the folder has its result.

    Args:
        case: The case.
        folder: Where its file is kept. A case that failed for another reason than a limit runs again.
    """
    path = folder / f"{case.name}.json"
    known = _read(path)
    if known is not None and known.case == case and _is_final(known):
        return known
    _write(path, CaseResult(case))
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(case, path))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    result = _read(path) or CaseResult(case)
    if process.exitcode:
        result = ended(result, process.exitcode)
        _write(path, result)
    return result


def ended(result: CaseResult, exit_code: int) -> CaseResult:
    """The result of a process that was ended: the phase that it was in gets the reason.

    Args:
        result: What was on disk.
        exit_code: Minus the number of the signal, as `multiprocessing` gives it.
    """
    if exit_code == -signal.SIGALRM:
        outcome = Outcome("over time limit", detail=f"more than {result.case.time_limit:g} s")
    elif exit_code == -signal.SIGKILL:
        outcome = Outcome("out of memory", detail="killed, as the system does when memory runs out")
    else:
        outcome = Outcome("failed", detail=f"the process ended with code {exit_code}")
    phase = result.ended_with("running") or PHASES[0]
    result = copy(result)
    setattr(result, phase, outcome)
    return result


def _child(case: Case, path: Path) -> None:
    if case.memory_limit is not None and torch.device(case.device).type != "cuda":
        import resource  # which Windows does not have

        limit = _data_bytes() + parse_bytes(case.memory_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Without a handler in Python the alarm ends the process at once, also inside a library.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def keep(result: CaseResult) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(path, result)
        signal.setitimer(signal.ITIMER_REAL, case.time_limit)

    measure(case, keep)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA counts; 0 where there is no /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData"):
                return int(line.split()[1]) * 1024
    return 0


def _is_final(result: CaseResult) -> bool:
    statuses = [getattr(result, phase).status for phase in PHASES]
    return statuses[0] != "not run" and not {"running", "failed"} & set(statuses)


def _read(path: Path) -> CaseResult | None:
    try:
        return CaseResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, result: CaseResult) -> None:
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False)

    atomic_write(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
