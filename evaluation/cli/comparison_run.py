"""The run behind `compare` and `reproduce`: its cost is told first, and its results are written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ...errors import bad_value
from ..comparison.compare import answer, planned_trainings
from ..comparison.results import Comparison
from ..comparison.shared.question import Question
from ..report.html import write_comparison
from ..report.terminal import console
from .output import Console
from .results import write_results
from .resume import keep_asked


def run_question(
    question: Question,
    folder: Path,
    context: typer.Context,
    voice: Console,
    *,
    dry_run: bool,
    yes: bool,
    **beside: Any,
) -> tuple[Comparison, dict[str, Any]] | None:
    """Run a comparison and write its results and its report, unless it is a dry run.

    Args:
        question: What is compared.
        folder: For results.json, report.html and the arguments of the command.
        context: The command, whose arguments are kept for `--resume`.
        voice: Where it prints.
        dry_run: Print the planned trainings, and stop.
        yes: Whether more than two hours of training are allowed.
        **beside: Further entries of results.json.

    Returns:
        The comparison, and what was written; None after a dry run.

    Raises:
        ValueError: It would take more than two hours, and `yes` is False.
    """
    if not _affordable(question, dry_run, yes, voice):
        return None
    keep_asked(folder, context.params)
    result = answer(question)
    return result, write_results(folder, {**beside, **result.to_dict()}, write_comparison)


def _affordable(question: Question, dry_run: bool, yes: bool, voice: Console) -> bool:
    """Print the planned trainings; whether to go on."""
    found = planned_trainings(question)
    if dry_run:
        results = {"estimates": [asdict(estimate) for estimate in found]}
        voice.results(results, lambda: console.print("\n".join(map(str, found))))
        return False
    for estimate in found:
        voice.note(str(estimate))
    hours = sum(estimate.seconds for estimate in found) / 3600
    if hours > 2 and not yes:
        raise bad_value(
            "--yes", "be given for more than two hours of retraining", f"{hours:.1f} h without it"
        )
    return True
