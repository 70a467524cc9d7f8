"""Attributed models, the trained models whose predictions are explained, and their checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import bad_value
from ...influence.checkpoints.checkpoint import log_positions
from ..tasks.new_network import checked_network
from ..tasks.task import Task
from . import store as run_store
from .spikes import FACTOR, LAST, SPIKE, NoSpikeError, SpikeWatch, no_spike, read_spike, write_spike
from .training import mean_residual, single_thread, train_model

#: The first seed that is tried for such a model, and how many seeds are.
FIRST_SPIKED, TRIES = 100, 30


class DivergedError(ValueError):
    """A training ended in weights that are not finite."""


def train_attributed(
    task: Task,
    seed: int,
    store: str | Path | None = None,
    *,
    spike: bool = False,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train a model on the whole training set, or read it from the store.

    It is trained with a single thread, so that the weights do not depend on the number of threads, bit for
    bit. A network that seeds itself is trained with a warning.

    Args:
        task: What is trained.
        seed: Seed of the training.
        store: Folder for the weights; None keeps nothing. If a file is damaged, its model is trained again,
            with a warning.
        spike: Return the weights on the highest spike of the training loss, instead of those after the last
            epoch: a model that was stopped at a bad moment. A spike is one of the last six epochs, with a
            mean training residual of more than twice the lowest one before.
        device: Where it is trained, and where it is returned. Weights from the CPU and from a GPU differ.

    Raises:
        TypeError: As for `train_model`.
        ValueError: As for `train_model`; or inputs are not finite; or `build_model` returns the same weights
            twice, or different ones for the same seed.
        DivergedError: The trained weights are not finite.
        NoSpikeError: There is no spike.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> train_attributed(task, seed=0).training
    False
    """
    task.check_inputs()
    x, y = task.train.tensors
    network = checked_network(task.build_model, task.train.tensors[0][:2])
    path = None
    if store is not None:
        path = attributed_path(run_store.Fingerprints(task), seed, store, spike, device)
        found, told = read_spike(path) if spike else (None, True)
        if spike and told and found is None:
            raise no_spike(task, seed)
        state, damage = run_store.read_state(path, network)
        if state is not None and told:
            network.load_state_dict(state)
            return network.to(device).eval()
        run_store.say_damaged(path, damage)
    watch = SpikeWatch(task) if spike else None
    with single_thread():
        model = train_model(
            task.build_model,
            x,
            y,
            task.training,
            seed,
            loss=task.loss,
            after_epoch=watch,
            device=device,
        )
    if not run_store.is_finite(model.state_dict(), {name for name, _ in model.named_buffers()}):
        raise DivergedError(
            f"The training of {task.name} with seed {seed} diverged: weights are not finite. Take a lower "
            "`learning_rate`, and look for very large values of the inputs."
        )
    if watch is not None:
        if path is not None and watch.found is None:
            write_spike(path, None)
        if watch.found is None:
            raise no_spike(task, seed)
        model.load_state_dict(watch.state)
    if path is not None:
        run_store.write_state(path, model.state_dict())
        if watch is not None:
            write_spike(path, watch.found)
    return model


def train_spiked(
    task: Task,
    store: str | Path | None = None,
    *,
    threshold: float = SPIKE,
    first_seed: int = FIRST_SPIKED,
    tries: int = TRIES,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, int]:
    """A model stopped on a spike of its training loss; seeds are tried one by one.

    A seed whose training diverges, or has no spike, is skipped.

    Args:
        task: What is trained.
        store: Folder for the weights; None keeps nothing.
        threshold: Smallest mean training residual.
        first_seed: The first seed that is tried.
        tries: How many seeds are tried.
        device: Where it is trained, and where it is returned.

    Returns:
        The model and its seed.

    Raises:
        RuntimeError: No seed gives such a spike.
    """
    x, y = task.train.tensors
    for seed in range(first_seed, first_seed + tries):
        try:
            model = train_attributed(task, seed, store, spike=True, device=device)
        except (DivergedError, NoSpikeError):
            continue
        if mean_residual(model, x, y, task.loss) > threshold:
            return model, seed
    raise RuntimeError(
        f"None of {tries} trainings of {task.name} had a spike with a mean residual above {threshold}: more "
        f"than {FACTOR:g} times the lowest one before, in its last {LAST} epochs. Leave out `n_spiked`."
    )


