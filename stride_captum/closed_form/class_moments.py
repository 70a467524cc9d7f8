"""Moments of the expected Hessians of a training set: the output side of the curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..errors import bad_value
from ..losses import CrossEntropy, Loss
from ..losses.hessians import softmax_hessians as probabilities
from ..system.devices import as_float64
from ..system.to_device import TrainingBlocks

#: Classes up to which Sigma is kept whole.
MOST_CLASSES = 4096
#: Mean variance of a class below which squares of residuals leave the range of float64.
_LEAST = 1e-140
#: Logit differences that are this large, in units of T, leave much of float64 to the probabilities.
_ENOUGH = 30.0


@dataclass
class ClassMoments:
    """Output-side statistics of a set of training examples; sums, so those of two sets add up.

    Attributes:
        hessian: `sum_i omega_i H_i`, or its diagonal, float64. With cross-entropy `H = diag p - p p^T`.
        residual_squares: `sum_i omega_i |r_i|^2`, `(1,)`; one per output, `(n_outputs,)`, if the
            loss treats outputs separately.
        weight: W, the sum of omega.
        loss: What the model was trained with.
    """

    hessian: Tensor
    residual_squares: Tensor
    weight: float
    loss: Loss

    @cached_property
    def unit(self) -> float:
        """s, the mean of the eigenvalues that `Sigma = E[H]` can have."""
        return self.loss.unit(self.hessian / self.weight)

    @cached_property
    def covariance(self) -> Tensor:
        """Sigma, or its diagonal, divided by `unit`; float64."""
        return self.hessian / self.weight / self.unit

    @property
    def residual_square(self) -> Tensor | float:
        """`residual_squares`, as a number where there is one."""
        return self.residual_squares if self.loss.apart else float(self.residual_squares)

    @property
    def level(self) -> Tensor | float:
        """Scale of a relative damping, in units of `unit`: a number, or one per output, `(n_outputs,)`."""
        return self.loss.level(self.covariance)

    @property
    def on_diagonal(self) -> Tensor | float:
        """Scale of the damping of Sigma; 0 if Sigma is not damped."""
        return self.level if self.loss.damps_outputs else 0.0

    def checked(self, data: TrainingBlocks, temperature: float) -> ClassMoments:
        """Return these moments after checking that the probabilities are not all 0 or 1.

        Args:
            data: The training set; the error computes from it how far to raise the temperature.
            temperature: T of these moments.

        Raises:
            ValueError: Every probability is 0 or 1 in float64, or curvatures of a loss are 0.
        """
        apart, mean = self.loss.apart, self.hessian / self.weight
        if apart and not self.loss.tempered and not bool((mean > _LEAST).all()):
            output = int((~(mean > _LEAST)).nonzero()[0])
            must = "be above 0 in the mean over the training set, for each output"
            got = f"{float(mean[output]):g} for output {output}"
            remedy = "Curvatures are what scores are divided by: return those of a smooth bound of the loss."
            raise bad_value(f"{type(self.loss).__name__}.curvatures", must, got, remedy)
        if not self.unit > _LEAST or (apart and not bool((mean > _LEAST).all())):
            raise _certain(data, temperature, self.loss)
        return self


def class_moments(
    data: TrainingBlocks,
    temperature: float,
    diagonal_only: bool = False,
    loss: Loss | None = None,
) -> ClassMoments:
    """One pass over the logits.

    Args:
        data: The training set.
        temperature: T of `z / T`.
        diagonal_only: Keep the diagonal of Sigma alone.
        loss: What the model was trained with; None for cross-entropy.

    Raises:
        ValueError: Logits with NaN or infinity.
    """
    loss = CrossEntropy() if loss is None else loss
    n_classes = data.logits.shape[1]
    like = data.logits_of(slice(0, 0))
    diagonal_only = diagonal_only or loss.apart
    total = like.new_zeros(n_classes if diagonal_only else (n_classes, n_classes))
    squares = like.new_zeros(n_classes if loss.apart else 1)
    for rows in data:
        z = data.logits_of(rows)
        hessians, omega = loss.hessians(z, temperature), data.weights_of(rows, z)
        hessians.add_to(total, omega)
        each = hessians.residuals(loss.residual_labels(data.labels_of(rows), z)).square()
        each = each if omega is None else each * omega[:, None]
        squares += each.sum(0) if loss.apart else each.sum()
    if not bool(total.isfinite().all()):
        raise _not_finite(data, loss)
    weight = float(len(data.labels) if data.weights is None else data.weights.sum())
    return ClassMoments(loss.covariance(total), squares, weight, loss)


def _not_finite(data: TrainingBlocks, loss: Loss) -> ValueError:
    """Error that names the first example whose outputs, or curvatures, are not finite."""
    for rows in data:
        z = data.logits_of(rows)
        wrong = loss.hessians(z, 1.0).undefined()
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            example = f"training example {rows.start + row}"
            if bool(z[row].isfinite().all()):
                must, got = "return finite numbers for finite outputs", f"others for {example}"
                return bad_value(f"{type(loss).__name__}.curvatures", must, got)
            what = "NaN" if bool(z[row].isnan().any()) else "infinity"
            got = f"{what} for {example}"
            return bad_value("model", f"return logits without {what}", got)
    raise AssertionError("every row of logits is finite")


def _certain(data: TrainingBlocks, temperature: float, loss: Loss) -> ValueError:
    """Error for probabilities that are all 0 or 1."""
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
