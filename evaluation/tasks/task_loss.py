"""The loss of a task: objective of a batch, outputs as rows, and the response that is measured.

Most tasks are classification with plain cross-entropy (`is_plain`), for which the harness has shortcuts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...errors import bad_type, bad_value
from ...losses import Loss
from ...losses.summed_positions import SummedPositions
from ...responses import response_value
from .class_logits import class_logits

#: Of the mean class weight that divides an objective: a batch of classes of weight 0 has none.
_LEAST_WEIGHT = 1e-12


def is_plain(loss: Loss | None) -> bool:
    """Whether the loss is cross-entropy of logits without options, so that every example has one class."""
    return loss is None or (loss.plain and getattr(loss, "outputs", None) != "probabilities")


def loss_of_methods(loss: Loss) -> Loss:
    """The loss that methods are given: for examples with several positions, that of one position."""
    return loss.position if isinstance(loss, SummedPositions) else loss


def output_rows(loss: Loss | None, outputs: Any) -> Tensor:
    """Outputs of a network as one row for each example, `(n, width)`.

    Raises:
        TypeError: The outputs are not a tensor.
        ValueError: The tensor has a shape that the loss does not take.
    """
    if loss is None or is_plain(loss):
        return class_logits(outputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise bad_type("model", "return a tensor, or an object with a tensor `.logits`", outputs)
    return loss.logits(outputs)


def objective(loss: Loss | None, rows: Tensor, labels: Tensor) -> Tensor:
    """What training minimizes: the mean over examples, and over positions if examples have several.

    Class weights multiply its terms, and their mean divides it, as `torch.nn.CrossEntropyLoss` does without
    label smoothing.

    Args:
        loss: Of the task.
        rows: From `output_rows`, `(n, width)`.
        labels: As the task has them.
    """
    if loss is None or is_plain(loss):
        return F.cross_entropy(rows, labels)
    y = loss.labels(labels, rows.shape[1], "labels")
    n_positions = loss.n_positions if isinstance(loss, SummedPositions) else 1
    if not loss.has_weights:
        return loss.values(rows, y).mean() / n_positions
    n, each, omega = len(rows), loss, loss.weights(y)
    if isinstance(loss, SummedPositions):
        each = loss.position
        rows, y, omega = loss.counted_rows(rows, y, None)
    values = each.values(rows, y)
    if omega is None:
        return values.sum() / (n * n_positions)
    omega = omega.to(values)
    weighed: Tensor = (values * omega).sum() / omega.mean().clamp_min(_LEAST_WEIGHT)
    return weighed / (n * n_positions)


def responses(loss: Loss, outputs: Any, labels: Tensor) -> NDArray[Any]:
    """The default response of the loss (its first) at each test point, `(..., n_test)` float64.

    Args:
        loss: Of the task.
        outputs: `(..., n_test, width)`.
        labels: Of the test points, as the task has them.
    """
    z = torch.as_tensor(np.asarray(outputs, dtype=np.float64))
    response = loss.responses[0]
    flat = z.reshape(-1, *z.shape[-2:])
    asked = loss.asked(flat[0], labels, "label", response)
    found = torch.stack([loss.response_value(rows, asked, response) for rows in flat])
    values: NDArray[Any] = found.reshape(z.shape[:-1]).numpy()
    return values


def response_of(loss: Loss | None, rows: Tensor, labels: Tensor, response: str | None = None) -> Tensor:
    """A response at each test point, `(n,)`.

    Args:
        loss: Of the task; None for cross-entropy.
        rows: From `output_rows`, `(n, width)`.
        labels: As the task has them, `(n, ...)`.
        response: Its name; None for the first of the loss.
    """
    if loss is None or (is_plain(loss) and labels.ndim == 1):
        return response_value(rows, labels, response or "margin")
    response = response or loss.responses[0]
    return loss.response_value(rows, loss.asked(rows, labels, "label", response), response)


def check_outputs(loss: Loss, outputs: Any, labels: Tensor, which: str) -> None:
    """Refuse outputs and labels that do not fit the loss.

    Args:
        loss: Of the task.
        outputs: Of the network for a few examples.
        labels: Of a whole data set.
        which: Name of the data set, for errors.

    Raises:
        TypeError: The outputs are not a tensor.
        ValueError: Outputs or labels have a shape or values that the loss does not take.
    """
    rows = output_rows(loss, outputs)
    if len(rows) != len(outputs):
        raise bad_value("build_model", "return one row of outputs for each example", f"{len(rows)} rows")
    loss.labels(labels, rows.shape[1], which)


def response_in_words(loss: Loss) -> str:
    """The response that LDS is measured on, for a report."""
    if is_plain(loss):
        return "margin of the true class"
    each = ", summed over positions" if isinstance(loss, SummedPositions) else ""
    return f"{loss.responses[0]} ({loss.name}){each}"
