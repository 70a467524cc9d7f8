"""Refusals of weights of examples and classes, by methods whose numbers they would not change."""

from __future__ import annotations

from ..data.reading import Batch
from ..errors import bad_value
from ..losses import Loss


def refuse_weights(name: str, batch: Batch, loss: Loss, why: str, remedy: str) -> None:
    """Refuse weights for a method that counts every training example once.

    Args:
        name: Of the method.
        batch: Which may weigh examples.
        loss: Which may weigh classes or labels.
        why: Why they would change nothing.
        remedy: What to do instead.

    Raises:
        ValueError: There are weights.
    """
    if batch.sample_weight is not None or loss.has_weights or loss.weighs_outputs:
        must = f"be None for {name}, and so must the weights of classes and `pos_weight`: {why}"
        raise bad_value("sample_weight", must, "weights", remedy)
