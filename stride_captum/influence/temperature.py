"""Temperature of tempered residuals: as given, matched to data that a model has not seen, or the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import bad_value
from ..losses import Loss
from ..losses.summed_positions import SummedPositions
from ..positions import Positions
from ..residuals import (
    CHECKPOINT_RESIDUAL,
    CHECKPOINT_TEMPERATURE,
    DEFAULT_TEMPERATURE,
    match_temperature,
    residual_sums,
)
from .checkpoints.checkpoint import Checkpoint, unseen_by

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
    - with `held_out`, matched to the mean residual there (weighted, as that of the training set is);
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
    at = _mean_residual_at(method, logits, labels, weights)
    return match_temperature(at, CHECKPOINT_RESIDUAL, high=CHECKPOINT_TEMPERATURE)


def _mean_residual_at(
    method: InfluenceMethod, logits: Tensor, labels: Tensor, weights: Tensor | None
) -> Callable[[float], float]:
    """Mean residual of examples at a temperature, over all processes; of positions, where they have several.

    Raises:
        ValueError: (by the function) No label counts.
    """
    loss, logits, labels, weights = _rows(method.loss, logits, labels, weights)

    def mean_at(temperature: float) -> float:
        sums = residual_sums(logits, labels, temperature, loss.mean_residuals, weights)
        total, size = method.ranks.sums("mean residual", *sums)
        if size == 0:
            must = "hold a label that counts, with a weight above 0, to match a temperature"
            raise bad_value("train_dataset", must, "none")
        return total / size

    return mean_at


def _rows(
    loss: Loss, logits: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Loss, Tensor, Tensor, Tensor | None]:
    """One row for each label that counts, and the loss of such a row."""
    if isinstance(loss, SummedPositions):
        return loss.position, *loss.counted_rows(logits, labels, weights)
    return loss, logits, labels, weights


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
    if bool(seen.all()):
        raise bad_value("seen", "leave out some training examples", "all of them", "Give None for all.")
    mine = seen[method._own_columns()]
    mine = mine if positions is None else positions.spread(mine)

    def mean_of(rows: Tensor) -> Callable[[float], float]:
        few = [None if part is None else part[rows.to(part.device)] for part in (logits, labels, weights)]
        return _mean_residual_at(method, *few)  # type: ignore[arg-type]

    omega = torch.ones(len(mine), dtype=torch.float64, device="cpu") if weights is None else weights.cpu()
    sums = method.ranks.sums("weights of examples", *(float(omega[rows].sum()) for rows in (~mine, mine)))
    for kind, weight in zip(("left out", "seen"), sums, strict=True):
        if weight == 0:
            must = "leave out and hold examples with a label and a weight above 0"
            remedy = "Give None for all examples, or a `temperature`."
            raise bad_value("seen", must, f"none of these among those that are {kind}", remedy)
    outside, inside = mean_of((~mine).nonzero()[:, 0]), mean_of(mine.nonzero()[:, 0])
    return match_temperature(inside, outside(1.0))


def _matched_to_held_out(
    method: InfluenceMethod, model: nn.Module, logits: Tensor, labels: Tensor, weights: Tensor | None
) -> float:
    residual, seen = 0.0, 0.0
    for batch in method._batches(method.held_out, "held_out", False, ""):
        outputs, asked, own = method.labeled_rows(model, batch)
        loss, outputs, asked, own = _rows(method.loss, outputs, asked, own)
        total, size = residual_sums(outputs, asked, each=loss.mean_residuals, weights=own)
        residual, seen = residual + total, seen + size
    whole, n = method.ranks.sums("held-out residual", residual, seen)
    if n == 0:
        raise bad_value("held_out", "hold an example with a weight above 0", "weights that are all 0")
    return match_temperature(_mean_residual_at(method, logits, labels, weights), whole / n)
