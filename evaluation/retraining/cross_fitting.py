"""Cross-fitting: models trained on the parts of random partitions, kept on disk, for scores and for `refine`.

Every training example is seen by one model of each partition and not by the others, so that each is judged by
models that have seen it and by models that have not, in the same proportion. Trainings on the parts of one
partition cost together what one training on everything costs.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from ... import __version__
from ...errors import bad_type, bad_value, whole_number
from ...influence.checkpoints import Checkpoint, load_checkpoint
from ...responses import response_value
from ...subsets import Membership, members, partition
from ...system.atomic import atomic_write
from ...system.preserve_state import preserve_state
from ...system.random_states import same_random_state
from ..system.stable_digest import NoStableDigest, stable_digest
from ..tasks.networks import TrainingSettings
from ..tasks.tasks import Task
from . import store as run_store
from .attributed_models import log_epochs
from .training import single_thread, train_model
from .workers import count

#: `train_function(indices, seed)`: a model, or the checkpoints along its training, the last one last.
_PACKAGE = "stride_captum"
#: Seed of the first partition for the attributed model number 0; number i begins `_APART * i` behind it.
_FIRST, _APART = 50_000, 1_000
TrainFunction = Callable[[NDArray[np.int64], int], Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class CrossFitted:
    """Models that were trained on parts of the training set.

    Attributes:
        checkpoints: Of all models in order, for `checkpoints=` of any method.
        membership: Which examples each model has seen, CSR `(n_models, n_train)`.
        last: Place of the last checkpoint of each model in `checkpoints`.
        trainings: Cost in trainings on the whole training set, at as many epochs.

    >>> halves = retrain(lambda indices, seed: nn.Linear(3, 2), 10)
    >>> halves.membership.shape, halves.last
    ((2, 10), [0, 1])
    """

    checkpoints: list[Checkpoint]
    membership: Membership
    last: list[int]
    trainings: float

    def measured(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], response: str = "margin"
    ) -> NDArray[np.float64]:
        """Responses of the models to test points, `(n_test, n_models)`: what `refine` takes.

        Args:
            model: A network of the same kind; it is left as it was.
            batch: Inputs and labels of the test points.
            response: One of `stride_captum.responses`.
        """
        found = []
        x, y = batch
        with preserve_state(model, weights=True) as network, torch.no_grad():
            for place in self.last:
                load_checkpoint(network, self.checkpoints[place].weights)
                network.eval()
                found.append(response_value(network(x), y, response).double().cpu().numpy())
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

    Scores that are averaged over such models, `STRIDE(model, data, checkpoints=found.checkpoints)`, explain
    the training procedure, not one file of weights. They are more faithful than those of one model, at the
    cost of `repeats` trainings.

    Args:
        train_function: `f(indices, seed)` trains a network from scratch on these examples and returns it, or
            the models or state dicts along its training in order. It is called in other processes if `n_jobs`
            is not 1.
        n_train: Number of training examples.
        parts: Into how many a partition splits them; each model is trained on one of them.
        repeats: Partitions.
        seed: Of the partitions; model number i is trained with `seed + i`.
        store: Folder for the weights: what is there is not trained again. None keeps nothing.
        version: Vouches for `train_function`: trainings with the same version are the same. None: the store's
            names hold its code and everything that it reads.
        n_jobs: Workers of joblib; -1 takes all cores.

    Returns:
        The models, as checkpoints that know what they have seen.

    Raises:
        ValueError: Counts out of range, or weights that are not finite.
        TypeError: `train_function` returns neither models nor state dicts.
        RuntimeError: A training failed; those that are done stay in the store.

    >>> def train(indices, seed):
    ...     torch.manual_seed(seed)
    ...     return nn.Linear(3, 2)
    >>> found = retrain(train, 10, parts=2, repeats=3)
    >>> len(found.checkpoints), found.trainings, len(found.checkpoints[0].seen)
    (6, 3.0, 5)
    """
    parts = whole_number("parts", parts, 2)
    repeats = whole_number("repeats", repeats)
    if whole_number("n_train", n_train) < parts:
        raise bad_value("parts", f"be at most n_train = {n_train}", parts)
    every = [partition(n_train, parts, seed=seed + repeat) for repeat in range(repeats)]
    rows = [members(split, k) for split in every for k in range(parts)]
    names = _names(train_function, rows, seed, store, version)
    folder = None if store is None else Path(store) / "cross-fitted"
    jobs = [(i, None if folder is None else folder / f"{name}.safetensors") for i, name in enumerate(names)]
    states: dict[int, list[State]] = {}
    for i, path in jobs:
        found = None if path is None else _read(path)
        if found is not None:
            states[i] = found
    todo = [(i, path) for i, path in jobs if i not in states]
    parallel = joblib.Parallel(n_jobs=count(n_jobs, "cpu"))
    done = parallel(joblib.delayed(_train)(train_function, rows[i], seed + i, i, path) for i, path in todo)
    states |= {i: found for (i, _), found in zip(todo, done, strict=True)}
    checkpoints, last = [], []
    for i, row in enumerate(rows):
        checkpoints += [Checkpoint(state, seen=row.tolist()) for state in states[i]]
        last.append(len(checkpoints) - 1)
    return CrossFitted(checkpoints, sparse.vstack(every).tocsr(), last, float(repeats))


