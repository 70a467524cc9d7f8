"""Precomputed features in the place of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..errors import bad_value
from ..losses import CrossEntropy, OutputCheck
from ..responses import class_labels
from ..system.memory import MOST_ROWS, blocks
from .store_files import as_tensor


class PrecomputedNetwork(nn.Module):
    """Stands for a network whose features and logits are known: `forward(features, logits) -> logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Pass both through."""
        self.features(features)
        return logits


@dataclass(frozen=True)
class Precomputed:
    """Features, logits and labels of a training set.

    Attributes:
        features: `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`.
        labels: `(n_train,)` int64.
        widths: Widths of the layers that the columns come from.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]

    @classmethod
    def checked(
        cls, features: Any, logits: Any, labels: Any, widths: Sequence[int] | None, loss: CrossEntropy
    ) -> tuple[Precomputed, TensorDataset]:
        """Look at what the user has given; returns it with a data set of it as it came.

        Raises:
            ValueError: Shapes that do not fit one another, or probabilities that are not declared.
        """
        features, logits, labels = (as_tensor(a) for a in (features, logits, labels))
        for name, value, ndim in (("features", features, 2), ("logits", logits, 2), ("labels", labels, 1)):
            if value.ndim != ndim or len(value) != len(features):
                raise bad_value(
                    name,
                    f"have {ndim} dimensions and n_train = {len(features)} rows",
                    f"shape {tuple(value.shape)}",
                )
        widths = [features.shape[1]] if widths is None else list(widths)
        if sum(widths) != features.shape[1]:
            raise bad_value("widths", f"add up to n_features = {features.shape[1]}", sum(widths))
        check = OutputCheck(loss, None)
        for rows in blocks(len(logits), MOST_ROWS):
            check.look(logits[rows], rows.start)
        check.finish()
        multiclass = loss.logits(logits)
        classes = class_labels(labels, multiclass.shape[1], "labels")
        return cls(features, multiclass, classes, widths), TensorDataset(features, logits, labels)
