"""Files of trainings: their names, and how they are written and read.

A name is a digest of everything that determines the result: data, settings, the code of the network with
everything it reads, its initial weights under one seed, and torch's version. Files are written atomically. A
damaged file is never used, and a warning tells it from a missing one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...system.atomic import atomic_write
from ...system.fingerprints import bits
from ...system.stable_digest import NoStableDigest, stable_digest
from ..tasks.new_network import built
from ..tasks.task import Task

#: Increased whenever `train_model` changes what it computes.
_RECIPE = 2
#: The same for losses with class weights.
_WEIGHTED_RECIPE = 1
#: Weights by name, as `state_dict` gives them.
State = dict[str, Tensor]


class Fingerprints:
    """Names of the trainings of one task.

    If the network has no stable digest, every name is new, so that no stored training is reused; a warning
    says why.

    Args:
        task: Its data, settings, network and loss are part of every name.
    """

    def __init__(self, task: Task) -> None:
        self._state = {
            "recipe": _RECIPE,
            "torch": torch.__version__,
            "data": [hash_tensors(task.train.tensors), hash_tensors(task.test.tensors)],
            "training": stable_digest(asdict(task.training)),
            "network": _network(task),
        }
        if not task.has_classes:
            self._state["loss"] = stable_digest(task.loss, "loss")
        if task.loss.has_weights:
            self._state["class weights"] = _WEIGHTED_RECIPE

    def of(self, seed: int, rows: NDArray[np.int64] | None, extra: str) -> str:
        """Digest (24 hex digits of SHA-256) of everything that determines a training.

        Args:
            seed: Seed of the training.
            rows: Training indices; None for all.
            extra: Anything else that determines the result.
        """
        return name_of({**self._state, "seed": seed, "extra": extra}, rows)


def _network(task: Task) -> list[str]:
    """Digests of the factory's code, and of the network that it returns under one seed."""
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
    warnings.warn(f"Stored trainings of {task.name} are not reused: {reason}", stacklevel=5)


def name_of(facts: Mapping[str, Any], rows: NDArray[np.int64] | None) -> str:
    """Name (24 hex digits) of a training, from plain values that determine it and its training indices."""
    trained_on = None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest()
    text = json.dumps({**facts, "rows": trained_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def of_all(fingerprints: Sequence[str]) -> str:
    """One fingerprint (24 hex digits) for a sequence of them."""
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
        The array and None; or None and what is wrong with the file; or (None, None) if there is no file.
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


def whole_state(state: Mapping[str, Tensor]) -> State:
    """Weights as contiguous copies on the CPU: a file cannot hold tied or strided tensors."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def is_finite(state: Mapping[str, Tensor], buffers: Container[str] = ()) -> bool:
    """Whether no value is NaN, and none is infinite; buffers may be, such as a mask with -inf."""
    return not any(
        bool(t.isnan().any()) or (name not in buffers and bool(t.isinf().any())) for name, t in state.items()
    )


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write the weights of a model as .safetensors, atomically."""
    from safetensors.torch import save_file

    whole = whole_state(state)
    atomic_write(path, lambda name: save_file(whole, name))


def write_states(path: Path, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the checkpoints of one training, in order, to one file."""
    write_state(path, {f"{i}/{name}": t for i, state in enumerate(states) for name, t in state.items()})


def read_state(path: Path, model: nn.Module) -> tuple[State | None, str | None]:
    """Read the weights of a model; the result is that of `read_array`."""
    state, damage = _read_weights(path)
    if state is None:
        return None, damage
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        return None, "of another network"
    if not is_finite(state, {name for name, _ in model.named_buffers()}):
        return None, "not finite"
    return state, None


def read_states(path: Path) -> tuple[list[State] | None, str | None]:
    """Read what `write_states` wrote; the result is that of `read_array`."""
    flat, damage = _read_weights(path)
    if flat is None:
        return None, damage
    states: dict[int, State] = {}
    for name, tensor in flat.items():
        number, _, key = name.partition("/")
        if not number.isdigit() or not key:
            return None, "not one of weights along a training"
        states.setdefault(int(number), {})[key] = tensor
    return [states[number] for number in sorted(states)], None


def _read_weights(path: Path) -> tuple[State | None, str | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: State = load_file(path)
    except FileNotFoundError:
        return None, None
    except (SafetensorError, OSError):
        return None, "cut off or not a file of weights"
    if not is_finite(state, state):  # which names are those of buffers, the file does not tell
        return None, "not finite"
    return state, None


def say_damaged(path: Path, damage: str | None) -> None:
    """Warn that a file is damaged, if it is; the warning points to the caller's caller."""
    if damage is not None:
        warnings.warn(f"{path.name} is {damage}: it is computed again.", stacklevel=3)
