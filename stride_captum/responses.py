"""Responses: the scalar that is attributed, and its gradient with respect to the logits.

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
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import bad_choice, bad_value
from .residuals import one_hot, tempered_residuals

Response = Literal["margin", "logit", "probability", "log-probability", "loss"]
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
        ValueError: Outputs with several rows an example, or none.
    """
    if outputs.ndim == 1:
        outputs = outputs[:, None]
    if outputs.ndim != 2:
        raise not_one_row(outputs, "logits of shape (n, n_classes) or, for a binary model, (n, 1)")
    if outputs.shape[1] == 1:
        return torch.cat([-outputs / 2, outputs / 2], dim=1)
    return outputs


def not_one_row(outputs: Tensor, wanted: str) -> ValueError:
    """The error for outputs with several positions an example, or none, given to a method that wants rows."""
    kinds = {3: "one row for each position, as of a sequence", 4: "a map, as of a segmentation"}
    kind = f" ({kinds[outputs.ndim]})" if outputs.ndim in kinds else ""
    remedy = "Wrap the model so that it returns one row for each example"
    remedy += ", or use STRIDE with closed-form operators, which take positions." if kind else "."
    return bad_value("model", f"return {wanted}", f"shape {tuple(outputs.shape)}{kind}", remedy)


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
            _labels_of_another_kind(labels),
        )
    real = flat.is_floating_point() or flat.is_complex()
    if real and not bool((flat == flat.round()).all()):
        wrong = flat[flat != flat.round()][0].item()
        raise bad_value(
            argument, "hold class indices", f"the value {wrong}", "Targets of a regression need loss='mse'."
        )
    classes = flat.long()
    outside = (classes < 0) | (classes >= n_classes)
    if bool(outside.any()):
        wrong = flat[outside][0].item()
        remedy = None
        if real or (n_classes <= 2 and len(flat[outside].unique()) > 1):
            remedy = "Whole numbers that are no classes look like a regression, which needs loss='mse'."
        elif wrong < 0:
            remedy = "Leave out examples without a label (-1, -100, ...)."
        raise bad_value(argument, f"hold class indices in [0, {n_classes})", wrong, remedy)
    return classes


def _labels_of_another_kind(labels: Tensor) -> str:
    """What labels with more than one number an example are likely to be."""
    if labels.ndim == 0:
        return "Write y[:1] instead of y[0]."
    if labels.ndim > 2:
        return "Labels of positions need outputs (n, positions, classes), or (n, classes, height, width)."
    if not labels.is_floating_point() or bool(((labels == 0) | (labels == 1)).all()):
        if bool((labels.sum(1) == 1).all()):
            return "One-hot labels: write labels.argmax(1)."
        return "Several labels for an example need loss='binary_cross_entropy'."
    return "Soft labels need one column for each class; targets of a regression need loss='mse'."
