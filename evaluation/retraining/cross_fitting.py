"""Cross-fitting: models trained on the parts of random partitions, for averaged scores and for `refine`.

In each partition, one model has seen a training example and the others have not; the proportion is the same
for all examples. Training on all parts of one partition costs as much as one training on the whole training
set.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import __version__
from ...errors import bad_type, bad_value, whole_number
from ...influence.checkpoints.checkpoint import Checkpoint, load_checkpoint
from ...losses import Loss
from ...subsets import Membership, members, membership_from_indices, partition
from ...system.preserve_state import preserve_state
from ...system.stable_digest import NoStableDigest, stable_digest
from ..tasks.new_network import drawn_on, seeded
from ..tasks.task_loss import output_rows, response_of
from . import store as run_store
from .store import State
from .training import single_thread
from .workers import count

_PACKAGE = "stride_captum"
#: `train_function(indices, seed)`: a model, or the checkpoints along its training, the last one last.
TrainFunction = Callable[[NDArray[np.int64], int], Any]


@dataclass(frozen=True)
class CrossFitted:
    """Models that were trained on parts of the training set.

    Attributes:
        checkpoints: Checkpoints of all models in order, for the argument `checkpoints` of any method.
        membership: Which examples each model has seen, CSR `(n_models, n_train)`.
        last: Index of the last checkpoint of each model in `checkpoints`.
        trainings: Cost, in trainings on the whole training set with as many epochs.

    >>> halves = retrain(lambda indices, seed: nn.Linear(3, 2), 10)
    >>> halves.membership.shape, halves.last
    ((2, 10), [0, 1])
    """

    checkpoints: list[Checkpoint]
    membership: Membership
    last: list[int]
    trainings: float

    def measured(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        response: str | None = None,
        *,
        loss: Loss | None = None,
    ) -> NDArray[np.float64]:
        """Responses of the models at test points, `(n_test, n_models)`, for `refine`.

        Args:
            model: A network of the same architecture; its weights do not change.
            batch: Inputs and labels of the test points.
            response: One of `stride_captum.responses`; None for the first of the loss, "margin" for classes.
            loss: What the models were trained with; None for cross-entropy.
        """
        found = []
        x, y = batch
        device = next((p.device for p in model.parameters()), x.device)
        with preserve_state(model, weights=True) as network, torch.no_grad():
            for place in self.last:
                load_checkpoint(network, self.checkpoints[place].weights)
                outputs = output_rows(loss, network.eval()(x.to(device))).cpu()
                found.append(response_of(loss, outputs, y, response).double().numpy())
        return np.stack(found, axis=1)


def retrain(
    train_function: TrainFunction,
    n_train: int,
    *,
    parts: int = 2,
    repeats: int = 1,
    seed: int = 0,
    store: str | Path | None = None,
    version: str | None = None,
    n_jobs: int = 1,
) -> CrossFitted:
    """Train a model on each part of random partitions of the training set.

    Scores averaged over such models, `STRIDE(model, data, checkpoints=found.checkpoints)`, explain the
    training procedure instead of one file of weights. They are more faithful than those of one model, at the
    cost of `repeats` trainings.

    Args:
        train_function: `f(indices, seed)` trains a network from scratch on these examples and returns it, or
            a sequence of models or state dicts along its training. It is called in other processes if
            `n_jobs` is not 1.
        n_train: Number of training examples.
        parts: Number of parts of a partition; each model is trained on one part.
        repeats: Number of partitions.
        seed: Seed of the partitions, and of torch, NumPy and Python's `random`: those of model i are
            `seed + i`.
        store: Folder for the weights: what is there is not trained again. None keeps nothing.
        version: Name for what `train_function` does: stored trainings with the same version are reused. None
            names them by a digest of the code and of everything that it reads.
        n_jobs: Workers of joblib; -1 takes all cores.

    Returns:
        The models, as checkpoints with the examples that they have seen.

    Raises:
        ValueError: A count is out of range, or trained weights are not finite.
        TypeError: `train_function` returns neither models nor state dicts.
        RuntimeError: `train_function` raised an error; the message names the training. Finished trainings
            stay in the store.

    >>> def train(indices, seed):
    ...     torch.manual_seed(seed)
    ...     return nn.Linear(3, 2)
    >>> found = retrain(train, 10, parts=2, repeats=3)
    >>> len(found.checkpoints), found.trainings, len(found.checkpoints[0].seen)
    (6, 3.0, 5)
    """
    jobs = part_trainings(n_train, parts, repeats, seed)
    paths = training_paths(train_function, jobs, store, version)
    states: dict[int, list[State]] = {}
    for job, path in zip(jobs, paths, strict=True):
        found, damage = (None, None) if path is None else run_store.read_states(path)
        if found is not None:
            states[job.number] = found
        elif path is not None:
            run_store.say_damaged(path, damage)
    todo = [job for job in jobs if job.number not in states]
    parallel = joblib.Parallel(n_jobs=count(n_jobs, "cpu"))
    done = parallel(joblib.delayed(_train)(train_function, job, paths[job.number]) for job in todo)
    states |= {job.number: found for job, found in zip(todo, done, strict=True)}
    checkpoints, last = [], []
    for job in jobs:
        checkpoints += [Checkpoint(state, seen=job.rows.tolist()) for state in states[job.number]]
        last.append(len(checkpoints) - 1)
    membership = membership_from_indices([job.rows for job in jobs], n_train)
    return CrossFitted(checkpoints, membership, last, float(repeats))


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


def _train(function: TrainFunction, job: PartTraining, path: Path | None) -> list[State]:
    """Train one model, and write it."""
    with seeded(job.seed, drawn_on()), single_thread():
        torch.manual_seed(job.seed)  # also of a GPU that is not in use yet
        try:
            returned = function(job.rows, job.seed)
        except Exception as error:
            raise RuntimeError(f"{job} failed with {type(error).__name__}: {error}") from error
        states, buffers = _states(returned)
        buffers |= getattr(function, "buffers", set())
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
    return states


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


def check_apart(judges: Membership, used: Membership) -> None:
    """Refuse to evaluate scores on subsets whose models were used to compute them.

    Args:
        judges: Subsets that scores are evaluated on, CSR `(n_subsets, n_train)`.
        used: Subsets whose models were used, CSR `(n_models, n_train)`.

    Raises:
        ValueError: A subset is in both.
    """

    def keys(membership: Membership) -> Iterable[bytes]:
        return (members(membership, k).tobytes() for k in range(membership.shape[0]))

    shared = set(keys(judges)) & set(keys(used))
    if shared:
        raise bad_value(
            "membership",
            "hold subsets whose models have not entered the scores",
            f"{len(shared)} that have",
            "Draw the parts with another seed.",
        )
