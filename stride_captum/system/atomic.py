"""Atomic file writes: a reader sees the old file or the new one, never a partial one."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: A partial file that nobody has written to for this many seconds was left by a writer that was killed.
ABANDONED_SECONDS = 900.0
_PARTIAL = re.compile(r".*\.[0-9a-f]{32}\.part", re.DOTALL)
_swept: set[Path] = set()


def atomic_write(path: str | Path, content: bytes | str | Callable[[str], Any]) -> None:
    """Write a file under another name, flush it to the disk, then rename it.

    If the write fails, the old file stays and no partial file is left. The folder is created if needed. The
    first write of a process to a folder also deletes partial files of killed writers.

    Args:
        path: The file.
        content: Bytes, text (written as UTF-8), or a function that writes to the path it is given.

    Raises:
        OSError: The file cannot be written; the error names `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "runs" / "note.txt"
    ...     atomic_write(path, "all of it")
    ...     path.read_text(), len(list(path.parent.iterdir()))
    ('all of it', 1)
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # The name is truncated, because the suffix could make it too long for the file system.
    name = path.name.encode(errors="surrogateescape")[:100].decode(errors="ignore")
    partial = path.with_name(f"{name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            if not callable(content):
                file.write(content.encode() if isinstance(content, str) else content)
        if callable(content):
            content(str(partial))
        with open(partial, "r+b") as file:  # Windows flushes only files open for writing
            os.fsync(file.fileno())
        _sweep(path.parent.absolute(), partial.stat().st_mtime)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            ours = (None, str(partial), *map(str, path.parents))
            if error.filename in ours:
                code = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


def _sweep(folder: Path, now: float) -> None:
    """Delete abandoned partial files of a folder, once per process; `now` is the file system's clock."""
    if folder in _swept:
        return
    _swept.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                age = now - entry.stat(follow_symlinks=False).st_mtime
                if _PARTIAL.fullmatch(entry.name) and age > ABANDONED_SECONDS:
                    os.unlink(entry.path)
