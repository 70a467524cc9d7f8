"""Moments of the class probabilities of a training set, free of cancellation in `1 - p` and `diag p - p p^T`.

`E[diag p - p p^T]` is the Laplacian of a graph: beside its diagonal stands `-E[p_a p_b]`, and rows sum to 0.
So each entry of the diagonal is a sum of positive numbers. A model that is sure of its training set, with
probabilities 1e-100 away from 0 and 1, has a covariance as accurate as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import bad_value
from ..linalg import add_gram_matrix
from ..system.processes import SINGLE_PROCESS, SingleProcess
from ..system.to_device import TrainingBlocks

#: Classes up to which Sigma is kept whole.
MOST_CLASSES = 4096
#: Mean variance of a class below which squares of residuals leave the range of float64.
_LEAST = 1e-140
#: Logit differences that are this large, in units of T, leave much of float64 to the probabilities.
_ENOUGH = 30.0


@dataclass
class Probabilities:
    """Softmax of some rows of logits, with each row's largest probability kept apart.

    Attributes:
        others: p with 0 in the place of the largest, `(n, n_classes)` float64.
        first: Where the largest is, `(n, 1)` int64.
        rest: 1 minus the largest, as the sum of the others, `(n, 1)`.
    """

    others: Tensor
    first: Tensor
    rest: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest probability of each row, `(n, 1)`."""
        return 1 - self.rest

    def whole(self) -> Tensor:
        """p, `(n, n_classes)`."""
        return self.others.scatter(1, self.first, self.largest)

    def residuals(self, labels: Tensor) -> Tensor:
        """`e_y - p`, `(n, n_classes)`; 1 - p_y is the sum of the other classes.

        Args:
            labels: y, `(n,)` int64.
        """
        others = self.whole().scatter_(1, labels[:, None], 0.0)
        return others.neg().scatter_(1, labels[:, None], others.sum(1, keepdim=True))

    def variances(self) -> Tensor:
        """`p (1 - p)`, `(n, n_classes)`."""
        small = self.others * (1 - self.others)
        return small.scatter_(1, self.first, self.largest * self.rest)


def probabilities(logits: Tensor, temperature: float) -> Probabilities:
    """`softmax(z / T)` of logits in float64, `(n, n_classes)`; NaN where the largest logit is not finite."""
    largest, first = logits.max(1, keepdim=True)
    others = ((logits - largest) / temperature).exp_().scatter_(1, first, 0.0)
    rest = others.sum(1, keepdim=True)
    others /= 1 + rest
    return Probabilities(others, first, torch.where(largest.isfinite(), rest / (1 + rest), torch.nan))


@dataclass
class ClassMoments:
    """What the closed form needs to know of the probabilities of a whole training set.

    Attributes:
        covariance: `Sigma = E[diag p - p p^T]`, or its diagonal, divided by `unit`; float64.
        unit: The mean of the C - 1 eigenvalues that Sigma can have.
        residual_square: `sum_i |e_{y_i} - p_i|^2`.
    """

    covariance: Tensor
    unit: float
    residual_square: float


def class_moments(
    data: TrainingBlocks,
    temperature: float,
    diagonal_only: bool = False,
    ranks: SingleProcess = SINGLE_PROCESS,
) -> ClassMoments:
    """One pass over the logits.

    Args:
        data: The training set.
        temperature: T of `p = softmax(z / T)`.
        diagonal_only: Keep the diagonal of Sigma alone.
        ranks: Who else has a share of the training set.

    Raises:
        ValueError: Logits with NaN or infinity, or no uncertainty left that float64 could hold.
    """
    n_classes = data.logits.shape[1]
    like = data.logits_of(slice(0, 0))
    total = like.new_zeros(n_classes if diagonal_only else (n_classes, n_classes))
    square = like.new_zeros(())
    for rows in data:
        z = data.logits_of(rows)
        p = probabilities(z, temperature)
        if diagonal_only:
            total += p.variances().sum(0)
        else:
            add_gram_matrix(total, p.whole())
        square += p.residuals(data.labels_of(rows)).square().sum()
    if not bool(total.isfinite().all()):
        raise _not_finite(data)
    whole = ranks.all_reduce(total if diagonal_only else _laplacian(total), "class covariance")
    residual_square, n_train = ranks.sums("norms of the residuals", float(square), len(data.labels))
    covariance = whole / n_train
    unit = float(covariance.sum() if diagonal_only else covariance.trace()) / (n_classes - 1)
    if not unit > _LEAST:
        raise _certain(data, temperature)
    return ClassMoments(covariance / unit, unit, residual_square)


def _laplacian(products: Tensor) -> Tensor:
    """`diag p - p p^T` from `p p^T`, both summed over examples: every row of the result sums to 0."""
    beside = products.fill_diagonal_(0.0)
    return beside.sum(1).diag() - beside


def _not_finite(data: TrainingBlocks) -> ValueError:
    """What to say of the first example whose probabilities are not numbers."""
    for rows in data:
        z = data.logits_of(rows)
        wrong = probabilities(z, 1.0).rest.isnan().squeeze(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            what = "NaN" if bool(z[row].isnan().any()) else "infinity"
            got = f"{what} for training example {rows.start + row}"
            return bad_value("model", f"return logits without {what}", got)
    raise AssertionError("every row of logits is finite")


def _certain(data: TrainingBlocks, temperature: float) -> ValueError:
    """What to say where every probability is 0 or 1."""
    least = math.inf
    for rows in data:
        best = data.logits_of(rows).topk(2, dim=1).values
        least = min(least, float((best[:, 0] - best[:, 1]).min()))
    remedy = "Raise it"
    if math.isfinite(least):
        remedy += f" to {least / _ENOUGH:.2g} or more"
    return bad_value(
        "temperature",
        "leave the model some uncertainty",
        f"probabilities that are all 0 or 1 at a temperature of {temperature:g}",
        f"{remedy}, with `residuals` other than 'training'.",
    )
