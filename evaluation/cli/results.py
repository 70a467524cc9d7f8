"""JSON and numbers given as options, and results written to files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import bad_value
from ..system.text_files import write_text


def training_settings(text: str | None) -> dict[str, Any] | None:
    """The value of --training."""
    return None if text is None else json_object("training", text)


def json_object(argument: str, text: str) -> dict[str, Any]:
    """Parse an option that is a JSON object.

    Args:
        argument: Name of the option, for errors.
        text: Its value.

    Raises:
        ValueError: It is not JSON, or not an object.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_value(argument, "be a JSON object", f"{text!r} ({error})") from error
    if not isinstance(options, dict):
        raise bad_value(argument, "be a JSON object", repr(text))
    return options


def numbers(argument: str, text: str) -> list[float]:
    """Parse an option that is a list of numbers with commas between them.

    Raises:
        ValueError: A part is not a number.

    >>> numbers("retrainings", "0, 1,2.5")
    [0.0, 1.0, 2.5]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise bad_value(argument, "be numbers with commas between them", repr(text)) from error


def write_results(
    out: Path, results: dict[str, Any], write_report: Callable[[dict[str, Any], Path], Path]
) -> dict[str, Any]:
    """Write results.json and the report; returns the results as they are in the file."""
    written = write_json(out / "results.json", results)
    write_report(written, out / "report.html")
    return written


def write_json(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write results together with the command; returns what was written."""
    results = {"command": ["stride-captum", *sys.argv[1:]], **results}
    write_text(path, json.dumps(results, indent=1, allow_nan=False))
    return results
