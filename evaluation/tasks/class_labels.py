"""Conversion of class labels to indices: whole numbers of any type, columns, and one-hot rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import bad_value

_MUST = "hold one class label for each example, a whole number from 0 to C - 1"
_REGRESSION = "For regression take loss='mse' (--loss mse)."
_SEVERAL = "For several labels take loss='binary_cross_entropy' (--loss binary_cross_entropy)."
_NO_LABEL = "Leave out examples that have no label"


def class_indices(labels: Tensor, argument: str, source: str = "", n_classes: int | None = None) -> Tensor:
    """Labels as `(n,)` int64; the same tensor where it is that already.

    Args:
        labels: `(n,)` or `(n, 1)` integers, booleans or whole floats; or one-hot rows `(n, C)`.
        argument: Name of the argument, for errors.
        source: Where the labels come from, for errors, such as " of 'module:factory'".
        n_classes: Classes of the network; None if it is not known yet.

    Returns:
        `(n,)` int64.

    Raises:
        ValueError: Regression targets, soft labels, several labels for one example, missing or negative
            labels, or more classes than the network has.

    >>> class_indices(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "train").tolist()
    [1, 0]
    """
    if labels.is_complex():
        raise bad_value(argument, _MUST, f"{_kind(labels)} labels{source}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        labels = _of_rows(labels, argument, source)
    if labels.ndim != 1:
        remedy = "A label for each position needs a network with a row of outputs for each, (n, P, C)."
        raise bad_value(argument, _MUST, f"labels of shape {tuple(labels.shape)}{source}", remedy)
    if labels.is_floating_point():
        _check_floats(labels, argument, source, n_classes)
    elif labels.dtype != torch.bool and bool((labels.long() < 0).any()):
        raise bad_value(
            argument,
            _MUST,
            f"{_first(labels.long() < 0, labels)}{source}",
            f"{_NO_LABEL}; number the classes from 0.",
        )
    found = labels.long()
    if n_classes is not None and len(found) and int(found.max()) >= n_classes:
        raise bad_value(
            argument,
            f"hold labels below {n_classes}, the number of classes of the network",
            f"{_first(found >= n_classes, labels)}{source}",
            "Number the classes from 0 to C - 1 and give the network C outputs.",
        )
    return found


def is_one_hot(labels: Tensor) -> bool:
    """Whether labels are rows `(n, C)` with a single 1 each, C at least 2."""
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.is_complex():
        return False
    ones = labels == 1
    return bool(((labels == 0) | ones).all()) and bool((ones.sum(1) == 1).all())


def _of_rows(labels: Tensor, argument: str, source: str) -> Tensor:
    if is_one_hot(labels):
        return (labels == 1).long().argmax(1)
    rows = labels.double()
    came = f"{_kind(labels)} rows of shape {tuple(labels.shape)}{source}"
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        remedy = "Ask the methods themselves, which take soft labels."
        raise bad_value(argument, _MUST, f"{came}, which are probabilities", remedy)
    if bool(((rows == 0) | (rows == 1)).all()):
        raise bad_value(argument, _MUST, f"{came} with not one 1 each", _SEVERAL)
    raise bad_value(argument, _MUST, came, _REGRESSION)


def _check_floats(labels: Tensor, argument: str, source: str, n_classes: int | None) -> None:
    missing = ~torch.isfinite(labels)
    if missing.any():
        raise bad_value(argument, _MUST, f"{_first(missing, labels)}{source}", f"{_NO_LABEL}.")
    low, high = labels.min().item(), labels.max().item()
    came = f"{_kind(labels)} targets from {low:.4g} to {high:.4g}"
    remedy = _REGRESSION
    parts = labels != labels.round()
    if parts.any():
        came += f" (such as {labels[parts][0].item():.4g})"
    elif n_classes is not None and high >= n_classes:
        came += f" for a network of {n_classes} classes"
    elif low >= 0:
        return
    else:
        remedy += f" {_NO_LABEL}."
    raise bad_value(argument, _MUST, f"{came}{source}", remedy)


def _first(wrong: Tensor, labels: Tensor) -> str:
    """The first wrong label and its index, and how many labels are wrong."""
    place = int(wrong.long().argmax())
    return f"{labels[place].item():g} (example {place}; {int(wrong.sum())} of {len(labels)} like it)"


def _kind(labels: Tensor) -> str:
    return str(labels.dtype).removeprefix("torch.")
