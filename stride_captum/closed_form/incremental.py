"""Update of a fitted closed form when training examples come, go or change, without reading the others again.

With k changed examples among n, d features and C classes:

    forward passes    of the k new examples, none for removed ones
    moments           gram +- H_k^T H_k, targets +- H_k^T E_k                 k d^2
    factors           of the new moments, from scratch, in float64            d^3
    residuals         leave-one-out, of all examples, from stored features    n d^2

A refit costs n forward passes and 2 n d^2 besides the factors. The factors are not updated by rank k (d^2 k):
the scale of every layer and the damping follow the mean diagonal, so that a changed example adds a full-rank
diagonal to the matrix, and an update that keeps them would not be equal to a refit. For the same reason the
leverages of all examples change, and their pass over the stored features stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..operators import Changed
from ..residuals import one_hot
from ..system.devices import matching
from ..system.memory import blocks
from .moments import Moments, feature_moments, layer_scale

if TYPE_CHECKING:
    from .operators import ClosedFormOperators


def with_examples(form: ClosedFormOperators, features: Tensor, logits: Tensor, labels: Tensor) -> Changed:
    """Put examples behind those of a closed form.

    Args:
        form: As it was fitted.
        features: Raw features of the new examples, `(k, n_features)`.
        logits: `(k, n_classes)`.
        labels: `(k,)`.
    """
    n_classes = logits.shape[1]
    old, part = form.moments, feature_moments(features, labels, n_classes, form.widths, dtype=torch.float64)
    n, gram, targets = old.n_train + len(labels), old.gram + part.gram, old.targets + part.targets
    return Changed(
        torch.cat([form.features, features.to(form.features)]),  # a memory map becomes a tensor
        torch.cat([form.logits, logits.to(form.logits)]),
        torch.cat([form.labels, labels.to(form.labels)]),
        form.widths,
        Moments(gram, targets, layer_scale(gram.diagonal(), form.widths, n), n),
    )


def without_examples(form: ClosedFormOperators, keep: Tensor) -> Changed:
    """Keep some examples of a closed form.

    Args:
        form: As it was fitted.
        keep: Rows that stay, in order, `(n_kept,)`, on the CPU: stored features are, whatever the labels are.
    """
    gone = torch.ones(len(form.labels), dtype=torch.bool, device="cpu")
    gone[keep] = False
    features, labels = _rows(form.features, keep), form.labels[keep]
    moments = _moments_without(form, gone, None, features, labels)
    return Changed(features, _rows(form.logits, keep), labels, form.widths, moments)


def with_others(
    form: ClosedFormOperators, rows: Tensor, features: Tensor, logits: Tensor, labels: Tensor
) -> Changed:
    """Put other examples in the places of some of a closed form.

    Args:
        form: As it was fitted.
        rows: Their places, `(k,)`.
        features: Raw features of the new examples, `(k, n_features)`.
        logits: `(k, n_classes)`.
        labels: `(k,)`.
    """
    rows = rows.to(form.labels.device)
    new = feature_moments(features, labels, logits.shape[1], form.widths, dtype=torch.float64)

    def replaced(old: Tensor, part: Tensor) -> Tensor:
        return old.clone().index_copy_(0, rows.to(old.device), part.to(old))

    every, all_labels = replaced(form.features, features), replaced(form.labels, labels)
    moments = _moments_without(form, rows, new, every, all_labels)
    return Changed(every, replaced(form.logits, logits), all_labels, form.widths, moments)


def _moments_without(
    form: ClosedFormOperators, gone: Tensor, new: Moments | None, features: Tensor, labels: Tensor
) -> Moments:
    """Moments after the rows `gone` have left a closed form and `new` ones have come.

    A feature that loses more than half of its energy is summed again from all rows that there are now: the
    difference of two sums would show their rounding.

    Args:
        form: As it was fitted.
        gone: Rows, or a mask of them.
        new: Moments of what has come, None for nothing.
        features: Of all examples that there are now.
        labels: Theirs.
    """
    old, n_classes = form.moments, form.logits.shape[1]
    lost = _rows(form.features, gone), form.labels[gone]
    part = feature_moments(*lost, n_classes, form.widths, dtype=torch.float64)
    gram, targets = old.gram - part.gram, old.targets - part.targets
    again = (gram.diagonal()[:-1] < 0.5 * old.gram.diagonal()[:-1]).nonzero().squeeze(1)
    if new is not None:
        gram, targets = gram + new.gram, targets + new.targets
    if len(again):
        gram[again], targets[again] = 0.0, 0.0
        for rows in blocks(len(features), 8192):
            h = torch.nn.functional.pad(matching(features[rows], gram), (0, 1), value=1.0)
            gram[again] += h[:, again].T @ h
            targets[again] += h[:, again].T @ one_hot(labels[rows].to(gram.device), targets)
        gram[:, again] = gram[again].T
    n = len(labels)
    return Moments(gram, targets, layer_scale(gram.diagonal(), form.widths, n), n)


def _rows(stored: Tensor, rows: Tensor) -> Tensor:
    """Some rows of an array that may be elsewhere than their indices."""
    return stored[rows.to(stored.device)]
