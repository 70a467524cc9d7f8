"""What a task is trained with: the objective of a batch, outputs as rows, and the response that is measured.

Classification with plain cross-entropy is the usual case, for which the harness has faster ways (`is_plain`).
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
from .class_logits import class_logits


def is_plain(loss: Loss | None) -> bool:
    """Whether examples have one class each, and the loss is cross-entropy without options."""
    return loss is None or loss.plain


def loss_of_methods(loss: Loss) -> Loss:
    """What methods are given: of an example with several positions, the loss of one."""
    return loss.position if isinstance(loss, SummedPositions) else loss


def output_rows(loss: Loss | None, outputs: Any) -> Tensor:
    """Outputs of a network as one row for each example, `(n, width)`.

    Raises:
        TypeError: Outputs that are no tensor.
        ValueError: A tensor of another shape.
    """
    if loss is None or loss.plain:
        return class_logits(outputs)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise bad_type("model", "return a tensor, or an object with a tensor `.logits`", outputs)
    return loss.logits(outputs)


def objective(loss: Loss | None, rows: Tensor, labels: Tensor) -> Tensor:
    """What training minimizes: the mean over the examples, with several positions over all of these."""
    if loss is None or loss.plain:
        return F.cross_entropy(rows, labels)
    values = loss.values(rows, loss.labels(labels, rows.shape[1], "labels"))
    return values.mean() / (loss.n_positions if isinstance(loss, SummedPositions) else 1)


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


def check_outputs(loss: Loss, outputs: Any, labels: Tensor, which: str) -> None:
    """Refuse a network and labels that the loss cannot compare.

    Raises:
        TypeError: Outputs that are no tensor.
        ValueError: They do not fit.
    """
    rows = output_rows(loss, outputs)
    if len(rows) != len(outputs):
        raise bad_value("build_model", "return one row of outputs for each example", len(rows))
    loss.labels(labels, rows.shape[1], which)


def response_in_words(loss: Loss) -> str:
    """What LDS compares predictions of, for a report."""
    if is_plain(loss):
        return "margin of the true class"
    each = ", summed over positions" if isinstance(loss, SummedPositions) else ""
    return f"{loss.responses[0]} ({loss.name}){each}"
