"""Files of trainings: their names, how they are written and how they are read.

A name is a digest of all that determines the result: data, settings, the code of the network with everything
it reads, its initial weights under one seed, and torch's version. A reader sees a whole file or none; a file
that was damaged later is told from one that is missing, and neither is ever used.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...system.atomic import atomic_write
from ...system.fingerprints import bits
from ..system.stable_digest import NoStableDigest, stable_digest
from ..tasks.new_network import built
from ..tasks.tasks import Task

#: Increased whenever `train_model` changes what it computes.
_RECIPE = 2


class Fingerprints:
    """Names of the runs of one task.

    Where the network cannot be told from another one, no run is found again, and a warning says why.

    Args:
        task: Its data, settings and network are part of every name.

    """

    def __init__(self, task: Task) -> None:
        self._state = {
            "recipe": _RECIPE,
            "torch": torch.__version__,
            "data": [hash_tensors(task.train.tensors), hash_tensors(task.test.tensors)],
            "training": stable_digest(asdict(task.training)),
            "network": _network(task),
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


def _network(task: Task) -> list[str]:
    """Digests of the code of the factory, and of the network that it gives under one seed."""
    try:
        code = stable_digest(task.build_model, "build_model")
        networks = [stable_digest(built(task), "build_model()") for _ in range(2)]
    except NoStableDigest as error:
        _never_found(task, f"{error}. Leave that out of the network and its factory.")
        return [secrets.token_hex()]
    if networks[0] != networks[1]:
        _never_found(
            task,
            "`build_model` gives another network each time under one seed. Draw its weights with the global "
            "random state of torch, numpy or Python.",
        )
    return [code, networks[0]]


def _never_found(task: Task, reason: str) -> None:
    warnings.warn(f"Trainings of {task.name} are done again every time: {reason}", stacklevel=5)


def of_all(fingerprints: Sequence[str]) -> str:
    """One fingerprint (24 hex digits) of several in their order."""
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:24]


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, types and contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, atomically."""

    def write(name: str) -> None:
        with open(name, "wb") as file:
            np.save(file, array)

    atomic_write(path, write)


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
