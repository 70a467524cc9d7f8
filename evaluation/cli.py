"""Owns the command line: it reads options, calls the library and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..checkpoints import load_checkpoint
from ..config import STRIDEConfig
from ..errors import bad_value
from .benchmark_core import bench_core
from .benchmark_recovery import bench_lasso
from .comparison import DEFAULT_METHODS, Comparison, compare
from .environment import describe, one_line
from .explanation import Explanation, explain
from .linear_datamodeling import LDSResult
from .recovery_curve import recovery_curve
from .report import write_comparison, write_explanation
from .tasks import PRESETS, TASKS, load_task

app = typer.Typer(
    name="stride-captum",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which training examples made the model say this?",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed as ratios in one run.")
app.add_typer(bench, name="bench")
console = Console()

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
            config=None if config is None else STRIDEConfig.from_dict(_json(config)),
            show_progress=not quiet,
        )
        _write(out, explanation.to_dict(), lambda path: write_explanation(explanation, loaded, path))
    if not quiet:
        _show_explanation(explanation)
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
    subsets: Annotated[int, typer.Option(help="Random halves of the training set.")] = 100,
    seeds: Annotated[int, typer.Option(help="Retrainings of each half; 2 or more give a ceiling.")] = 2,
    models: Annotated[int, typer.Option(help="Attributed models.")] = 3,
    spiked: Annotated[int, typer.Option(help="Further models, stopped on a spike of the training loss.")] = 0,
    test_points: Annotated[int, typer.Option(help="One half tunes, the other is reported.")] = 300,
    jobs: Annotated[int, typer.Option(help="Processes for the retrainings; -1 takes all cores.")] = -1,
    store: Annotated[Path, typer.Option(help="Folder of retrainings: a killed run resumes.")] = Path(
        "out/store"
    ),
    out: Out = Path("out/compare"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Compare methods on the same models, subsets and test points by the linear datamodeling score.

    Examples:

        stride-captum compare --task digits --seeds 3

        stride-captum compare --task mnist --data-root ~/data --spiked 1
    """
    with _one_sentence_errors():
        loaded = load_task(task, preset=preset, data_root=data_root, data=data, model=model)
        result = compare(
            method or DEFAULT_METHODS,
            loaded,
            store=store,
            n_subsets=subsets,
            n_seeds=seeds,
            n_models=models,
            n_spiked=spiked,
            n_test=test_points,
            n_jobs=jobs,
            show_progress=not quiet,
        )
        _write(out, result.to_dict(), lambda path: write_comparison(result, path))
    if not quiet:
        _show_comparison(result)
        console.print(f"Report: {out / 'report.html'}")


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


def _json(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_value("config", "be a JSON object", f"{text!r} ({error})") from error
    if not isinstance(options, dict):
        raise bad_value("config", "be a JSON object", repr(text))
    return options


def _write(out: Path, results: dict[str, Any], write_report: Callable[[Path], Path]) -> None:
    _write_json(out / "results.json", results)
    write_report(out / "report.html")


def _write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"command": ["stride-captum", *sys.argv[1:]], **results}
    path.write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")


def _show_explanation(explanation: Explanation) -> None:
    table = Table(title=f"{explanation.task}: training examples, as label #index (score)")
    for column in ("test", "label", "says", "proponents", "opponents"):
        table.add_column(column)
    for point in explanation.points:
        table.add_row(
            f"#{point.index}",
            str(point.label),
            str(point.predicted),
            *(
                ", ".join(f"{n.label} #{n.index} ({n.score:+.2g})" for n in neighbours[:3])
                for neighbours in (point.proponents, point.opponents)
            ),
        )
    console.print(table)
    suspects = ", ".join(f"{n.label} #{n.index}" for n in explanation.suspects[:8])
    console.print(f"Most suspect labels: {suspects}")
    seconds = explanation.seconds
    console.print(
        f"Forward pass {1e3 * seconds['forward']:.0f} ms, fit {1e3 * seconds['fit']:.0f} ms, "
        f"query {1e3 * seconds['query']:.1f} ms. {one_line(explanation.environment)}"
    )


def _show_comparison(result: Comparison) -> None:
    protocol = result.protocol
    table = Table(
        title=f"{result.task}: LDS, {protocol['n_subsets']} halves x {protocol['n_seeds']} retrainings, "
        f"{protocol['n_test_reported']} reported test points"
    )
    for column in (
        "method",
        "LDS",
        "95%",
        "worst",
        "each model",
        "first - this",
        "fit s",
        "query s",
        "chosen",
    ):
        table.add_column(column)
    for row in result.rows:
        gap = ""
        if row.against_first is not None:
            value, spread = row.against_first
            gap = f"{value:+.3f}" + ("" if spread is None else f" [{spread.low:+.3f}, {spread.high:+.3f}]")
        interval = row.lds.interval
        table.add_row(
            row.name,
            f"{row.lds.value:.3f}",
            "" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]",
            f"{row.lds.worst:.3f}",
            " ".join(f"{v:.3f}" for v in row.lds.per_model),
            gap,
            f"{row.fit_seconds:.2f}",
            f"{row.query_seconds:.2f}",
            ", ".join(f"{k}={v}" for k, v in row.options.items()),
        )
    console.print(table)
    ceiling = result.rows[0].lds.ceiling
    console.print("Ceiling: " + ("needs two retrainings" if ceiling is None else f"{ceiling:.3f}"))
    for name, residual in protocol["models"].items():
        console.print(f"Attributed model {name}: mean training residual {residual:.4f}")
    console.print(one_line(result.environment), result.note)
