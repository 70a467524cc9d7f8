"""Trainings on the parts of random partitions: which they are, their files, and how one is done."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import __version__
from ...errors import bad_type, bad_value, whole_number
from ...subsets import members, partition
from ...system.stable_digest import NoStableDigest, stable_digest
from ..tasks.new_network import drawn_on, seeded
from . import store as run_store
from .store import State
from .training import single_thread
from .workers import ONE_AT_A_TIME

_PACKAGE = "stride_captum"
#: `train_function(indices, seed)`: a model, or the checkpoints along its training, the last one last.
TrainFunction = Callable[[NDArray[np.int64], int], Any]


@dataclass(frozen=True)
class PartTraining:
    """One training of `retrain`.

    Attributes:
        number: Its number among all trainings.
        parts: Parts of each partition.
        rows: Indices of the training examples.
        seed: Seed of the training.

    >>> print(part_trainings(10, 2, 1, seed=7)[1])
    Training 1, part 2 of 2 with 5 examples and seed 8,
    """

    number: int
    parts: int
    rows: NDArray[np.int64]
    seed: int

    def __str__(self) -> str:
        part = f"part {self.number % self.parts + 1} of {self.parts}"
        return f"Training {self.number}, {part} with {len(self.rows)} examples and seed {self.seed},"


def part_trainings(n_train: int, parts: int, repeats: int, seed: int) -> list[PartTraining]:
    """The trainings of `retrain` with these arguments. Larger `repeats` only append trainings.

    Raises:
        ValueError: A count is out of range.
    """
    parts, repeats = whole_number("parts", parts, 2), whole_number("repeats", repeats)
    if whole_number("n_train", n_train) < parts:
        raise bad_value("parts", f"be at most n_train = {n_train}", parts)
    found = []
    for repeat in range(repeats):
        drawn = np.random.SeedSequence((seed, repeat)).generate_state(1)[0]  # none shared with another seed
        split = partition(n_train, parts, seed=int(drawn))
        for k in range(parts):
            number = repeat * parts + k
            found.append(PartTraining(number, parts, members(split, k), seed + number))
    return found


def stacks_of(jobs: Sequence[PartTraining], most: int) -> list[list[PartTraining]]:
    """Trainings on parts of one size together, at most so many.

    >>> [[job.number for job in stack] for stack in stacks_of(part_trainings(5, 2, 3, seed=0), 2)]
    [[0, 2], [4], [1, 3], [5]]
    """
    groups: dict[int, list[PartTraining]] = {}
    for job in jobs:
        groups.setdefault(len(job.rows), []).append(job)
    return [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]


def training_paths(
    function: TrainFunction, jobs: Sequence[PartTraining], store: str | Path | None, version: str | None
) -> list[Path | None]:
    """The file of each training, named by everything that determines its result; None without a store.

    Args:
        function: `train_function` of `retrain`; `store` and `version` are those of `retrain`, too.
        jobs: The trainings.
        store: See there.
        version: See there.
    """
    if store is None:
        return [None] * len(jobs)
    try:
        digest = stable_digest(function, "train_function", packages=(_PACKAGE,)) if version is None else ""
        what = digest or f"version {version}"
    except NoStableDigest as error:
        warnings.warn(
            f"Stored trainings are not reused: {error}. Give `version`, a name for what the function does.",
            stacklevel=3,
        )
        what = secrets.token_hex()
    shared = {"function": what, "torch": torch.__version__, _PACKAGE: __version__}
    names = [run_store.name_of({**shared, "seed": job.seed}, job.rows) for job in jobs]
    return [Path(store) / "cross-fitted" / f"{name}.safetensors" for name in names]


def stored_trainings(
    function: TrainFunction, jobs: Sequence[PartTraining], store: str | Path, version: str | None = None
) -> int:
    """Number of the trainings that the store holds."""
    paths = training_paths(function, jobs, store, version)
    return sum(path is not None and run_store.read_states(path)[0] is not None for path in paths)


def train_part(function: TrainFunction, job: PartTraining, path: Path | None) -> list[State]:
    """Train one model, and write it."""
    with ONE_AT_A_TIME, seeded(job.seed, drawn_on()), single_thread():
        torch.manual_seed(job.seed)  # also of a GPU that is not in use yet
        try:
            returned = function(job.rows, job.seed)
        except Exception as error:
            raise RuntimeError(f"{job} failed with {type(error).__name__}: {error}") from error
        states, buffers = _states(returned)
        buffers |= getattr(function, "buffers", set())
    keep_states(states, buffers, job, path)
    return states


def keep_states(
    states: Sequence[State], buffers: Container[str], job: PartTraining, path: Path | None
) -> None:
    """Write the checkpoints of a training after checking that they are finite; buffers may be infinite."""
    for state in states:
        if not run_store.is_finite(state, buffers):
            raise bad_value(
                "train_function",
                "return models with finite weights",
                f"NaN or infinity in training {job.number} (seed {job.seed})",
                "If it is a buffer that is meant to be infinite, return the model itself.",
            )
    if path is not None:
        run_store.write_states(path, states)


def _states(returned: Any) -> tuple[list[State], set[str]]:
    """The result of a training function, as state dicts, and the names of the buffers of its models."""
    several = isinstance(returned, Sequence) and not isinstance(returned, str | nn.Module)
    found: list[State] = []
    buffers: set[str] = set()
    for model in returned if several else [returned]:
        buffers |= {name for name, _ in model.named_buffers()} if isinstance(model, nn.Module) else set()
        state = model.state_dict() if isinstance(model, nn.Module) else model
        if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
            must = "return a model, or the models or state dicts along its training"
            raise bad_type("train_function", must, model)
        found.append(run_store.whole_state(state))
    if not found:
        raise bad_value("train_function", "return at least one model", "none")
    return found, buffers
