"""Separate processes for the cases of the scalability benchmark, with limits of memory and time.

Figures are written to disk before the next phase begins, so that a process that runs out of memory or is
killed does not lose them, and an interrupted benchmark continues where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from copy import copy
from pathlib import Path

import torch

from ....system.memory import parse_bytes
from ...system.process_status import status_bytes
from ...system.text_files import write_text
from .case import PHASES, Case, CaseResult, Outcome
from .measure import measure


def run_case(case: Case, folder: Path) -> CaseResult:
    """Measure a case in a new process, unless the folder has its result.

    Args:
        case: The case.
        folder: Folder of its file. A case that failed for another reason than a limit runs again.
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
    """The result of a process that was killed, with the reason in the phase that was running.

    Args:
        result: The result on disk.
        exit_code: Exit code of `multiprocessing`: minus the number of the signal.
    """
    if exit_code == -signal.SIGALRM:
        outcome = Outcome("over time limit", detail=f"more than {result.case.time_limit:g} s")
    elif exit_code == -signal.SIGKILL:
        outcome = Outcome("out of memory", detail="killed, as the system does if memory runs out")
    else:
        outcome = Outcome("failed", detail=f"the process ended with code {exit_code}")
    phase = result.ended_with("running") or PHASES[0]
    result = copy(result)
    setattr(result, phase, outcome)
    return result


def _child(case: Case, path: Path) -> None:
    if case.memory_limit is not None and torch.device(case.device).type != "cuda":
        import resource  # which Windows does not have

        started_with = status_bytes("VmData") or 0  # what RLIMIT_DATA counts: private writable memory
        limit = started_with + parse_bytes(case.memory_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    # Without a Python handler the alarm ends the process at once, even inside a library call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def keep(result: CaseResult) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(path, result)
        signal.setitimer(signal.ITIMER_REAL, case.time_limit)

    measure(case, keep)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _is_final(result: CaseResult) -> bool:
    statuses = [getattr(result, phase).status for phase in PHASES]
    return statuses[0] != "not run" and not {"running", "failed"} & set(statuses)


def _read(path: Path) -> CaseResult | None:
    try:
        return CaseResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, result: CaseResult) -> None:
    write_text(path, json.dumps(result.to_dict(), indent=1, allow_nan=False))
