"""Command line: it reads options, calls the library and prints."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ...config import STRIDEConfig
from ...doctor import diagnose
from ...errors import bad_value
from ...influence.checkpoints import load_checkpoint
from ...system.devices import existing_device
from ...system.memory import parse_bytes
from ...system.processes import is_first
from ..benchmarks.core import CoreRow, bench_core
from ..benchmarks.estimate import bench_estimate
from ..benchmarks.feature_store import PARTS, bench_store
from ..benchmarks.gpu import PARTS as GPU_PARTS
from ..benchmarks.gpu import bench_gpu, tables
from ..benchmarks.peers import bench_peers
from ..benchmarks.recovery import bench_lasso
from ..benchmarks.retraining import CASES, bench_retraining
from ..benchmarks.scalability.case import SCALED_METHODS
from ..benchmarks.scalability.report import show_scalability, write_scalability
from ..benchmarks.scalability.scalability import bench_scalability, parse_size
from ..comparison.compare import MEASURES, compare, comparison_sizes, estimates
from ..comparison.explain import explain
from ..comparison.methods import DEFAULT_METHODS
from ..comparison.recovery_curve import RecoveryCurve, recovery_curve
from ..measures.linear_datamodeling import LDSResult
from ..report.html import read_results, write_comparison, write_explanation
from ..report.terminal import (
    console,
    show_comparison,
    show_explanation,
    show_measured,
    show_printed,
    table_of,
)
from ..retraining.estimate import RetrainingEstimate
from ..system.environment import describe, one_line
from ..system.text_files import write_text
from ..tasks.paper_tables import TABLES, find_table
from ..tasks.tasks import PRESETS, TASKS, load_task
from . import completion
from .output import Console, one_sentence_errors


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stride-captum {metadata.version('stride-captum')}")
        raise typer.Exit


app = typer.Typer(
    name="stride-captum",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Which training examples made the model say this?

    Examples:

        stride-captum explain --task digits --index 3

        stride-captum compare --task digits --measure all --dry-run

        stride-captum doctor
    """,
)


@app.callback()
def main_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """What every subcommand shares."""


bench = typer.Typer(
    no_args_is_help=True,
    help="""Measure speed as ratios in one run.

    Example: stride-captum bench core
    """,
)
app.add_typer(bench, name="bench")

