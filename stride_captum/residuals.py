"""Residuals r_i of training examples: estimates of `e_y - p`, minus the gradient of the loss.

A trained model has seen its training examples, so its own residuals are too small, most of all for
influential examples. The options estimate out-of-sample residuals.

    training       e_y - softmax(z)
    temperature    e_y - softmax(z / T)
    leave-one-out  e_y - q, where q is what a ridge head on the features, fitted without the example,
                   predicts, projected on the probability simplex
    both           weighted mean of the last two, the second rescaled to the Frobenius norm of the first
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .system.devices import as_float64, float64_device
from .system.memory import blocks
from .system.to_device import to_device

#: The best of 2, 3 and 4 on digits and MNIST, and within .005 of the best on CIFAR-10 (LDS).
DEFAULT_TEMPERATURE = 2.0
#: Mean residual to which the training residuals of each of several checkpoints are tempered, and the highest
#: temperature that this may take. LDS of .06, .1 and .16 for checkpoints after epochs 1, 2, 3, 5, 8, 12, 20
#: and the last (three trainings each): digits .617 .611 .588, MNIST .562 .561 .552; T = 1.5 for all of them
#: .586, .540; the last one alone .602, .516.
CHECKPOINT_RESIDUAL = 0.1
CHECKPOINT_TEMPERATURE = 2.0
#: Weight of the leave-one-out part of "both". LDS of .2, .4 and .6 (half of the test
#: points, three models each): digits .624 .612 .591, MNIST .543 .552 .545; one model that was
#: stopped on a spike of its training loss (MNIST) .458 .488 .499.
RIDGE_SHARE = 0.4
#: Values of the option `residuals` that read the ridge head.
OF_A_HEAD = ("leave-one-out", "both")
#: Logits that `residual_sums` takes at a time.
_LOGITS = 2**18


def tempered_residuals(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`e_y - softmax(z / T)`, `(n, n_classes)` in the dtype of the logits.

    Args:
        logits: `(n, n_classes)`; those in half precision are widened to float32 in between.
        labels: `(n,)` int64.
        temperature: T; 1 gives the training residuals.
    """
    label, z = labels[:, None], logits if logits.dtype == torch.float64 else logits.float()
    # The maximum is subtracted before the division by T, because large logits would lose digits otherwise.
    others = (z - z.amax(1, keepdim=True)).div_(temperature).exp_()
    own = others.gather(1, label)
    rest = others.scatter_(1, label, 0.0).sum(1, keepdim=True)
    # 1 - p_y cancels for a confident model, so it is computed as the sum over the other classes.
    return others.div_(-(rest + own)).scatter_(1, label, rest / (rest + own)).to(logits)


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """e_y of each label, in the width and dtype of `like` `(n, n_classes)`."""
    zeros = like.new_zeros(len(labels), like.shape[1])
    return zeros.scatter_(1, labels[:, None], 1)  # F.one_hot would allocate integers first


def leave_one_out_residuals(predictions: Tensor, slack: Tensor, labels: Tensor) -> Tensor:
    """Residuals of a ridge head fitted without the example, in closed form: `r_i / (1 - H_ii)`.

    Args:
        predictions: Fitted values of the ridge regression of the one-hot labels, `(n, n_classes)`.
        slack: 1 - H_ii in (0, 1], `(n,)`.
        labels: `(n,)` int64.

    Returns:
        `(n, n_classes)`; not projected.
    """
    label, divisor = labels[:, None], slack.clamp_min(torch.finfo(slack.dtype).eps)[:, None]
    own = (1 - predictions.gather(1, label)) / divisor
    return (predictions / -divisor).scatter_(1, label, own)


def choose_residuals(
    kind: str,
    logits: Tensor,
    labels: Tensor,
    predictions: Tensor | None,
    temperature: float,
    ratio: Tensor | float | None = None,
    residuals_of: Callable[[Tensor, Tensor, float], Tensor] = tempered_residuals,
    encoded: Callable[[Tensor, Tensor], Tensor] = one_hot,
    of_ridge_head: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None,
) -> tuple[Tensor, Tensor | float]:
    """The residuals that the option `residuals` names.

    Args:
        kind: "training", "temperature", "leave-one-out" or "both".
        logits: `(n, n_classes)`.
        labels: `(n,)` int64, or as `residuals_of` accepts.
        predictions: q of the ridge head, on the simplex, `(n, n_classes)`; None for kinds without a head.
        temperature: T.
        ratio: Factor of the ridge part of "both"; None scales it to the norm of the other part.
        residuals_of: `f(logits, labels, T)`, the residuals of another loss.
        encoded: `f(labels, logits)`, what its ridge head is fitted to, `(n, n_classes)`.
        of_ridge_head: `f(differences, logits, labels, T)`, residuals of that loss from those of its ridge
            head; None if these are the same.

    Returns:
        Residuals `(n, n_classes)` and the factor of the ridge part, 1 where there is none.
    """
    if predictions is None or kind not in OF_A_HEAD:
        return residuals_of(logits, labels, 1.0 if kind == "training" else temperature), 1.0
    ridge = encoded(labels, logits) - predictions
    if of_ridge_head is not None:
        ridge = of_ridge_head(ridge, logits, labels, temperature)
    if kind == "leave-one-out":
        return ridge, 1.0
    tempered = residuals_of(logits, labels, temperature)
    if ratio is None:
        squares = [as_float64(part).square().sum() for part in (tempered, ridge)]
        ratio = torch.as_tensor(ratio_of_norms(*map(float, squares))).to(logits)
    return (1 - RIDGE_SHARE) * tempered + RIDGE_SHARE * ratio * ridge, ratio


