"""Residuals of a training set: computed block by block, and kept only if they fit a budget.

They are those of the loss (`Loss.residuals`), or of a ridge head that has not seen the example, times omega.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..losses import Loss
from ..residuals import RIDGE_SHARE
from ..system.to_device import TrainingBlocks
from .ridge_head import RidgeHead


@dataclass
class TrainingResiduals:
    """What stands for `e_y - p` of each training example (`residuals`), in a given unit.

    Attributes:
        data: The training set; residuals are in the dtype of its products.
        head: Ridge head on its features.
        kind: The option `residuals`.
        temperature: T.
        ridge_ratio: Factor of the ridge part of "both": a number, or one an output.
        unit: What they are divided by.
        most_bytes: They are kept if they take no more.
        loss: What the model was trained with.
    """

    data: TrainingBlocks
    head: RidgeHead
    kind: str
    temperature: float
    ridge_ratio: float | Tensor
    unit: float
    most_bytes: int
    loss: Loss

    def of(self, rows: slice) -> Tensor:
        """Residuals of some rows, `(n_rows, n_classes)`."""
        return self._computed(rows) if self.kept is None else self.kept[rows]

    def of_loss(self, rows: slice) -> Tensor:
        """`e_y - p` of some rows at T = 1, `(n_rows, n_classes)` float64, in no unit and without omega."""
        return self.loss.residuals(self.data.logits_of(rows), self.data.labels_of(rows))

    @cached_property
    def kept(self) -> Tensor | None:
        """All of them, `(n_train, n_classes)`; None if they do not fit the budget."""
        n, n_classes = len(self.data.labels), self.data.logits.shape[1]
        if n * n_classes * self.data.dtype.itemsize > self.most_bytes:
            return None
        kept = self.data.labels.new_empty(n, n_classes, dtype=self.data.dtype)
        for rows in self.data:
            kept[rows] = self._computed(rows)
        return kept

    def _computed(self, rows: slice) -> Tensor:
        residuals = self._unweighted(rows)
        omega = self.data.weights_of(rows, residuals)
        return residuals if omega is None else residuals.mul_(omega[:, None])

    def _unweighted(self, rows: slice) -> Tensor:
        if self.kind == "leave-one-out":
            return self._ridge(rows).div_(self.unit)
        temperature = 1.0 if self.kind == "training" else self.temperature
        tempered = self.loss.residuals(self.data.logits_of(rows), self.data.labels_of(rows), temperature)
        share = 1 - RIDGE_SHARE if self.kind == "both" else 1.0
        residuals = tempered.mul_(share / self.unit).to(self.data.device, self.data.dtype)
        if self.kind == "both":
            if isinstance(self.ridge_ratio, Tensor):
                factors = (RIDGE_SHARE * self.ridge_ratio / self.unit).to(residuals)
                residuals += self._ridge(rows) * factors
            else:
                residuals.add_(self._ridge(rows), alpha=RIDGE_SHARE * self.ridge_ratio / self.unit)
        return residuals

    def _ridge(self, rows: slice) -> Tensor:
        width = len(self.head.weights) - 1
        return self.head.residuals(self.data.features_of(rows, width), self.data.labels[rows], rows)
