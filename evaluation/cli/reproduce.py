"""`stride-captum reproduce`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..comparison.plan import settle
from ..comparison.shared.methods import METHODS
from ..report.terminal import show_comparison, show_printed
from ..tasks.loading import load_task
from ..tasks.paper_tables import TABLES, find_table
from . import completion
from .comparison_run import run_question
from .options import (
    AsJSON,
    Data,
    DataRoot,
    Device,
    DryRun,
    Jobs,
    LabelKey,
    Models,
    Out,
    Preset,
    Quiet,
    Resume,
    Store,
    Yes,
)
from .output import Console, one_sentence_errors
from .results import json_object
from .resume import go_on


def reproduce_command(
    context: typer.Context,
    table: Annotated[
        str,
        typer.Argument(help="One of: " + ", ".join(TABLES) + ".", autocompletion=completion.one_of(TABLES)),
    ],
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Methods; default: those of the table.", autocompletion=completion.one_of(METHODS)),
    ] = None,
    subsets: Annotated[int, typer.Option(help="Random halves that models are retrained on, for LDS.")] = 100,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 2,
    models: Models = None,
    test_points: Annotated[int, typer.Option(help="One half chooses options, the other is reported.")] = 300,
    settings: Annotated[str | None, typer.Option(help="Options of the table's measure as JSON.")] = None,
    jobs: Jobs = -1,
    store: Store = Path("out/store"),
    device: Device = "cpu",
    resume: Resume = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    out: Out = Path("out/reproduce"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Measure a table of the paper, and print the paper's figures next to it.

    Tables 2 to 4 are settings: see `stride_captum.evaluation.tasks.networks` and `Trained.paper`.

    Examples:

        stride-captum reproduce table8 --data-root ~/data --dry-run

        stride-captum reproduce table8 --resume

        stride-captum reproduce table13 --data-root ~/data --preset paper
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        printed = find_table(table)
        folder = out / f"{table}-{preset}"
        if resume:
            anew = {"out": out, "dry_run": dry_run, "yes": yes, "quiet": quiet, "as_json": as_json}
            go_on(reproduce_command, context, folder, **anew)
            return
        loaded = load_task(printed.task, preset=preset, data_root=data_root, data=data, label_key=label_key)
        rows = method or printed.methods
        own = {} if settings is None else json_object("settings", settings)
        defaults = printed.settings_for(loaded.n_train)
        question = settle(
            rows,
            loaded,
            store=store,
            measures={printed.measure: {**defaults, **own}},
            n_subsets=subsets,
            n_seeds=seeds,
            n_models=models,
            n_test=test_points,
            n_jobs=jobs,
            device=device,
            show_progress=not quiet,
        )
        found = run_question(
            question, folder, context, voice, dry_run=dry_run, yes=yes, paper=asdict(printed)
        )
    if found is None:
        return
    result, results = found

    def show() -> None:
        show_comparison(result)
        show_printed(printed)

    voice.results(results, show)
    voice.note(f"Report: {folder / 'report.html'}")
