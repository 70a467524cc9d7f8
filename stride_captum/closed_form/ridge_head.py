"""Ridge regression of the labels on the features, and its leave-one-out residuals.

    1 / (2 W) sum_i omega_i |e_i - h_i^T B|^2 + lambda / 2 |B|^2

e is the encoded label (`Loss.encoded`), one-hot with cross-entropy. The leave-one-out residual is
`(e - f) / (1 - H)` with fitted value f and leverage H. It is recomputed block by block from the weights and
two numbers per example.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg import inverse_forms
from ..losses import CrossEntropy, Loss
from ..system.devices import as_float64, matching
from ..system.memory import MOST_ROWS, blocks
from ..system.saved_values import saved_as
from ..system.to_device import to_device, working_dtype
from .damping import damped_factor
from .moments import Moments

#: Where 1 - H or the largest entry of a residual is below this, float32 keeps too few of their digits.
_FEW_DIGITS = 0.01


@saved_as("ridge-head")
@dataclass
class RidgeHead:
    """Ridge regression of the encoded labels on phi.

    Attributes:
        weights: On raw features and the constant, `(n_features + 1, n_classes)` float64.
        slack: 1 - H of each training example, `(n_train,)` float64.
        shifts: From `Loss.projection_shift`, `(n_train,)` float64; with cross-entropy, what the projection
            onto the simplex subtracts from the prediction.
        delicate: Which residuals are always computed in float64, `(n_train,)` bool.
        norms: Norm of the leave-one-out residual of each example, `(n_train,)`.
        square: Sum over the training set of omega times the squares of `residuals`; one per output if the
            loss treats outputs separately.
        loss: What the model was trained with.
    """

    weights: Tensor
    slack: Tensor
    shifts: Tensor
    delicate: Tensor
    norms: Tensor
    square: float | Tensor
    loss: Loss = field(default_factory=CrossEntropy)

    def predict(self, features: Tensor) -> Tensor:
        """Predictions for other examples, `(n, n_classes)` float64.

        Args:
            features: Raw features `(n, at least the head's)`; further columns are ignored.
        """
        return fitted_values(matching(features[:, : len(self.weights) - 1], self.weights), self.weights)

    def residuals(self, features: Tensor, labels: Tensor, rows: slice) -> Tensor:
        """`e - q` of training examples, where q is the leave-one-out prediction, made a valid one.

        Args:
            features: Raw features of the rows, `(n_rows, n_features)`; the result is in their dtype.
            labels: Of the rows, `(n_rows,)` or `(n_rows, n_classes)`.
            rows: Their places in the training set.

        Returns:
            `(n_rows, n_classes)`.
        """
        slack, shifts = self.slack[rows], self.shifts[rows]
        result = self._residuals(features, labels, slack, shifts)
        ends = torch.tensor([rows.start, rows.stop], device="cpu")
        first, last = torch.searchsorted(self._delicate_rows, ends).tolist()
        if features.dtype != torch.float64 and first < last:
            places = self._delicate_rows[first:last] - rows.start
            few, theirs = places.to(features.device), places.to(slack.device)
            exact = self._residuals(as_float64(features[few]), labels[few], slack[theirs], shifts[theirs])
            result[few] = exact.to(result)
        return result

    @cached_property
    def _delicate_rows(self) -> Tensor:
        """Rows for which `delicate` is true, on the CPU: one device synchronization for all blocks."""
        return self.delicate.nonzero().squeeze(1).cpu()

    def _residuals(self, features: Tensor, labels: Tensor, slack: Tensor, shifts: Tensor) -> Tensor:
        labels = labels.to(features.device)
        left_out = self.loss.left_out(fitted_values(features, self.weights), slack.to(features), labels)
        return self.loss.projected(left_out, labels, shifts.to(features)[:, None])

    def without_rows(self) -> RidgeHead:
        """A copy that predicts, and knows nothing of the training examples."""
        few = ("slack", "shifts", "delicate", "norms")
        return replace(self, **{name: getattr(self, name)[:0].clone() for name in few})

    def left_out(self, features: Tensor, labels: Tensor, rows: slice) -> Tensor:
        """`e` minus the leave-one-out prediction without projection, `(n_rows, n_classes)` float64."""
        exact = matching(features[:, : len(self.weights) - 1], self.weights)
        y = labels.to(exact.device)
        return self.loss.left_out(fitted_values(exact, self.weights), self.slack[rows].to(exact), y)


def fit_ridge_head(
    features: Tensor,
    labels: Tensor,
    moments: Moments,
    damping: float,
    block_rows: int = MOST_ROWS,
    dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
) -> RidgeHead:
    """Fit the head, and compute in one pass what leave-one-out residuals need.

    Args:
        features: Raw features `(n_train, n_features)`.
        labels: `(n_train,)` int64, or as `loss` has them.
        moments: Of the same features, labels and weights.
        damping: lambda relative to the mean diagonal of A.
        block_rows: Rows of a block.
        dtype: Of the products; None takes the working dtype of the features.
        loss: What the model was trained with; None for cross-entropy.
        weights: omega, `(n_train,)`; None for 1.
    """
    loss = CrossEntropy() if loss is None else loss
    dtype, n = dtype or working_dtype(features), moments.weight
    factor = damped_factor(moments.second_moment, damping, name="head_damping")
    factor = factor / moments.scale[:, None]  # acts on raw features instead of phi
    rounded = factor.to(labels.device, dtype)
    head = RidgeHead(
        weights=torch.cholesky_solve(moments.targets, factor) / n,
        slack=factor.new_empty(len(features)),
        shifts=factor.new_empty(len(features)),
        delicate=torch.empty(len(features), dtype=torch.bool, device=factor.device),
        norms=torch.empty(len(features), dtype=working_dtype(features), device=labels.device),
        square=0.0,
        loss=loss,
    )
    squares = factor.new_empty(len(features), moments.targets.shape[1] if loss.apart else 1)

    def keep(rows: slice | Tensor, block: _Block) -> None:
        head.slack[rows], head.shifts[rows], squares[rows] = block.slack, block.shifts, block.squares
        head.norms[rows] = block.norms.to(head.norms)

    for rows in blocks(len(features), block_rows):
        h = to_device(features[rows], labels.device, dtype)
        leverage = _weighed(inverse_forms(h, rounded) / n, weights, rows)
        block = _read(h, labels[rows], head.weights, 1 - leverage, loss)
        keep(rows, block)
        head.delicate[rows] = block.delicate
    if dtype != torch.float64:
        few = head.delicate.nonzero().squeeze(1)
        theirs = few.to(features.device)  # one device synchronization
        for part in blocks(len(few), block_rows):
            exact = as_float64(features[theirs[part]].to(labels.device))
            y = labels[few[part].to(labels.device)]
            leverage = _weighed(inverse_forms(exact, factor) / n, weights, few[part])
            keep(few[part], _read(exact, y, head.weights, 1 - leverage, loss))
    if weights is not None:
        squares *= weights.to(squares)[:, None]
    head.square = squares.sum(0) if loss.apart else float(squares.sum())
    return head


def _weighed(values: Tensor, weights: Tensor | None, rows: slice | Tensor) -> Tensor:
    """Values of some rows times their omega."""
    if weights is None:
        return values
    few = weights[rows.to(weights.device) if isinstance(rows, Tensor) else rows]
    return values * few.to(values)


@dataclass
class _Block:
    """Leave-one-out quantities of one block; each tensor is `(n_rows,)`, `squares` may be `(n_rows, C)`."""

    slack: Tensor
    shifts: Tensor
    norms: Tensor
    squares: Tensor
    delicate: Tensor


def _read(features: Tensor, labels: Tensor, weights: Tensor, slack: Tensor, loss: Loss) -> _Block:
    labels = labels.to(features.device)
    left_out = loss.left_out(fitted_values(features, weights), slack, labels)
    norms = torch.linalg.vector_norm(left_out, dim=1)
    shifts = loss.projection_shift(left_out, labels)
    residuals = loss.projected(left_out, labels, shifts)
    largest = residuals.abs().amax(1)
    return _Block(
        slack=as_float64(slack),
        shifts=as_float64(shifts.squeeze(1)),
        norms=as_float64(norms),
        squares=as_float64(residuals.square() if loss.apart else residuals.square().sum(1, keepdim=True)),
        delicate=(slack < _FEW_DIGITS) | ((largest > 0) & (largest < _FEW_DIGITS)),
    )


def fitted_values(features: Tensor, weights: Tensor) -> Tensor:
    """Predictions of the head, `(n, n_classes)` in the dtype of the features."""
    near = weights.to(features)
    return torch.addmm(near[-1], features, near[:-1])
