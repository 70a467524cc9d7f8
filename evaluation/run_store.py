"""Owns what a training leaves on disk: the name of the file, how it is written and how it is read.

A name is a fingerprint of all that determines the result, so a file made with other data or settings
has another name. A file is there as a whole or not at all; one that was damaged later is told from one
that is missing, and neither is ever used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..whole_files import write_whole
from .tasks import Task

#: Increased whenever `train_model` changes what it computes.
_RECIPE = 1


class Fingerprints:
    """Names of the runs of one task.

    Args:
        task: Its data, settings and network (source and structure) are part of every name.

    """

    def __init__(self, task: Task) -> None:
        with torch.random.fork_rng(devices=[]):
            network = repr(task.build_model())
        self._state = {
            "recipe": _RECIPE,
            "data": [data_hash(task.train.tensors), data_hash(task.test.tensors)],
            "training": asdict(task.training),
            "model": inspect.getsource(task.build_model) + network,
        }

    def of(self, seed: int, rows: NDArray[np.int64] | None, extra: str) -> str:
        """SHA-256 (24 hex digits) of all that determines a run.

        Args:
            seed: Seed of the training.
            rows: Training indices; None for all.
            extra: What else determines the result.

        """
        state = {
            **self._state,
            "seed": seed,
            "rows": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest(),
            "extra": extra,
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24]


def of_all(fingerprints: Sequence[str]) -> str:
    """One fingerprint (24 hex digits) of several in their order."""
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:24]


_DATA_HASHES: dict[int, tuple[Any, list[int], str]] = {}


def data_hash(tensors: tuple[Tensor, ...]) -> str:
    """`hash_tensors` of a data set; done once as long as the tensors are not written to."""
    known = _DATA_HASHES.get(id(tensors))
    versions = [t._version for t in tensors]
    if known is None or known[0] is not tensors or known[1] != versions:
        known = _DATA_HASHES[id(tensors)] = (tensors, versions, hash_tensors(tensors))
    return known[2]


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, types and contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, atomically."""

    def write(name: str) -> None:
        with open(name, "wb") as file:
            np.save(file, array)

    write_whole(path, write)


def read_array(path: Path, shape: tuple[int, ...]) -> tuple[NDArray[np.float32] | None, str | None]:
    """Read an array of finite numbers.

    Returns:
        The array and None; or None and what is wrong with the file; or None twice if there is none.

    """
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        return None, None
    except (ValueError, EOFError, OSError):
        return None, "cut off or not an array"
    if array.dtype.kind != "f":
        return None, "not an array of floats"
    if array.shape != shape:
        return None, f"of shape {array.shape} instead of {shape}"
    if not np.isfinite(array).all():
        return None, "not finite"
    return array, None


def read_state(path: Path, model: nn.Module) -> tuple[dict[str, Tensor] | None, str | None]:
    """Read the weights of a model; the result is that of `read_array`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        return None, None
    except SafetensorError:
        return None, "cut off or not a file of weights"
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        return None, "of another network"
    if not all(torch.isfinite(v).all() for v in state.values()):
        return None, "not finite"
    return state, None


def say_damaged(path: Path, damage: str | None) -> None:
    """Warn the caller's caller that a file is damaged; None says nothing."""
    if damage is not None:
        warnings.warn(f"{path.name} is {damage}: it is computed again.", stacklevel=3)
