"""Stored rows on the device that computes with them.

A copy to a GPU from pageable memory holds up the host until it is done. Through pinned memory it is queued:
the host reads the next rows from the store while the GPU works on these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import copied_in_background


def staged(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows of a stored array on a device; rounding and widening happen there, so that what travels is small.

    Args:
        rows: On the CPU (perhaps memory-mapped) or on the device already, in any precision.
        device: Where they are needed.
        dtype: In which they are needed.

    >>> staged(torch.ones(2, 3, dtype=torch.bfloat16), torch.device("cpu"), torch.float32).dtype
    torch.float32
    """
    return copied_in_background(rows, device).to(dtype)
