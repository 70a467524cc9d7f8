"""Results of the scalability benchmark: tables in the terminal, results.json and the plot."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Group

from ...report.terminal import console, table_of
from ...system.environment import one_line
from ...system.text_files import write_text
from .case import SCALED_METHODS, CaseResult, Outcome
from .plot import scalability_plot
from .printed import PROPOSITION1_NOTE, TABLE5, TABLE5_NOTE
from .scalability import Scalability

#: Goals of the closed form.
FLOOR_GOAL, QUERY_GOAL = 1.3, 0.05


def show_scalability(found: Scalability) -> None:
    """Print costs by model and method, the first failures, and the exponents."""
    settings = found.settings
    for table in (_setup, _queries, _memory):
        console.print(table(found))
    for status in ("out of memory", "over time limit", "failed"):
        for method, result in found.first(status).items():
            phase = result.ended_with(status) or ""
            detail = getattr(result, phase).detail
            console.print(f"First {status} of {method}: {phase} with {result.case.size} ({detail})")
    for result in found.results:
        reasons = {out.detail for out in (result.setup, result.inference) if out.status == "not run"}
        for reason in sorted(reasons - {""}):
            console.print(f"Not run: {result.case.method} with {result.case.size}, because {reason}")
    console.print(TABLE5_NOTE)
    console.print(_exponents(found))
    console.print(PROPOSITION1_NOTE)
    limit = settings["memory_limit"] or "that of the device"
    console.print(f"Limits of a case: memory {limit}, {settings['time_limit']:g} s a phase.")
    console.print(one_line(found.environment))


def write_scalability(found: Scalability, out: Path) -> list[Path]:
    """Write results.json, with the command, and the plot.

    Args:
        found: The results.
        out: Folder, which is created if it does not exist.

    Returns:
        The paths of both files.
    """
    results, plot = out / "results.json", out / "scalability.svg"
    text = json.dumps({"command": sys.argv, **found.to_dict()}, indent=1, allow_nan=False)
    write_text(results, text)
    write_text(plot, scalability_plot(found.results))
    return [results, plot]


def _setup(found: Scalability) -> Group:
    """Seconds of setup, with those of Table 5."""
    printed = {f"{row.depth} x {row.width}": row for row in TABLE5}
    rows = []
    for size, results in _by_model(found).items():
        ratios = [f"{r.floor_ratio:.2f}" for r in results.values() if r.floor_ratio is not None]
        theirs = printed.get(size)
        rows.append(
            (
                size,
                f"{next(iter(results.values())).n_params:,}",
                _forward(results),
                *(_seconds(results, method, "setup") for method in SCALED_METHODS[:1]),
                ratios[0] if ratios else "",
                _seconds(results, SCALED_METHODS[1], "setup"),
                theirs.stride if theirs else "",
                *(_seconds(results, method, "setup") for method in SCALED_METHODS[2:4]),
                theirs.ekfac if theirs else "",
                _seconds(results, SCALED_METHODS[4], "setup"),
            )
        )
    columns = (
        "model", "parameters", "F", "STRIDE", f"/ floor (<{FLOOR_GOAL})", "STRIDE paper", "Table 5: STRIDE",
        "DiagonalEKFAC", "EKFAC", "Table 5: EKFAC", "TracIn",
    )  # fmt: skip
    title = (
        f"Setup with {found.settings['n_train']:,} training examples, seconds. F: one forward pass of them. "
        "Floor: F and two products of the size of a Gram matrix"
    )
    return table_of(title, columns, rows)


def _queries(found: Scalability) -> Group:
    """Seconds of a query."""
    title = (
        f"Query of {found.settings['n_test']} test points, seconds (goal of STRIDE on a GPU: {QUERY_GOAL})"
    )
    rows = [
        (size, *(_seconds(results, method, "inference") for method in SCALED_METHODS))
        for size, results in _by_model(found).items()
    ]
    return table_of(title, ("model", *SCALED_METHODS), rows)


def _memory(found: Scalability) -> Group:
    """Peak memory of setup and query."""
    rows = []
    for size, results in _by_model(found).items():
        weights = f"{4 * next(iter(results.values())).n_params / 2**20:,.0f}"
        rows.append((size, weights, *(_mebibytes(results, method) for method in SCALED_METHODS)))
    title = "Most memory that setup and query added, MiB"
    return table_of(title, ("model", "its weights", *SCALED_METHODS), rows)


def _by_model(found: Scalability) -> dict[str, dict[str, CaseResult]]:
    """Results by model and method."""
    models: dict[str, dict[str, CaseResult]] = {}
    for result in found.results:
        models.setdefault(result.case.size, {})[result.case.method] = result
    return models


def _exponents(found: Scalability) -> Group:
    rows = []
    for one in found.growth:
        measured = "fewer than three sizes"
        if one.law is not None and one.law.standard_error is not None:
            measured = f"{one.law.exponent:.2f} +- {one.law.standard_error:.2f}"
        span = f"{min(one.sizes):,.0f} to {max(one.sizes):,.0f}" if one.sizes else "none"
        rows.append((one.method, one.cost, one.quantity, span, measured, one.stated))
    columns = ("method", "cost", "of", "sizes", "measured exponent +- s.e.", "stated")
    return table_of("Growth: slopes of log cost", columns, rows)


_SHORT = {"out of memory": "OOM", "over time limit": "> limit"}


def _seconds(results: Mapping[str, CaseResult], method: str, phase: str) -> str:
    """Seconds, or the reason why there are none; "" for a method that was not measured."""
    if method not in results:
        return ""
    failed = results[method].first_failure
    outcome: Outcome = getattr(results[method], phase)
    if outcome.seconds is None and outcome.status == "not run" and not outcome.detail and failed:
        outcome = failed  # of an earlier phase
    return _SHORT.get(outcome.status, outcome.status) if outcome.seconds is None else f"{outcome.seconds:.3g}"


def _forward(results: Mapping[str, CaseResult]) -> str:
    """Seconds of the forward pass: the median over methods, each of which has timed it."""
    seconds = [result.forward.seconds for result in results.values() if result.forward.seconds is not None]
    return f"{statistics.median(seconds):.3g}" if seconds else ""


def _mebibytes(results: Mapping[str, CaseResult], method: str) -> str:
    if method not in results:
        return ""
    peaks = [getattr(results[method], phase).peak_bytes for phase in ("setup", "inference")]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known) / 2**20:,.0f}" if known else ""
