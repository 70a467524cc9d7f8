"""Owns training one base model from scratch, and reading its logits and its mean residual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import residuals
from ..errors import bad_choice
from .models import TrainingSettings


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

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.models import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> train_model(task.build_model, *task.train.tensors, training, seed=0).training
    False
    """
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        torch.default_generator.manual_seed(seed)
        model = build_model().to(device)
        x, y = x.to(device), y.to(device)
        optimizer = make_optimizer(model.parameters(), training)
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


def make_optimizer(
    parameters: Iterable[Tensor], training: TrainingSettings, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of the settings: "adam", or "sgd" with momentum, both with weight decay.

    Raises:
        ValueError: Another optimizer.

    """
    if training.optimizer == "adam":
        return torch.optim.Adam(
            parameters,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True if fused else None,
        )
    if training.optimizer != "sgd":
        raise bad_choice("optimizer", training.optimizer, ("adam", "sgd"))
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True if fused else None,
    )


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits `(n, n_classes)` of a model in eval mode."""
    return torch.cat([model(batch) for batch in x.split(batch_size)])


def mean_residual(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean residual of a model on a data set (see `stride_captum.residuals`)."""
    return residuals.mean_residual(logits_of(model, x), y)


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute with one thread inside, so that the bits do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
