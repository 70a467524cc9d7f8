"""Digests of training examples.

`Digests` holds two numbers per example, one for its label and one for its inputs. They tell whether two
passes over a data set gave the same examples in the same order, and which differ. A change of a single 32-bit
word is always detected, any other with probability 1 - 2^-32 (`row_digests`). `ExampleDigest` and
`data_fingerprint` are SHA-256 digests of many examples at once. None of them protects against deliberate
manipulation.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from ..errors import bad_value
from ..system.fingerprints import bits
from ..system.random_states import draws_put_back, user_code
from ..system.saved_values import saved_as
from .batch import ExampleBatch
from .containers import walk

#: What `data_fingerprint` says of data that can only be read from the first example to the last.
STREAM = "unknown: an iterable data set"
_SAMPLES = 64
#: Odd factor of what the parts before give.
_NEXT_PART = np.uint64(0xD6E8FEB86659FD93)
#: Bytes that are hashed at a time.
_HASHED_BYTES = 2**20


@saved_as("digests")
@dataclass(frozen=True)
class Digests:
    """Digests of consecutive examples.

    Attributes:
        labels: `(n,)` int64; 0 without labels.
        inputs: `(n,)` int64.
    """

    labels: Tensor
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def joined(cls, parts: Sequence[Digests]) -> Digests:
        """Concatenate digests."""
        return cls(torch.cat([p.labels for p in parts]), torch.cat([p.inputs for p in parts]))

    def rows(self, rows: Tensor) -> Digests:
        """Digests of some examples."""
        return Digests(self.labels[rows], self.inputs[rows])

    def replaced(self, rows: Tensor, others: Digests) -> Digests:
        """Digests with some of them replaced."""
        return Digests(
            self.labels.index_copy(0, rows, others.labels), self.inputs.index_copy(0, rows, others.inputs)
        )

    @classmethod
    def of(cls, n: int, labels: Any, inputs: Iterable[Any]) -> Digests:
        """Digests of the `n` examples of a batch.

        Args:
            n: Number of examples.
            labels: The labels, or None.
            inputs: Parts of the inputs with one row (or item) per example.
        """
        return cls(
            row_digests(n, () if labels is None else (labels,)),
            row_digests(n, inputs),
        )


def row_digests(n: int, parts: Iterable[Any]) -> Tensor:
    """Digest of the rows of each of `n` examples in all `parts`, `(n,)` int64.

    Numbers: multilinear hashing of 32-bit words, `sum_j w_j x_j` modulo 2^64 with fixed odd weights (Carter
        and
    Wegman, 1979); two different rows collide with probability 2^-32. Texts and other items: CRC-32.

    Args:
        n: Number of examples.
        parts: Tensors, arrays or lists of length n.

    >>> row_digests(2, [torch.tensor([[1.0, 2.0], [1.0, 2.0]])]).unique().numel()
    1
    """
    digests = np.zeros(n, dtype=np.uint64)
    for part in parts if n else ():
        digests *= _NEXT_PART
        if isinstance(part, Tensor) or _is_numeric(part):
            digests += _hashed(_bytes(part).reshape(n, -1))
        else:
            digests += np.fromiter(map(_hashed_item, part), np.uint64, n)
    return torch.from_numpy(digests.view(np.int64))


def _hashed_item(item: Any) -> int:
    """Digest of one item: a tensor or array as a row, CRC-32 of anything else."""
    content = _item_bytes(item)
    if isinstance(item, Tensor) or _is_numeric(item):
        return int(_hashed(np.asarray(content)[None])[0])
    return zlib.crc32(content)


def _hashed(rows: Any) -> Any:
    """Multilinear hash of each row of bytes, `(n,)` uint64."""
    n, width = rows.shape
    if width % 4:
        rows = np.concatenate([rows, np.zeros((n, -width % 4), np.uint8)], axis=1)
    weights = _weights(1 << max(width // 4, 1).bit_length())
    found = np.full(n, width, np.uint64)
    size = max(_HASHED_BYTES // max(width, 1), 1)
    wide = np.empty((min(size, n), rows.shape[1] // 4), np.uint64)  # products are 64-bit
    for start in range(0, n, size):
        words = rows[start : start + size].view("<u4")
        wide[: len(words)] = words
        found[start : start + size] += np.einsum("nw,w->n", wide[: len(words)], weights[: words.shape[1]])
    return found


@cache
def _weights(n: int) -> Any:
    """Odd weights of `_hashed`, by SplitMix64: `(n,)` uint64."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def n_bytes(parts: Iterable[Any]) -> int:
    """Number of bytes that `row_digests` reads."""
    return sum(
        part.nbytes
        if isinstance(part, Tensor) or _is_numeric(part)
        else sum(map(len, map(_item_bytes, part)))
        for part in parts
    )


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _bytes(value: Any) -> Any:
    """The bytes of a tensor or array, `(n_bytes,)` uint8."""
    return (
        bits(value).numpy()
        if isinstance(value, Tensor)
        else np.ascontiguousarray(value).reshape(-1).view("u1")
    )


