"""`stride-captum compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..comparison.compare import comparison_sizes
from ..comparison.plan import MEASURES, settle
from ..comparison.shared.methods import DEFAULT_METHODS, METHODS
from ..report.html import read_results, write_comparison
from ..report.terminal import show_comparison
from ..retraining.engines import ENGINES
from ..tasks.loading import load_task
from ..tasks.task import Task
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
    LossName,
    Model,
    Models,
    Out,
    Preset,
    Quiet,
    Resume,
    Store,
    TaskName,
    Training,
    Yes,
)
from .output import Console, one_sentence_errors
from .results import json_object, numbers, training_settings
from .resume import go_on


def compare_command(
    context: typer.Context,
    task: TaskName = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method; may be repeated. Default: " + "; ".join(DEFAULT_METHODS) + ".",
            autocompletion=completion.one_of(METHODS),
        ),
    ] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    loss: LossName = None,
    model: Model = None,
    training: Training = None,
    subsets: Annotated[
        int | None, typer.Option(help="Random halves of the training set that models are retrained on [100].")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Retrainings of each half; the ceiling needs 2 [2].")
    ] = None,
    models: Models = None,
    spiked: Annotated[
        int, typer.Option(help="Additional models, each stopped on a spike of its training loss.")
    ] = 0,
    test_points: Annotated[
        int | None, typer.Option(help="One half chooses options, the other is reported [300].")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(MEASURES) + ", all. Default: lds, calibration.",
            autocompletion=completion.one_of((*MEASURES, "all")),
        ),
    ] = None,
    retrainings: Annotated[
        str | None,
        typer.Option(
            help="Measure LDS at these retraining budgets, in trainings on all data: '0,1,2,5,10'. 0 is one "
            "model and its checkpoints; the others are spent on models of parts of the data."
        ),
    ] = None,
    parts: Annotated[int, typer.Option(help="Parts that the data are split into, for --retrainings.")] = 2,
    settings: Annotated[
        str | None,
        typer.Option(help='Options of the measures as JSON, such as \'{"mislabel": {"rate": 0.2}}\'.'),
    ] = None,
    jobs: Jobs = -1,
    store: Store = Path("out/store"),
    engine: Annotated[
        str,
        typer.Option(
            help="How halves are retrained: auto, processes or stacked (many models at once).",
            autocompletion=completion.one_of(ENGINES),
        ),
    ] = "auto",
    options_from: Annotated[
        Path | None,
        typer.Option(help="A results.json whose options of the methods are used, instead of choosing them."),
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

    The first measure, LDS: models are retrained from scratch on random halves of the training set. A method
    is good if the summed scores of a half rank the margins (log odds of the true label) of its models.

    Options of a method are chosen by LDS on one half of the test points; the other half is reported.
    Retrained models and scores are kept: --resume, or the same command again, continues from there.

    Examples:

        stride-captum compare --task digits --seeds 3 --measure all

        stride-captum compare --data mydata:wine --model mydata:network --training '{"epochs": 40}'

        stride-captum compare --data mydata:prices --model mydata:network --loss mse

        stride-captum compare --method STRIDE --method EKFAC --measure lds --measure leakage

        stride-captum compare --task mnist --data-root ~/data --spiked 1

        stride-captum compare --retrainings 0,1,2,5 --method STRIDE --method TRAK --dry-run

        stride-captum compare --resume --out out/compare
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        if resume:
            anew = {"out": out, "dry_run": dry_run, "yes": yes, "quiet": quiet, "as_json": as_json}
            go_on(compare_command, context, out, **anew)
            return
        loaded = load_task(
            task,
            preset=preset,
            data_root=data_root,
            data=data,
            model=model,
            training=training_settings(training),
            label_key=label_key,
            loss=loss,
        )
        sizes, measures = comparison_sizes(preset)
        own = {} if settings is None else json_object("settings", settings)
        possible = {name for name, found in MEASURES.items() if found.takes(loaded)}
        every = [name for name in MEASURES if name in possible - {"retrainings"}]  # it has its own option
        wanted = every if measure and "all" in measure else tuple(measure or ("lds", "calibration"))
        given = {"n_subsets": subsets, "n_seeds": seeds, "n_models": models, "n_test": test_points}
        if models is not None:  # then also of the measures that train models of their own
            for its_own in measures.values():
                its_own.update({"n_models": models} if "n_models" in its_own else {})
        plan: dict[str, Any] = {
            **sizes,
            **{name: value for name, value in given.items() if value is not None},
            **({} if options_from is None else _options_of(options_from, loaded)),
            "store": store,
            "measures": {
                name: {**measures.get(name, {}), **own.get(name, {})}
                for name in dict.fromkeys((*wanted, *own))
            },
        }
        question = settle(
            method,
            loaded,
            retrainings=None if retrainings is None else numbers("retrainings", retrainings),
            parts=parts,
            n_spiked=spiked,
            n_jobs=jobs,
            engine=engine,
            device=device,
            show_progress=not quiet,
            **plan,
        )
        found = run_question(question, out, context, voice, dry_run=dry_run, yes=yes)
    if found is None:
        return
    result, results = found
    voice.results(results, lambda: show_comparison(result))
    voice.note(f"Report: {out / 'report.html'}")


def _options_of(path: Path, task: Task) -> dict[str, Any]:
    """The options in a results.json, and on how many test points of the same data they were chosen."""
    results = read_results(path)
    protocol = results["protocol"]
    chosen_on = max(protocol["n_test_tuning"], protocol.get("options_chosen_on", 0))
    same = results["task"].rpartition("-")[0] == task.name.rpartition("-")[0]  # of another size, perhaps
    return {"options": protocol["options"], "chosen_on": chosen_on if same else 0}


def report_command(
    results: Annotated[Path, typer.Argument(help="The results.json of `compare` or `reproduce`.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html next to the results.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the report of a comparison again, from its results.json alone.

    Example: stride-captum report out/compare/results.json
    """
    with one_sentence_errors():
        path = write_comparison(read_results(results), out or results.with_name("report.html"))
    Console(quiet).note(f"Report: {path}")
