"""Scalability benchmark (B.3, D.1, Table 5, Figure 2, Proposition 1): models, methods, limits and order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ....errors import bad_choice, bad_value
from ...system.environment import describe
from .case import SCALED_METHODS, Case, CaseResult, Outcome
from .exponents import CPU_LADDERS, FULL_LADDERS, Growth, Ladders, growth, ladder_cases
from .network import n_parameters
from .printed import PROPOSITION1_NOTE, TABLE5, TABLE5_NOTE
from .process import run_case

#: Default models as (depth, width); two of them are rows of Table 5.
CPU_SIZES = ((4, 16), (4, 32), (4, 64), (6, 64), (6, 128), (8, 64))
CPU_TRAIN, FULL_TRAIN, N_TEST = 500, 5_000, 100


@dataclass
class Scalability:
    """All results of the benchmark.

    Attributes:
        settings: Sizes and limits.
        environment: Versions and hardware.
        results: A result for each method and model, sorted by number of parameters.
        growth: Costs against N, d, K and P.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    results: list[CaseResult] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)

    def first(self, status: str) -> dict[str, CaseResult]:
        """By method, its smallest model with a status such as "out of memory"."""
        found: dict[str, CaseResult] = {}
        for result in self.results:
            if result.ended_with(status):
                found.setdefault(result.case.method, result)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "results": [result.to_dict() for result in self.results],
            "growth": [one.to_dict() for one in self.growth],
            "paper": {
                "table5": [asdict(row) for row in TABLE5],
                "notes": [TABLE5_NOTE, PROPOSITION1_NOTE],
            },
        }


def bench_scalability(
    folder: Path,
    *,
    full: bool = False,
    device: torch.device | str | None = None,
    methods: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    n_train: int | None = None,
    n_test: int = N_TEST,
    batch_size: int = 256,
    time_limit: float = 120.0,
    memory_limit: str | None = "8GiB",
    exponents: bool = True,
    ladders: Ladders | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Scalability:
    """Measure setup, query and memory of every method on models of growing size.

    Every case has its own process, and a file in `folder`: the same call continues an interrupted run. A
    method that exceeds the time limit is not tried on larger models; one that runs out of memory is.

    Args:
        folder: Folder for the files of the cases.
        full: Whether to take the 18 models of Table 5 with 5,000 examples, instead of six small ones with
            500.
        device: None takes a GPU if there is one.
        methods: Some of `SCALED_METHODS`; None takes all.
        sizes: Depth and width of the models; None takes those of `full`.
        n_train: Training examples; None takes those of `full`.
        n_test: Test points of the query.
        batch_size: Examples in a batch.
        time_limit: Seconds that each phase of a case may take.
        memory_limit: Memory that a process may allocate, on the CPU; None for no limit.
        exponents: Whether to vary N, d and K as well.
        ladders: Sizes for that; None takes `FULL_LADDERS` if `full`, else `CPU_LADDERS`.
        say: Called with a line of text for each case.

    Raises:
        ValueError: An argument is out of range.
    """
    methods = list(SCALED_METHODS if methods is None else methods)
    for method in methods:
        if method not in SCALED_METHODS:
            raise bad_choice("methods", method, SCALED_METHODS)
    if sizes is None:
        sizes = [(row.depth, row.width) for row in TABLE5] if full else CPU_SIZES
    sizes = sorted({(int(depth), int(width)) for depth, width in sizes}, key=lambda size: n_parameters(*size))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = describe(device)
    common: dict[str, Any] = {
        "n_test": n_test,
        "batch_size": batch_size,
        "device": str(device),
        "hardware": f"{environment['processor']}, {environment['torch_threads']} threads, "
        f"{environment['device']}, torch {environment['versions']['torch']}",
        "memory_limit": None if torch.device(device).type == "cuda" else memory_limit,
        "time_limit": time_limit,
    }
    n_train = (FULL_TRAIN if full else CPU_TRAIN) if n_train is None else n_train
    if n_train < 50:
        raise bad_value("n_train", "be at least 50, the number of subsets", n_train)
    found = Scalability({**common, "full": full, "n_train": n_train, "sizes": sizes}, environment)
    for method in methods:
        given_up: dict[str, str] = {}
        for depth, width in sizes:
            case = Case(**common, method=method, depth=depth, width=width, n_train=n_train)
            found.results.append(_run_unless_hopeless(case, folder, given_up, say))
    found.results.sort(key=lambda result: result.n_params)
    if exponents:
        ladders = ladders or (FULL_LADDERS if full else CPU_LADDERS)
        found.settings["ladders"] = asdict(ladders)
        for (method, quantity), cases in ladder_cases(ladders, methods, common).items():
            points = [(size, _run(case, folder, say)) for size, case in cases]
            found.growth += growth(method, quantity, points)
    for method in methods:
        own = [(result.n_params, result) for result in found.results if result.case.method == method]
        found.growth += growth(method, "P", own)
    return found


def _run_unless_hopeless(
    case: Case, folder: Path, given_up: dict[str, str], say: Callable[[str], None]
) -> CaseResult:
    """Run a case, without the phases that were over the time limit on a smaller model.

    Args:
        case: The case.
        folder: Folder for its file.
        given_up: Phases that are no longer tried, with the reason; the case may add one.
        say: Called with a line of text.
    """
    if "forward" in given_up or "setup" in given_up:
        reason = Outcome(detail=given_up.get("forward") or given_up["setup"])
        return CaseResult(case, n_parameters(case.depth, case.width), setup=reason, inference=reason)
    if "inference" in given_up:
        case = replace(case, last_phase="setup")
    result = _run(case, folder, say)
    late = result.ended_with("over time limit")
    if late is not None:
        given_up[late] = f"{late} was over the time limit with {case.size}"
    elif "inference" in given_up and result.setup.ok:
        result.inference = Outcome(detail=given_up["inference"])
    result.n_params = result.n_params or n_parameters(case.depth, case.width)
    return result


def _run(case: Case, folder: Path, say: Callable[[str], None]) -> CaseResult:
    result = run_case(case, folder)
    say(
        f"{case.name}: "
        + ", ".join(_in_words(phase, getattr(result, phase)) for phase in ("setup", "inference"))
    )
    return result


def _in_words(phase: str, outcome: Outcome) -> str:
    if outcome.seconds is None:
        return f"{phase} {outcome.status}" + (f" ({outcome.detail})" if outcome.detail else "")
    return f"{phase} {outcome.seconds:.3g} s"


def parse_size(text: str) -> tuple[int, int]:
    """Depth and width from "4x64".

    Raises:
        ValueError: The text has another form.

    >>> parse_size("4x64")
    (4, 64)
    """
    depth, _, width = text.partition("x")
    if not (depth.isdigit() and width.isdigit()):
        raise bad_value("size", "be depth x width, such as 4x64", repr(text))
    return int(depth), int(width)
