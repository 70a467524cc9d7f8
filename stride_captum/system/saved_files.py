"""safetensors files with a description and a checksum over both."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import bad_value
from ..system.atomic import atomic_write
from ..system.fingerprints import bits

FORMAT = 3
_KEY = "stride_captum"


def write_file(path: str | Path, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file atomically.

    Args:
        path: Its name.
        description: Plain values.
        tensors: Contiguous, on the CPU.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    text = json.dumps({"format": FORMAT, **description})
    # One entry, because safetensors writes several in arbitrary order and files must be reproducible.
    metadata = {_KEY: f"{checksum(text, tensors)} {text}"}
    try:
        atomic_write(path, lambda name: save_file(tensors, name, metadata))
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} was not written: {error}") from error


def read_file(path: str | Path, parts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file.

    Args:
        path: Its name.
        parts: Keys that the description must have.

    Raises:
        ValueError: The file is damaged, of another format or not one of ours.
    """
    if Path(path).is_dir():
        raise not_ours(path, "is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        what = "is cut off, damaged or of another kind" if Path(path).stat().st_size else "is empty"
        raise not_ours(path, what) from error
    if _KEY not in metadata:
        raise not_ours(path, "has no description of a method")
    found, _, text = metadata[_KEY].partition(" ")
    if found.startswith("{"):  # no checksum before format 3
        text = metadata[_KEY]
    try:
        description = json.loads(text)
        version = description["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise not_ours(path, "has a broken description") from error
    if version != FORMAT:
        raise not_ours(path, f"is in format {version}, where this version reads format {FORMAT}")
    if found != checksum(text, tensors):
        raise not_ours(path, "is damaged: its checksum differs")
    missing = [part for part in parts if part not in description]
    if missing:
        raise not_ours(path, f"has a description without {', '.join(missing)}")
    return description, tensors


def checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the description and of all tensors, in hexadecimal."""
    found = zlib.crc32(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(bits(tensor).numpy().data, found)
    return f"{found:08x}"


def not_ours(path: str | Path, what: str) -> ValueError:
    """Error for a file that cannot be read; `what` says why."""
    must = "name a whole file that `save` has written"
    return bad_value("path", must, f"{str(path)!r}, which {what}", "Fit, and save it again.")
