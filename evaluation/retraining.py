"""Owns training from scratch: one model, or a plan of subsets x seeds whose results live on disk.

A `RetrainingPlan` is the ground truth of every measure that asks "what would the model have said
without these examples?". Each run is one file, written atomically and named by a fingerprint of all
that determines it, so that a killed plan resumes and a store made with other data or settings is
never mistaken for this one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .. import residuals
from ..errors import bad_choice, bad_value
from ..subsets import Membership, members
from .models import TrainingSettings
from .tasks import Task

#: Increased whenever `train_model` changes what it computes.
_RECIPE = 1


def train_model(
    build_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    training: TrainingSettings,
    seed: int,
    *,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train a network from scratch with cross-entropy.

    The seed decides the initial weights, the order of the batches and Dropout; the caller's random
    state is left as it was.

    Args:
        build_model: Gives an untrained network.
        x: Inputs `(n, ...)`.
        y: Labels `(n,)`, int64.
        training: Settings of Table 3.
        seed: Seed.
        after_epoch: Called with the epoch (from 1) and the model in eval mode.
        device: Where it is trained.

    Returns:
        The trained model in eval mode.

    """
    with torch.random.fork_rng(devices=[] if torch.device(device).type != "cuda" else None):
        torch.manual_seed(seed)
        model = build_model().to(device)
        x, y = x.to(device), y.to(device)
        optimizer = _optimizer(model, training)
        for epoch in range(1, training.epochs + 1):
            model.train()
            for rows in torch.randperm(len(x)).to(device).split(training.batch_size):
                if len(rows) == 1 and len(x) > 1:
                    continue  # BatchNorm cannot normalise a single example
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            model.eval()
            if after_epoch is not None:
                after_epoch(epoch, model)
    return model


