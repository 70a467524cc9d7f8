"""Files of random features, and plain reads and writes of the same size to compare with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK = 8192
_READ = 2**24


def write_features(folder: Path, n_train: int, n_features: int, n_classes: int) -> None:
    """Write random features, logits and labels block by block, as raw arrays."""
    generator = np.random.default_rng(0)
    with open(folder / "features", "wb") as features, open(folder / "logits", "wb") as logits:
        for start in range(0, n_train, _BLOCK):
            rows = min(_BLOCK, n_train - start)
            features.write(generator.standard_normal((rows, n_features), dtype=np.float32).data)
            logits.write((3 * generator.standard_normal((rows, n_classes), dtype=np.float32)).data)
    generator.integers(n_classes, size=n_train).tofile(folder / "labels")


def mapped(folder: Path, n_train: int, n_features: int, n_classes: int) -> list[NDArray[Any]]:
    """Memory maps of the features, logits and labels that `write_features` wrote."""
    return [
        np.memmap(folder / "features", np.float32, "r", shape=(n_train, n_features)),
        np.memmap(folder / "logits", np.float32, "r", shape=(n_train, n_classes)),
        np.memmap(folder / "labels", np.int64, "r", shape=(n_train,)),
    ]


def stored_as(folder: Path, features: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The features in another precision, mapped from a new file."""
    path = folder / str(dtype)
    stored = torch.from_file(str(path), shared=True, size=features.size, dtype=dtype).view(features.shape)
    for start in range(0, len(features), _BLOCK):
        stored[start : start + _BLOCK] = torch.from_numpy(features[start : start + _BLOCK].copy())
    return stored


def random_points(n: int, n_features: int, n_classes: int) -> tuple[torch.Tensor, ...]:
    """Features, logits and labels of random test points."""
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, width, generator=generator) for width in (n_features, n_classes))
    return x, z, z.argmax(1)


def plain_write(path: Path, size: int) -> None:
    """Write a file of zeros and flush it to disk."""
    block = bytes(_READ)
    with open(path, "wb") as file:
        for start in range(0, size, _READ):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def read_all(path: Path) -> None:
    """Read a file from start to end."""
    block = bytearray(_READ)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def drop_from_cache(path: Path) -> None:
    """Remove a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
