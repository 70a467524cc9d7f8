"""Projection of wide layers to fewer features, and the error of their kernel.

A matrix P per layer maps h to `h P`. The closed form depends on features only through their kernel `h(x)^T
h(i)`, so the reported error is `|K - K_P|_F / |K|_F` on a sample of training examples, with every layer
scaled to unit mean square norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import add_gram_matrix, in_float32
from ..system.devices import float64_device
from ..system.memory import MOST_ROWS, blocks, spread_rows
from ..system.saved_values import saved_as
from ..system.to_device import working_dtype

_SAMPLE = 512


@saved_as("projection")
@dataclass
class Projection:
    """One matrix for each layer.

    Attributes:
        matrices: P of each layer, `(width, new_width)`; None for a layer that is not projected.
        widths: Of the layers before projection.
        error: Relative error of the kernel on a sample.
    """

    matrices: list[Tensor | None]
    widths: list[int]
    error: float

    @property
    def new_widths(self) -> list[int]:
        """Widths of the layers after projection."""
        pairs = zip(self.matrices, self.widths, strict=True)
        return [width if matrix is None else matrix.shape[1] for matrix, width in pairs]

    def __call__(self, features: Tensor) -> Tensor:
        """Project rows `(n, n_features)`, in the dtype of the matrices."""
        parts = features.split(self.widths, dim=1)
        like = next(matrix for matrix in [*self.matrices, features] if matrix is not None)
        pairs = zip(parts, self.matrices, strict=True)
        return torch.cat([part.to(like) if p is None else part.to(p) @ p for part, p in pairs], dim=1)

    def whole(self, features: Tensor, device: torch.device, block_rows: int = MOST_ROWS) -> Tensor:
        """Project a training set block by block, `(n_train, sum(new_widths))` on the device."""
        dtype = working_dtype(features)
        result = torch.empty(len(features), sum(self.new_widths), dtype=dtype, device=device)
        for start in range(0, len(features), block_rows):
            result[start : start + block_rows] = self(features[start : start + block_rows].to(device))
        return result


def fit_projection(
    features: Tensor,
    widths: Sequence[int],
    kind: str,
    width: int,
    seed: int,
    device: torch.device,
    block_rows: int = MOST_ROWS,
) -> Projection:
    """Fit projections to `width` for all wider layers.

    Args:
        features: `(n_train, n_features)`, may be memory-mapped.
        widths: Of the layers, in the order of the columns.
        kind: "random" (Gaussian, variance 1 / width: the expected kernel is the true one) or "pca" (the
            directions with most of the sum of squares, uncentered like the kernel).
        width: Of a layer after projection.
        seed: Of the random directions.
        device: Compute device.
        block_rows: Training examples per block.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, start = working_dtype(features), 0
    matrices: list[Tensor | None] = []
    for old in widths:
        layer = features[:, start : start + old]
        start += old
        if old <= width:
            matrices.append(None)
        elif kind == "random":
            drawn = (
                torch.randn(old, width, generator=generator, dtype=torch.float64, device="cpu") / width**0.5
            )
            matrices.append(drawn.to(dtype).to(device))
        else:
            matrices.append(_principal(layer, width, device, block_rows))
    projection = Projection(matrices, list(widths), 0.0)
    projection.error = kernel_error(projection, features, device)
    return projection


def kernel_error(projection: Projection, features: Tensor, device: torch.device) -> float:
    """`|K - K_P|_F / |K|_F` on at most 512 examples that are spread evenly over the training set."""
    sample = features[spread_rows(len(features), _SAMPLE)].to(device, working_dtype(features))
    before = _kernel(sample, projection.widths)
    gap = _kernel(projection(sample), projection.new_widths) - before
    norm = before.norm()
    return float(gap.norm() / norm) if norm > 0 else 0.0


def _kernel(features: Tensor, widths: Sequence[int]) -> Tensor:
    layers = [layer.double() for layer in features.cpu().split(list(widths), dim=1)]
    energies = [layer.square().sum(1).mean() for layer in layers]
    pairs = zip(layers, energies, strict=True)
    return torch.stack([layer @ layer.T / (energy if energy > 0 else 1.0) for layer, energy in pairs]).sum(0)


def _principal(layer: Tensor, width: int, device: torch.device, block_rows: int) -> Tensor:
    """Leading eigenvectors of the second moment, `(old width, width)`."""
    dtype = working_dtype(layer)
    total = _gram_matrix(layer, device, dtype, block_rows)
    if not bool(in_float32((total.trace() / len(layer)).sqrt())):
        total = _gram_matrix(layer, float64_device(device), torch.float64, block_rows)
    vectors: Tensor = torch.linalg.eigh(total)[1]
    return vectors[:, -width:].flip(1).to(dtype).to(device)


def _gram_matrix(layer: Tensor, device: torch.device, dtype: torch.dtype, block_rows: int) -> Tensor:
    total = torch.zeros(layer.shape[1], layer.shape[1], dtype=torch.float64, device="cpu")
    for rows in blocks(len(layer), block_rows):
        add_gram_matrix(total, layer[rows].to(device, dtype))
    return total
