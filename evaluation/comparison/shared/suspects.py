"""The most suspect training labels, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_N_SUSPECTS = 10


@dataclass(frozen=True)
class Suspect:
    """A training example with a suspect label.

    Attributes:
        index: Index in the training set.
        label: The label that the model was trained on.
        true_label: The label before the flips.
        score: How suspect it is; high = suspect.
    """

    index: int
    label: int
    true_label: int
    score: float


def most_suspect(scores: Any, labels: Any, true_labels: Any = None) -> tuple[Suspect, ...]:
    """The ten highest scores, ties by lower index.

    Args:
        scores: `(n_train,)`.
        labels: `(n_train,)`, those that the model was trained on.
        true_labels: `(n_train,)` before the flips; None if no labels were flipped.
    """
    true_labels = labels if true_labels is None else true_labels
    first = np.argsort(-np.asarray(scores), kind="stable")[:_N_SUSPECTS]
    return tuple(Suspect(int(i), int(labels[i]), int(true_labels[i]), float(scores[i])) for i in first)
