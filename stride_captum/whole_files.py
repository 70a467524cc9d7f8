"""Owns files that are whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Write a file under another name, bring it to the disk, then rename it: readers see old or new.

    Nothing is left where the writing fails. The folder is made.

    Args:
        path: The file.
        write: Given the name to write to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "runs" / "note.txt"
    ...     write_whole(path, lambda name: Path(name).write_text("all of it"))
    ...     path.read_text(), len(list(path.parent.iterdir()))
    ('all of it', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(str(partial))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
