"""Owns what stands for `e_y - p` of a training example, the loss gradient's side of every score.

A trained model has seen its training examples: its own residuals are too small, and smallest where
they matter. The options take them back out of the sample.

    training       e_y - softmax(z)
    temperature    e_y - softmax(z / T)
    leave-one-out  e_y - q, where q is what a ridge head on the features, fitted without the example,
                   predicts, projected on the probability simplex
    both           weighted mean of the last two, the second rescaled to the Frobenius norm of the first
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .devices import as_float64
from .memory_budget import MOST_ROWS, blocks
from .process_group import ALONE, Alone
from .staging import staged

#: The best of 2, 3 and 4 on digits and MNIST, and within .005 of the best on CIFAR-10 (LDS).
DEFAULT_TEMPERATURE = 2.0
#: Weight of the leave-one-out part of "both". LDS of .2, .4 and .6 (half of the test
#: points, three models each): digits .624 .612 .591, MNIST .543 .552 .545; one model that was
#: stopped on a spike of its training loss (MNIST) .458 .488 .499.
RIDGE_SHARE = 0.4


def tempered_residuals(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`e_y - softmax(z / T)`, `(n, n_classes)`.

    Args:
        logits: `(n, n_classes)`.
        labels: `(n,)` int64.
        temperature: T; 1 gives the training residuals.
    """
    label = labels[:, None]
    others = (logits / temperature).softmax(-1).scatter(1, label, 0.0)
    # 1 - p_y of a confident model would be a rounding error: it is the sum of the other classes.
    return (-others).scatter(1, label, others.sum(1, keepdim=True))


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """e_y of each label, in the width and dtype of `like` `(n, n_classes)`."""
    zeros = like.new_zeros(len(labels), like.shape[1])
    return zeros.scatter_(1, labels[:, None], 1)  # F.one_hot would make integers first


def leave_one_out_residuals(predictions: Tensor, leverages: Tensor, labels: Tensor) -> Tensor:
    """Residuals of a ridge head fitted without the example, in closed form: `r_i / (1 - H_ii)`.

    Args:
        predictions: Fitted values of the ridge regression of the one-hot labels, `(n, n_classes)`.
        leverages: H_ii in [0, 1), `(n,)`.
        labels: `(n,)` int64.

    Returns:
        `(n, n_classes)`; not projected.
    """
    return (one_hot(labels, predictions) - predictions) / (1 - leverages).clamp_min(
        torch.finfo(leverages.dtype).eps
    )[:, None]


