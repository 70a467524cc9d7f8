"""Quadratic forms of the inverse curvature: self-influence, and the norms of cosine normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import bad_value
from ..system.to_device import TrainingBlocks
from .curvature import Curvature, IdentityCurvature, KroneckerCurvature, forms_of
from .memory import FEW_ROWS
from .moments import scaled_features


@dataclass
class TrainingForms:
    """`<phi_i (x) left_i, (F + lambda)^-1 (phi_i (x) right_i)> / W` of training examples, in units of 1/s.

    Attributes:
        data: The training set.
        curvature: F + lambda.
        scale: Factor of each feature, `(n_features + 1,)`.
        weight: W.
    """

    data: TrainingBlocks
    curvature: Curvature
    scale: Tensor
    weight: float

    @property
    def blocks(self) -> TrainingBlocks:
        """Blocks of the training set for `of`; small ones if a form sums over many Kronecker terms."""
        if isinstance(self.curvature, IdentityCurvature | KroneckerCurvature):
            return self.data
        return replace(self.data, block_rows=min(self.data.block_rows, FEW_ROWS))

    def of(self, rows: slice, left: Tensor, right: Tensor) -> Tensor:
        """The forms of some rows, `(n_rows,)`, given both sides `(n_rows, n_classes)`."""
        if isinstance(self.curvature, IdentityCurvature | KroneckerCurvature):
            return self._leverages[rows] * self.curvature.class_product(left, right) / self.weight
        phi = scaled_features(self.data.features_of(rows), self.scale)
        return forms_of(self.curvature.solve(phi, right), phi, left) / self.weight

    @cached_property
    def _leverages(self) -> Tensor:
        """Feature factor of the forms of a single Kronecker product, `(n_train,)`."""
        assert isinstance(self.curvature, IdentityCurvature | KroneckerCurvature)
        return self.curvature.inverse.forms(self.data, self.scale)


def sizes_and_units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute entry of each row, and the rows divided by it, so that squares do not underflow."""
    sizes = vectors.abs().amax(1)
    return sizes, vectors / torch.where(sizes > 0, sizes, 1.0)[:, None]


def norms_of(forms: Tensor, sizes: Tensor) -> Tensor:
    """Norms of rows from the forms of the scaled rows; 0 if the inverse would overflow."""
    norms = forms.clamp_min(0).sqrt() * sizes
    return torch.where(norms >= torch.finfo(norms.dtype).tiny, norms, 0.0)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """The outer product of each pair of rows, flat, `(n, n_left n_right)`."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def in_range(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cast float64 results to another dtype.

    Raises:
        ValueError: All of them would underflow to 0.
    """
    rounded = values.to(device, dtype)
    largest, least = float(values.abs().max()), torch.finfo(dtype).tiny
    if 0 < largest < least:
        raise bad_value(
            "model",
            f"have losses of which float32 can hold the products (above {least:.0e})",
            f"{largest:.0e} at most",
            "Give the model and its data in float64.",
        )
    return rounded
