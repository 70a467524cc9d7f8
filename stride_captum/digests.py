"""Digests of training examples: one number for the label of each example and one for its inputs.

They tell whether two passes over a data set gave the same examples in the same order. A digest is a CRC-32:
a change of up to 32 neighboring bits always shows, any other with probability 1 - 2^-32. Nothing here
guards against someone who changes data on purpose.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .restoring import bits


@dataclass(frozen=True)
class Digests:
    """Digests of consecutive examples.

    Attributes:
        labels: `(n,)` int64; 0 where there is no label.
        inputs: `(n,)` int64.
    """

    labels: Tensor
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[Digests]) -> Digests:
        """Several digests, one after the other."""
        return cls(torch.cat([p.labels for p in parts]), torch.cat([p.inputs for p in parts]))

    @classmethod
    def of(cls, n: int, labels: Any, inputs: Iterable[Any]) -> Digests:
        """Digests of the `n` examples of a batch.

        Args:
            n: Number of examples.
            labels: What holds the labels, or None.
            inputs: The parts of the inputs that have one row (or one item) for each example.
        """
        return cls(
            row_digests(n, () if labels is None else (labels,)),
            row_digests(n, inputs),
        )


def row_digests(n: int, parts: Iterable[Any]) -> Tensor:
    """One CRC-32 for each of `n` examples over its rows in all `parts`, `(n,)` int64.

    Args:
        n: Number of examples.
        parts: Tensors, arrays or lists of length n.

    >>> row_digests(2, [torch.tensor([[1.0, 2.0], [1.0, 2.0]])]).unique().numel()
    1
    """
    digests = [0] * n
    for part in parts:
        for i, row in enumerate(_rows(part, n)):
            digests[i] = zlib.crc32(row, digests[i])
    return torch.tensor(digests, dtype=torch.int64, device="cpu")


def _rows(part: Any, n: int) -> Iterable[Any]:
    """The bytes of each row."""
    if isinstance(part, np.ndarray) and part.dtype.kind in "biufc":
        part = torch.from_numpy(np.ascontiguousarray(part))
    if isinstance(part, Tensor):
        content = memoryview(bits(part).numpy())
        width = len(content) // max(n, 1)
        return (content[i * width : (i + 1) * width] for i in range(n))
    return (_item_bytes(item) for item in part)


def _item_bytes(item: Any) -> bytes:
    """Bytes of a text, a number or another item; of an unknown object only its type."""
    if isinstance(item, Tensor):
        return bits(item).numpy().tobytes()
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | int | float | bool | None):
        return repr(item).encode()
    if hasattr(item, "__array__") or hasattr(item, "__array_interface__"):
        return np.ascontiguousarray(item).tobytes()
    return type(item).__qualname__.encode()
