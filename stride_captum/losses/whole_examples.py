"""The loss of whole examples, from that of one position and the outputs of the model."""

from __future__ import annotations

from torch import Tensor

from .base import Loss
from .positions import channels_last, has_positions
from .summed_positions import SummedPositions


def loss_of_outputs(loss: Loss, outputs: Tensor) -> Loss:
    """`SummedPositions` where outputs have several positions an example; else the loss as it is.

    Args:
        loss: Of one position.
        outputs: Of the model for a few examples, `(n, P, C)`, `(n, C, H, W)` or `(n, C)`.
    """
    if isinstance(loss, SummedPositions) or not has_positions(outputs):
        return loss
    last = channels_last(outputs, loss.class_dim)
    return SummedPositions(
        position=loss,
        n_positions=last[0, ..., 0].numel(),
        n_outputs=loss.logits(last.reshape(-1, last.shape[-1])).shape[1],
        shape=tuple(outputs.shape[1:]),
    )
