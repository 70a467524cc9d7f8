"""Losses by name."""

from __future__ import annotations

from typing import Any

from ..errors import bad_choice, bad_type
from .base import Loss
from .binary_cross_entropy import BinaryCrossEntropy
from .cross_entropy import CrossEntropy
from .squared_error import MSE

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in (CrossEntropy, BinaryCrossEntropy, MSE)}


def loss_of(loss: Any) -> Loss:
    """The loss behind a name or an object.

    Raises:
        ValueError: Another name.
        TypeError: Another object.

    >>> loss_of("mse").responses
    ('output', 'loss')
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise bad_choice("loss", loss, list(LOSSES))
        return LOSSES[loss]()
    raise bad_type(
        "loss",
        "be a name or a loss of stride_captum.losses",
        loss,
        "Write loss=CrossEntropy(outputs=...).",
    )
