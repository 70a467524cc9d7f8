"""Owns how a fitted closed form takes in or gives up training examples without the others being read again.

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

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from . import inputs as data
from .batch import is_batch
from .closed_form import ClosedForm
from .devices import matching
from .errors import bad_type, bad_value
from .memory_budget import blocks
from .newton import Moments, feature_moments, layer_scale
from .residuals import one_hot


@dataclass(frozen=True)
class Changed:
    """What the closed form of a changed training set starts from, in the order of its examples.

    Attributes:
        features: `(n_train, n_features)`.
        logits: `(n_train, n_classes)`.
        labels: `(n_train,)`.
        moments: Of the features.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    moments: Moments


def with_examples(form: ClosedForm, features: Tensor, logits: Tensor, labels: Tensor) -> Changed:
    """Put examples behind those of a closed form.

    Args:
        form: As it was fitted.
        features: Raw features of the new examples, `(k, n_features)`.
        logits: `(k, n_classes)`.
        labels: `(k,)`.
    """
    old, part = form.moments, feature_moments(features, labels, logits.shape[1], form.widths)
    n, gram, targets = old.n_train + len(labels), old.gram + part.gram, old.targets + part.targets
    return Changed(
        torch.cat([form.features, features.to(form.features)]),  # a memory map becomes a tensor
        torch.cat([form.logits, logits.to(form.logits)]),
        torch.cat([form.labels, labels.to(form.labels)]),
        Moments(gram, targets, layer_scale(gram.diagonal(), form.widths, n), n),
    )


def without_examples(form: ClosedForm, keep: Tensor) -> Changed:
    """Keep some examples of a closed form.

    A feature that loses more than half of its energy is summed again from the rows that stay: the
    difference of two sums would show their rounding.

    Args:
        form: As it was fitted.
        keep: Rows that stay, in order, `(n_kept,)`, on the CPU: stored features are, whatever the labels are.
    """
    gone = torch.ones(len(form.labels), dtype=torch.bool, device="cpu")
    gone[keep] = False
    old, n_classes = form.moments, form.logits.shape[1]
    part = feature_moments(form.features[gone], form.labels[gone], n_classes, form.widths)
    features, labels = form.features[keep], form.labels[keep]
    gram, targets = old.gram - part.gram, old.targets - part.targets
    again = (gram.diagonal()[:-1] < 0.5 * old.gram.diagonal()[:-1]).nonzero().squeeze(1)
    if len(again):
        gram[again], targets[again] = 0.0, 0.0
        for rows in blocks(len(features), 8192):
            h = torch.nn.functional.pad(matching(features[rows], gram), (0, 1), value=1.0)
            gram[again] += h[:, again].T @ h
            targets[again] += h[:, again].T @ one_hot(labels[rows].to(gram.device), targets)
        gram[:, again] = gram[again].T
    n = len(keep)
    moments = Moments(gram, targets, layer_scale(gram.diagonal(), form.widths, n), n)
    return Changed(features, form.logits[keep], labels, moments)


def rows_to_keep(indices: Any, n_train: int) -> Tensor:
    """The rows that stay when `indices` are removed, `(n_kept,)` int64.

    Raises:
        TypeError: Not a list of integers.
        ValueError: Out of range, twice the same, none at all, or every example.
    """
    gone = indices.cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
    if gone.ndim != 1 or (gone.size and not np.issubdtype(gone.dtype, np.integer)):
        raise bad_type("indices", "be a list of places in the training set", indices)
    if not 0 < gone.size < n_train:
        raise bad_value("indices", f"name between 1 and {n_train - 1} examples", gone.size)
    if gone.min() < 0 or gone.max() >= n_train:
        raise bad_value("indices", f"be between 0 and {n_train - 1}", f"{gone.min()} to {gone.max()}")
    keep = np.ones(n_train, dtype=bool)
    keep[gone] = False
    if n_train - int(keep.sum()) != gone.size:
        raise bad_value("indices", "name each example once", "one of them twice")
    return torch.from_numpy(keep.nonzero()[0])


def new_examples(examples: Any) -> Any:
    """Added examples as a data set: a Dataset or DataLoader as it is, or tensors `(inputs..., labels)`."""
    if isinstance(examples, tuple | list) and len(examples) > 1 and all(map(torch.is_tensor, examples)):
        examples = TensorDataset(*examples)
    if is_batch(examples) or data.count_examples(examples) is None:
        must = "be a Dataset or DataLoader with a length, or tensors (inputs..., labels)"
        raise bad_type("examples", must, examples)
    data.check_source(examples, "examples")
    return examples
