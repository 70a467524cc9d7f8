"""Temperature of tempered residuals: as given, matched to data that a model has not seen, or the default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import bad_value
from ..positions import Positions
from ..residuals import (
    CHECKPOINT_RESIDUAL,
    CHECKPOINT_TEMPERATURE,
    DEFAULT_TEMPERATURE,
    match_temperature,
    mean_residual,
)
from .checkpoints import Checkpoint, unseen_by

if TYPE_CHECKING:
    from .method import InfluenceMethod


def choose_temperature(
    method: InfluenceMethod,
    model: nn.Module,
    logits: Tensor,
    labels: Tensor,
    temperature: float | None,
    weights: Tensor | None = None,
    positions: Positions | None = None,
) -> float:
    """T of a method at the checkpoint that it is fitted to.

    - as given;
    - for a `Checkpoint` that has not seen all examples, matched to the mean residual of the others;
    - with `held_out`, matched to the mean residual there;
    - for one of several checkpoints, such that the mean residual of the training set is at least
      `CHECKPOINT_RESIDUAL`, but at most `CHECKPOINT_TEMPERATURE`: a network that has hardly learned needs no
      temperature, and one that has learned everything by heart needs 2;
    - else `DEFAULT_TEMPERATURE`.

    Args:
        method: Its `held_out` is read if it is needed.
        model: Its model.
        logits: Of the training set, `(n_train, n_classes)`.
        labels: `(n_train,)`, or `(n_train, n_classes)`.
        temperature: As given, or None.
        weights: omega of each training example, `(n_train,)`; None for 1.
        positions: Where all these have one row for each position: which belong to an example.

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
    checkpoint = method._checkpoints()[method._checkpoint_index]
    if isinstance(checkpoint, Checkpoint) and checkpoint.seen is not None:
        return _matched_to_unseen(method, logits, labels, checkpoint, weights, positions)
    if method.held_out is not None:
        return _matched_to_held_out(method, model, logits, labels, weights)
    if len(method._checkpoints()) == 1:
        return DEFAULT_TEMPERATURE
    return match_temperature(
        logits,
        labels,
        CHECKPOINT_RESIDUAL,
        high=CHECKPOINT_TEMPERATURE,
        ranks=method.ranks,
        each=method.loss.mean_residuals,
        weights=weights,
    )


def _matched_to_unseen(
    method: InfluenceMethod,
    logits: Tensor,
    labels: Tensor,
    checkpoint: Checkpoint,
    weights: Tensor | None,
    positions: Positions | None,
) -> float:
    """T at which examples that the model has seen have the mean residual of those that it has not."""
    n_own = len(labels) if positions is None else len(positions)
    n_train = int(method.ranks.sums("number of examples", n_own)[0])
    seen = ~unseen_by(checkpoint, n_train)
    if bool(seen.all()) or not bool(seen.any()):
        must = "leave out some training examples, and hold some"
        raise bad_value("seen", must, f"{int(seen.sum())} of {n_train}", "Give None for all of them.")
    mine = seen[method._own_columns()]
    mine = mine if positions is None else positions.spread(mine)
    outside, inside = ((~mine).nonzero()[:, 0], mine.nonzero()[:, 0])

    def some(rows: Tensor) -> dict[str, Any]:
        omega = None if weights is None else weights[rows.to(weights.device)]
        chosen = {"logits": logits[rows.to(logits.device)], "labels": labels[rows.to(labels.device)]}
        return {**chosen, "weights": omega, "ranks": method.ranks, "each": method.loss.mean_residuals}

    return match_temperature(target=mean_residual(**some(outside)), **some(inside))


def _matched_to_held_out(
    method: InfluenceMethod, model: nn.Module, logits: Tensor, labels: Tensor, weights: Tensor | None
) -> float:
    residual, seen = 0.0, 0
    for batch in method._batches(method.held_out, "held_out", False, ""):
        outputs, asked = method.labeled_rows(model, batch)
        residual += mean_residual(outputs, asked, each=method.loss.mean_residuals) * len(outputs)
        seen += len(outputs)
    whole, n = method.ranks.sums("held-out residual", residual, seen)
    each = method.loss.mean_residuals
    return match_temperature(logits, labels, whole / n, ranks=method.ranks, each=each, weights=weights)
