"""`stride-captum recovery-curve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..comparison.recovery_curve import RecoveryCurve, recovery_curve
from ..measures.linear_datamodeling import LDSResult
from ..report.terminal import console, table_of
from ..system.environment import one_line
from ..tasks.loading import load_task
from . import completion
from .options import (
    AsJSON,
    Data,
    DataRoot,
    LabelKey,
    Out,
    Preset,
    Quiet,
    Store,
    TaskName,
)
from .output import Console, one_sentence_errors
from .results import write_json


def recovery_curve_command(
    task: TaskName = "digits",
    n_subsets: Annotated[
        list[int] | None, typer.Option(help="K, the number of subsets; may be repeated.")
    ] = None,
    preset: Preset = "small",
    data_root: DataRoot = None,
    data: Data = None,
    label_key: LabelKey = None,
    paper: Annotated[
        str,
        typer.Option(
            help="The paper's preset: mnist or cifar10.",
            autocompletion=completion.one_of(("mnist", "cifar10")),
        ),
    ] = "mnist",
    seeds: Annotated[int, typer.Option(help="Retrainings of each half.")] = 3,
    models: Annotated[int, typer.Option(help="Attributed models.")] = 3,
    test_points: Annotated[
        int, typer.Option(help="The first half chooses penalties, the second is reported.")
    ] = 400,
    store: Store = Path("out/store"),
    out: Out = Path("out/recovery-curve"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """LDS of trained operators with Lasso as K grows, next to ridge and the closed form on the same features.

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
        results = write_json(out / "results.json", curve.to_dict())
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
