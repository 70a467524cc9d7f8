"""Files of a feature store: one raw file per array, and a manifest of the complete chunks.

A store is a folder with `features.bin`, `logits.bin` and `labels.bin`, each a row-major array, and
`manifest.json`, which holds for each chunk of rows a checksum (CRC-32) of its part of every file and a digest
(SHA-256) of the examples. Where examples have positions, these arrays have a row for each, `counts.bin` says
how many rows an example has, and `places.bin` which of its positions each row is.

A chunk is valid once a manifest that lists it has replaced the previous one; rows that a killed process has
written after it are truncated.

The folder may be a symbolic link. The files in it may not, since links could point to any file.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from ..errors import bad_value
from ..system.atomic import atomic_write
from ..system.fingerprints import bits

FORMAT = 2
_MANIFEST = "manifest.json"
#: numpy has no bfloat16: files are mapped as integers of the same size.
_MAPPED = {2: np.int16, 4: np.int32, 8: np.int64}
_PARTS = ("features", "logits", "labels")
_REMEDY = "Delete the folder to build the store again."


@dataclass
class Part:
    """One file of the store.

    Attributes:
        dtype: Name of its torch dtype.
        width: Values per row.
        per_example: Whether it has a row for each example where the others have one for each position.
    """

    dtype: str
    width: int
    per_example: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.width * self.torch_dtype.itemsize


@dataclass
class Chunk:
    """Examples that were written together.

    Attributes:
        rows: How many.
        examples: SHA-256 of the examples.
        checksums: CRC-32 of the bytes in each file.
        positions: Rows of their positions; None where each has one row.
    """

    rows: int
    examples: str
    checksums: dict[str, int]
    positions: int | None = None

    def rows_of(self, part: Part) -> int:
        """Its rows in a file."""
        return self.rows if self.positions is None or part.per_example else self.positions


@dataclass
class Manifest:
    """What a store holds.

    Attributes:
        key: Key of the content, by name; values are text or numbers.
        taps: Places that are read, as plain values.
        parts: The files by name.
        chunk_rows: Examples of every chunk but the last.
        chunks: The complete ones.
        complete: Whether the whole training set is stored.
    """

    key: dict[str, Any]
    taps: list[dict[str, Any]]
    parts: dict[str, Part]
    chunk_rows: int
    chunks: list[Chunk] = field(default_factory=list)
    complete: bool = False

    @property
    def rows(self) -> int:
        """Examples in complete chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def rows_of(self, part: Part) -> int:
        """Rows of a file in complete chunks."""
        return sum(chunk.rows_of(part) for chunk in self.chunks)


