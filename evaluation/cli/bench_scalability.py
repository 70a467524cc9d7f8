"""`stride-captum bench scalability`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...system.devices import existing_device
from ..benchmarks.scalability.case import SCALED_METHODS
from ..benchmarks.scalability.report import show_scalability, write_scalability
from ..benchmarks.scalability.scalability import bench_scalability, parse_size
from . import completion
from .options import AsJSON, Quiet
from .output import Console, one_sentence_errors


def bench_scalability_command(
    full: Annotated[
        bool, typer.Option("--full", help="The 18 models of Table 5, with 5,000 training examples.")
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; one of: " + ", ".join(SCALED_METHODS) + ". Default: all.",
            autocompletion=completion.one_of(SCALED_METHODS),
        ),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="Depth x width of a model, such as 4x64; may be repeated.")
    ] = None,
    train: Annotated[int | None, typer.Option(help="Training examples [500; 5,000 with --full].")] = None,
    test_points: Annotated[int, typer.Option(help="Test points of a query.")] = 100,
    device: Annotated[
        str | None,
        typer.Option(help="Default: a GPU if there is one.", autocompletion=completion.devices),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that setup, and the query, of one method and model may take.")
    ] = 120.0,
    memory_limit: Annotated[
        str, typer.Option(help="Memory that one method and model may use, on the CPU.")
    ] = "8GiB",
    exponents: Annotated[
        bool,
        typer.Option("--exponents/--no-exponents", help="Also vary N, d and K one by one (Proposition 1)."),
    ] = True,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results.json and the plot. A run that was killed resumes there."),
    ] = Path("out/scalability"),
    quiet: Quiet = False,
    as_json: AsJSON = False,
) -> None:
    """Setup, query and memory of every method as models grow: Table 5, Figure 2 and Proposition 1.

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
