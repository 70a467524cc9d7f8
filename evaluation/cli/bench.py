"""`stride-captum bench`: speed as ratios in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...system.devices import existing_device
from ...system.memory import parse_bytes
from ..benchmarks.core import bench_core
from ..benchmarks.estimate import bench_estimate
from ..benchmarks.feature_store import PARTS, bench_store
from ..benchmarks.gpu import PARTS as GPU_PARTS
from ..benchmarks.gpu import bench_gpu, tables
from ..benchmarks.peers import bench_peers
from ..benchmarks.positions import SIZES, bench_positions
from ..benchmarks.recovery import bench_lasso
from ..benchmarks.retraining import CASES, bench_retraining
from ..benchmarks.scalability.case import SCALED_METHODS
from ..benchmarks.scalability.report import show_scalability, write_scalability
from ..benchmarks.scalability.scalability import bench_scalability, parse_size
from ..report.terminal import show_measured
from ..system.environment import describe
from . import completion
from .bench_tables import show_core, show_peers, show_rows
from .options import AsJSON, Out, Quiet
from .output import Console, one_sentence_errors
from .results import write_json

bench = typer.Typer(
    no_args_is_help=True,
    help="""Measure speed as ratios in one run.

    Example: stride-captum bench core
    """,
)


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
        results = write_json(
            out / "core.json", {"environment": environment, "rows": [row.to_dict() for row in rows]}
        )
    Console(quiet, as_json).results(results, lambda: show_core(rows, environment))


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
        results = write_json(out / "peers.json", {"environment": describe(), "rows": rows})
    Console(quiet, as_json).results(results, lambda: show_peers(rows, results["environment"]))


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
    show_rows(title, rows, out / "recovery.json", Console(quiet, as_json))


@bench.command("positions")
def bench_positions_command(
    n_train: Annotated[int, typer.Option(help="Training examples.")] = SIZES["n_train"],
    n_positions: Annotated[int, typer.Option(help="Positions of each.")] = SIZES["n_positions"],
    test_points: Annotated[int, typer.Option(help="Test points of one call.")] = SIZES["n_test"],
    repeats: Annotated[int, typer.Option(help="Timed repetitions; medians are reported.")] = 3,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query of the closed form on tokens, in both forms, against the products that they must do.

    Example: stride-captum bench positions
    """
    with one_sentence_errors():
        rows = bench_positions(repeats, n_train=n_train, n_positions=n_positions, n_test=test_points)
    title = "Positions: medians in seconds, and ratios to the floors, in one run"
    show_rows(title, rows, out / "positions.json", Console(quiet, as_json))


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
    show_rows(title, rows, out / "retraining.json", Console(quiet, as_json))


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
    show_rows("Features on disk", rows, out / "store.json", Console(quiet, as_json))


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
    show_rows("Estimated, measured and their ratio", rows, out / "estimate.json", Console(quiet, as_json))


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
