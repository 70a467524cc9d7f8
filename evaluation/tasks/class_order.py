"""Data sets that are sorted by class: their first examples would be of few classes."""

from __future__ import annotations

import torch
from torch import Tensor


def in_class_order(labels: Tensor) -> bool:
    """Whether examples are sorted by class: neighbors differ far less often than in a random order.

    Args:
        labels: `(n,)` int64.

    >>> in_class_order(torch.arange(4).repeat_interleave(10)), in_class_order(torch.arange(40) % 4)
    (True, False)
    """
    n = len(labels)
    expected = (n - 1) * (1 - float((labels.bincount() / n).square().sum())) if n else 0.0
    return expected >= 4 and int((labels[1:] != labels[:-1]).sum()) < expected / 3


def first_examples(labels: Tensor, size: int | None) -> tuple[Tensor | slice, list[str]]:
    """Choose `size` examples of a data set: the first ones, or a random draw if it is sorted by class.

    Args:
        labels: Of all examples, `(n,)`.
        size: How many are wanted; None takes all.

    Returns:
        The chosen indices in ascending order, and notes for a report.
    """
    if size is None or size >= len(labels):
        return slice(None), []
    if not in_class_order(labels):
        return slice(size), []
    note = (
        f"The {size} training examples are a random draw from {len(labels)}, which are sorted by class: "
        "their numbers count within the draw."
    )
    return _mixed(len(labels))[:size].sort().values, [note]


def shuffled_where_sorted(labels: Tensor) -> tuple[Tensor | slice, list[str]]:
    """Shuffle test examples that are sorted by class.

    Args:
        labels: `(n_test,)`.

    Returns:
        The order of the examples, and notes for a report.
    """
    if not in_class_order(labels):
        return slice(None), []
    note = "The test examples are sorted by class and were shuffled: their numbers count in the new order."
    return _mixed(len(labels)), [note]


def _mixed(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))