def _optimizer(model: nn.Module, training: TrainingSettings) -> torch.optim.Optimizer:
    if training.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
    if training.optimizer != "sgd":
        raise bad_choice("optimizer", training.optimizer, ("adam", "sgd"))
    return torch.optim.SGD(
        model.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits `(n, n_classes)` of a model in eval mode."""
    return torch.cat([model(batch) for batch in x.split(batch_size)])


def mean_residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean residual of a model on a data set (see `stride_captum.residuals`)."""
    return residuals.mean_residual(logits_of(model, x), y)


def train_attributed(
    task: Task, seed: int, store: str | Path | None = None, *, spike: bool = False
) -> nn.Module:
    """Train the model that is attributed, on the whole training set (kept in `store` once trained).

    Args:
        task: What is trained.
        seed: Seed of the training.
        store: Folder for the weights; None keeps nothing.
        spike: Keep the weights of the epoch with the highest training loss among the last six
            instead of the last epoch's: a model that was stopped at a bad moment.

    """
    from safetensors.torch import save_file

    x, y = task.train.tensors
    key = _fingerprint(task, seed, None, extra=f"attributed spike={spike}")
    path = None if store is None else Path(store) / f"attributed-{key}.safetensors"
    state = None if path is None else _read_state(path)
    if state is not None:
        with torch.random.fork_rng(devices=[]):
            model = task.build_model()
        model.load_state_dict(state)
        return model.eval()
    worst: dict[str, Any] = {"residual": -1.0}

    def keep_worst(epoch: int, model: nn.Module) -> None:
        residual = mean_residual(model, x, y)
        if epoch > task.training.epochs - 6 and residual > worst["residual"]:
            worst.update(
                residual=residual, state={k: v.detach().clone() for k, v in model.state_dict().items()}
            )

    model = train_model(
        task.build_model, x, y, task.training, seed, after_epoch=keep_worst if spike else None
    )
    if spike:
        model.load_state_dict(worst["state"])
    if path is not None:
        _write_atomically(path, lambda name: save_file(model.state_dict(), name))
    return model


def train_spiked(
    task: Task,
    store: str | Path | None = None,
    *,
    threshold: float = 0.005,
    first_seed: int = 100,
    tries: int = 30,
) -> tuple[nn.Module, int]:
    """A model stopped on a spike of its training loss: mean training residual above `threshold`.

    Returns:
        The model and the seed that gave it.

    Raises:
        RuntimeError: No seed among `tries` has such a spike.

    """
    x, y = task.train.tensors
    for seed in range(first_seed, first_seed + tries):
        model = train_attributed(task, seed, store, spike=True)
        if mean_residual(model, x, y) > threshold:
            return model, seed
    raise RuntimeError(f"None of {tries} trainings of {task.name} had a mean residual above {threshold}.")


@dataclass(frozen=True)
class RetrainingPlan:
    """Retrain a task from scratch on every subset with every seed.

    Attributes:
        task: What is retrained.
        membership: Which examples each subset keeps, CSR `(n_subsets, n_train)`.
        n_seeds: Independent retrainings of each subset.
        store: Folder of the results.
        n_test: The first `n_test` test points are evaluated.

    Raises:
        ValueError: The membership is of another training set, or a count is out of range.

    """

    task: Task
    membership: Membership
    n_seeds: int
    store: Path
    n_test: int

    def __post_init__(self) -> None:
        if self.membership.shape[1] != self.task.n_train:
            raise bad_value(
                "membership", f"have n_train = {self.task.n_train} columns", self.membership.shape[1]
            )
        if self.n_seeds < 1:
            raise bad_value("n_seeds", "be at least 1", self.n_seeds)
        if not 1 <= self.n_test <= len(self.task.test):
            raise bad_value("n_test", f"be between 1 and the {len(self.task.test)} test points", self.n_test)

    def _path(self, k: int, seed: int) -> Path:
        key = _fingerprint(
            self.task, self._seed(k, seed), members(self.membership, k), extra=f"n_test={self.n_test}"
        )
        return Path(self.store) / f"run-{key}.npy"

    @staticmethod
    def _seed(k: int, seed: int) -> int:
        return 1_000_003 * (seed + 1) + k

    def missing(self) -> list[tuple[int, int]]:
        """The runs `(subset, seed)` that are not in the store, or whose file is damaged."""
        runs = [(k, s) for s in range(self.n_seeds) for k in range(self.membership.shape[0])]
        return [run for run in runs if _read(self._path(*run), self.n_test) is None]

    def execute(self, n_jobs: int = -1, show_progress: bool = True) -> NDArray[np.float32]:
        """Do the missing runs through joblib and read all of them.

        Another joblib backend (dask, ray) is chosen by `joblib.parallel_config` around the call.

        Returns:
            Logits `(n_seeds, n_subsets, n_test, n_classes)`.

        """
        Path(self.store).mkdir(parents=True, exist_ok=True)
        todo = self.missing()
        x, y = (t.numpy() for t in self.task.train.tensors)
        x_test = self.task.test.tensors[0][: self.n_test].numpy()
        calls = (
            joblib.delayed(_run)(
                self._path(k, s),
                self.task.build_model,
                self.task.training,
                x,
                y,
                members(self.membership, k),
                x_test,
                self._seed(k, s),
            )
            for k, s in todo
        )
        results = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")(calls)
        for _ in tqdm(results, total=len(todo), desc="retraining", disable=not show_progress or not todo):
            pass
        shape = (self.n_seeds, self.membership.shape[0])
        return np.stack(
            [np.stack([np.load(self._path(k, s)) for k in range(shape[1])]) for s in range(shape[0])]
        )


def _run(
    path: Path,
    build_model: Callable[[], nn.Module],
    training: TrainingSettings,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    rows: NDArray[np.int64],
    x_test: NDArray[np.float32],
    seed: int,
) -> None:
    """One retraining in a worker: a single thread, so that the bits do not depend on the machine's load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = train_model(build_model, torch.tensor(x[rows]), torch.tensor(y[rows]), training, seed)
        logits = logits_of(model, torch.tensor(x_test)).numpy()
    finally:
        torch.set_num_threads(threads)

    def write(name: str) -> None:
        with open(name, "wb") as file:
            np.save(file, logits)

    _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        write(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read(path: Path, n_test: int) -> NDArray[np.float32] | None:
    """The stored logits, or None where the file is missing or was cut off."""
    try:
        logits: NDArray[np.float32] = np.load(path)
    except (FileNotFoundError, ValueError, EOFError, OSError):
        return None
    return logits if logits.shape[0] == n_test else None


def _read_state(path: Path) -> dict[str, Tensor] | None:
    """The stored weights, or None where the file is missing or was cut off."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return state


_DATA_HASHES: dict[int, tuple[Any, list[int], str]] = {}


def _data_hash(tensors: tuple[Tensor, ...]) -> str:
    known = _DATA_HASHES.get(id(tensors))
    versions = [t._version for t in tensors]
    if known is not None and known[0] is tensors and known[1] == versions:
        return known[2]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    _DATA_HASHES[id(tensors)] = (tensors, versions, digest.hexdigest())
    return digest.hexdigest()


def _fingerprint(task: Task, seed: int, rows: NDArray[np.int64] | None, extra: str) -> str:
    """SHA-256 (24 hex digits) of all that determines a run."""
    with torch.random.fork_rng(devices=[]):
        network = repr(task.build_model())
    digest = hashlib.sha256()
    state = {
        "recipe": _RECIPE,
        "data": [_data_hash(task.train.tensors), _data_hash(task.test.tensors)],
        "training": asdict(task.training),
        "model": inspect.getsource(task.build_model) + network,
        "seed": seed,
        "rows": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest(),
        "extra": extra,
    }
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()[:24]
