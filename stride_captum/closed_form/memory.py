"""Bytes that a closed form keeps or needs temporarily, counted from array shapes.

Of n examples with d features in n_heads = d minus the last layer's, C classes and products of b bytes:

    features, logits     4 n (d + C), unless they are stored or memory-mapped
    vectors              29 n: label, 1 - leverage, shift, norm, flag; 8 n where residuals need no ridge head
    residuals            b n C, if they fit the memory budget
    moments              8 (d + 1) (d + 1 + C)
    factors              b ((d + 1)^2 + C^2) + 8 (n_heads + 1) C
    one block            3 b (d + 1) + 48 C for each of its rows

Of n examples with R positions that have a label, all rows of this table are R, and beside it:

    vectors              12 R + 16 n: which rows are those of an example
    left-out residuals   4 R C
    matrices             b n (d + 1) C + 16 n in the form "matrix", without features, logits, residuals and
                         vectors of rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..residuals import OF_A_HEAD
from ..system.memory import DEFAULT_BUDGET, MOST_ROWS, rows_that_fit
from ..system.to_device import TrainingBlocks, working_dtype
from .class_moments import MOST_CLASSES
from .damping import needs_float64

if TYPE_CHECKING:
    from .options import ClosedForm

#: Rows that are taken at a time by curvatures with many Kronecker terms.
FEW_ROWS = 256
#: Logits of a block: larger arrays are slower, because the system clears them at every use.
_LOGITS = 2**21


@dataclass(frozen=True)
class ClosedFormBytes:
    """Bytes by kind, as in the table of this module.

    Attributes:
        arrays: Features and logits in memory.
        vectors: What is kept of each example.
        residuals: Those that are kept, 0 if they do not fit the budget.
        moments: Gram matrix and class moments.
        factors: Inverses of A and Sigma, and weights of the ridge head.
        block: Temporary arrays of one block of training examples.
        solving: Temporary matrices of the factorizations.
    """

    arrays: int
    vectors: int
    residuals: int
    moments: int
    factors: int
    block: int
    solving: int

    @property
    def kept(self) -> int:
        """What a fit keeps."""
        return self.arrays + self.vectors + self.residuals + self.moments + self.factors


def closed_form_bytes(
    options: ClosedForm,
    n_train: int,
    widths: Sequence[int],
    n_classes: int,
    *,
    in_memory: bool,
    memory_budget: int = DEFAULT_BUDGET,
) -> ClosedFormBytes:
    """Count the arrays of one Kronecker term.

    Args:
        options: `damping`, `curvature` and `residuals`.
        n_train: n.
        widths: Widths of the layers.
        n_classes: C.
        in_memory: Whether features and logits are in memory.
        memory_budget: Bytes.

    >>> from stride_captum import ClosedForm
    >>> wide = closed_form_bytes(ClosedForm(), 10**6, [64], 1000, in_memory=False, memory_budget=2**20)
    >>> wide.vectors, wide.residuals, wide.block <= 2**20
    (29000000, 0, True)
    """
    d = sum(widths) + 1
    head = sum(widths[:-1]) + 1 if len(widths) > 1 else d
    dtype = products_dtype(options, n_train, d - 1)
    whole = options.curvature == "kronecker" and n_classes <= MOST_CLASSES
    residuals = dtype.itemsize * n_train * n_classes
    rows = min(n_train, block_rows(memory_budget, d - 1, n_classes, dtype))
    return ClosedFormBytes(
        arrays=4 * n_train * (d - 1 + n_classes) * in_memory,
        vectors=(29 if _has_head(options) else 8) * n_train,
        residuals=residuals if residuals <= memory_budget else 0,
        moments=8 * d * (d + n_classes),
        factors=dtype.itemsize * (d * d + (n_classes**2 if whole else n_classes)) + 8 * head * n_classes,
        block=rows * (3 * dtype.itemsize * d + 6 * 8 * n_classes),
        solving=8 * (4 * d * d + d * n_classes + 4 * (n_classes**2 if whole else n_classes)),
    )


@dataclass(frozen=True)
class PositionBytes:
    """Bytes of a closed form of examples with several positions.

    Attributes:
        form: "rows" or "matrix": the given one, or for "auto" the one that is chosen.
        rows: Of all rows, as examples of their own.
        of_rows: What the form "rows" keeps beside them.
        of_matrices: What the form "matrix" keeps in the place of both, but for moments and factors.
    """

    form: str
    rows: ClosedFormBytes
    of_rows: int
    of_matrices: int

    @property
    def kept(self) -> int:
        """What a fit keeps."""
        if self.form == "rows":
            return self.rows.kept + self.of_rows
        return self.rows.moments + self.rows.factors + self.of_matrices

    @property
    def at_the_end(self) -> int:
        """What a fit needs on top when it gives the form "matrix": the rows, and the matrices in blocks."""
        return 0 if self.form == "rows" else self.rows.kept + self.of_rows + self.of_matrices


def position_bytes(
    options: ClosedForm,
    n_train: int,
    n_rows: int,
    widths: Sequence[int],
    n_classes: int,
    *,
    in_memory: bool,
    memory_budget: int = DEFAULT_BUDGET,
) -> PositionBytes:
    """Count the arrays of one Kronecker term of examples with several positions.

    Args:
        options: `form`, `damping`, `curvature` and `residuals`.
        n_train: n.
        n_rows: R, positions with a label of all examples.
        widths: Widths of the layers.
        n_classes: C.
        in_memory: Whether features and logits are in memory.
        memory_budget: Bytes.

    >>> from stride_captum import ClosedForm
    >>> long = position_bytes(ClosedForm(), 1000, 128_000, [64], 50, in_memory=True)
    >>> long.form, long.of_matrices < long.rows.arrays
    ('matrix', True)
    """
    rows = closed_form_bytes(
        options, n_rows, widths, n_classes, in_memory=in_memory, memory_budget=memory_budget
    )
    d, which = sum(widths), 12 * n_rows + 16 * n_train
    itemsize = products_dtype(options, n_rows, d).itemsize
    return PositionBytes(
        form=smaller_form(options.form, n_train, n_rows, d, n_classes),
        rows=rows,
        of_rows=which + 4 * n_rows * n_classes * _has_head(options),
        of_matrices=which + itemsize * n_train * (d + 1) * n_classes + 16 * n_train,
    )


def _has_head(options: ClosedForm) -> bool:
    return options.residuals in (None, *OF_A_HEAD)


def smaller_form(form: str, n_train: int, n_rows: int, n_features: int, n_outputs: int) -> str:
    """The form that "auto" means: the one that takes less memory.

    >>> smaller_form("auto", 10, 1280, 64, 50)
    'matrix'
    """
    if form != "auto":
        return form
    rows = n_rows * (n_features + n_outputs)
    return "rows" if rows <= n_train * (n_features + 1) * n_outputs else "matrix"


def products_dtype(options: ClosedForm, n_train: int, n_features: int) -> torch.dtype:
    """The dtype of products with float32 features of usual size."""
    return torch.float64 if needs_float64(options.damping, n_train, n_features) else torch.float32


def block_rows(memory_budget: int, n_features: int, n_classes: int, dtype: torch.dtype) -> int:
    """Training examples whose temporary arrays fit the budget: 3 of features, 6 of classes in float64."""
    bytes_per_row = 3 * dtype.itemsize * (n_features + 1) + 6 * 8 * n_classes
    most = min(MOST_ROWS, max(_LOGITS // n_classes, FEW_ROWS))
    return rows_that_fit(memory_budget, bytes_per_row, most)


def blocks_within(
    memory_budget: int,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    exact: bool,
    weights: Tensor | None,
) -> TrainingBlocks:
    """A training set in blocks that fit the budget; products are in float64 if `exact`.

    Args:
        memory_budget: Bytes of one block.
        features: `(n_train, n_features)`.
        logits: `(n_train, n_classes)`.
        labels: `(n_train,)`, or `(n_train, n_classes)`.
        exact: Whether products must be in float64.
        weights: omega, `(n_train,)`; None for 1.
    """
    dtype = torch.float64 if exact else working_dtype(features)
    rows = block_rows(memory_budget, features.shape[1], logits.shape[1], dtype)
    return TrainingBlocks(features, logits, labels, dtype, rows, weights)
