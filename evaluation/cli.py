"""Owns the command line: it reads options, calls the library and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..checkpoints import load_checkpoint
from ..config import STRIDEConfig
from ..errors import bad_value
from ..process_group import is_first
from .benchmark_core import bench_core
from .benchmark_recovery import bench_lasso
from .comparison import MEASURES, compare, comparison_sizes, estimates
from .contenders import DEFAULT_METHODS
from .environment import describe, one_line
from .explanation import explain
from .linear_datamodeling import LDSResult
from .paper_tables import TABLES, find_table
from .recovery_curve import recovery_curve
from .report import read_results, write_comparison, write_explanation
from .retraining_estimate import RetrainingEstimate
from .tasks import PRESETS, TASKS, load_task
from .terminal import console, show_comparison, show_explanation, show_printed

app = typer.Typer(
    name="stride-captum",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which training examples made the model say this?",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed as ratios in one run.")
app.add_typer(bench, name="bench")

TaskName = Annotated[str, typer.Option("--task", help="One of: " + ", ".join(TASKS) + ".")]
Preset = Annotated[str, typer.Option(help="Size of the task: " + ", ".join(PRESETS) + ".")]
Out = Annotated[Path, typer.Option(help="Folder for report.html and results.json.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of MNIST or CIFAR-10 in torchvision's layout.")]
Data = Annotated[str | None, typer.Option(help="Your own data set, as module:factory.")]
Model = Annotated[str | None, typer.Option(help="Your own network, as module:factory.")]


@app.command("explain")
def explain_command(
    task: TaskName = "digits",
    index: Annotated[list[int] | None, typer.Option(help="Test point; may be repeated.")] = None,
    k: Annotated[int, typer.Option(help="Proponents and opponents of each test point.")] = 8,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    model: Model = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights instead of training.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    config: Annotated[
        str | None, typer.Option(help="Options of STRIDE as JSON, such as '{\"damping\": 0.1}'.")
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder for trained models.")] = Path("out/store"),
    out: Out = Path("out/explain"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train (or load) a model, fit STRIDE and explain test points by their training examples.

    Examples:

        stride-captum explain --task digits --index 3

        stride-captum explain --task mnist --data-root ~/data --checkpoint mlp.pt --index 8 --index 9

        torchrun --nproc-per-node 4 -m stride_captum explain --task digits
    """
    with _one_sentence_errors():
        loaded = load_task(task, preset=preset, data_root=data_root, data=data, model=model)
        trained = None
        if checkpoint is not None:
            trained = loaded.build_model()
            load_checkpoint(trained, checkpoint)
        explanation, _ = explain(
            loaded,
            indices=index,
            k=k,
            model=trained,
            seed=seed,
            store=store,
            config=None if config is None else STRIDEConfig.from_dict(_json("config", config)),
            show_progress=not quiet,
        )
        if is_first():
            _write(out, explanation.to_dict(), lambda _, path: write_explanation(explanation, loaded, path))
    if not quiet and is_first():
        show_explanation(explanation)
        console.print(f"Report: {out / 'report.html'}")


