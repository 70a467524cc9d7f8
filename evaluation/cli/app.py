"""The command line: all commands by name."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from ...doctor import diagnose
from .bench import bench
from .compare import compare_command, report_command
from .explain import explain_command
from .options import AsJSON, Quiet
from .output import Console, one_sentence_errors
from .recovery_curve import recovery_curve_command
from .reproduce import reproduce_command


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
    """Options of the program itself."""


app.command("explain")(explain_command)
app.command("compare")(compare_command)
app.command("reproduce")(reproduce_command)
app.command("report")(report_command)
app.command("recovery-curve")(recovery_curve_command)
app.add_typer(bench, name="bench")


@app.command("doctor")
def doctor_command(quiet: Quiet = False, as_json: AsJSON = False) -> None:
    """Print versions, devices and extras, and check the methods on synthetic data in ten seconds.

    The exit code is 1 if something is broken. The output also names what is not checked.

    Examples:

        stride-captum doctor

        stride-captum doctor --json
    """
    with one_sentence_errors():
        diagnosis = diagnose(show_progress=not quiet)
    Console(quiet, as_json).results(diagnosis.to_dict(), lambda: typer.echo(str(diagnosis)))
    if not diagnosis.ok:
        raise typer.Exit(1)
