"""Data sets that are sorted by label: their first examples would not stand for the others."""

from __future__ import annotations

from collections.abc import Callable

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


def in_order(labels: Tensor) -> bool:
    """Whether labels never fall, or never rise, from one example to the next; for those with several numbers
    the first one.

    Args:
        labels: `(n, ...)`.

    >>> in_order(torch.tensor([0.5, 2.0, 2.5, 4.0])), in_order(torch.ones(4)), in_order(torch.eye(3))
    (True, False, False)
    """
    first = labels.reshape(len(labels), -1)[:, :1]
    steps = first[1:].double() - first[:-1].double()
    rises, falls = bool((steps > 0).any()), bool((steps < 0).any())
    return len(labels) > 3 and rises != falls


def first_examples(
    labels: Tensor, size: int | None, is_sorted: Callable[[Tensor], bool] = in_class_order
) -> tuple[Tensor | slice, list[str]]:
    """Choose `size` examples of a data set: the first ones, or a random draw if it is sorted by label.

    Args:
        labels: Of all examples, `(n,)`, or as `is_sorted` takes them.
        size: How many are wanted; None takes all.
        is_sorted: Tells whether they are.

    Returns:
        The chosen indices in ascending order, and notes for a report.
    """
    if size is None or size >= len(labels):
        return slice(None), []
    if not is_sorted(labels):
        return slice(size), []
    note = (
        f"The {size} training examples are a random draw from {len(labels)}, which are sorted by label: "
        "their numbers count within the draw."
    )
    return _mixed(len(labels))[:size].sort().values, [note]


def shuffled_where_sorted(
    labels: Tensor, is_sorted: Callable[[Tensor], bool] = in_class_order
) -> tuple[Tensor | slice, list[str]]:
    """Shuffle test examples that are sorted by label.

    Args:
        labels: `(n_test,)`, or as `is_sorted` takes them.
        is_sorted: Tells whether they are.

    Returns:
        The order of the examples, and notes for a report.
    """
    if not is_sorted(labels):
        return slice(None), []
    note = "The test examples are sorted by label and were shuffled: their numbers count in the new order."
    return _mixed(len(labels)), [note]


def _mixed(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))