def ratio_of_norms(above: float, below: float) -> float:
    """Square root of a quotient of squared norms; 1 if the denominator is 0.

    >>> ratio_of_norms(9.0, 4.0), ratio_of_norms(9.0, 0.0)
    (1.5, 1.0)
    """
    return math.sqrt(above / below) if below > 0 else 1.0


def project_on_simplex(points: Tensor) -> Tensor:
    """Euclidean projection of each row on the probability simplex (Duchi et al., 2008).

    >>> project_on_simplex(torch.tensor([[1.5, 0.2, -0.7]])).tolist()
    [[1.0, 0.0, 0.0]]
    """
    return (points - simplex_shift(points)).clamp_min(0)


def simplex_shift(points: Tensor) -> Tensor:
    """Threshold that `project_on_simplex` subtracts from every entry of a row before clamping, `(..., 1)`."""
    ordered = _descending(points)
    ranks = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    excess = ordered.cumsum(-1) - 1
    support = (ordered - excess / ranks > 0).sum(-1, keepdim=True)
    return excess.gather(-1, support - 1) / support


def _descending(values: Tensor) -> Tensor:
    """Values of each row, the largest first; on the CPU NumPy sorts short rows seven times as fast."""
    if (
        values.device.type != "cpu"
        or values.requires_grad
        or values.dtype not in (torch.float32, torch.float64)
    ):
        return values.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


def _doubts(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`1 - p_y` of each row, `(n,)`."""
    return tempered_residuals(logits, labels, temperature).gather(1, labels[:, None]).squeeze(1)


def residual_sums(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    each: Callable[[Tensor, Tensor, float], Tensor] = _doubts,
    weights: Tensor | None = None,
) -> tuple[float, float]:
    """Sum of half the L1 norm of `e_y - p`, which is that of `1 - p_y`, and of the weights.

    In float64, block by block; the sums of two parts of a training set add up.

    Args:
        logits: `(n, n_classes)`.
        labels: `(n,)` int64, or as `each` accepts.
        temperature: T.
        each: `f(logits, labels, T)`, the same of each row for another loss, `(n,)`.
        weights: omega of each row, `(n,)`; None for 1.
    """
    device = float64_device(labels.device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in blocks(len(labels), max(_LOGITS // logits.shape[1], 1)):
        z, y = to_device(logits[rows], device, torch.float64), labels[rows].to(device)
        doubts = each(z, y, temperature)
        total += (doubts if weights is None else doubts * weights[rows].to(doubts)).sum()
    size = len(labels) if weights is None else float(as_float64(weights).sum())
    return float(total), size


def mean_residual(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean of half the L1 norm of `e_y - p`, which is the mean of `1 - p_y`.

    Args:
        logits: `(n, n_classes)`.
        labels: `(n,)` int64.
        temperature: T.
    """
    total, size = residual_sums(logits, labels, temperature)
    return total / size


def match_temperature(
    mean_at: Callable[[float], float], target: float, low: float = 1.0, high: float = 100.0
) -> float:
    """The temperature at which the mean residual of the training set is that of held-out data.

    The mean residual of a model that fits its training set grows with T; T is found by bisection in
    log T to 1e-4 and clipped to `[low, high]`. By default T is at least 1: the aim is to enlarge
    residuals, and held-out data with cleaner labels than the training set would give T near 0.

    Args:
        mean_at: Mean residual of the training set at a temperature (`mean_residual`).
        target: Mean residual on the held-out data at T = 1.
        low: Smallest temperature.
        high: Largest temperature.
    """
    if mean_at(low) >= target:
        return low
    if mean_at(high) <= target:
        return high
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        if mean_at(middle) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def drawn_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels from softmax(logits) by inversion of its distribution function, `(n,)` int64.

    Args:
        logits: `(n, n_classes)`.
        uniforms: In [0, 1), `(n,)`.

    >>> drawn_labels(torch.zeros(3, 2), torch.tensor([0.2, 0.5, 0.9])).tolist()
    [0, 1, 1]
    """
    below = as_float64(logits).softmax(1).cumsum(1) <= as_float64(uniforms)[:, None]
    labels: Tensor = below[:, :-1].sum(1)  # without the last: a sum may round to less than 1
    return labels.to(logits.device)