@app.command("compare")
def compare_command(
    task: TaskName = "digits",
    method: Annotated[
        list[str] | None, typer.Option(help="A row; may be repeated. Default: " + ", ".join(DEFAULT_METHODS))
    ] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    model: Model = None,
    subsets: Annotated[int | None, typer.Option(help="Random halves of the training set [100].")] = None,
    seeds: Annotated[int | None, typer.Option(help="Retrainings of each half; 2 give a ceiling [2].")] = None,
    models: Annotated[int | None, typer.Option(help="Attributed models [3].")] = None,
    spiked: Annotated[int, typer.Option(help="Further models, stopped on a spike of the training loss.")] = 0,
    test_points: Annotated[int | None, typer.Option(help="Half tunes, half is reported [300].")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(MEASURES) + ", all. Default: lds, calibration."
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
        str, typer.Option(help="How halves are retrained: auto, processes or stacked (many models at once).")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be retrained; stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Go on where it takes more than two hours.")] = False,
    out: Out = Path("out/compare"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Compare methods on the same models, subsets and test points.

    Options of a method are chosen by LDS on one half of the test points and reported on the other.

    Examples:

        stride-captum compare --task digits --seeds 3 --measure all

        stride-captum compare --method STRIDE --method EKFAC --measure lds --measure leakage

        stride-captum compare --task mnist --data-root ~/data --spiked 1
    """
    with _one_sentence_errors():
        loaded = load_task(task, preset=preset, data_root=data_root, data=data, model=model)
        sizes, measures = comparison_sizes(preset)
        own = {} if settings is None else _json("settings", settings)
        wanted = MEASURES if measure and "all" in measure else tuple(measure or ("lds", "calibration"))
        given = {"n_subsets": subsets, "n_seeds": seeds, "n_models": models, "n_test": test_points}
        plan: dict[str, Any] = {
            **sizes,
            **{name: value for name, value in given.items() if value is not None},
            "store": store,
            "measures": {
                name: {**measures.get(name, {}), **own.get(name, {})}
                for name in dict.fromkeys((*wanted, *own))
            },
            "n_jobs": jobs,
            "engine": engine,
        }
        if not _affordable(estimates(method, loaded, **plan), dry_run, yes, quiet):
            return
        result = compare(method, loaded, n_spiked=spiked, show_progress=not quiet, **plan)
        _write(out, result.to_dict(), write_comparison)
    if not quiet:
        show_comparison(result)
        console.print(f"Report: {out / 'report.html'}")


@app.command("reproduce")
def reproduce_command(
    table: Annotated[str, typer.Argument(help="One of: " + ", ".join(TABLES) + ".")],
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    method: Annotated[list[str] | None, typer.Option(help="Rows; default: those of the table.")] = None,
    subsets: Annotated[int, typer.Option(help="Random halves that are retrained for LDS.")] = 100,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 2,
    models: Annotated[int, typer.Option(help="Attributed models.")] = 3,
    test_points: Annotated[int, typer.Option(help="One half tunes, the other is reported.")] = 300,
    settings: Annotated[str | None, typer.Option(help="Options of the table's measure as JSON.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes for the retrainings; -1 takes all cores.")] = -1,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    out: Out = Path("out/reproduce"),
) -> None:
    """Measure a table of the paper, with the paper's figures beside ours.

    Tables 2 to 4 are settings: `stride_captum.evaluation.models` and `STRIDEConfig.paper`.

    Examples:

        stride-captum reproduce table8 --data-root ~/data

        stride-captum reproduce table13 --data-root ~/data --preset paper
    """
    with _one_sentence_errors():
        printed = find_table(table)
        loaded = load_task(printed.task, preset=preset, data_root=data_root, data=data)
        result = compare(
            method or printed.methods,
            loaded,
            store=store,
            measures={
                printed.measure: {
                    **printed.settings,
                    **({} if settings is None else _json("settings", settings)),
                }
            },
            n_subsets=subsets,
            n_seeds=seeds,
            n_models=models,
            n_test=test_points,
            n_jobs=jobs,
            show_progress=True,
        )
        results = {"paper": asdict(printed), **result.to_dict()}
        folder = out / f"{table}-{preset}"
        _write(folder, results, write_comparison)
    show_comparison(result)
    show_printed(printed)
    console.print(f"Report: {folder / 'report.html'}")


@app.command("report")
def report_command(
    results: Annotated[Path, typer.Argument(help="The results.json of `compare` or `reproduce`.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html beside the results.")
    ] = None,
) -> None:
    """Write the report of a comparison again, from its results alone, on this machine or another.

    Example: stride-captum report out/compare/results.json
    """
    with _one_sentence_errors():
        path = write_comparison(read_results(results), out or results.with_name("report.html"))
    console.print(f"Report: {path}")


@app.command("recovery-curve")
def recovery_curve_command(
    task: TaskName = "digits",
    n_subsets: Annotated[list[int] | None, typer.Option(help="K; may be repeated.")] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    paper: Annotated[str, typer.Option(help="The paper's preset: mnist or cifar10.")] = "mnist",
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 3,
    models: Annotated[int, typer.Option(help="Attributed models.")] = 3,
    test_points: Annotated[int, typer.Option(help="The second half is reported.")] = 400,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    out: Out = Path("out/recovery-curve"),
) -> None:
    """Fidelity of trained operators and Lasso as K grows, against ridge and the closed form on the same phi.

    Example: stride-captum recovery-curve --task digits --n-subsets 50 --n-subsets 500
    """
    with _one_sentence_errors():
        loaded = load_task(task, preset=preset, data_root=data_root, data=data)
        curve = recovery_curve(
            loaded,
            store=store,
            ks=n_subsets or (50, 500, 2000),
            preset=paper,
            n_seeds=seeds,
            n_models=models,
            n_test=test_points,
            show_progress=True,
        )
        _write_json(out / "results.json", curve.to_dict())
    table = Table(title=f"{curve.task}: LDS of trained operators, mean of {models} models [95%]")
    for column in ("K", "|S_k|", "Lasso", "ridge", "closed form on phi", "stage 1, s"):
        table.add_column(column)
    for point in curve.points:
        table.add_row(
            str(point.n_subsets),
            str(point.subset_size),
            *(_lds_cell(result) for result in (point.lasso, point.ridge, point.closed_form)),
            f"{point.fit_seconds:.1f}",
        )
    console.print(table)
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
) -> None:
    """Fit and query against the floor of the hardware, and against Captum's TracInCPFast.

    Example: stride-captum bench core
    """
    with _one_sentence_errors():
        rows = bench_core(repeats=repeats)
        environment = describe()
        _write_json(out / "core.json", {"environment": environment, "rows": [row.to_dict() for row in rows]})
    table = Table(title="Seconds are medians; ratios are goals at most (<) or at least (>)")
    for column in (
        "model", "N", "d", "n_test", "fit / floor (<1.5)", "dense / floor (<1.5)", "top-100 / floor (<2)",
        "one point: x TracInCPFast (>50)", "n_test points: x TracInCPFast (>3)", "fit MiB", "formula MiB",
    ):  # fmt: skip
        table.add_column(column)
    for row in rows:
        table.add_row(
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
    console.print(table)
    console.print(one_line(environment))


@bench.command("recovery")
def bench_recovery_command(
    test_points: Annotated[int, typer.Option(help="Test points that are recovered together.")] = 200,
    n_subsets: Annotated[int, typer.Option(help="K.")] = 500,
    n_train: Annotated[int, typer.Option(help="N.")] = 50_000,
    subset_size: Annotated[int, typer.Option(help="|S_k|.")] = 100,
    reference: Annotated[int, typer.Option(help="Test points that scikit-learn is timed on.")] = 5,
    out: Out = Path("out/bench"),
) -> None:
    """The batched Lasso against a loop over scikit-learn's at the same duality gap.

    Example: stride-captum bench recovery
    """
    with _one_sentence_errors():
        rows = bench_lasso(
            n_test=test_points,
            n_subsets=n_subsets,
            n_train=n_train,
            subset_size=subset_size,
            n_reference=reference,
        )
        environment = describe()
        _write_json(out / "recovery.json", {"environment": environment, "rows": rows})
    table = Table(title="Lasso: seconds for all test points, in one run")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    console.print(one_line(environment))


def _affordable(found: list[RetrainingEstimate], dry_run: bool, yes: bool, quiet: bool) -> bool:
    """Whether to go on: not after a dry run, and not for more than two hours without being told so.

    Raises:
        ValueError: It would take more than two hours.
    """
    if dry_run or not quiet:
        for estimate in found:
            console.print(str(estimate))
    hours = sum(estimate.seconds for estimate in found) / 3600
    if hours > 2 and not (dry_run or yes):
        raise bad_value(
            "--yes", "be given for more than two hours of retraining", f"{hours:.1f} h without it"
        )
    return not dry_run


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """Errors that a user can mend are one sentence and exit code 2; Ctrl-C says how to go on."""
    try:
        yield
    except (ValueError, TypeError, IndexError, FileNotFoundError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("Interrupted. Finished work is kept: the same command goes on from here.", err=True)
        raise typer.Exit(130) from error


def _json(argument: str, text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_value(argument, "be a JSON object", f"{text!r} ({error})") from error
    if not isinstance(options, dict):
        raise bad_value(argument, "be a JSON object", repr(text))
    return options


def _write(out: Path, results: dict[str, Any], write_report: Callable[[dict[str, Any], Path], Path]) -> None:
    write_report(_write_json(out / "results.json", results), out / "report.html")


def _write_json(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"command": ["stride-captum", *sys.argv[1:]], **results}
    path.write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    return results
