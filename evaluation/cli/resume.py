"""`--resume`: the arguments of a run are kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ...errors import bad_value
from ..system.text_files import write_text
from .results import json_object

#: Arguments of `compare` and `reproduce` that are not kept: a resumed run takes the new ones.
_NOT_KEPT = ("out", "yes", "quiet", "as_json", "resume", "dry_run")


def keep_asked(folder: Path, parameters: dict[str, Any]) -> None:
    """Write the arguments of a run into its folder, before the work starts."""
    kept = {name: value for name, value in parameters.items() if name not in _NOT_KEPT}
    write_text(folder / "asked.json", json.dumps(kept, default=str, indent=1))


def go_on(command: Callable[..., None], context: typer.Context, folder: Path, **anew: Any) -> None:
    """Run a command with the arguments that are kept in a folder; `anew` replaces some of them."""
    before = _read_asked(folder)
    context.params.update(before)  # so that they are kept again
    context.invoke(command, context, **before, **anew)


def _read_asked(folder: Path) -> dict[str, Any]:
    """The arguments of the run that was started in a folder."""
    path = folder / "asked.json"
    if not path.exists():
        raise FileNotFoundError(
            f"No run was started in {path.parent}: {path.name} is not there. Name its folder with --out, or "
            "leave out --resume."
        )
    try:
        asked = json_object("--resume", path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_value(
            "--resume",
            "find what the run was asked",
            f"{path}, which is damaged",
            "Give the options again, without --resume: what is in the store is not trained again.",
        ) from error
    paths = ("store", "data_root", "options_from")
    return {k: Path(v) if k in paths and v is not None else v for k, v in asked.items()}