class StoreFiles:
    """The folder of one store.

    Args:
        folder: Created at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The path of one of the files.

        Raises:
            ValueError: The path is outside the folder, or the file is a link.
        """
        path = self.folder / name
        if path.name != name:
            got = f"a manifest in {str(self.folder)!r} that names {name!r}"
            raise bad_value("feature_store", "keep its files in its own folder", got, _REMEDY)
        if path.is_symlink():
            remedy = "Delete the link, or give another folder."
            raise bad_value("feature_store", "hold files, not links", f"the link {str(path)!r}", remedy)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context manager: lock against other builders; the system releases the lock of a dead process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path("lock")):
            yield

    def read_manifest(self) -> Manifest | None:
        """The manifest; None if there is no store yet.

        Raises:
            ValueError: It is damaged or of another format.
        """
        path = self.path(_MANIFEST)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("checksum")
            version = content.pop("format")
            if checksum != _manifest_checksum(content):
                raise KeyError("checksum")
            manifest = None if version != FORMAT else _manifest(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise bad_value("feature_store", "have a whole manifest", f"a damaged {path}", _REMEDY) from error
        if manifest is None:
            raise bad_value("feature_store", f"be in format {FORMAT}", f"format {version}", _REMEDY)
        for name in manifest.parts:
            self.path(f"{name}.bin")
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest atomically."""
        content = asdict(manifest)
        text = json.dumps({"format": FORMAT, "checksum": _manifest_checksum(content), **content}, indent=1)
        atomic_write(self.path(_MANIFEST), text)

    def append(self, manifest: Manifest, values: Mapping[str, Tensor], examples: str) -> None:
        """Append one chunk, then write the manifest that lists it.

        Args:
            manifest: The chunk is added to it.
            values: Rows of each part, `(rows, width)` in its dtype, contiguous on the CPU.
            examples: Digest of their examples.
        """
        checksums = {}
        for name, part in manifest.parts.items():
            content, start = bits(values[name]).numpy().data, manifest.rows_of(part) * part.row_bytes
            path = self.path(f"{name}.bin")
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            checksums[name] = zlib.crc32(content)
        rows, counts = len(values["labels"]), values.get("counts")
        one_row = Chunk(rows, examples, checksums)
        manifest.chunks.append(one_row if counts is None else Chunk(len(counts), examples, checksums, rows))
        self.write_manifest(manifest)

    def verify(self, manifest: Manifest) -> None:
        """Read all bytes once and compare the checksums.

        Raises:
            ValueError: A file is missing or too short, or a chunk has changed; the error names the file and
                rows.
        """
        for name, part in manifest.parts.items():
            path, start = self._whole(manifest, name), 0
            with open(path, "rb") as file:
                for chunk in manifest.chunks:
                    rows_there = chunk.rows_of(part)
                    content = file.read(rows_there * part.row_bytes)
                    if zlib.crc32(content) != chunk.checksums[name]:
                        rows = f"{start} to {start + rows_there - 1}"
                        raise _damaged(f"other bytes in {path} for rows {rows}")
                    start += rows_there

    def mapped(self, manifest: Manifest, name: str) -> Tensor:
        """Read-only memory map of a file, `(rows, width)`."""
        part = manifest.parts[name]
        shape = (manifest.rows_of(part), part.width)
        if not shape[0]:
            return torch.empty(shape, dtype=part.torch_dtype, device="cpu")
        integers = _MAPPED[part.torch_dtype.itemsize]
        array = np.memmap(self._whole(manifest, name), mode="r", dtype=integers, shape=shape)
        return as_tensor(array).view(part.torch_dtype)

    def _whole(self, manifest: Manifest, name: str) -> Path:
        """Path of a file, after checking that it has all rows of the manifest."""
        path = self.path(f"{name}.bin")
        size = path.stat().st_size if path.is_file() else None
        needed = manifest.rows_of(manifest.parts[name]) * manifest.parts[name].row_bytes
        if size is None or size < needed:
            got = f"no file {path}" if size is None else f"{size:,} of {needed:,} bytes in {path}"
            raise _damaged(got)
        return path


def _manifest(content: dict[str, Any]) -> Manifest:
    """Parse a manifest.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: A value is missing or of another type.
    """
    content["parts"] = {name: Part(**part) for name, part in content["parts"].items()}
    content["chunks"] = [Chunk(**chunk) for chunk in content["chunks"]]
    manifest = Manifest(**content)
    counts = [manifest.chunk_rows, *(c.rows for c in manifest.chunks)]
    counts += [p.width for p in manifest.parts.values()]
    of_positions = "counts" in manifest.parts
    if any(isinstance(chunk.positions, int) != of_positions for chunk in manifest.chunks):
        raise ValueError("positions")
    sums = [chunk.checksums[name] for chunk in manifest.chunks for name in manifest.parts]
    if not all(isinstance(n, int) for n in sums + counts) or min(counts) < 1:
        raise ValueError("counts")
    for name in _PARTS:
        if manifest.parts[name].torch_dtype.itemsize not in _MAPPED:
            raise ValueError("dtype")
    return manifest


def _damaged(got: str) -> ValueError:
    return bad_value("feature_store", "hold what was written to it", got, _REMEDY)


def as_tensor(values: Any) -> Tensor:
    """Tensor that shares memory with an array if possible, memory maps included."""
    if isinstance(values, np.ndarray):
        array: NDArray[Any] = values
        # torch warns about read-only memory maps; nothing here writes to them.
        return torch.from_numpy(array if array.flags.writeable else _writeable_view(array))
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _writeable_view(array: NDArray[Any]) -> NDArray[Any]:
    interface = dict(array.__array_interface__, data=(array.__array_interface__["data"][0], False))

    class View:
        __array_interface__ = interface
        keep_alive = array

    return np.asarray(View())


def _manifest_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
