"""Weights of checkpoints in the mean of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .checkpoint import seen_by


def mean_weights(checkpoints: Sequence[Any], n_train: int) -> list[float]:
    """The weight of each checkpoint; their sum is 1.

    Checkpoints of the model and models of parts of its training set (`Checkpoint(seen=...)`) have weights of
    their own, `weight_of_parts`, which those of a kind share equally.

    Args:
        checkpoints: At least one.
        n_train: Number of training examples.

    >>> from stride_captum.influence.checkpoints.checkpoint import Checkpoint
    >>> halves = [Checkpoint("a.pt", seen=range(5)), Checkpoint("b.pt", seen=range(5, 10))]
    >>> mean_weights([*halves, "last.pt"], n_train=10)
    [0.25, 0.25, 0.5]
    """
    seen = [seen_by(checkpoint, n_train) for checkpoint in checkpoints]
    parts = {tuple(rows.tolist()) for rows in seen if rows is not None and len(rows) < n_train}
    of_parts = [rows is not None and len(rows) < n_train for rows in seen]
    together = weight_of_parts(sum(len(rows) for rows in parts) / n_train) if not all(of_parts) else 1.0
    n_of_parts = sum(of_parts)
    return [
        together / n_of_parts if of_part else (1 - together) / (len(seen) - n_of_parts)
        for of_part in of_parts
    ]


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
