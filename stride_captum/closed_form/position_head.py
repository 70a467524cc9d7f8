"""Ridge head whose residuals leave out all positions of an example at once.

With Phi_i the rows of example i, G the damped Gram matrix, Omega_i their weights and e_i the residuals of
the fit, the residuals of the head without example i are

    (I - H_i Omega_i)^-1 e_i,        H_i = Phi_i G^-1 Phi_i^T / W

A position left out alone would be predicted by its neighbors, which the model saw with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from ..linalg import whitened
from ..losses import Loss
from ..positions import Positions
from ..system.devices import as_float64
from ..system.saved_values import saved_as
from ..system.to_device import to_device, working_dtype
from .damping import damped_factor
from .moments import Moments
from .ridge_head import RidgeHead, fit_ridge_head, fitted_values

#: Rows that are taken together, at most, and entries of the squares H_i that are held.
_ROWS, _SQUARES = 4096, 2**24


@saved_as("ridge-head.positions")
@dataclass
class PositionHead(RidgeHead):
    """A ridge head with the residuals that it has for each position when its example is left out.

    Attributes:
        without_example: `e - f`, f the prediction without the example; `(n_rows, n_outputs)`.
    """

    without_example: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @override
    def residuals(self, features: Tensor, labels: Tensor, rows: slice) -> Tensor:
        left_out = self.without_example[rows].to(features).clone()
        shifts = self.shifts[rows].to(features)[:, None]
        return self.loss.projected(left_out, labels.to(features.device), shifts)

    @override
    def without_rows(self) -> RidgeHead:
        return replace(super().without_rows(), without_example=self.without_example[:0].clone())  # type: ignore[call-arg]

    @override
    def left_out(self, features: Tensor, labels: Tensor, rows: slice) -> Tensor:
        return as_float64(self.without_example[rows])


def fit_head(
    features: Tensor,
    labels: Tensor,
    moments: Moments,
    damping: float,
    positions: Positions | None,
    block_rows: int,
    dtype: torch.dtype,
    loss: Loss,
    weights: Tensor | None = None,
) -> RidgeHead:
    """The ridge head of a training set, with or without positions; the arguments are those of the two."""
    if positions is None:
        return fit_ridge_head(features, labels, moments, damping, block_rows, dtype, loss, weights)
    return fit_position_head(features, labels, moments, damping, positions, dtype, loss, weights)


def fit_position_head(
    features: Tensor,
    labels: Tensor,
    moments: Moments,
    damping: float,
    positions: Positions,
    dtype: torch.dtype,
    loss: Loss,
    weights: Tensor | None = None,
) -> PositionHead:
    """Fit the head, and solve for the residuals that it would have without each example.

    Args:
        features: Raw features of all rows, `(n_rows, n_features)`.
        labels: Of all rows, as the loss has them.
        moments: Of the same features, labels and weights.
        damping: lambda relative to the mean diagonal of A.
        positions: Rows of each example.
        dtype: Of the products of features; the small systems are solved in float64.
        loss: What the model was trained with.
        weights: omega of each row, `(n_rows,)`; None for 1.
    """
    factor = damped_factor(moments.second_moment, damping, name="head_damping")
    factor = factor / moments.scale[:, None]
    beta = torch.cholesky_solve(moments.targets, factor) / moments.weight
    rounded = factor.to(labels.device, dtype)
    n, kept = len(features), working_dtype(features)
    head = PositionHead(
        weights=beta,
        slack=factor.new_ones(n),
        shifts=factor.new_empty(n),
        delicate=torch.zeros(n, dtype=torch.bool, device=factor.device),
        norms=torch.empty(n, dtype=kept, device=labels.device),
        square=0.0,
        loss=loss,
        without_example=torch.empty(n, beta.shape[1], dtype=kept, device=labels.device),
    )
    square = beta.new_zeros(beta.shape[1])
    most = int(positions.counts.max())
    for examples in positions.blocks(min(_ROWS, max(_SQUARES // max(most, 1), 1))):
        rows = positions.rows_of(examples)
        if rows.start == rows.stop:
            continue
        h = to_device(features[rows], labels.device, dtype)
        fitted = as_float64(fitted_values(h, beta))
        y = labels[rows].to(fitted.device)
        omega = fitted.new_ones(len(h)) if weights is None else weights[rows].to(fitted)
        errors = loss.encoded(y, fitted) - fitted
        left_out = _left_out(h, errors, omega, rounded, moments.weight, positions.of(examples))
        shifts = loss.projection_shift(left_out, y)
        head.without_example[rows] = left_out.to(head.without_example)
        head.norms[rows] = torch.linalg.vector_norm(left_out, dim=1).to(head.norms)
        head.shifts[rows] = shifts.squeeze(1)
        residuals = loss.projected(left_out.clone(), y, shifts)
        square += (residuals.square() * omega[:, None]).sum(0)
    head.square = square if loss.apart else float(square.sum())
    return head


def _left_out(
    h: Tensor, errors: Tensor, omega: Tensor, factor: Tensor, weight: float, positions: Positions
) -> Tensor:
    """`(I - H_i Omega_i)^-1 e_i` for the rows of some examples, `(n_rows, n_outputs)`."""
    blocks = positions.padded(whitened(h, factor))
    squares = as_float64(blocks @ blocks.transpose(1, 2)) / weight * positions.padded(omega)[:, None, :]
    eye = torch.eye(squares.shape[1], dtype=squares.dtype, device=squares.device)
    solved: Tensor = torch.linalg.solve(eye - squares, positions.padded(errors))
    return positions.unpadded(solved)
