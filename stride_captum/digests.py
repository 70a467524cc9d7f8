"""Digests of training examples.

`Digests` has two numbers an example, one of its label and one of its inputs: they tell whether two passes
over a data set gave the same examples in the same order, and which differ. Each is a CRC-32: a change of up
to 32 neighboring bits always shows, any other with probability 1 - 2^-32. `ExampleDigest` and
`data_fingerprint` are SHA-256 digests of many examples at once. None of them guards against someone who
changes data on purpose.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from . import inputs as data
from .errors import bad_value
from .restoring import bits, same_random_state

if TYPE_CHECKING:
    from .influence import InfluenceMethod

#: What `data_fingerprint` says of data that can only be read from the first example to the last.
STREAM = "unknown: an iterable data set"
_SAMPLES = 64


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

    def rows(self, rows: Tensor) -> Digests:
        """The digests of some examples."""
        return Digests(self.labels[rows], self.inputs[rows])

    def replaced(self, rows: Tensor, others: Digests) -> Digests:
        """The digests with others in some places."""
        return Digests(
            self.labels.index_copy(0, rows, others.labels), self.inputs.index_copy(0, rows, others.inputs)
        )

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


def digest_training_set(method: InfluenceMethod) -> Digests:
    """Digests of a method's training set, in the order of its columns.

    The data set is read once, and the model is not run. The caller's random state is left as it was.
    """
    with same_random_state():
        return read_digests(method)


def read_digests(method: InfluenceMethod) -> Digests:
    """`digest_training_set`, which draws random numbers where the data set does."""
    return Digests.joined([digest_batch(batch) for batch in method._train_batches(False)])


def digest_batch(batch: Any) -> Digests:
    """Digests of the examples of a batch `(inputs..., labels)` or dict; 0 for labels that are not there."""
    n = data.batch_length(batch)
    return Digests.of(n, data.labels_of(batch), _inputs(batch, n))


def input_bytes(batch: Any) -> int:
    """Bytes of the inputs of a batch."""
    n = data.batch_length(batch)
    return sum(len(row) for part in _inputs(batch, n) for row in _rows(part, n))


def _inputs(batch: Any, n: int) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        return _parts({key: value for key, value in batch.items() if key != data.LABEL_KEY}, n)
    return _parts(list(batch[:-1] if len(batch) > 1 else batch), n)


def _parts(value: Any, n: int) -> Iterator[Any]:
    """What there is for each of `n` examples; what they share is given to all of them."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _parts(value[key], n)
    elif isinstance(value, Tensor | np.ndarray):
        yield value if value.ndim and len(value) == n else [value] * n
    elif isinstance(value, list | tuple):
        if len(value) == n and not any(
            isinstance(v, Tensor | np.ndarray | Mapping | list | tuple) for v in value
        ):
            yield value  # texts and the like
        else:
            for part in value:
                yield from _parts(part, n)
    else:
        yield [value] * n


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
    if isinstance(part, Tensor) or _is_numeric(part):
        content = memoryview(_bytes(part))
        width = len(content) // max(n, 1)
        return (content[i * width : (i + 1) * width] for i in range(n))
    return (_item_bytes(item) for item in part)


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
    """Bytes of a text, a number or another item; of an unknown object only its type."""
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
    """SHA-256 of consecutive examples, the same however they come in batches.

    Each field of the examples has a digest of its own, so that rows join where batches do.
    """

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def update(self, batch: Any) -> None:
        """Take in the examples of one batch (tuple, list or dict)."""
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for name, values in items:
            whole = isinstance(values, Tensor) or _is_numeric(values)
            digest = self._fields.get(str(name))
            if digest is None:
                shape = f"{values.dtype} {tuple(values.shape[1:])}" if whole else "objects"
                digest = self._fields[str(name)] = hashlib.sha256(shape.encode())
            if whole:
                digest.update(_bytes(values).data)
            else:  # texts and the like
                for item in values if isinstance(values, list | tuple) else [values]:
                    digest_item(item, digest)

    def finish(self) -> str:
        """The digest of what came since the last call, in hexadecimal."""
        whole = hashlib.sha256()
        for name in sorted(self._fields):
            whole.update(f"{name} {self._fields[name].hexdigest()} ".encode())
        self._fields = {}
        return whole.hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """SHA-256 of the length of a data set, of 64 examples spread evenly over it, and of a loader's order.

    A change between these examples goes unseen.

    Args:
        dataset: Data set or loader.

    Returns:
        Hexadecimal digits, or `STREAM`.

    Raises:
        ValueError: The same example read twice is not the same.
    """
    source = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        return STREAM
    n, whole = len(source), hashlib.sha256()
    rows = np.unique(np.linspace(0, n - 1, num=min(n, _SAMPLES)).astype(int)).tolist()
    with same_random_state():
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
        digest_item(source[i], digest)
    return digest.hexdigest()


def digest_item(item: Any, digest: Any) -> None:
    """Feed the content of an example or a part of one to a hash; of an unknown object only its type."""
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
