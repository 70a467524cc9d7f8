"""Weights of checkpoints in the mean of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .checkpoint import unseen_by


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