TaskName = Annotated[
    str,
    typer.Option("--task", help="One of: " + ", ".join(TASKS) + ".", autocompletion=completion.tasks),
]
Preset = Annotated[
    str,
    typer.Option(help="Size of the task: " + ", ".join(PRESETS) + ".", autocompletion=completion.presets),
]
Models = Annotated[
    int | None, typer.Option(help="Attributed models [3; for flipped labels and leaked examples 1].")
]
Out = Annotated[Path, typer.Option(help="Folder for report.html and results.json.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of MNIST or CIFAR-10 in torchvision's layout.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your own data set, as module:factory; factory(train=True) and factory(train=False) return a "
        "data set of (input, label), or of dicts with one input and 'labels' or 'label'. With --data-root it "
        "is called factory(DIR, train=...)."
    ),
]
LabelKey = Annotated[
    str | None, typer.Option(help="Key of the label in --data of dicts, where it is another one.")
]
Device = Annotated[
    str,
    typer.Option(
        help="Where models are trained and methods are run: cpu, cuda, cuda:1 or mps.",
        autocompletion=completion.devices,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that was started in --out, as it was asked.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be retrained; stop.")]
Yes = Annotated[bool, typer.Option("--yes", help="Go on where it takes more than two hours.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Your own network, as module:factory; factory() returns it untrained. It gives logits "
        "(n, n_classes), or one logit for two classes."
    ),
]
Training = Annotated[
    str | None,
    typer.Option(help='How models are trained, as JSON: \'{"epochs": 40, "learning_rate": 0.01}\'.'),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the results as JSON; all else goes to stderr.")]


@app.command("explain")
def explain_command(
    task: TaskName = "digits",
    index: Annotated[list[int] | None, typer.Option(help="Test point; may be repeated.")] = None,
    k: Annotated[int, typer.Option(help="Proponents and opponents of each test point.")] = 8,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    model: Model = None,
    training: Training = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights instead of training.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    config: Annotated[
        str | None, typer.Option(help="Options of STRIDE as JSON, such as '{\"damping\": 0.1}'.")
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder for trained models.")] = Path("out/store"),
    device: Device = "cpu",
    out: Out = Path("out/explain"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Train (or load) a model, fit STRIDE and explain test points by their training examples.

    Examples:

        stride-captum explain --task digits --index 3

        stride-captum explain --task mnist --data-root ~/data --checkpoint mlp.pt --index 8 --index 9

        torchrun --nproc-per-node 4 -m stride_captum explain --task digits
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        on = existing_device(device)
        out.mkdir(parents=True, exist_ok=True)  # before the work
        loaded = load_task(
            task,
            preset=preset,
            data_root=data_root,
            data=data,
            model=model,
            training=_training(training),
            label_key=label_key,
            mix_test=False,
        )
        trained = None
        if checkpoint is not None:
            trained = _loaded(loaded.build_model(), checkpoint).to(on)
        explanation, _ = explain(
            loaded,
            indices=index,
            k=k,
            model=trained,
            seed=seed,
            store=store,
            config=None if config is None else STRIDEConfig.from_dict(_json("config", config)),
            device=on,
            show_progress=not quiet,
        )
        results = explanation.to_dict()
        images = (loaded.train.tensors[0], loaded.test.tensors[0])
        if is_first():
            results = _write(out, results, lambda found, path: write_explanation(found, *images, path))
    if is_first():
        voice.results(results, lambda: show_explanation(explanation))
        if explanation.note:
            voice.note(explanation.note)
        voice.note(f"Report: {out / 'report.html'}")


@app.command("compare")
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

        stride-captum compare --resume --out out/compare
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(store):
        if resume:
            before = _read_asked(out)
            context.params.update(before)  # which is what is kept again
            context.invoke(compare_command, context, **before, out=out, yes=yes, quiet=quiet, as_json=as_json)
            return
        loaded = load_task(
            task,
            preset=preset,
            data_root=data_root,
            data=data,
            model=model,
            training=_training(training),
            label_key=label_key,
        )
        sizes, measures = comparison_sizes(preset)
        own = {} if settings is None else _json("settings", settings)
        wanted = MEASURES if measure and "all" in measure else tuple(measure or ("lds", "calibration"))
        given = {"n_subsets": subsets, "n_seeds": seeds, "n_models": models, "n_test": test_points}
        plan: dict[str, Any] = {
            **sizes,
            **{name: value for name, value in given.items() if value is not None},
            "store": store,
            "measures": {
                name: {**measures.get(name, {}), **_models_of(name, models), **own.get(name, {})}
                for name in dict.fromkeys((*wanted, *own))
            },
            "n_jobs": jobs,
            "engine": engine,
            "device": device,
        }
        chosen = None if options_from is None else read_results(options_from)["protocol"]["options"]
        if not _affordable(estimates(method, loaded, **plan), dry_run, yes, voice):
            return
        _keep_asked(out, context.params)
        result = compare(method, loaded, n_spiked=spiked, options=chosen, show_progress=not quiet, **plan)
        results = _write(out, result.to_dict(), write_comparison)
    voice.results(results, lambda: show_comparison(result))
    voice.note(f"Report: {out / 'report.html'}")


@app.command("reproduce")
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

    Tables 2 to 4 are settings: `stride_captum.evaluation.tasks.networks` and `STRIDEConfig.paper`.

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
            before = _read_asked(folder)
            context.params.update(before)  # which is what is kept again
            context.invoke(
                reproduce_command, context, **before, out=out, yes=yes, quiet=quiet, as_json=as_json
            )
            return
        loaded = load_task(printed.task, preset=preset, data_root=data_root, data=data, label_key=label_key)
        rows = method or printed.methods
        plan: dict[str, Any] = {
            "store": store,
            "measures": {
                printed.measure: {
                    **printed.settings_for(loaded.n_train),
                    **_models_of(printed.measure, models),
                    **({} if settings is None else _json("settings", settings)),
                }
            },
            "n_subsets": subsets,
            "n_seeds": seeds,
            "n_models": 3 if models is None else models,
            "n_test": test_points,
            "n_jobs": jobs,
            "device": device,
        }
        if not _affordable(estimates(rows, loaded, **plan), dry_run, yes, voice):
            return
        _keep_asked(folder, context.params)
        result = compare(rows, loaded, show_progress=not quiet, **plan)
        results = _write(folder, {"paper": asdict(printed), **result.to_dict()}, write_comparison)

    def show() -> None:
        show_comparison(result)
        show_printed(printed)

    voice.results(results, show)
    voice.note(f"Report: {folder / 'report.html'}")


@app.command("report")
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


@app.command("recovery-curve")
def recovery_curve_command(
    task: TaskName = "digits",
    n_subsets: Annotated[list[int] | None, typer.Option(help="K; may be repeated.")] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    paper: Annotated[
        str,
        typer.Option(help="The paper's preset: mnist or cifar10.", autocompletion=completion.paper_presets),
    ] = "mnist",
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 3,
    models: Annotated[int, typer.Option(help="Attributed models.")] = 3,
    test_points: Annotated[int, typer.Option(help="The second half is reported.")] = 400,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    out: Out = Path("out/recovery-curve"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fidelity of trained operators and Lasso as K grows, against ridge and the closed form on the same phi.

    Example: stride-captum recovery-curve --task digits --n-subsets 50 --n-subsets 500
    """
    with one_sentence_errors(store):
        out.mkdir(parents=True, exist_ok=True)  # before the work
        loaded = load_task(task, preset=preset, data_root=data_root, data=data, label_key=label_key)
        curve = recovery_curve(
            loaded,
            store=store,
            ks=n_subsets or (50, 500, 2000),
            preset=paper,
            n_seeds=seeds,
            n_models=models,
            n_test=test_points,
            show_progress=not quiet,
        )
        results = _write_json(out / "results.json", curve.to_dict())
    Console(quiet, as_json).results(results, lambda: _show_curve(curve, models))


def _show_curve(curve: RecoveryCurve, models: int) -> None:
    title = f"{curve.task}: LDS of trained operators, mean of {models} models [95%]"
    columns = ("K", "|S_k|", "Lasso", "ridge", "closed form on phi", "stage 1, s")
    cells = [
        (
            str(point.n_subsets),
            str(point.subset_size),
            *(_lds_cell(result) for result in (point.lasso, point.ridge, point.closed_form)),
            f"{point.fit_seconds:.1f}",
        )
        for point in curve.points
    ]
    console.print(table_of(title, columns, cells))
    console.print(f"The paper's preset: {_lds_cell(curve.paper)}")
    console.print(one_line(curve.environment))


def _lds_cell(result: LDSResult) -> str:
    models = " ".join(f"{v:.3f}" for v in result.per_model)
    spread = "" if result.interval is None else f" [{result.interval.low:.3f}, {result.interval.high:.3f}]"
    return f"{result.value:.3f}{spread} ({models})"


@bench.command("core")
def bench_core_command(
    repeats: Annotated[int, typer.Option(help="Timed repetitions; medians are reported.")] = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query against the floor of the hardware, and against Captum's TracInCPFast.

    Example: stride-captum bench core
    """
    with one_sentence_errors():
        rows = bench_core(repeats=repeats)
        environment = describe()
        results = _write_json(
            out / "core.json", {"environment": environment, "rows": [row.to_dict() for row in rows]}
        )
    Console(quiet, as_json).results(results, lambda: _show_core(rows, environment))


def _show_core(rows: Sequence[CoreRow], environment: dict[str, Any]) -> None:
    title = "Seconds are medians; ratios are goals at most (<) or at least (>)"
    columns = (
        "model", "N", "d", "n_test", "fit / floor (<1.5)", "dense / floor (<1.5)", "top-100 / floor (<2)",
        "one point: x TracInCPFast (>50)", "n_test points: x TracInCPFast (>3)", "fit MiB", "formula MiB",
    )  # fmt: skip
    cells = [
        (
            row.model,
            f"{row.n_train:,}",
            str(row.n_features),
            f"{row.n_test:,}",
            f"{row.fit_ratio:.2f} ({row.fit:.3f} s)",
            f"{row.dense_ratio:.2f} ({row.dense:.3f} s)",
            f"{row.top100_ratio:.2f} ({row.top100:.3f} s)",
            f"{row.single_speedup:.0f} ({1e3 * row.single:.1f} ms, {1e3 * row.tracin_single:.0f} ms)",
            f"{row.many_speedup:.1f} ({row.tracin_many:.2f} s)",
            f"{row.fit_bytes / 2**20:.0f}",
            f"{row.formula_bytes / 2**20:.0f}",
        )
        for row in rows
    ]
    show_measured(title, columns, cells, environment)


@bench.command("peers")
def bench_peers_command(
    repeats: Annotated[int, typer.Option(help="Timed repetitions; medians are reported.")] = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query beside feature similarity, Captum's TracInCPFast and kronfluence's EKFAC.

    Example: stride-captum bench peers
    """
    with one_sentence_errors():
        rows = bench_peers(repeats=repeats)
        results = _write_json(out / "peers.json", {"environment": describe(), "rows": rows})
    Console(quiet, as_json).results(results, lambda: _show_peers(rows, results["environment"]))


def _show_peers(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    title = "Medians of one run; in brackets the ratio to feature similarity on the same layers"
    columns = (
        "network", "N", "d", "method", "fit s (forward passes)", "test points",
        "query ms", "top-k ms", "one point ms",
    )  # fmt: skip
    cells = [
        (
            row["network"],
            f"{row['n_train']:,}",
            str(row["n_features"]),
            row["method"],
            f"{row['fit']:.3f} ({row['fit_ratio']:.1f})",
            str(row["n_test"]),
            *(f"{1e3 * row[key]:.1f} ({row[key + '_ratio']:.2f})" for key in ("query", "top_k", "one_point")),
        )
        for row in rows
    ]
    show_measured(title, columns, cells, environment)


@bench.command("recovery")
def bench_recovery_command(
    test_points: Annotated[int, typer.Option(help="Test points that are recovered together.")] = 200,
    n_subsets: Annotated[int, typer.Option(help="K.")] = 500,
    n_train: Annotated[int, typer.Option(help="N.")] = 50_000,
    subset_size: Annotated[int, typer.Option(help="|S_k|.")] = 100,
    reference: Annotated[int, typer.Option(help="Test points that scikit-learn is timed on.")] = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """The batched Lasso against a loop over scikit-learn's at the same duality gap.

    Example: stride-captum bench recovery
    """
    with one_sentence_errors():
        rows = bench_lasso(
            n_test=test_points,
            n_subsets=n_subsets,
            n_train=n_train,
            subset_size=subset_size,
            n_reference=reference,
        )
    title = "Lasso: seconds for all test points, in one run"
    _show_rows(title, rows, out / "recovery.json", Console(quiet, as_json))


#: Of `compare` and `reproduce`, what may be said anew of a run that is resumed.
_SAID_ANEW = ("out", "yes", "quiet", "as_json", "resume", "dry_run")


def _keep_asked(folder: Path, parameters: dict[str, Any]) -> None:
    """Write what a run was asked into its folder, before the work."""
    kept = {name: value for name, value in parameters.items() if name not in _SAID_ANEW}
    write_text(folder / "asked.json", json.dumps(kept, default=str, indent=1))


def _read_asked(folder: Path) -> dict[str, Any]:
    """The parameters of the run that was started in a folder."""
    path = folder / "asked.json"
    if not path.exists():
        raise FileNotFoundError(
            f"No run was started in {path.parent}: {path.name} is not there. Name its folder with --out, or "
            "leave out --resume."
        )
    try:
        asked = _json("--resume", path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_value(
            "--resume",
            "find what the run was asked",
            f"{path}, which is damaged",
            "Give the options again, without --resume: what is in the store is not done twice.",
        ) from error
    paths = ("store", "data_root", "options_from")
    return {k: Path(v) if k in paths and v is not None else v for k, v in asked.items()}


@bench.command("retraining")
def bench_retraining_command(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(CASES) + ".", autocompletion=completion.cases
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where models are trained.", autocompletion=completion.devices)
    ] = "cpu",
    stack: Annotated[list[int] | None, typer.Option(help="Models of a stack; may be repeated.")] = None,
    epochs: Annotated[int, typer.Option(help="Few will do.")] = 1,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Many small models trained at once against the same models one by one.

    Example: stride-captum bench retraining --device cuda
    """
    with one_sentence_errors():
        rows = bench_retraining(
            case or ("digits", "mnist"), device=existing_device(device), stack_sizes=stack, epochs=epochs
        )
    title = "Retraining: seconds of a model, with all workers busy, in one run"
    _show_rows(title, rows, out / "retraining.json", Console(quiet, as_json))


@bench.command("gpu")
def bench_gpu_command(
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(GPU_PARTS) + ". Default: all.",
            autocompletion=completion.one_of(GPU_PARTS),
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Default: a GPU where there is one. On the CPU all sizes are toys.",
            autocompletion=completion.devices,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="For everything; what does not fit is skipped.")] = 8.0,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """All that wants a GPU, in minutes: training, queries, retraining, transfers, nccl, models up to 1 B.

    Example: stride-captum bench gpu
    """
    voice, path = Console(quiet, as_json), out / "gpu.json"
    with one_sentence_errors(out):
        found = bench_gpu(path, device=device, parts=part or GPU_PARTS, minutes=minutes, say=voice.note)

    def show() -> None:
        for title, columns, cells in tables(found):
            show_measured(title, columns, cells, found["environment"])

    voice.results(found, show)
    voice.note(f"Wrote {path}")


@bench.command("store")
def bench_store_command(
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(PARTS) + ". Default: all.",
            autocompletion=completion.parts,
        ),
    ] = None,
    n_train: Annotated[
        int, typer.Option(help="N of the large files; the other parts take a tenth.")
    ] = 2_000_000,
    n_features: Annotated[int, typer.Option(help="d.")] = 512,
    test_points: Annotated[int, typer.Option(help="Test points of a query.")] = 200,
    k: Annotated[int, typer.Option(help="Training examples for each.")] = 100,
    limit: Annotated[str, typer.Option(help="Data segment that the large fit and query may have.")] = "2GiB",
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Features on disk: memory of a large training set, building and querying against plain writes and reads.

    Example: stride-captum bench store --part large --n-train 200000
    """
    with one_sentence_errors():
        rows = bench_store(
            part or PARTS,
            n_train=n_train,
            n_features=n_features,
            n_test=test_points,
            k=k,
            limit=parse_bytes(limit, name="--limit"),
        )
    _show_rows("Features on disk", rows, out / "store.json", Console(quiet, as_json))


@bench.command("estimate")
def bench_estimate_command(
    test_points: Annotated[int, typer.Option(help="Test points of a query.")] = 100,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """What `method.estimate()` says before, against what is measured after.

    Example: stride-captum bench estimate
    """
    with one_sentence_errors():
        rows = bench_estimate(n_test=test_points)
    _show_rows("Estimated, measured and their ratio", rows, out / "estimate.json", Console(quiet, as_json))


@bench.command("scalability")
def bench_scalability_command(
    full: Annotated[
        bool, typer.Option("--full", help="The 18 models of Table 5 with 5,000 examples.")
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(SCALED_METHODS) + ". Default: all.",
            autocompletion=completion.scalable_methods,
        ),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Depth x width of a model, such as 4x64; may be repeated.")
    ] = None,
    train: Annotated[int | None, typer.Option(help="Training examples [500; 5,000 with --full].")] = None,
    test_points: Annotated[int, typer.Option(help="Test points of a query.")] = 100,
    device: Annotated[
        str | None,
        typer.Option(help="Default: a GPU where there is one.", autocompletion=completion.devices),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds of each phase of a case.")] = 120.0,
    memory_limit: Annotated[str, typer.Option(help="What a process may add to memory, on the CPU.")] = "8GiB",
    exponents: Annotated[
        bool, typer.Option("--exponents/--no-exponents", help="Sweep N, d and K too (Proposition 1).")
    ] = True,
    out: Annotated[
        Path,
        typer.Option(help="Folder of results.json, the plot and the cases: a killed run resumes."),
    ] = Path("out/scalability"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Setup, queries and memory of every method as models grow: Table 5, Figure 2 and Proposition 1.

    Examples:

        stride-captum bench scalability

        stride-captum bench scalability --size 4x64 --train 5000 --method STRIDE --no-exponents
    """
    voice = Console(quiet, as_json)
    with one_sentence_errors(out):
        found = bench_scalability(
            out / "cases",
            full=full,
            device=None if device is None else str(existing_device(device)),
            methods=method,
            sizes=None if size is None else [parse_size(text) for text in size],
            n_train=train,
            n_test=test_points,
            time_limit=time_limit,
            memory_limit=memory_limit,
            exponents=exponents,
            say=voice.note,
        )
        files = write_scalability(found, out)
    voice.results(json.loads(files[0].read_text(encoding="utf-8")), lambda: show_scalability(found))
    for path in files:
        voice.note(f"Wrote {path}")


def _show_rows(title: str, rows: Sequence[dict[str, Any]], path: Path, voice: Console) -> None:
    """Rows of plain values, as JSON in a file and as a table in the terminal."""
    environment = describe()

    def show() -> None:
        columns = [column.replace("_", " ") for column in rows[0]]
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        show_measured(title, columns, cells, environment)

    voice.results(_write_json(path, {"environment": environment, "rows": list(rows)}), show)


@app.command("doctor")
def doctor_command(quiet: Quiet = False, as_json: AsJSON = False) -> None:
    """Say which versions, devices and extras are there, and check the methods on planted data in ten seconds.

    The exit code is 1 where something is broken. What the check does not cover is named.

    Examples:

        stride-captum doctor

        stride-captum doctor --json
    """
    with one_sentence_errors():
        diagnosis = diagnose(show_progress=not quiet)
    Console(quiet, as_json).results(diagnosis.to_dict(), lambda: typer.echo(str(diagnosis)))
    if not diagnosis.ok:
        raise typer.Exit(1)


def _affordable(found: list[RetrainingEstimate], dry_run: bool, yes: bool, voice: Console) -> bool:
    """Whether to go on: not after a dry run, and not for more than two hours without being told so.

    Raises:
        ValueError: It would take more than two hours.
    """
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


def _loaded(model: nn.Module, checkpoint: Path) -> nn.Module:
    try:
        load_checkpoint(model, checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:
        raise bad_value(
            "checkpoint",
            "be a file of weights, as torch.save(model.state_dict(), path) writes it",
            f"{str(checkpoint)!r}, which is none or holds more than weights",
        ) from error
    return model


def _training(text: str | None) -> dict[str, Any] | None:
    return None if text is None else _json("training", text)


def _models_of(measure: str, models: int | None) -> dict[str, int]:
    """How many models a measure trains that trains its own: as many as were asked for."""
    return {} if models is None or measure not in ("mislabel", "leakage") else {"n_models": models}


def _json(argument: str, text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_value(argument, "be a JSON object", f"{text!r} ({error})") from error
    if not isinstance(options, dict):
        raise bad_value(argument, "be a JSON object", repr(text))
    return options


def _write(
    out: Path, results: dict[str, Any], write_report: Callable[[dict[str, Any], Path], Path]
) -> dict[str, Any]:
    """Write the results and the report; gives the results as they are in the file."""
    written = _write_json(out / "results.json", results)
    write_report(written, out / "report.html")
    return written


def _write_json(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    results = {"command": ["stride-captum", *sys.argv[1:]], **results}
    write_text(path, json.dumps(results, indent=1, allow_nan=False))
    return results
