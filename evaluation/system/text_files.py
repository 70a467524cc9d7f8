"""Atomic writes of text files: results, reports, and arguments of a run."""

from __future__ import annotations

import os
from pathlib import Path

from ...system.atomic import atomic_write


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically.

    A link keeps pointing to its file; what is no file (a pipe, a terminal) is written to as it is.

    Args:
        path: The file; its folder is made.
        text: The content, in UTF-8. Parts of a file name that are not Unicode become "?".

    Returns:
        The path.
    """
    content = text.encode("utf-8", errors="replace")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(content)
    else:
        atomic_write(target, content)
    return Path(path)


def printable(text: str) -> str:
    r"""Text that every output takes: parts of a file name that are not Unicode become "?".

    >>> printable("f\udcf6lder")
    'f?lder'
    """
    return text.encode("utf-8", errors="replace").decode("utf-8")