def spiked_epoch(task: Task, seed: int, store: str | Path, device: torch.device | str = "cpu") -> int | None:
    """The epoch at which a model was stopped on a spike; None if the store does not tell."""
    spike, _ = read_spike(attributed_path(run_store.Fingerprints(task), seed, store, True, device))
    return None if spike is None else spike.epoch


def train_checkpoints(
    task: Task,
    seed: int,
    store: str | Path | None,
    epochs: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Checkpoints along the training of an attributed model, which is repeated for them.

    Args:
        task: What is trained.
        seed: Seed of the training of the attributed model.
        store: Folder for the weights; None keeps nothing.
        epochs: Epochs after which a checkpoint is kept (`even_epochs`, `log_epochs`), in order.
        device: Where the attributed model was trained.

    Returns:
        State dicts on the CPU in the order of the training, without the final weights.

    Raises:
        ValueError: The training does not have such an epoch.
    """
    from safetensors.torch import load_file

    kept = list(epochs)
    if any(not 0 < epoch <= task.training.epochs for epoch in kept):
        raise bad_value("epochs", f"lie between 1 and {task.training.epochs}", kept)
    if store is None:
        with tempfile.TemporaryDirectory() as folder:
            return train_checkpoints(task, seed, folder, epochs, device=device)
    paths = checkpoint_paths(run_store.Fingerprints(task), kept, seed, store, device)

    def keep(epoch: int, model: nn.Module) -> None:
        if epoch in kept:
            run_store.write_state(paths[kept.index(epoch)], model.state_dict())

    network = checked_network(task.build_model, task.train.tensors[0][:2])
    if any(run_store.read_state(path, network)[0] is None for path in paths):
        with single_thread():
            x, y = task.train.tensors
            how = {"loss": task.loss, "after_epoch": keep, "device": device}
            train_model(task.build_model, x, y, task.training, seed, **how)  # type: ignore[arg-type]
    return [load_file(path) for path in paths]


def log_epochs(epochs: int) -> list[int]:
    """Epochs before the last at which checkpoints are worth keeping: 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, ...

    >>> log_epochs(30)
    [1, 2, 3, 5, 8, 12, 20]
    """
    return log_positions(epochs)[:-1]


def even_epochs(epochs: int, n_checkpoints: int) -> list[int]:
    """Epochs before the last that are spread evenly.

    Args:
        epochs: Epochs of the training.
        n_checkpoints: How many are wanted.

    Raises:
        ValueError: The training has fewer epochs.
    """
    kept = [round(epochs * (i + 1) / (n_checkpoints + 1)) for i in range(n_checkpoints)]
    if not kept or kept[0] < 1 or len(set(kept)) < n_checkpoints:
        raise bad_value("n_checkpoints", f"be between 1 and {epochs - 1}", n_checkpoints)
    return kept


def attributed_path(
    names: run_store.Fingerprints, seed: int, store: str | Path, spike: bool, device: torch.device | str
) -> Path:
    """The file of an attributed model."""
    key = names.of(seed, None, f"attributed spike={spike}{_on(device)}")
    return Path(store) / f"attributed-{key}.safetensors"


def checkpoint_paths(
    names: run_store.Fingerprints,
    kept: Sequence[int],
    seed: int,
    store: str | Path,
    device: torch.device | str,
) -> list[Path]:
    """The files of the checkpoints after the epochs that are kept."""
    keys = (names.of(seed, None, f"epoch {epoch}{_on(device)}") for epoch in kept)
    return [Path(store) / f"checkpoint-{key}.safetensors" for key in keys]


def _on(device: torch.device | str) -> str:
    """Suffix for the name of a training on a device."""
    kind = torch.device(device).type
    return "" if kind == "cpu" else f" device={kind}"
