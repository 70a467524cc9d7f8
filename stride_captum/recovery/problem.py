"""Responses and membership of a recovery problem, validated and centered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import bad_value
from .design import Design, read_membership, read_responses
from .working_set import largest_correlation


class Problem:
    """Validated responses and columns, centered if requested."""

    def __init__(self, Y: Any, membership: Any, center: bool) -> None:
        matrix = read_membership(membership)
        y = read_responses(Y, matrix.shape[0])
        given = torch.from_numpy(Y) if not isinstance(Y, Tensor) else Y
        self.home = given.new_empty(0, dtype=given.dtype if given.is_floating_point() else torch.float64)
        self.mean = y.mean(1) if center else y.new_zeros(len(y))
        self.y = y - self.mean[:, None]
        self.columns = Design(matrix, center, y.device)

    def per_row(self, name: str, value: float | Tensor, remedy: str | None) -> Tensor:
        """Expand a number or `(n_test,)` tensor to `(n_test,)` float64; must be positive for nonzero rows."""
        rows = torch.as_tensor(value, dtype=torch.float64, device=self.y.device)
        if rows.ndim > 0 and rows.shape != self.y.shape[:1]:
            must = f"be a number or of shape (n_test,) = ({len(self.y)},)"
            raise bad_value(name, must, tuple(rows.shape))
        rows = rows.expand(len(self.y))
        matters = largest_correlation(self.columns, self.y) > 0
        fine = torch.isfinite(rows) & ((rows > 0) | ((rows == 0) & ~matters))
        if not bool(fine.all()):
            raise bad_value(name, "be positive and finite", rows[~fine][0].item(), remedy)
        return rows
