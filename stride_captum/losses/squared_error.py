"""Squared error: regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..system.saved_values import saved_as
from .positions import check_class_dim
from .separate_outputs import SeparateOutputs


@saved_as("loss.mse")
@dataclass(frozen=True, kw_only=True)
class MSE(SeparateOutputs):
    """`1/2 sum_c (y_c - z_c)^2`, summed over the outputs of an example; labels `(n,)` or `(n, n_outputs)`.

        r = y - z          H = I, which is exact and not damped

    There is no temperature: out of the sample, residuals are those of a ridge head without the example.
    The residuals "both" are the mean of `y - z` and of these, both in units of the labels. Scores of the
    response "output" are the same for any multiple of this loss, such as the mean of `nn.MSELoss`.

    Responses: "output", z_c summed over outputs, or of the one that `target=` names; and "loss", likewise.

    Args:
        class_dim: As for `CrossEntropy`; labels have the shape of the outputs.

    >>> MSE().response_value(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, float("nan")]]), "output")
    tensor([1.])
    """

    name: ClassVar[str] = "mse"
    damps_outputs: ClassVar[bool] = False
    label_units: ClassVar[bool] = True

    class_dim: int | None = None

    def __post_init__(self) -> None:
        check_class_dim(self.class_dim)

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`1/2 (y - z)^2`."""
        return (labels - logits).square() / 2

    def curvatures(self, logits: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(logits)

    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """`y - z`."""
        return labels.to(logits) - logits

    def level(self, covariance: Tensor) -> Tensor | float:
        """1, the curvature of every output."""
        return 1.0

    def unit(self, covariance: Tensor) -> float:
        """1, likewise: free of the rounding of a mean of weights."""
        return 1.0

    def doubts(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """`y - z`, for one output."""
        return self.residuals(logits, labels) if logits.shape[1] == 1 else None
