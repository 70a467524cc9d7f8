"""Labels that are distributions over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import bad_value

#: How far from 1 the sum of a soft label may be.
_ROUNDING = 1e-4


def distributions(labels: Tensor, argument: str) -> Tensor:
    """Soft labels whose rows have the sum 1, `(n, n_classes)` in at least float32.

    Args:
        labels: `(n, n_classes)`; the sum of a row may be off by the rounding of its dtype.
        argument: What an error calls them.

    Raises:
        ValueError: Numbers below 0, or another sum.

    >>> distributions(torch.tensor([[0.25, 0.75]]), "labels")
    tensor([[0.2500, 0.7500]])
    """
    rows = labels if labels.dtype == torch.float64 else labels.float()
    eps = torch.finfo(labels.dtype if labels.is_floating_point() else rows.dtype).eps
    wrong = ~((rows >= 0).all(1) & ((rows.sum(1) - 1).abs() <= max(_ROUNDING, 2 * eps)))
    if bool(wrong.any()):
        row = rows[wrong][0]
        must = f"hold class indices (n,), or distributions (n, {labels.shape[1]}), each with the sum 1"
        remedy = "Several labels an example need loss='binary_cross_entropy', a regression loss='mse'."
        raise bad_value(argument, must, f"a row with the sum {float(row.sum()):g}", remedy)
    return rows / rows.sum(1, keepdim=True)
