"""`stride-captum bench`: speed, as ratios of times measured in one run."""

from __future__ import annotations

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
from ..report.terminal import show_measured
from ..system.environment import describe
from . import completion
from .bench_scalability import bench_scalability_command
from .bench_tables import show_core, show_peers, show_rows
from .options import AsJSON, Out, Quiet, Repeats
from .output import Console, one_sentence_errors
from .results import write_json

bench = typer.Typer(
    no_args_is_help=True,
    help="""Measure speed, as ratios of times measured in one run.

    Example: stride-captum bench core
    """,
)


@bench.command("core")
def bench_core_command(
    repeats: Repeats = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query against the arithmetic that they cannot avoid, and against Captum's TracInCPFast.

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
    repeats: Repeats = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query next to feature similarity, Captum's TracInCPFast and kronfluence's EKFAC.

    Example: stride-captum bench peers
    """
    with one_sentence_errors():
        rows = bench_peers(repeats=repeats)
        results = write_json(out / "peers.json", {"environment": describe(), "rows": rows})
    Console(quiet, as_json).results(results, lambda: show_peers(rows, results["environment"]))


@bench.command("recovery")
def bench_recovery_command(
    test_points: Annotated[int, typer.Option(help="Test points that are recovered together.")] = 200,
    n_subsets: Annotated[int, typer.Option(help="K, the number of subsets.")] = 500,
    n_train: Annotated[int, typer.Option(help="N, the number of training examples.")] = 50_000,
    subset_size: Annotated[int, typer.Option(help="|S_k|, examples in each subset.")] = 100,
    reference: Annotated[
        int, typer.Option(help="Test points that scikit-learn solves; its time for all is extrapolated.")
    ] = 5,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """The batched Lasso against a loop over scikit-learn's, both to the same duality gap.

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
    n_positions: Annotated[int, typer.Option(help="Positions (tokens) of each example.")] = SIZES[
        "n_positions"
    ],
    test_points: Annotated[int, typer.Option(help="Test points of one call.")] = SIZES["n_test"],
    repeats: Repeats = 3,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Fit and query of the closed form on tokens, in both forms, against the matrix products they need.

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
            help="May be repeated; one of: " + ", ".join(CASES) + ".", autocompletion=completion.one_of(CASES)
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where models are trained.", autocompletion=completion.devices)
    ] = "cpu",
    stack: Annotated[list[int] | None, typer.Option(help="Models trained at once; may be repeated.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs; one is enough to time a step.")] = 1,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Many small models trained at once, against the same models trained one by one.

    Example: stride-captum bench retraining --device cuda
    """
    with one_sentence_errors():
        rows = bench_retraining(
            case or ("digits", "mnist"), device=existing_device(device), stack_sizes=stack, epochs=epochs
        )
    title = "Retraining: seconds for each model, with all workers busy, in one run"
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
            help="Default: a GPU if there is one. On the CPU all sizes are tiny.",
            autocompletion=completion.devices,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything; what does not fit is skipped.")] = 8.0,
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Everything that needs a GPU, in minutes: training, queries, retraining, transfers, nccl, large models.

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
            autocompletion=completion.one_of(PARTS),
        ),
    ] = None,
    n_train: Annotated[
        int, typer.Option(help="Examples in the large files; the other parts use a tenth.")
    ] = 2_000_000,
    n_features: Annotated[int, typer.Option(help="d, the number of features.")] = 512,
    test_points: Annotated[int, typer.Option(help="Test points of a query.")] = 200,
    k: Annotated[int, typer.Option(help="Training examples returned for each test point.")] = 100,
    limit: Annotated[
        str, typer.Option(help="Limit of the data segment (RLIMIT_DATA) for the large fit and query.")
    ] = "2GiB",
    out: Out = Path("out/bench"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Features on disk: memory for a large training set, and time against plain writes and reads.

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
    """The cost that `method.estimate()` predicts, against the cost that is measured.

    Example: stride-captum bench estimate
    """
    with one_sentence_errors():
        rows = bench_estimate(n_test=test_points)
    show_rows("Estimated, measured, and their ratio", rows, out / "estimate.json", Console(quiet, as_json))


bench.command("scalability")(bench_scalability_command)
