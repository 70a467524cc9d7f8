"""Output of the command line: stdout and stderr, errors in one sentence, and how to continue."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..report.terminal import console
from ..system.text_files import printable


@dataclass(frozen=True)
class Console:
    """Output of one command.

    Attributes:
        quiet: Print nothing but errors, and the results if `as_json`.
        as_json: Print the results as JSON on stdout, and everything else to stderr.
    """

    quiet: bool = False
    as_json: bool = False

    def note(self, text: str) -> None:
        """Print a line that is not part of the results."""
        if self.as_json and not self.quiet:
            typer.echo(printable(text), err=True)
        elif not self.quiet:
            console.print(printable(text), markup=False)

    def results(self, results: Any, show: Callable[[], None]) -> None:
        """Print plain values as JSON, or show them as tables."""
        if self.as_json:
            typer.echo(json.dumps(results, indent=1, allow_nan=False))
        elif not self.quiet:
            show()


@contextmanager
def one_sentence_errors(store: Path | None = None) -> Iterator[None]:
    """Print errors that the user can fix as one sentence and exit with code 2.

    Ctrl-C prints how to continue, and exits with code 130.

    Args:
        store: Folder that keeps finished work; None if nothing is kept.
    """
    try:
        yield
    except (
        typer.Exit,
        typer.Abort,
    ):  # RuntimeErrors too, raised by a command within a command
        raise
    except OSError as error:
        _stop(_of_a_file(error) if error.filename else str(error), error)
    except (ValueError, TypeError, IndexError, RuntimeError, ImportError) as error:
        _stop(str(error), error)
    except KeyboardInterrupt as error:
        typer.echo(f"Interrupted. {_how_to_go_on(store)}", err=True)
        raise typer.Exit(130) from error


def _stop(sentence: str, error: Exception) -> None:
    typer.echo(f"Error: {sentence}", err=True)
    raise typer.Exit(2) from error


def _of_a_file(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}. Name another path, or make this one readable and writable."


def _how_to_go_on(store: Path | None) -> str:
    if store is None:
        return "Nothing was kept: the same command starts over."
    command = shlex.join(["stride-captum", *sys.argv[1:]])
    return f"Finished work is kept in {store}. Continue with: {command}"
