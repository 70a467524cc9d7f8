"""Incremental update of a fitted closed form when training examples are added, removed or changed.

With k changed examples among n, d features and C classes:

    forward passes    of the k new examples, none for removed ones
    moments           gram +- H_k^T H_k, targets +- H_k^T E_k                 k d^2
    factors           of the new moments, from scratch, in float64            d^3
    residuals         leave-one-out, of all examples, from stored features    n d^2

A refit costs n forward passes and 2 n d^2 on top of the factors. A rank-k update of the factors (d^2 k) would
not equal a refit: layer scales and damping depend on the mean diagonal, so one changed example changes the
whole diagonal. The leverages of all examples change for the same reason, which takes a pass over the stored
features. Examples with several positions come and go with all their rows; where no rows are kept (the form
"matrix") there is nothing to update, and all examples are read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import bad_value
from ..features.precomputed import Precomputed, positions_in_some
from ..operators import Changed
from ..positions import joined
from ..system.devices import matching
from ..system.memory import blocks
from .moments import Moments, feature_moments

if TYPE_CHECKING:
    from .operators import ClosedFormOperators


def with_examples(form: ClosedFormOperators, new: Precomputed) -> Changed:
    """Append training examples to a closed form.

    Args:
        form: As it was fitted.
        new: The examples; features raw, in the columns of the form.

    Raises:
        ValueError: Soft labels beside class indices, or the reverse; positions beside examples without.
    """
    _check_kind(form, new, "examples")
    weights = new.weights
    return Changed(
        torch.cat([form.features, new.features.to(form.features)]),  # a memory map becomes a tensor
        torch.cat([form.logits, new.logits.to(form.logits)]),
        torch.cat([form.labels, new.labels.to(form.labels)]),
        form.widths,
        None
        if weights is None or form.weights is None
        else torch.cat([form.weights, weights.to(form.weights)]),
        None if new.positions is None or form.positions is None else joined([form.positions, new.positions]),
        form.moments + _moments_of(form, new.features, new.labels, weights),
    )


def _check_kind(form: ClosedFormOperators, new: Precomputed, argument: str) -> None:
    if (form.positions is None) != (new.positions is None):
        raise positions_in_some()
    if new.labels.ndim != form.labels.ndim:
        kinds = ["class indices", "distributions over classes"]
        there, here = (kinds[part.ndim - 1] for part in (form.labels, new.labels))
        must = f"hold labels of the kind that the method was fitted with, {there}"
        raise bad_value(argument, must, here, "Give all labels in one form, or fit again.")


def _moments_of(
    form: ClosedFormOperators, features: Tensor, labels: Tensor, weights: Tensor | None
) -> Moments:
    """Moments of some examples, in float64."""
    n_classes, loss = form.n_classes, form.loss
    return feature_moments(
        features, labels, n_classes, form.widths, dtype=torch.float64, loss=loss, weights=weights
    )


def without_examples(form: ClosedFormOperators, keep: Tensor) -> Changed:
    """Keep some examples of a closed form.

    Args:
        form: As it was fitted.
        keep: Examples that stay, in order, `(n_kept,)`, on the CPU, because stored features are.
    """
    positions = None
    if form.positions is not None:
        keep, positions = form.positions.rows_at(keep), form.positions.at(keep)
    gone = torch.ones(len(form.labels), dtype=torch.bool, device="cpu")
    gone[keep] = False
    features, labels = _rows(form.features, keep), form.labels[keep]
    weights = None if form.weights is None else _rows(form.weights, keep)
    moments = _moments_without(form, gone, None, features, labels, weights)
    return Changed(features, _rows(form.logits, keep), labels, form.widths, weights, positions, moments)


def with_others(form: ClosedFormOperators, places: Tensor, new: Precomputed) -> Changed:
    """Replace some training examples of a closed form.

    Args:
        form: As it was fitted.
        places: Theirs, `(k,)` on the CPU.
        new: The examples that come; features raw, in the columns of the form.

    Raises:
        ValueError: Soft labels beside class indices, or the reverse; positions beside examples without.
    """
    _check_kind(form, new, "train_dataset")
    gone, there, positions = places, places, None
    if form.positions is not None and new.positions is not None:
        order = torch.arange(len(form.positions), device="cpu")
        order[places] = len(order) + torch.arange(len(places), device="cpu")
        positions = joined([form.positions, new.positions]).at(order)
        gone, there = form.positions.rows_at(places), positions.rows_at(places)
    kept = _all_but(gone, len(form.labels))
    others = _all_but(there, len(kept) + len(there))

    def replaced(old: Tensor, part: Tensor) -> Tensor:
        whole = old.new_empty(len(others) + len(there), *old.shape[1:])
        whole[there.to(old.device)] = part.to(old)
        for few in blocks(len(kept), 8192):
            whole[others[few].to(old.device)] = _rows(old, kept[few])
        return whole

    features, labels = replaced(form.features, new.features), replaced(form.labels, new.labels)
    weights = None
    if form.weights is not None and new.weights is not None:
        weights = replaced(form.weights, new.weights)
    of_new = _moments_of(form, new.features, new.labels, new.weights)
    moments = _moments_without(form, gone.to(form.labels.device), of_new, features, labels, weights)
    logits = replaced(form.logits, new.logits)
    return Changed(features, logits, labels, form.widths, weights, positions, moments)


def _all_but(rows: Tensor, n: int) -> Tensor:
    """The other ones of n rows, in order."""
    others = torch.ones(n, dtype=torch.bool, device="cpu")
    others[rows] = False
    return others.nonzero()[:, 0]


def _moments_without(
    form: ClosedFormOperators,
    gone: Tensor,
    new: Moments | None,
    features: Tensor,
    labels: Tensor,
    weights: Tensor | None,
) -> Moments:
    """Moments without the rows `gone` and with `new` ones.

    A feature that loses more than half of its sum of squares is summed again over all remaining rows, because
    the difference of the two sums would lose digits.

    Args:
        form: As it was fitted.
        gone: Rows, or a mask of them.
        new: Moments of the new examples; None if there are none.
        features: Of all examples after the change.
        labels: Theirs.
        weights: Theirs.
    """
    omega = None if form.weights is None else _rows(form.weights, gone)
    moments = form.moments - _moments_of(form, _rows(form.features, gone), form.labels[gone], omega)
    left, before = moments.gram.diagonal()[:-1], form.moments.gram.diagonal()[:-1]
    again = (left < 0.5 * before).nonzero().squeeze(1)
    if new is not None:
        moments = moments + new
    if len(again):
        gram, targets = moments.gram, moments.targets
        gram[again], targets[again] = 0.0, 0.0
        for rows in blocks(len(features), 8192):
            h = torch.nn.functional.pad(matching(features[rows], gram), (0, 1), value=1.0)
            few = h[:, again] if weights is None else h[:, again] * weights[rows].to(h)[:, None]
            gram[again] += few.T @ h
            targets[again] += few.T @ form.loss.encoded(labels[rows].to(gram.device), targets)
        gram[:, again] = gram[again].T
    return moments


def _rows(stored: Tensor, rows: Tensor) -> Tensor:
    """Rows of an array that may be on another device than their indices."""
    return stored[rows.to(stored.device)]