def _item_bytes(item: Any) -> Any:
    """Bytes of a text, number or other item; only the type of an unknown object."""
    if isinstance(item, Tensor):
        return _bytes(item)
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | int | float | bool | None):
        return repr(item).encode()
    if hasattr(item, "__array__") or hasattr(item, "__array_interface__"):
        array = np.ascontiguousarray(item)
        return b"".join(map(_item_bytes, array.ravel())) if array.dtype.kind == "O" else _bytes(array)
    return type(item).__qualname__.encode()


class ExampleDigest:
    """SHA-256 of consecutive examples, independent of the batch size.

    Each field of the examples has its own digest, so that rows are hashed in order across batches.
    """

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def update(self, batch: ExampleBatch) -> None:
        """Add the examples of one batch."""
        for path, part in walk(batch.content):
            name = str(path)
            by_rows = batch.has_rows(path, part)
            whole = isinstance(part, Tensor) or _is_numeric(part)
            known = name in self._fields
            if not known:
                shape = part.shape[1:] if by_rows and whole else None
                text = f"{part.dtype} {tuple(shape)}" if shape is not None else "objects"
                self._fields[name] = hashlib.sha256(text.encode())
            if not by_rows:  # the same for all examples
                if not known:
                    digest_item(part, self._fields[name])
            elif whole:
                self._fields[name].update(_bytes(part).data)
            else:  # texts and the like
                for item in part:
                    digest_item(item, self._fields[name])

    def finish(self) -> str:
        """Digest of the examples since the last call, in hexadecimal."""
        whole = hashlib.sha256()
        for name in sorted(self._fields):
            whole.update(f"{name} {self._fields[name].hexdigest()} ".encode())
        self._fields = {}
        return whole.hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 of the length of a data set, of 64 examples spread evenly over it, and of a loader's order.

    Changes in other examples are not detected.

    Args:
        dataset: Data set or loader.

    Returns:
        Hexadecimal digits, or `STREAM`.

    Raises:
        ValueError: Reading an example twice gives different values.
    """
    source = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        return STREAM
    n, whole = len(source), hashlib.sha256()
    rows = np.unique(np.linspace(0, n - 1, num=min(n, _SAMPLES)).astype(int)).tolist()
    with draws_put_back():
        if isinstance(dataset, DataLoader) and type(dataset.sampler) is not SequentialSampler:
            order = dataset.sampler if dataset.batch_sampler is None else dataset.batch_sampler
            digest_item(list(order), whole)
        first, second = (_digest_of(source, rows) for _ in range(2))
    if first != second:
        raise bad_value(
            "train_dataset",
            "give the same example each time it is read, to be kept in a feature store",
            "another one at the second reading",
            "Turn random augmentation off, or leave `feature_store` out.",
        )
    whole.update(f"{n} {first}".encode())
    return whole.hexdigest()


def _digest_of(source: Any, rows: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for i in rows:
        with user_code("examples"):
            item = source[i]
        digest_item(item, digest)
    return digest.hexdigest()


def digest_item(item: Any, digest: Any) -> None:
    """Update a hash with an example or a part of one; only the type of an unknown object counts."""
    if isinstance(item, Mapping):
        for key in sorted(item):
            digest.update(str(key).encode())
            digest_item(item[key], digest)
    elif isinstance(item, tuple | list):
        for part in item:
            digest_item(part, digest)
    else:
        if isinstance(item, Tensor | np.ndarray):
            digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
        content = _item_bytes(item)
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
