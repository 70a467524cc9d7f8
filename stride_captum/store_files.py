"""Owns the files of a feature store: one raw file a column group, and one manifest that says what is whole.

A store is a folder with `features.bin`, `logits.bin` and `labels.bin`, whole rows behind one another, and
`manifest.json`, which holds for each chunk of rows a checksum (CRC-32) of every file's part and a digest
(SHA-256) of the examples. A chunk counts from the moment at which a manifest that names it has replaced
the one before: what a process that was killed had written behind it is cut off.
"""

from __future__ import annotations

import fcntl
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
from numpy.typing import NDArray
from torch import Tensor

from .errors import bad_value
from .persistence import digest_item
from .restoring import bits
from .whole_files import write_whole

FORMAT = 1
_MANIFEST = "manifest.json"
#: numpy has no bfloat16: files are mapped as integers of the same size.
_MAPPED = {2: np.int16, 4: np.int32, 8: np.int64}
_REMEDY = "Delete the folder to build the store again."


@dataclass
class Part:
    """One file of the store.

    Attributes:
        dtype: Name of its torch dtype.
        width: Values a row.
    """

    dtype: str
    width: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.width * self.torch_dtype.itemsize


@dataclass
class Chunk:
    """Rows that were written together.

    Attributes:
        rows: How many.
        examples: SHA-256 of the examples that they come from.
        checksums: CRC-32 of the bytes in each file.
    """

    rows: int
    examples: str
    checksums: dict[str, int]


@dataclass
class Manifest:
    """What a store holds.

    Attributes:
        key: What the content depends on, by name; values are text or numbers.
        taps: Where features are read, as plain values.
        parts: The files by name.
        chunk_rows: Rows of every chunk but the last.
        chunks: Those that are whole.
        complete: Whether the last example of the training set is in.
    """

    key: dict[str, Any]
    taps: list[dict[str, Any]]
    parts: dict[str, Part]
    chunk_rows: int
    chunks: list[Chunk] = field(default_factory=list)
    complete: bool = False

    @property
    def rows(self) -> int:
        """Rows in whole chunks."""
        return sum(chunk.rows for chunk in self.chunks)


class StoreFiles:
    """The folder of one store.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process builds here; the system ends the lock of a process that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read_manifest(self) -> Manifest | None:
        """The manifest, or None where there is no store yet.

        Raises:
            ValueError: It is damaged or of another format.
        """
        path = self.folder / _MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            checksum = content.pop("checksum")
            version = content.pop("format")
            if checksum != _manifest_checksum(content):
                raise KeyError("checksum")
        except (ValueError, KeyError, AttributeError) as error:
            raise bad_value("feature_store", "have a whole manifest", f"a damaged {path}", _REMEDY) from error
        if version != FORMAT:
            raise bad_value("feature_store", f"be in format {FORMAT}", f"format {version}", _REMEDY)
        content["parts"] = {name: Part(**part) for name, part in content["parts"].items()}
        content["chunks"] = [Chunk(**chunk) for chunk in content["chunks"]]
        return Manifest(**content)

    def write_manifest(self, manifest: Manifest) -> None:
        """Put a manifest in the place of the one before, at once."""
        content = asdict(manifest)
        text = json.dumps({"format": FORMAT, "checksum": _manifest_checksum(content), **content}, indent=1)
        write_whole(self.folder / _MANIFEST, lambda name: Path(name).write_text(text, encoding="utf-8"))

    def append(self, manifest: Manifest, values: Mapping[str, Tensor], examples: str) -> None:
        """Write one chunk behind the whole ones, then the manifest that names it.

        Args:
            manifest: Gets the chunk.
            values: For each part the rows, `(rows, width)` in its dtype, contiguous on the CPU.
            examples: Digest of their examples.
        """
        checksums = {}
        for name, part in manifest.parts.items():
            content = bits(values[name]).numpy().data
            path = self.folder / f"{name}.bin"
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.truncate(manifest.rows * part.row_bytes)
                file.seek(manifest.rows * part.row_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            checksums[name] = zlib.crc32(content)
        manifest.chunks.append(Chunk(len(values["labels"]), examples, checksums))
        self.write_manifest(manifest)

    def verify(self, manifest: Manifest) -> None:
        """Read everything once and compare the checksums.

        Raises:
            ValueError: A file is too short or a chunk is not what was written; names the file and the rows.
        """
        for name, part in manifest.parts.items():
            path, start = self.folder / f"{name}.bin", 0
            with open(path, "rb") as file:
                for chunk in manifest.chunks:
                    content = file.read(chunk.rows * part.row_bytes)
                    if zlib.crc32(content) != chunk.checksums[name]:
                        rows = f"{start} to {start + chunk.rows - 1}"
                        raise bad_value(
                            "feature_store",
                            "hold what was written to it",
                            f"other bytes in {path} for rows {rows}",
                            _REMEDY,
                        )
                    start += chunk.rows

    def mapped(self, manifest: Manifest, name: str) -> Tensor:
        """The rows of a file as a read-only memory map, `(rows, width)`."""
        part = manifest.parts[name]
        shape = (manifest.rows, part.width)
        integers = _MAPPED[part.torch_dtype.itemsize]
        array = np.memmap(self.folder / f"{name}.bin", mode="r", dtype=integers, shape=shape)
        return as_tensor(array).view(part.torch_dtype)


class ExampleDigest:
    """SHA-256 of consecutive examples, the same however they come in batches.

    Each field of the examples has a digest of its own, so that rows join where batches do.
    """

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def update(self, batch: Any) -> None:
        """Take in the examples of one batch (tuple, list or dict)."""
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for name, value in items:
            values = (
                as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
            )
            digest = self._fields.get(str(name))
            if digest is None:
                shape = (
                    f"{values.dtype} {tuple(values.shape[1:])}" if isinstance(values, Tensor) else "objects"
                )
                digest = self._fields[str(name)] = hashlib.sha256(shape.encode())
            if isinstance(values, Tensor):
                digest.update(bits(values).numpy().data)
            else:  # texts and the like
                for item in values if isinstance(values, list | tuple) else [values]:
                    digest_item(item, digest)

    def finish(self) -> str:
        """The digest of what came since the last call, in hexadecimal."""
        whole = hashlib.sha256()
        for name in sorted(self._fields):
            whole.update(f"{name} {self._fields[name].hexdigest()} ".encode())
        self._fields = {}
        return whole.hexdigest()


def as_tensor(values: Any) -> Tensor:
    """A tensor over the same memory where there is some, memory maps included."""
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
