"""Owns the trained models that are attributed, kept in the store of the retrainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import bad_value
from ..whole_files import write_whole
from . import run_store
from .base_training import mean_residual, single_thread, train_model
from .tasks import Task


def train_attributed(
    task: Task, seed: int, store: str | Path | None = None, *, spike: bool = False
) -> nn.Module:
    """Train the model that is attributed, on the whole training set (kept in `store` once trained).

    It is trained with a single thread, so that its bits do not depend on the number of threads.

    Args:
        task: What is trained.
        seed: Seed of the training.
        store: Folder for the weights; None keeps nothing. A damaged file is trained again, with a
            warning.
        spike: Keep the weights of the epoch with the highest training loss among the last six
            instead of the last epoch's: a model that was stopped at a bad moment.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.models import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> train_attributed(task, seed=0).training
    False
    """
    from safetensors.torch import save_file

    x, y = task.train.tensors
    path = None
    if store is not None:
        key = run_store.Fingerprints(task).of(seed, None, extra=f"attributed spike={spike}")
        path = Path(store) / f"attributed-{key}.safetensors"
        with torch.random.fork_rng(devices=[]):
            model = task.build_model()
        state, damage = run_store.read_state(path, model)
        if state is not None:
            model.load_state_dict(state)
            return model.eval()
        run_store.say_damaged(path, damage)
    worst: dict[str, Any] = {"residual": -1.0}

    def keep_worst(epoch: int, model: nn.Module) -> None:
        residual = mean_residual(model, x, y)
        if epoch > task.training.epochs - 6 and residual > worst["residual"]:
            worst.update(
                residual=residual, state={k: v.detach().clone() for k, v in model.state_dict().items()}
            )

    with single_thread():
        model = train_model(
            task.build_model, x, y, task.training, seed, after_epoch=keep_worst if spike else None
        )
    if spike:
        model.load_state_dict(worst["state"])
    if path is not None:
        write_whole(path, lambda name: save_file(model.state_dict(), name))
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


def train_checkpoints(task: Task, seed: int, store: str | Path, n_checkpoints: int) -> list[dict[str, Any]]:
    """Checkpoints on the way to an attributed model: the training is repeated and looked at.

    Args:
        task: What is trained.
        seed: Seed of the training of the attributed model.
        store: Folder for the weights.
        n_checkpoints: How many; they are spread evenly over the epochs before the last.

    Returns:
        State dicts in the order of the training, the final weights not among them.

    Raises:
        ValueError: Fewer epochs than checkpoints.

    """
    from safetensors.torch import load_file, save_file

    epochs = task.training.epochs
    kept = [round(epochs * (i + 1) / (n_checkpoints + 1)) for i in range(n_checkpoints)]
    if not kept or kept[0] < 1 or len(set(kept)) < n_checkpoints:
        raise bad_value("n_checkpoints", f"be between 1 and {epochs - 1}", n_checkpoints)
    prints = run_store.Fingerprints(task)
    paths = [
        Path(store) / f"checkpoint-{prints.of(seed, None, extra=f'epoch {epoch}')}.safetensors"
        for epoch in kept
    ]

    def keep(epoch: int, model: nn.Module) -> None:
        if epoch in kept:
            state = model.state_dict()
            write_whole(paths[kept.index(epoch)], lambda name: save_file(state, name))

    with torch.random.fork_rng(devices=[]):
        network = task.build_model()
    if any(run_store.read_state(path, network)[0] is None for path in paths):
        with single_thread():
            x, y = task.train.tensors
            train_model(task.build_model, x, y, task.training, seed, after_epoch=keep)
    return [load_file(path) for path in paths]
