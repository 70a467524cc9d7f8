"""Training of one model from scratch, its logits, and its mean residual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ... import residuals
from ...losses import Loss
from ..tasks.class_logits import first_logits, has_batch_norm
from ..tasks.networks import TrainingSettings
from ..tasks.new_network import new_network, seeded
from ..tasks.task_loss import is_plain, objective, output_rows


def train_model(
    build_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    training: TrainingSettings,
    seed: int,
    *,
    loss: Loss | None = None,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train a network from scratch, by default with cross-entropy (binary cross-entropy for a single logit).

    The seed determines the initial weights, the order of the batches and Dropout: torch, NumPy and Python's
    `random` are seeded. The caller's random states do not change.

    Args:
        build_model: Gives an untrained network.
        x: Inputs `(n, ...)`.
        y: Labels `(n,)`, int64, or as the loss has them.
        training: Settings of Table 3.
        seed: Seed.
        loss: What it is trained with; None for cross-entropy.
        after_epoch: Called after each epoch with its number (from 1) and the model in eval mode.
        device: Where it is trained.

    Returns:
        The trained model in eval mode.

    Raises:
        TypeError: `build_model` does not return a network, or the network does not return a tensor.
        ValueError: The network cannot read the inputs, has fewer logits than there are classes, or returns
            probabilities.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> train_model(task.build_model, *task.train.tensors, training, seed=0).training
    False
    """
    with seeded(seed, device):
        model = new_network(build_model, seed).to(device)
        x, y = x.to(device), y.to(device)
        n_classes = int(y.max()) + 1 if is_plain(loss) else 0
        optimizer = make_optimizer(model.parameters(), training)
        checked = not is_plain(loss)
        for epoch in range(1, training.epochs + 1):
            model.train()
            for rows in torch.randperm(len(x)).to(device).split(training.batch_size):
                if is_left_out(model, len(rows), len(x), training):
                    continue
                optimizer.zero_grad(set_to_none=True)
                logits = (
                    output_rows(loss, model(x[rows])) if checked else first_logits(model, x[rows], n_classes)
                )
                checked = True
                objective(loss, logits, y[rows]).backward()
                optimizer.step()
            model.eval()
            if after_epoch is not None:
                after_epoch(epoch, model)
    return model


def is_left_out(model: nn.Module, n_rows: int, n_train: int, training: TrainingSettings) -> bool:
    """Whether to skip a step: the last batch is a single example, which BatchNorm cannot normalize."""
    return n_rows == 1 < training.batch_size < n_train and has_batch_norm(model)


def make_optimizer(
    parameters: Iterable[Tensor], training: TrainingSettings, *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of the settings: "adam", or "sgd" with momentum, both with weight decay."""
    if training.optimizer == "adam":
        return torch.optim.Adam(
            parameters,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True if fused else None,
        )
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True if fused else None,
    )


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor, batch_size: int = 1024, loss: Loss | None = None) -> Tensor:
    """Logits `(n, n_classes)` of a model in eval mode, on the device of `x`; `output_rows` with a loss."""
    own = next((p.device for p in model.parameters()), x.device)
    return torch.cat([output_rows(loss, model(batch.to(own))).to(x.device) for batch in x.split(batch_size)])


def mean_residual(model: nn.Module, x: Tensor, y: Tensor, loss: Loss | None = None) -> float:
    """Mean residual, in [0, 1] for classes, of a model on a data set (see `stride_captum.residuals`)."""
    rows = logits_of(model, x, loss=loss)
    if loss is None or is_plain(loss):
        return residuals.mean_residual(rows, y)
    return float(loss.mean_residuals(rows, loss.labels(y, rows.shape[1], "labels"), 1.0).mean())


@contextmanager
def single_thread() -> Iterator[None]:
    """Use one thread inside, so that results do not depend on the number of threads, bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