def _names(
    function: TrainFunction,
    rows: Sequence[NDArray[np.int64]],
    seed: int,
    store: str | Path | None,
    version: str | None,
) -> list[str]:
    """A name for each training, of everything that determines it."""
    if store is None:
        return [""] * len(rows)
    try:
        digest = stable_digest(function, "train_function", packages=(_PACKAGE,)) if version is None else ""
        what = digest or f"version {version}"
    except NoStableDigest as error:
        warnings.warn(
            f"These trainings are not found again: {error}. Give `version`, which vouches for the function.",
            stacklevel=3,
        )
        what = secrets.token_hex()
    shared = {"function": what, "torch": torch.__version__, _PACKAGE: __version__}
    found = []
    for i, row in enumerate(rows):
        state = {**shared, "seed": seed + i, "rows": hashlib.sha256(row.tobytes()).hexdigest()}
        found.append(hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:24])
    return found


def _train(
    function: TrainFunction, rows: NDArray[np.int64], seed: int, number: int, path: Path | None
) -> list[State]:
    """Train one model, and write it."""
    with same_random_state(), single_thread():
        torch.manual_seed(seed)
        try:
            states = _states(function(rows, seed))
        except (TypeError, ValueError):
            raise
        except Exception as error:
            raise RuntimeError(
                f"Training {number} of the cross-fitting, on {len(rows)} examples with seed {seed}, failed "
                f"with {type(error).__name__}: {error}"
            ) from error
    for state in states:
        if not all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point()):
            must = "return models with finite weights"
            raise bad_value("train_function", must, f"NaN or infinity in training {number} (seed {seed})")
    if path is not None:
        from safetensors.torch import save_file

        flat = {f"{i}/{name}": t for i, state in enumerate(states) for name, t in state.items()}
        atomic_write(path, lambda name: save_file(flat, name))
    return states


def _states(returned: Any) -> list[State]:
    """What a training function returned, as state dicts."""
    several = isinstance(returned, Sequence) and not isinstance(returned, str | nn.Module)
    found = []
    for model in returned if several else [returned]:
        state = model.state_dict() if isinstance(model, nn.Module) else model
        if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
            must = "return a model, or the models or state dicts along its training"
            raise bad_type("train_function", must, model)
        found.append({name: t.detach().cpu().clone().contiguous() for name, t in state.items()})
    if not found:
        raise bad_value("train_function", "return at least one model", "none")
    return found


def _read(path: Path) -> list[State] | None:
    """The state dicts of a file; None if there is none, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        flat = load_file(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        warnings.warn(f"{path} is cut off or not a file of weights: it is trained again.", stacklevel=3)
        return None
    states: dict[int, State] = {}
    for name, tensor in flat.items():
        number, _, key = name.partition("/")
        states.setdefault(int(number), {})[key] = tensor
    return [states[number] for number in sorted(states)]


@dataclass(frozen=True)
class TaskTraining:
    """The training of a task, as `retrain` takes it.

    Attributes:
        task: Data, network and settings.
        epochs: Passes over the part; None for those of the task.
        along: Whether to return checkpoints along the training, after epochs 1, 2, 3, 5, 8, 12, ...

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> len(TaskTraining(task, along=True)(np.arange(20), 0))
    2
    """

    task: Task
    epochs: int | None = None
    along: bool = False

    def __call__(self, indices: NDArray[np.int64], seed: int) -> list[State]:
        """Train on some examples of the task."""
        settings: TrainingSettings = self.task.training
        if self.epochs is not None:
            settings = replace(settings, epochs=self.epochs)
        x, y = (t[torch.from_numpy(indices)] for t in self.task.train.tensors)
        kept = log_epochs(settings.epochs) if self.along else []
        states: list[State] = []

        def keep(epoch: int, model: nn.Module) -> None:
            if epoch in kept:
                states.append({name: t.clone() for name, t in model.state_dict().items()})

        model = train_model(self.task.build_model, x, y, settings, seed, after_epoch=keep)
        return [*states, dict(model.state_dict())]


def cross_fit(task: Task, number: int, repeats: int, store: str | Path) -> CrossFitted:
    """Models of a task on the halves of `repeats` partitions; each `number` has partitions of its own."""
    seed, version = _FIRST + _APART * number, _version(task)
    n, function = task.n_train, TaskTraining(task)
    return retrain(function, n, repeats=repeats, seed=seed, store=store, version=version)


def cross_fit_paths(task: Task, number: int, repeats: int, store: str | Path) -> list[Path]:
    """The files that `cross_fit` leaves, one for each model."""
    seed = _FIRST + _APART * number
    rows = [members(partition(task.n_train, 2, seed=seed + r), k) for r in range(repeats) for k in range(2)]
    names = _names(TaskTraining(task), rows, seed, store, _version(task))
    return [Path(store) / "cross-fitted" / f"{name}.safetensors" for name in names]


def _version(task: Task) -> str:
    return run_store.Fingerprints(task).of(0, None, "cross-fitted")


def is_stored(path: Path) -> bool:
    """Whether a model of `retrain` can be read from a file."""
    return path.exists() and _read(path) is not None


def check_apart(judges: Membership, used: Membership) -> None:
    """Refuse subsets that judge scores if a model of one of them has entered the scores.

    Args:
        judges: CSR `(n_subsets, n_train)`.
        used: CSR `(n_models, n_train)`.

    Raises:
        ValueError: One is in both.
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
