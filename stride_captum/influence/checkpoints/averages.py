"""Weights of checkpoints in the mean of their scores, and that mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import bad_value
from ...system.devices import as_float64, matching
from .checkpoint import unseen_by

#: Normalizations for which the scores of each checkpoint are enough.
SUMMED = (None, "deviation")
#: Share of the mean square below which a variance is rounding.
_ROUNDING = 1e-12


def checkpoint_weights(checkpoints: Sequence[Any], n_train: int) -> list[float]:
    """The weight of each checkpoint; their sum is 1.

    Checkpoints of the model and models of parts of its training set (`Checkpoint(seen=...)`) have weights of
    their own, `weight_of_parts`, which those of a kind share equally. The number of partitions is the sum of
    the shares of all different parts: several models of the same part count once, as checkpoints along its
    training do.

    Args:
        checkpoints: At least one.
        n_train: Number of training examples.

    Raises:
        ValueError: `seen` holds no places in the training set.

    >>> from stride_captum.influence.checkpoints.checkpoint import Checkpoint
    >>> halves = [Checkpoint("a.pt", seen=range(5)), Checkpoint("b.pt", seen=range(5, 10))]
    >>> checkpoint_weights([*halves, "last.pt"], n_train=10)
    [0.25, 0.25, 0.5]
    """
    shares: dict[bytes, float] = {}
    of_parts = []
    for checkpoint in checkpoints:
        unseen = unseen_by(checkpoint, n_train)
        n_unseen = int(unseen.sum())
        of_parts.append(n_unseen > 0)
        if n_unseen:
            shares[unseen.numpy().tobytes()] = 1 - n_unseen / n_train
    n_parts = sum(of_parts)
    together = weight_of_parts(sum(shares.values())) if n_parts < len(of_parts) else 1.0
    return [together / n_parts if part else (1 - together) / (len(of_parts) - n_parts) for part in of_parts]


def weight_of_parts(n_partitions: float) -> float:
    """Weight of the models of parts, all together, beside checkpoints of the model: sqrt(P) / (1 + sqrt(P)).

    It is a half with one partition and grows with their number P, since the mean over more models has less
    noise. With P of 2, 4 and 10 the best weight for LDS is about .6, .7 and .75 on MNIST, .6, .65 and .65 on
    digits.

    Args:
        n_partitions: P, where the parts of a partition count as their share of the training set.

    >>> weight_of_parts(1), round(weight_of_parts(4), 3)
    (0.5, 0.667)
    """
    root = math.sqrt(n_partitions)
    return root / (1 + root)


def weighted_sum(scores: Tensor, weights: Sequence[float], normalize: str | None = None) -> Tensor:
    """What `influence` gives of the scores of each checkpoint, `(n_test, n_train)`.

    Args:
        scores: `(n_checkpoints, n_test, n_train)`, of `checkpoint_scores`.
        weights: `checkpoint_weights_` of the method.
        normalize: None, or "deviation".

    Raises:
        ValueError: Another normalization, which needs more than the scores.

    >>> weighted_sum(torch.tensor([[[1.0, 3.0]], [[0.0, 4.0]]]), [0.5, 0.5], "deviation")
    tensor([[0.5000, 2.5000]])
    """
    if normalize not in SUMMED:
        raise bad_value("normalize", "be None or 'deviation'", repr(normalize))
    total = torch.zeros_like(scores[0])
    for part, weight in zip(scores, weights, strict=True):
        if normalize == "deviation":
            exact = as_float64(part)
            scale = unit_deviation_scale(exact.mean(1), exact.square().mean(1))
            part = part * matching(scale, part)[:, None]
        total += part * weight
    return total


def unit_deviation_scale(mean: Tensor, mean_square: Tensor) -> Tensor:
    """1 / standard deviation, 0 where all values are the same up to rounding.

    Args:
        mean: Of some values.
        mean_square: Mean of their squares, of the same shape.
    """
    variance = mean_square - mean.square()
    return torch.where(variance <= _ROUNDING * mean_square, 0, variance.rsqrt())