def choose_residuals(
    kind: str,
    logits: Tensor,
    labels: Tensor,
    predictions: Tensor,
    temperature: float,
    ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residuals that the option `residuals` names.

    Args:
        kind: "training", "temperature", "leave-one-out" or "both".
        logits: `(n, n_classes)`.
        labels: `(n,)` int64.
        predictions: q of the ridge head, on the simplex, `(n, n_classes)`.
        temperature: T.
        ratio: Factor of the ridge part of "both"; None gives it the norm of the other part.

    Returns:
        Residuals `(n, n_classes)` and the factor that was used.
    """
    tempered, ridge = tempered_residuals(logits, labels, temperature), one_hot(labels, logits) - predictions
    if ratio is None:
        ratio = _ratio_of(_squares([_norms(tempered, ridge)])).to(logits)
    if kind == "both":
        return (1 - RIDGE_SHARE) * tempered + RIDGE_SHARE * ratio * ridge, ratio
    if kind == "leave-one-out":
        return ridge, ratio
    return (tempered if kind == "temperature" else tempered_residuals(logits, labels)), ratio


def _norms(tempered: Tensor, ridge: Tensor) -> Tensor:
    """Norms of the two parts, `(2,)`."""
    return torch.stack([tempered.norm(), ridge.norm()])


def _squares(norms: list[Tensor]) -> Tensor:
    """Sums of the squares of the norms of all blocks, `(2,)` float64 on the CPU."""
    return torch.stack(norms).cpu().double().square().sum(0)


def _ratio_of(squares: Tensor) -> Tensor:
    """The factor that gives the ridge part the norm of the other; 1 where it is nothing."""
    return (squares[0] / squares[1]).sqrt() if squares[1] > 0 else torch.ones_like(squares[1])


def training_residuals(
    kind: str,
    logits: Tensor,
    labels: Tensor,
    left_out: Tensor,
    temperature: float,
    block_rows: int = MOST_ROWS,
    ranks: Alone = ALONE,
) -> tuple[Tensor, Tensor]:
    """The residuals of a whole training set, block by block.

    Args:
        kind: As for `choose_residuals`.
        logits: `(n_train, n_classes)`, may be memory-mapped.
        labels: `(n_train,)` int64.
        left_out: Leave-one-out residuals of the ridge head, `(n_train, n_classes)`, not projected.
        temperature: T.
        block_rows: Examples at a time.
        ranks: Who else has a share of the training set.

    Returns:
        Residuals `(n_train, n_classes)` and the factor of the ridge part of "both", a tensor of one number.
    """
    residuals = torch.empty_like(left_out)
    norms = []
    for rows in blocks(len(labels), block_rows):
        ridge = one_hot(labels[rows], left_out)
        residuals[rows] = project_on_simplex(ridge - left_out[rows])  # for the second walk
        ridge -= residuals[rows]
        z = staged(logits[rows], left_out.device, left_out.dtype)
        tempered = tempered_residuals(z, labels[rows], temperature)
        norms.append(_norms(tempered, ridge))
    ratio = _ratio_of(ranks.total(_squares(norms), "norms of the residuals")).to(left_out)
    for rows in blocks(len(labels), block_rows):
        z = staged(logits[rows], left_out.device, left_out.dtype)
        residuals[rows] = choose_residuals(kind, z, labels[rows], residuals[rows], temperature, ratio)[0]
    return residuals, ratio


def project_on_simplex(points: Tensor) -> Tensor:
    """Euclidean projection of each row on the probability simplex (Duchi et al., 2008).

    >>> project_on_simplex(torch.tensor([[1.5, 0.2, -0.7]])).tolist()
    [[1.0, 0.0, 0.0]]
    """
    ordered = points.sort(-1, descending=True).values
    ranks = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype, device=points.device)
    excess = ordered.cumsum(-1) - 1
    support = (ordered - excess / ranks > 0).sum(-1, keepdim=True)
    shift = excess.gather(-1, support - 1) / support
    return (points - shift).clamp_min(0)


def mean_residual(logits: Tensor, labels: Tensor, temperature: float = 1.0, ranks: Alone = ALONE) -> float:
    """Mean of half the L1 norm of `e_y - p`, which is the mean of `1 - p_y`."""
    p = (logits / temperature).softmax(-1).gather(1, labels[:, None])
    sums = torch.tensor([float(as_float64(p).sum()), len(p)], dtype=torch.float64, device="cpu")
    total, n = ranks.total(sums, "mean residual").tolist()
    return float(1 - total / n)


def match_temperature(
    logits: Tensor,
    labels: Tensor,
    target: float,
    low: float = 1.0,
    high: float = 100.0,
    ranks: Alone = ALONE,
) -> float:
    """The temperature at which the mean residual of the training set is that of held-out data.

    The mean residual of a model that fits its training set grows with T; T is found by bisection in
    log T to 1e-4 and clipped to `[low, high]`. By default T is at least 1: residuals are there to be
    made larger, and held-out data with cleaner labels than the training set would ask for T near 0.

    Args:
        logits: Training logits `(n, n_classes)`.
        labels: `(n,)` int64.
        target: Mean residual on the held-out data at T = 1.
        low: Smallest temperature.
        high: Largest temperature.
        ranks: Who else has a share of the training set.
    """
    if mean_residual(logits, labels, low, ranks) >= target:
        return low
    if mean_residual(logits, labels, high, ranks) <= target:
        return high
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        if mean_residual(logits, labels, middle, ranks) < target:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
