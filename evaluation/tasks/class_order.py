"""Data in the order of their classes, of which the first examples would be of few classes."""

from __future__ import annotations

import torch
from torch import Tensor


def in_class_order(labels: Tensor) -> bool:
    """Whether examples come class by class: neighbors differ far less often than in a random order.

    >>> in_class_order(torch.arange(4).repeat_interleave(10)), in_class_order(torch.arange(40) % 4)
    (True, False)
    """
    n = len(labels)
    expected = (n - 1) * (1 - float((labels.bincount() / n).square().sum())) if n else 0.0
    return expected >= 4 and int((labels[1:] != labels[:-1]).sum()) < expected / 3


def first_examples(labels: Tensor, size: int | None) -> tuple[Tensor | slice, list[str]]:
    """Which `size` examples stand for all, and what must be said of them.

    They are the first ones; a draw, in ascending order, where these would be of few classes.

    Args:
        labels: Of all, `(n,)`.
        size: How many are wanted; None takes all.
    """
    if size is None or size >= len(labels):
        return slice(None), []
    if not in_class_order(labels):
        return slice(size), []
    note = (
        f"The {size} training examples are a random draw from {len(labels)}, which come in the order of "
        "their classes: their numbers count within the draw."
    )
    return _mixed(len(labels))[:size].sort().values, [note]


def shuffled_where_sorted(labels: Tensor) -> tuple[Tensor | slice, list[str]]:
    """An order of test examples whose first ones are of all classes, and what must be said of it."""
    if not in_class_order(labels):
        return slice(None), []
    note = (
        "The test examples come in the order of their classes and were shuffled: their numbers count in the "
        "new order."
    )
    return _mixed(len(labels)), [note]


def _mixed(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))
