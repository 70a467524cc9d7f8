"""What is asked about test points: the response, its class, and how scores are normalized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..data.batch import ExampleBatch
from ..errors import bad_type, bad_value
from ..layers.activations import token_mask
from ..losses.base import Loss
from ..losses.positions import check_weight_shape
from ..losses.summed_positions import SummedPositions
from ..positions import Positions


class Default(Enum):
    """The value of an argument that is not given, if None has a meaning of its own."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final = Default.DEFAULT


@dataclass(frozen=True)
class Query:
    """What is asked about a batch of test points.

    Attributes:
        response: The scalar that is attributed.
        target: "label", "predicted", or the class (or output) of each test point of the batch, `(n,)` int64.
    """

    response: str
    target: str | Tensor

    def asked(self, logits: Tensor, batch: ExampleBatch) -> Tensor:
        """What the response is about at each test point, as the loss says it (`Loss.asked`).

        Args:
            logits: `(n, n_classes)`.
            batch: The batch that gave them.

        Returns:
            With cross-entropy the class c, `(n,)` int64.
        """
        loss, labels = batch.reading.loss, batch.labels
        if not isinstance(loss, SummedPositions):
            return self.asked_of_rows(loss, logits, labels, None)
        weights, padding = asked_weights(batch), None if labels is not None else token_mask(batch)
        check_weight_shape(weights, (len(logits), loss.n_positions))
        return loss.asked(logits, labels, self.target, self.response, weights, padding)

    def asked_of_rows(
        self, loss: Loss, logits: Tensor, labels: Tensor | None, positions: Positions | None
    ) -> Tensor:
        """What the response is about at each row: that of its example, if examples have several positions.

        Args:
            loss: What the model was trained with.
            logits: `(n_rows, n_outputs)`.
            labels: Of the rows, as the data set has them.
            positions: Rows of each test point; None for one.
        """
        target = self.target
        if positions is None:
            if labels is not None and len(labels) != len(logits):
                raise bad_value("inputs", f"carry one label for each of {len(logits)} examples", len(labels))
        elif isinstance(target, Tensor):
            target = positions.spread(target)
        return loss.asked(logits, labels, target, self.response)

    def classes(self, logits: Tensor, batch: ExampleBatch) -> Tensor:
        """The class c of each test point, `(n,)` int64, whatever the response is.

        Raises:
            ValueError: A loss without classes.
        """
        batch.reading.loss.refuse("this method", "which asks for the class of a test point")
        found = self.asked(logits, batch)
        return found if found.ndim == 1 else found.argmax(1)


def weights_of(batch: ExampleBatch) -> Tensor | None:
    """Weights of training examples, and of others if they stand in the batch; None for 1."""
    return batch.weights if batch.columns is not None or batch.has_weights else None


def asked_weights(batch: ExampleBatch) -> Tensor | None:
    """Weights of the positions of test points, `(n, P)`: one of weight 0 is not asked about; None for 1.

    Whole test points are asked about with any weight.
    """
    own = weights_of(batch)
    return None if own is None or own.ndim == 1 else own


def check_query(loss: Loss, response: str, normalize: str | None) -> None:
    """Refuse what cannot be asked of any method.

    Raises:
        ValueError: A response or a normalization that does not exist.
    """
    loss.check_response(response)
    if normalize not in (None, "cosine", "deviation"):
        raise bad_value("normalize", "be None, 'cosine' or 'deviation'", repr(normalize))


def checked_target(target: Any) -> str | Tensor:
    """A target as a name, or as class indices: one for all test points, `()`, or one for each, `(n,)`.

    Args:
        target: A name, an index, or indices `(n,)` or `(n, 1)`.

    Raises:
        ValueError: Another name, or indices of another shape.
        TypeError: Another object.
    """
    if isinstance(target, str):
        if target not in ("label", "predicted"):
            raise bad_value("target", "be 'label', 'predicted' or class indices", repr(target))
        return target
    numeric = isinstance(target, int | Sequence | Tensor | np.ndarray | np.integer)
    if isinstance(target, bool) or not numeric:
        raise bad_type("target", "be 'label', 'predicted' or class indices", target)
    try:
        found = torch.as_tensor(target)
    except (TypeError, ValueError) as error:
        raise bad_value("target", "be 'label', 'predicted' or class indices", repr(target)) from error
    if found.dtype == torch.bool:
        raise bad_value("target", "be 'label', 'predicted' or class indices", repr(target), "Write 0 and 1.")
    found = found.squeeze(1) if found.ndim == 2 and found.shape[1] == 1 else found
    if found.ndim > 1:
        must = "hold one class or output for each test point, shape (n,)"
        remedy = "Labels of several positions, or of several outputs, go into `inputs`, as in (x, y)."
        raise bad_value("target", must, f"shape {tuple(found.shape)}", remedy)
    return found


def slice_target(target: str | Tensor, start: int, n: int) -> str | Tensor:
    """The target of test points `start, ..., start + n - 1`."""
    if isinstance(target, str):
        return target
    if target.ndim == 0:
        return target.expand(n)
    piece = target[start : start + n]
    if len(piece) != n:
        raise bad_value(
            "target", "hold one class per test point", f"{len(target)} classes for more test points"
        )
    return piece
