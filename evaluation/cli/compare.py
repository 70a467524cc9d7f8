"""`stride-captum compare`, `reproduce` and `report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import bad_value
from ..comparison.compare import answer, comparison_sizes, planned_trainings
from ..comparison.plan import MEASURES, settle
from ..comparison.shared.methods import DEFAULT_METHODS
from ..comparison.shared.question import Question
from ..report.html import read_results, write_comparison
from ..report.terminal import console, show_comparison, show_printed
from ..tasks.loading import load_task
from ..tasks.paper_tables import TABLES, find_table
from . import completion
from .options import (
    AsJSON,
    Data,
    DataRoot,
    Device,
    DryRun,
    LabelKey,
    Model,
    Models,
    Out,
    Preset,
    Quiet,
    Resume,
    TaskName,
    Training,
    Yes,
)
from .output import Console, one_sentence_errors
from .results import json_object, numbers, training_settings, write_results
from .resume import go_on, keep_asked


def compare_command(
    context: typer.Context,
    task: TaskName = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A row; may be repeated. Default: " + "; ".join(DEFAULT_METHODS) + ".",
            autocompletion=completion.methods,
        ),
    ] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    model: Model = None,
    training: Training = None,
    subsets: Annotated[int | None, typer.Option(help="Random halves of the training set [100].")] = None,
    seeds: Annotated[int | None, typer.Option(help="Retrainings of each half; 2 give a ceiling [2].")] = None,
    models: Models = None,
    spiked: Annotated[int, typer.Option(help="Further models, stopped on a spike of the training loss.")] = 0,
    test_points: Annotated[int | None, typer.Option(help="Half tunes, half is reported [300].")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(MEASURES) + ", all. Default: lds, calibration.",
            autocompletion=completion.measures,
        ),
    ] = None,
    retrainings: Annotated[
        str | None,
        typer.Option(
            help="Measure LDS against the retraining budget, at so many trainings: '0,1,2,5,10'. 0 is "
            "one model and its checkpoints, the others are models of parts of the data."
        ),
    ] = None,
    parts: Annotated[int, typer.Option(help="Parts of each partition, for --retrainings.")] = 2,
    settings: Annotated[
        str | None,
        typer.Option(help='Options of the measures as JSON, such as \'{"mislabel": {"rate": 0.2}}\'.'),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes for the retrainings; -1 takes all cores.")] = -1,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    engine: Annotated[
        str,
        typer.Option(
            help="How halves are retrained: auto, processes or stacked (many models at once).",
            autocompletion=completion.engines,
        ),
    ] = "auto",
    options_from: Annotated[
        Path | None,
        typer.Option(help="A results.json: its options of the methods are taken, none are chosen."),
    ] = None,
    device: Device = "cpu",
    resume: Resume = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    out: Out = Path("out/compare"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Compare methods on the same models, subsets and test points.

    LDS, the first measure: random halves of the training set are retrained from scratch, and a method is as
    good as the sums of its scores rank the margins (log odds of the true label) that come out.

    Options of a method are chosen by LDS on one half of the test points and reported on the other. Whatever
    has been retrained, fitted and asked is kept: --resume, or the same command again, goes on from there.

    Examples:

        stride-captum compare --task digits --seeds 3 --measure all

        stride-captum compare --data mydata:wine --model mydata:network --training '{"epochs": 40}'

        stride-captum compare --method STRIDE --method EKFAC --measure lds --measure leakage

        stride-captum compare --task mnist --data-root ~/data --spiked 1

        stride-captum compare --retrainings 0,1,2,5 --method STRIDE --method TRAK --dry-run

        stride-captum compare --resume --out out/compare
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        if resume:
            go_on(compare_command, context, out, out=out, yes=yes, quiet=quiet, as_json=as_json)
            return
        loaded = load_task(
            task,
            preset=preset,
            data_root=data_root,
            data=data,
            model=model,
            training=training_settings(training),
            label_key=label_key,
        )
        sizes, measures = comparison_sizes(preset)
        own = {} if settings is None else json_object("settings", settings)
        possible = {name for name, found in MEASURES.items() if found.takes(loaded)}
        every = [name for name in MEASURES if name in possible - {"retrainings"}]  # which has its own option
        wanted = every if measure and "all" in measure else tuple(measure or ("lds", "calibration"))
        given = {"n_subsets": subsets, "n_seeds": seeds, "n_models": models, "n_test": test_points}
        plan: dict[str, Any] = {
            **sizes,
            **{name: value for name, value in given.items() if value is not None},
            "store": store,
            "measures": {
                name: {**measures.get(name, {}), **_models_of(name, models), **own.get(name, {})}
                for name in dict.fromkeys((*wanted, *own))
            },
        }
        question = settle(
            method,
            loaded,
            options=None if options_from is None else read_results(options_from)["protocol"]["options"],
            retrainings=None if retrainings is None else numbers("retrainings", retrainings),
            parts=parts,
            n_spiked=spiked,
            n_jobs=jobs,
            engine=engine,
            device=device,
            show_progress=not quiet,
            **plan,
        )
        if not _affordable(question, dry_run, yes, voice):
            return
        keep_asked(out, context.params)
        result = answer(question)
        results = write_results(out, result.to_dict(), write_comparison)
    voice.results(results, lambda: show_comparison(result))
    voice.note(f"Report: {out / 'report.html'}")


def reproduce_command(
    context: typer.Context,
    table: Annotated[
        str, typer.Argument(help="One of: " + ", ".join(TABLES) + ".", autocompletion=completion.tables)
    ],
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Rows; default: those of the table.", autocompletion=completion.methods),
    ] = None,
    subsets: Annotated[int, typer.Option(help="Random halves that are retrained for LDS.")] = 100,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 2,
    models: Models = None,
    test_points: Annotated[int, typer.Option(help="One half tunes, the other is reported.")] = 300,
    settings: Annotated[str | None, typer.Option(help="Options of the table's measure as JSON.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes for the retrainings; -1 takes all cores.")] = -1,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    device: Device = "cpu",
    resume: Resume = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    out: Out = Path("out/reproduce"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Measure a table of the paper, with the paper's figures beside ours.

    Tables 2 to 4 are settings: `stride_captum.evaluation.tasks.networks` and `Trained.paper`.

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
            go_on(reproduce_command, context, folder, out=out, yes=yes, quiet=quiet, as_json=as_json)
            return
        loaded = load_task(printed.task, preset=preset, data_root=data_root, data=data, label_key=label_key)
        rows = method or printed.methods
        own = {} if settings is None else json_object("settings", settings)
        defaults = {**printed.settings_for(loaded.n_train), **_models_of(printed.measure, models)}
        question = settle(
            rows,
            loaded,
            store=store,
            measures={printed.measure: {**defaults, **own}},
            n_subsets=subsets,
            n_seeds=seeds,
            n_models=3 if models is None else models,
            n_test=test_points,
            n_jobs=jobs,
            device=device,
            show_progress=not quiet,
        )
        if not _affordable(question, dry_run, yes, voice):
            return
        keep_asked(folder, context.params)
        result = answer(question)
        results = write_results(folder, {"paper": asdict(printed), **result.to_dict()}, write_comparison)

    def show() -> None:
        show_comparison(result)
        show_printed(printed)

    voice.results(results, show)
    voice.note(f"Report: {folder / 'report.html'}")


def report_command(
    results: Annotated[Path, typer.Argument(help="The results.json of `compare` or `reproduce`.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html beside the results.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the report of a comparison again, from its results alone, on this machine or another.

    Example: stride-captum report out/compare/results.json
    """
    with one_sentence_errors():
        path = write_comparison(read_results(results), out or results.with_name("report.html"))
    Console(quiet).note(f"Report: {path}")


def _affordable(question: Question, dry_run: bool, yes: bool, voice: Console) -> bool:
    """Whether to go on: not after a dry run, and not for more than two hours without being told so.

    Raises:
        ValueError: It would take more than two hours.
    """
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


def _models_of(measure: str, models: int | None) -> dict[str, int]:
    """How many models a measure trains that trains its own: as many as were asked for."""
    trains = measure in MEASURES and "n_models" in MEASURES[measure].defaults
    return {"n_models": models} if trains and models is not None else {}
