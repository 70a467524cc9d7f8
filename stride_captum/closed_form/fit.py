"""Fit of the closed form: moments, ridge head, curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import bad_value
from ..losses import CrossEntropy, Loss
from ..positions import Positions
from ..residuals import OF_A_HEAD
from ..system.memory import DEFAULT_BUDGET
from ..system.processes import SINGLE_PROCESS, SingleProcess
from ..system.to_device import working_dtype
from .class_moments import MOST_CLASSES, class_moments
from .curvature_fit import Spectrum, eigenbases, fit_curvature, squares_in
from .damping import check_damping, head_dtype, needs_float64
from .memory import blocks_within
from .moments import Moments, feature_moments
from .operators import ClosedFormOperators
from .position_head import fit_head
from .training_residuals import readable_widths, ridge_squares

if TYPE_CHECKING:
    from .options import ClosedForm

#: Norm of residuals, in the unit of the curvature, up to which scores stay within float32.
_LARGEST_RESIDUAL = 1e30


def fit_closed_form(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    options: ClosedForm,
    temperature: float,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    ranks: SingleProcess = SINGLE_PROCESS,
    moments: Moments | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
    positions: Positions | None = None,
) -> ClosedFormOperators:
    """Fit the closed form: one product of n_train x n_features x n_features, a second one for a ridge head.

    Args:
        features: Raw features `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`, likewise.
        labels: `(n_train,)` int64, or as `loss` has them, on the compute device; blocks of features are
            copied there.
        widths: Widths of the layers, in the order of the columns.
        options: As given by the user; its temperature is not read.
        temperature: T of the tempered residuals; also of p in the curvature, unless the residuals are
            those of training.
        memory_budget: Bytes of one block; residuals are kept if they fit it.
        ranks: Processes that share the training set.
        moments: Of the features, if they are known; saves one of the two products.
        loss: What the model was trained with; None for cross-entropy.
        weights: omega, `(n_train,)` float64, beside the labels; None for 1.
        positions: Where all arrays have one row for each position: which rows are those of an example, which
            the ridge head leaves out together.

    Raises:
        ValueError: A damping too small for the precision of the features, logits without uncertainty, or
            tempered residuals of a loss without a temperature.
    """
    loss = CrossEntropy() if loss is None else loss
    if options.residuals == "temperature" and not loss.tempered:
        must = f"be 'training', 'leave-one-out' or 'both' for loss={loss.name!r}, which has no temperature"
        raise bad_value("residuals", must, repr(options.residuals))
    for name in ("damping", "head_damping"):
        check_damping(getattr(options, name), features, name)
    n = int(ranks.sums("number of examples", len(labels))[0])
    read = readable_widths(widths)
    d = sum(read)
    exact = needs_float64(options.damping, n, features.shape[1])
    data = blocks_within(memory_budget, features, logits, labels, exact, weights)
    precision = head_dtype(options.head_damping, n, d, data.dtype)
    if moments is None:
        dtype = torch.float64 if precision == torch.float64 else None
        moments = ranks.total(
            feature_moments(features, labels, logits.shape[1], widths, data.block_rows, dtype, loss, weights),
            "moments of features",
        )
    if not moments.checked().in_float32:
        precision = torch.float64
        data = blocks_within(memory_budget, features, logits, labels, True, weights)
    kind = options.residuals or "both"
    head = None
    if kind in OF_A_HEAD:
        of_head = features[:, :d], labels, moments.of_layers(read), options.head_damping, positions
        head = fit_head(*of_head, data.block_rows, precision, loss, weights)
    softening = 1.0 if kind == "training" else temperature
    diagonal_only = options.curvature == "identity" or (
        options.curvature == "kronecker" and logits.shape[1] > MOST_CLASSES
    )
    classes = ranks.total(class_moments(data, softening, diagonal_only, loss), "moments of classes")
    classes.checked(data, softening)
    largest = classes.residual_squares
    ratio: float | Tensor = 1.0
    if head is not None:
        squares = ridge_squares(head, data, loss, temperature)
        ridge = ranks.all_reduce(squares, "norms of the ridge residuals")
        ratio = loss.ridge_ratio(classes.residual_square, ridge)
        largest = ridge if kind == "leave-one-out" else largest
    _check_unit(float(largest.sum()), classes.unit, features)
    spectrum = None
    if options.curvature == "eigenvalue-corrected":  # other hardware may rotate eigenvectors
        first, second = (ranks.broadcast(q, "eigenvectors") for q in eigenbases(moments, classes))
        squares = squares_in((first, second), data, softening, moments, classes)
        spectrum = Spectrum(first, second, ranks.all_reduce(squares, "corrected eigenvalues"))
    form = ClosedFormOperators(
        features=features,
        logits=logits,
        labels=labels,
        widths=list(widths),
        moments=moments,
        scale=moments.scale.to(labels.device, data.dtype),
        head=head,
        head_damping=options.head_damping,
        ridge_ratio=ratio,
        curvature=fit_curvature(
            options.curvature, data, softening, moments, classes, options.damping, spectrum
        ),
        kind=kind,
        temperature=temperature,
        threshold=options.threshold,
        block_rows=data.block_rows,
        residual_bytes=memory_budget,
        loss=loss,
        weights=weights,
        positions=positions,
    )
    form.keep_residuals()
    return form


def _check_unit(square: float, unit: float, features: Tensor) -> None:
    """Refuse residuals so large beside the model's uncertainty that float32 cannot hold their scores."""
    if working_dtype(features) == torch.float32 and math.sqrt(square) > _LARGEST_RESIDUAL * unit:
        raise bad_value(
            "temperature",
            "leave the model some uncertainty beside its errors, for scores that float32 can hold",
            f"a mean variance of {unit:.0e} of a class",
            "Raise it, or give the model and its data in float64.",
        )
