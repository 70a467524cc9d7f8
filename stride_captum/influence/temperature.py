"""Temperature of tempered residuals: as given, matched to held-out data, or the default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..residuals import DEFAULT_TEMPERATURE, match_temperature, mean_residual
from .query import Query

if TYPE_CHECKING:
    from .method import InfluenceMethod


def choose_temperature(
    method: InfluenceMethod, model: nn.Module, logits: Tensor, labels: Tensor, temperature: float | None
) -> float:
    """T of a method.

    Args:
        method: Its `held_out` is read, if T is not given.
        model: Its model.
        logits: Of the training set, `(n_train, n_classes)`.
        labels: `(n_train,)`.
        temperature: As given, or None.
    """
    if temperature is not None:
        return float(temperature)
    if method.held_out is None:
        return DEFAULT_TEMPERATURE
    residual, seen = 0.0, 0
    for batch in method._batches(method.held_out, "held_out", False, ""):
        outputs = method.batch_logits(model, batch)
        classes = Query("loss", "label").classes(outputs, batch)
        residual += mean_residual(outputs, classes) * len(outputs)
        seen += len(outputs)
    whole, n = method.ranks.sums("held-out residual", residual, seen)
    return match_temperature(logits, labels, whole / n, ranks=method.ranks)
