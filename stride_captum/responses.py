"""Owns the scalar that is attributed: its value and its gradient with respect to the logits.

With class c and logits z (n_classes,), p = softmax(z):

    margin            z_c - log sum_{j != c} exp z_j  =  log p_c / (1 - p_c)
    logit             z_c
    probability       p_c
    log-probability   log p_c
    loss              -log p_c

A score is the predicted change of this scalar, so that a training example with a positive score for
"loss" raises the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from .config import Response
from .errors import bad_choice, bad_value
from .residuals import one_hot, tempered_residuals

RESPONSES: tuple[str, ...] = get_args(Response)


def response_value(logits: Tensor, classes: Tensor, response: str) -> Tensor:
    """The response at each row of logits.

    Args:
        logits: `(..., n, n_classes)`.
        classes: Class c of each row, `(n,)` int64.
        response: One of `RESPONSES`.

    Returns:
        `(..., n)`.

    >>> round(response_value(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), "margin").item(), 6)
    2.0
    """
    index = classes.expand(logits.shape[:-1])[..., None]
    if response == "logit":
        return logits.gather(-1, index).squeeze(-1)
    if response == "margin":
        others = logits.scatter(-1, index, float("-inf"))
        return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1)
    log_p = logits.log_softmax(-1).gather(-1, index).squeeze(-1)
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "probability": torch.exp,
        "log-probability": torch.clone,
        "loss": torch.neg,
    }
    if response not in transforms:
        raise bad_choice("response", response, RESPONSES)
    return transforms[response](log_p)


def response_gradient(logits: Tensor, classes: Tensor, response: str) -> Tensor:
    """Gradient of the response with respect to the logits, `(n, n_classes)`.

    Args:
        logits: `(n, n_classes)`.
        classes: `(n,)` int64.
        response: One of `RESPONSES`.
    """
    if response == "logit":
        return one_hot(classes, logits)
    if response == "margin":
        target = one_hot(classes, logits)
        return target - logits.masked_fill(target.bool(), float("-inf")).softmax(-1)
    if response == "log-probability":
        return tempered_residuals(logits, classes)
    if response == "loss":
        return -tempered_residuals(logits, classes)
    if response == "probability":
        p = logits.softmax(-1).gather(-1, classes[:, None])
        return p * tempered_residuals(logits, classes)
    raise bad_choice("response", response, RESPONSES)


def multiclass_logits(outputs: Tensor) -> Tensor:
    """Model outputs as `(n, n_classes)` logits.

    A model with one logit z a row (binary, sigmoid) becomes `(-z/2, z/2)`: the same probabilities,
    and the margin of class 1 is z.

    Raises:
        ValueError: Sequence or scalar outputs, which are not supported.
    """
    if outputs.ndim == 1:
        outputs = outputs[:, None]
    if outputs.ndim != 2:
        raise bad_value(
            "model",
            "return logits of shape (n, n_classes) or, for a binary model, (n, 1)",
            f"shape {tuple(outputs.shape)}",
            "Sequence outputs are not supported: wrap the model so that it returns one row per example.",
        )
    if outputs.shape[1] == 1:
        return torch.cat([-outputs / 2, outputs / 2], dim=1)
    return outputs


def class_labels(labels: Tensor, n_classes: int, argument: str) -> Tensor:
    """Labels as `(n,)` int64 in `[0, n_classes)`.

    Args:
        labels: `(n,)` or `(n, 1)`, integers or whole floats.
        n_classes: Number of classes of the model.
        argument: What an error calls them.

    Raises:
        ValueError: Multi-label or regression targets, or labels out of range.
    """
    flat = labels.squeeze(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1:
        raise bad_value(
            argument,
            "hold one class index per example, shape (n,)",
            f"shape {tuple(labels.shape)}",
            "Multi-label and sequence targets are not supported.",
        )
    if flat.is_floating_point() and not bool((flat == flat.round()).all()):
        raise bad_value(
            argument,
            "hold class indices",
            f"the value {flat[flat != flat.round()][0].item()}",
            "Regression targets are not supported.",
        )
    classes = flat.long()
    if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= n_classes):
        wrong = classes[(classes < 0) | (classes >= n_classes)][0].item()
        raise bad_value(argument, f"hold class indices in [0, {n_classes})", wrong)
    return classes
