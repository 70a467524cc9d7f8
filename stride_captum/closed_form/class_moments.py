"""Moments of the expected Hessians of a training set: the output side of the curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import bad_value
from ..losses import CrossEntropy, Loss
from ..losses.hessians import softmax_hessians as probabilities
from ..system.devices import as_float64
from ..system.processes import SINGLE_PROCESS, SingleProcess
from ..system.to_device import TrainingBlocks

#: Classes up to which Sigma is kept whole.
MOST_CLASSES = 4096
#: Mean variance of a class below which squares of residuals leave the range of float64.
_LEAST = 1e-140
#: Logit differences that are this large, in units of T, leave much of float64 to the probabilities.
_ENOUGH = 30.0


@dataclass
class ClassMoments:
    """What the closed form needs to know of the outputs for a whole training set.

    Attributes:
        covariance: `Sigma = E[H]`, or its diagonal, divided by `unit`; float64. With cross-entropy
            `H = diag p - p p^T`.
        unit: The mean of the eigenvalues that Sigma can have.
        residual_square: `sum_i omega_i |r_i|^2`; of each output where these are judged apart.
        level: What a relative damping is relative to, in `unit`: a number, or one an output `(n_outputs,)`.
        damped: Whether Sigma itself is damped.
    """

    covariance: Tensor
    unit: float
    residual_square: Tensor | float
    level: Tensor | float = 1.0
    damped: bool = True

    @property
    def on_diagonal(self) -> Tensor | float:
        """What the damping of Sigma is relative to, 0 where it is not damped."""
        return self.level if self.damped else 0.0


def class_moments(
    data: TrainingBlocks,
    temperature: float,
    diagonal_only: bool = False,
    ranks: SingleProcess = SINGLE_PROCESS,
    loss: Loss | None = None,
) -> ClassMoments:
    """One pass over the logits.

    Args:
        data: The training set.
        temperature: T of `z / T`.
        diagonal_only: Keep the diagonal of Sigma alone.
        ranks: Who else has a share of the training set.
        loss: What the model was trained with; None for cross-entropy.

    Raises:
        ValueError: Logits with NaN or infinity, or no uncertainty left that float64 could hold.
    """
    loss = CrossEntropy() if loss is None else loss
    n_classes = data.logits.shape[1]
    like = data.logits_of(slice(0, 0))
    diagonal_only = diagonal_only or loss.apart
    total = like.new_zeros(n_classes if diagonal_only else (n_classes, n_classes))
    square = like.new_zeros(n_classes if loss.apart else 1)
    for rows in data:
        z = data.logits_of(rows)
        hessians, omega = loss.hessians(z, temperature), data.weights_of(rows, z)
        hessians.add_to(total, omega)
        each = hessians.residuals(loss.residual_labels(data.labels_of(rows), z)).square()
        each = each if omega is None else each * omega[:, None]
        square += each.sum(0) if loss.apart else each.sum()
    if not bool(total.isfinite().all()):
        raise _not_finite(data, loss)
    whole = ranks.all_reduce(loss.covariance(total), "class covariance")
    residual_square = ranks.all_reduce(square, "norms of the residuals")
    size = len(data.labels) if data.weights is None else float(data.weights.sum())
    (weight,) = ranks.sums("number of examples", size)
    covariance = whole / weight
    unit = loss.unit(covariance)
    if not unit > _LEAST or (loss.apart and not bool((covariance > _LEAST).all())):
        raise _certain(data, temperature, loss)
    covariance = covariance / unit
    squares = residual_square if loss.apart else float(residual_square)
    return ClassMoments(covariance, unit, squares, loss.level(covariance), loss.damps_outputs)


def _not_finite(data: TrainingBlocks, loss: Loss) -> ValueError:
    """What to say of the first example whose outputs are not numbers."""
    for rows in data:
        z = data.logits_of(rows)
        wrong = loss.hessians(z, 1.0).undefined()
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            what = "NaN" if bool(z[row].isnan().any()) else "infinity"
            got = f"{what} for training example {rows.start + row}"
            return bad_value("model", f"return logits without {what}", got)
    raise AssertionError("every row of logits is finite")


def _certain(data: TrainingBlocks, temperature: float, loss: Loss) -> ValueError:
    """What to say where every probability is 0 or 1."""
    least = math.inf
    for rows in data:
        least = min(least, float(as_float64(loss.certainty(data.logits_of(rows))).min()))
    remedy = "Raise it"
    if math.isfinite(least):
        remedy += f" to {least / _ENOUGH:.2g} or more"
    return bad_value(
        "temperature",
        "leave the model some uncertainty",
        f"probabilities that are all 0 or 1 at a temperature of {temperature:g}",
        f"{remedy}, with `residuals` other than 'training'.",
    )


__all__ = ["MOST_CLASSES", "ClassMoments", "class_moments", "probabilities"]
