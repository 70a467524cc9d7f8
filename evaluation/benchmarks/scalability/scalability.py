"""Sweep of the scalability benchmark (B.3, D.1, Table 5, Figure 2, Proposition 1): which models,
methods and limits, in which order.
"""

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

#: Models of the default sweep; two of them are rows of Table 5.
CPU_SIZES = ((4, 16), (4, 32), (4, 64), (6, 64), (6, 128), (8, 64))
CPU_TRAIN, FULL_TRAIN, N_TEST = 500, 5_000, 100


@dataclass
class Scalability:
    """Everything that the benchmark found.

    Attributes:
        settings: Sizes, limits and what was left out.
        environment: Of the machine.
        results: A result for each method and model, models by their parameters.
        growth: Costs against N, d, K and P.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    results: list[CaseResult] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)

    def first(self, status: str) -> dict[str, CaseResult]:
        """By method, its smallest model that ended so ("out of memory", ...)."""
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
    """Measure setup, queries and memory of every method over models of growing size.

    Every case has a process of its own, and a file in `folder`: the same call goes on where it was
    interrupted. A method that was over the time limit is not tried on larger models; running out of
    memory is tried on every model.

    Args:
        folder: Where the files of the cases are kept.
        full: The 18 models of Table 5 with 5,000 examples, instead of six small ones with 500.
        device: None is a GPU where there is one.
        methods: Some of `SCALED_METHODS`; None is all.
        sizes: Depth and width of models instead.
        n_train: Training examples instead.
        n_test: Test points of the query.
        batch_size: Examples a batch.
        time_limit: Seconds of each phase of a case.
        memory_limit: What a process may add, on the CPU; None for no limit.
        exponents: Whether to sweep N, d and K as well.
        ladders: Their sizes.
        say: Given a line for each case.

    Raises:
        ValueError: An argument out of its range.
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
    """Run a case but for phases that were over the time limit on a smaller model.

    Args:
        case: The case.
        folder: Of files.
        given_up: Phases that are not tried any more, with the reason; the case may add one.
        say: For a line.
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

    >>> parse_size("4x64")
    (4, 64)
    """
    depth, _, width = text.partition("x")
    if not (depth.isdigit() and width.isdigit()):
        raise bad_value("size", "be depth x width, such as 4x64", repr(text))
    return int(depth), int(width)
