"""Residuals of a training set, block by block: of the model, of a ridge head without the example, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..losses import CrossEntropy, Loss
from ..positions import Positions
from ..residuals import RIDGE_SHARE
from ..system.memory import DEFAULT_BUDGET
from ..system.to_device import TrainingBlocks, working_dtype
from .class_moments import class_moments
from .damping import LEAST_OF_HEAD, check_damping, needs_float64
from .memory import blocks_within
from .moments import feature_moments
from .position_head import fit_head
from .ridge_head import RidgeHead


def out_of_sample_residuals(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    kind: str = "both",
    temperature: float = 1.0,
    *,
    head_damping: float = 0.1,
    memory_budget: int = DEFAULT_BUDGET,
    loss: Loss | None = None,
    weights: Tensor | None = None,
    positions: Positions | None = None,
) -> Tensor:
    """Residuals r_i that take each training example out of its own sample, as `STRIDE` uses them.

    Args:
        features: Raw features `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`, likewise.
        labels: `(n_train,)` int64, or as `loss` has them, on the device that computes.
        widths: Widths of the layers, in the order of the columns; the ridge head reads all but the last.
        kind: "leave-one-out", or "both" for the weighted mean with tempered residuals.
        temperature: T of the tempered part.
        head_damping: lambda of the ridge head, relative to the mean diagonal of A.
        memory_budget: Bytes of one block of work.
        loss: What the model was trained with; None for cross-entropy.
        weights: omega of each example, `(n_train,)`; None for 1.
        positions: Where all arrays have one row for each position: which rows are those of an example, which
            the ridge head leaves out together.

    Returns:
        omega_i r_i, `(n_train, n_classes)`, positive for outputs that the label wants higher.

    Raises:
        ValueError: Features or logits that are not finite, or a damping too small for their precision.

    >>> h, z = torch.eye(3), torch.zeros(3, 2)
    >>> out_of_sample_residuals(h, z, torch.tensor([0, 1, 0]), [3]).shape
    torch.Size([3, 2])
    """
    loss = CrossEntropy() if loss is None else loss
    check_damping(head_damping, features, "head_damping")
    read = readable_widths(widths)
    features = features[:, : sum(read)]
    exact = needs_float64(head_damping, len(labels), sum(read), LEAST_OF_HEAD)
    data = blocks_within(memory_budget, features, logits, labels, exact, weights)
    dtype = torch.float64 if exact else None
    moments = feature_moments(features, labels, logits.shape[1], read, data.block_rows, dtype, loss, weights)
    if not moments.checked().in_float32:
        data = blocks_within(memory_budget, features, logits, labels, True, weights)
    of_head = features, labels, moments, head_damping, positions
    head = fit_head(*of_head, data.block_rows, data.dtype, loss, weights)
    square = class_moments(data, temperature, diagonal_only=True, loss=loss).residual_square
    ratio = loss.ridge_ratio(square, ridge_squares(head, data, loss, temperature))
    residuals = TrainingResiduals(data, head, kind, temperature, ratio, 1.0, 0, loss)
    return torch.cat([residuals.of(rows) for rows in data]).to(working_dtype(features))


def readable_widths(widths: Sequence[int]) -> list[int]:
    """Widths of the layers that the ridge head reads: the last one has memorized the training labels."""
    return list(widths[:-1] or widths)


@dataclass
class TrainingResiduals:
    """Residuals r_i of the training examples (see `stride_captum.residuals`), divided by a unit.

    Attributes:
        data: The training set; residuals are in the dtype of its products.
        head: Ridge head on its features; None for kinds without one.
        kind: The option `residuals`.
        temperature: T.
        ridge_ratio: Factor of the ridge part of "both": a number, or one per output.
        unit: What they are divided by.
        most_bytes: Residuals are kept if they take no more bytes.
        loss: What the model was trained with.
    """

    data: TrainingBlocks
    head: RidgeHead | None
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
        """`e_y - p` of some rows at T = 1, `(n_rows, n_classes)` float64; without unit and omega."""
        return self.loss.residuals(self.data.logits_of(rows), self.data.labels_of(rows))

    @cached_property
    def kept(self) -> Tensor | None:
        """All residuals, `(n_train, n_classes)`; None if they exceed `most_bytes`."""
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
        assert self.head is not None, "kinds that read a head have one"
        return ridge_residuals(self.head, self.data, rows, self.loss, self.temperature)


def ridge_residuals(
    head: RidgeHead, data: TrainingBlocks, rows: slice, loss: Loss, temperature: float
) -> Tensor:
    """Residuals of the head without the example, in units of the loss: a new tensor `(n_rows, n_outputs)`."""
    width = len(head.weights) - 1
    found = head.residuals(data.features_of(rows, width), data.labels[rows], rows)
    if loss.label_units:
        return found
    return loss.of_ridge_head(found, data.logits_of(rows), data.labels_of(rows), temperature)


def ridge_squares(head: RidgeHead, data: TrainingBlocks, loss: Loss, temperature: float) -> Tensor:
    """Sum of omega times the squares of `ridge_residuals`: a number, or one per output; float64."""
    if loss.label_units:
        return torch.as_tensor(head.square, dtype=torch.float64, device=head.weights.device)
    total = head.weights.new_zeros(head.weights.shape[1])
    for rows in data:
        squares = ridge_residuals(head, data, rows, loss, temperature).to(total).square()
        omega = data.weights_of(rows, squares)
        total += (squares if omega is None else squares * omega[:, None]).sum(0)
    return total if loss.apart else total.sum()
