"""Temperature of tempered residuals: as given, matched to held-out data, or the default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import bad_value
from ..residuals import DEFAULT_TEMPERATURE, match_temperature, mean_residual
from .query import Query

if TYPE_CHECKING:
    from .method import InfluenceMethod


def choose_temperature(
    method: InfluenceMethod,
    model: nn.Module,
    logits: Tensor,
    labels: Tensor,
    temperature: float | None,
    weights: Tensor | None = None,
) -> float:
    """T of a method.

    Args:
        method: Its `held_out` is read, if T is not given.
        model: Its model.
        logits: Of the training set, `(n_train, n_classes)`.
        labels: `(n_train,)`, or `(n_train, n_classes)`.
        temperature: As given, or None.
        weights: omega of each training example, `(n_train,)`; None for 1.

    Raises:
        ValueError: A temperature for a loss that has none.
    """
    if not method.loss.tempered:
        if temperature is not None:
            must = f"be None for loss={method.loss.name!r}, which has no temperature"
            raise bad_value("temperature", must, temperature)
        return 1.0
    if temperature is not None:
        return float(temperature)
    if method.held_out is None:
        return DEFAULT_TEMPERATURE
    residual, seen = 0.0, 0
    for batch in method._batches(method.held_out, "held_out", False, ""):
        outputs = method.batch_logits(model, batch)
        asked = Query("loss", "label").asked(outputs, batch)
        residual += mean_residual(outputs, asked, each=method.loss.mean_residuals) * len(outputs)
        seen += len(outputs)
    whole, n = method.ranks.sums("held-out residual", residual, seen)
    each = method.loss.mean_residuals
    return match_temperature(logits, labels, whole / n, ranks=method.ranks, each=each, weights=weights)
