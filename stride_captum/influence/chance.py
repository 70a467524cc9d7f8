"""Accuracy at chance level: a model that has learned nothing makes every score meaningless."""

from __future__ import annotations

import math

from torch import Tensor


def at_chance(predicted: Tensor, labels: Tensor) -> str | None:
    """Why a model has learned nothing of its own training set; None where it has.

    It is compared with a constant answer, the most frequent class, on the examples where the two differ:
    the model must be right there more often than wrong, by two standard errors of a fair coin.

    Args:
        predicted: Classes, `(n,)`.
        labels: `(n,)`.

    >>> import torch
    >>> at_chance(torch.zeros(4), torch.tensor([0, 0, 0, 1]))
    'it is right for 75.0% of its training examples, and 75.0% have the most frequent label'
    >>> at_chance(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 1, 0])) is None
    True
    """
    classes, counts = labels.unique(return_counts=True)
    right, frequent = predicted == labels, labels == classes[counts.argmax()]
    if len(classes) > 1 and bool(right.all()):
        return None
    better, worse = int((right & ~frequent).sum()), int((~right & frequent).sum())
    if better - worse > 2 * math.sqrt(better + worse):
        return None
    shares = (float(which.double().mean()) for which in (right, frequent))
    own, constant = (f"{share:.1%}" for share in shares)
    return f"it is right for {own} of its training examples, and {constant} have the most frequent label"
