"""Transfer of a stored training set to the compute device, block by block.

A copy from pageable memory to a GPU blocks the host. A copy from pinned memory is queued, so that the host
reads the next rows while the GPU works on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .devices import copied_in_background, float64_device
from .memory import MOST_ROWS, blocks


def to_device(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy rows of a stored array to a device and cast them there, so that the transfer is small.

    Args:
        rows: On the CPU (perhaps memory-mapped) or on the device already, in any precision.
        device: Target device.
        dtype: Target dtype.

    >>> to_device(torch.ones(2, 3, dtype=torch.bfloat16), torch.device("cpu"), torch.float32).dtype
    torch.float32
    """
    return copied_in_background(rows, device).to(dtype)


def working_dtype(features: Tensor) -> torch.dtype:
    """Dtype of results: float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TrainingBlocks:
    """View of a training set that is read block by block, without a copy of its size.

    Attributes:
        features: Raw features `(n_train, n_features)` in any precision, may be memory-mapped.
        logits: `(n_train, n_classes)`, likewise.
        labels: `(n_train,)` int64 or `(n_train, n_classes)`, on the compute device.
        dtype: Of products.
        block_rows: Rows of a block.
        weights: omega of each example, `(n_train,)` float64; None for 1.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    dtype: torch.dtype
    block_rows: int = MOST_ROWS
    weights: Tensor | None = None

    def __iter__(self) -> Iterator[slice]:
        return blocks(len(self.labels), self.block_rows)

    @property
    def device(self) -> torch.device:
        """Compute device."""
        return self.labels.device

    def features_of(self, rows: slice, width: int | None = None) -> Tensor:
        """The first `width` features of some rows, `(n_rows, width)` in `dtype`."""
        return to_device(self.features[rows, :width], self.device, self.dtype)

    def logits_of(self, rows: slice) -> Tensor:
        """Logits of some rows, `(n_rows, n_classes)` float64."""
        return to_device(self.logits[rows], float64_device(self.device), torch.float64)

    def labels_of(self, rows: slice) -> Tensor:
        """Labels of some rows, on the device of `logits_of`, `(n_rows,)` or `(n_rows, n_classes)`."""
        return self.labels[rows].to(float64_device(self.device))

    def weights_of(self, rows: slice, like: Tensor) -> Tensor | None:
        """Omega of some rows in the dtype and on the device of `like`, `(n_rows,)`; None for 1."""
        return None if self.weights is None else self.weights[rows].to(like)
