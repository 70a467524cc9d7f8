"""Owns how data come in: data sets, loaders, batch tuples and dicts, and what in them is the label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from .errors import bad_type, bad_value
from .restoring import same_random_state

LABEL_KEY = "labels"


def is_batch(inputs: Any) -> bool:
    """Whether this is one batch (tuple, list or dict), not a source of batches."""
    return isinstance(inputs, tuple | list | Mapping)


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch: the last element of a tuple or list, or the key "labels" of a dict.

    None for a tuple with one element or a dict without that key.
    """
    if isinstance(batch, Mapping):
        labels = batch.get(LABEL_KEY)
    else:
        labels = batch[-1] if len(batch) > 1 else None
    if labels is not None and not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    return labels


def forward(model: Callable[..., Any], batch: Any) -> Tensor:
    """Outputs of the model: `model(*batch[:-1])`, or `model(**batch without labels)` for a dict.

    Outputs that carry a `.logits` (Hugging Face) are unwrapped; a single number, which is what a binary
    model that squeezes its output makes of one example, becomes `(1,)`.
    """
    if isinstance(batch, Mapping):
        outputs = model(**{key: value for key, value in batch.items() if key != LABEL_KEY})
    else:
        outputs = model(*(batch[:-1] if len(batch) > 1 else batch))
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise bad_type("model", "return a tensor or an object with a tensor `.logits`", outputs)
    return outputs if outputs.ndim else outputs[None]


def batch_length(batch: Any) -> int:
    """Number of examples, from the first tensor of the batch."""
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    raise bad_type("inputs", "hold at least one tensor with a batch dimension", batch)


def first_input(batch: Any) -> Tensor | None:
    """The first tensor that is given to the model."""
    if isinstance(batch, Mapping):
        values = [value for key, value in batch.items() if key != LABEL_KEY]
    else:
        values = list(batch[:-1] if len(batch) > 1 else batch)
    return next((value for value in values if isinstance(value, Tensor)), None)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; the caller's object is not changed."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Inference tensors do not count the writes to them, which reading activations relies on.
        return value.clone().to(device) if value.is_inference() else value.to(device)

    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    return tuple(move(value) for value in batch)


def split_batch(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch into pieces of at most `size` examples; a batch that fits is yielded as it is."""
    n = batch_length(batch)
    if n <= size:
        yield batch
        return
    for start in range(0, n, size):
        yield slice_batch(batch, slice(start, start + size))


def slice_batch(batch: Any, rows: slice | Tensor) -> Any:
    """Some examples of a batch: of its tensors, and of arrays and lists that are as long."""
    n = batch_length(batch)

    def some(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim else value
        if isinstance(value, list) and len(value) == n and isinstance(rows, Tensor):
            return [value[row] for row in rows.tolist()]
        return value[rows] if isinstance(value, list | np.ndarray) and len(value) == n else value

    if isinstance(batch, Mapping):
        return {key: some(value) for key, value in batch.items()}
    return tuple(some(value) for value in batch)


def batches(source: Any, batch_size: int, argument: str) -> Iterator[Any]:
    """Batches of a data set, a loader or one batch, in order.

    A `TensorDataset` is cut by slices instead of example by example.

    Args:
        source: Dataset, DataLoader or batch.
        batch_size: Examples a batch, where the source does not decide.
        argument: What an error calls the source.
    """
    check_source(source, argument)
    if is_batch(source):
        yield from split_batch(source, batch_size)
    elif type(source) is TensorDataset:
        for start in range(0, len(source), batch_size):
            yield tuple(tensor[start : start + batch_size] for tensor in source.tensors)
    else:
        loader = source if isinstance(source, DataLoader) else DataLoader(source, batch_size=batch_size)
        for batch in loader:
            if not is_batch(batch):
                raise bad_type(
                    argument,
                    "give batches (inputs..., labels) or dicts",
                    batch,
                    "An example is (inputs..., label), or (input,) with target='predicted'.",
                )
            yield batch


def check_source(source: Any, argument: str) -> None:
    """Refuse what cannot be read in a fixed order.

    Raises:
        TypeError: Not a Dataset, DataLoader or batch.
        ValueError: A shuffling loader, or nothing in it.
    """
    if isinstance(source, DataLoader):
        if _shuffles(source):
            raise bad_value(
                argument,
                "give its examples in the same order every time",
                "a DataLoader that shuffles",
                "Build it with shuffle=False: column i of the scores is the i-th training example.",
            )
    elif isinstance(source, Tensor):
        raise bad_type(
            argument,
            "be a Dataset, a DataLoader or a batch (inputs..., labels)",
            source,
            "Write (x, y), or (x,) with target='predicted'.",
        )
    elif not (is_batch(source) or isinstance(source, Dataset) or hasattr(source, "__getitem__")):
        raise bad_type(argument, "be a Dataset, a DataLoader or a batch (inputs..., labels)", source)
    if is_batch(source):
        empty = len(source) == 0 or batch_length(source) == 0
    else:
        empty = _length(source) == 0
    if empty:
        raise bad_value(argument, "hold at least one example", "an empty one")


def some_examples(source: Any, rows: slice | Tensor) -> Any:
    """Rows of a training set that has a length, as one of the same kind.

    Of a DataLoader these are rows of what it gives, in its order; sampler and batches stay the user's.
    """
    if isinstance(source, DataLoader):
        return loader_like(source, some_examples(in_order(source), rows))
    if type(source) is TensorDataset:
        return TensorDataset(*(tensor[rows] for tensor in source.tensors))
    order = range(len(source))[rows] if isinstance(rows, slice) else rows.tolist()
    return Subset(source, order)


def in_order(source: Any) -> Any:
    """The examples of a DataLoader as a data set, in the order in which it gives them; others as they are."""
    if not isinstance(source, DataLoader):
        return source
    if type(source.sampler) is SequentialSampler and not source.drop_last:
        return source.dataset
    return Subset(source.dataset, [i for batch in source.batch_sampler or () for i in batch])


def joined(source: Any, more: Any) -> Any:
    """A training set with other examples behind it, as one of the same kind."""
    if isinstance(source, DataLoader):
        return loader_like(source, joined(in_order(source), more))
    more = in_order(more)
    if type(source) is type(more) is TensorDataset:
        return TensorDataset(*(torch.cat(pair) for pair in zip(source.tensors, more.tensors, strict=True)))
    return ConcatDataset([source, more])


def loader_like(loader: DataLoader[Any], dataset: Any) -> DataLoader[Any]:
    """A loader of another data set, in order, with the batches of this one."""
    return DataLoader(
        dataset, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


def count_batches(source: Any, batch_size: int) -> int | None:
    """Number of batches for a progress bar, or None where it is unknown."""
    n = batch_length(source) if is_batch(source) else _length(source)
    return n if n is None or isinstance(source, DataLoader) else -(-n // batch_size)


def count_examples(source: Any) -> int | None:
    """Number of examples, or None where it is unknown."""
    if not isinstance(source, DataLoader):
        return _length(source)
    if isinstance(source.dataset, IterableDataset) or type(source.batch_sampler) is not BatchSampler:
        return None
    n = _length(source.sampler)
    return n - n % source.batch_sampler.batch_size if n is not None and source.drop_last else n


def _length(source: Any) -> int | None:
    """`len(source)`, or None where it is unknown; a stream's own word for it is not relied on."""
    if isinstance(getattr(source, "dataset", source), IterableDataset):
        return None
    try:
        return len(source)
    except TypeError:
        return None


def _shuffles(loader: DataLoader[Any]) -> bool:
    if isinstance(loader.dataset, IterableDataset):
        return False
    if isinstance(loader.sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return True
    if type(loader.sampler) is SequentialSampler and type(loader.batch_sampler) in (BatchSampler, type(None)):
        return False
    order = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    with same_random_state():
        first = list(order)
        # Several times, because a shuffle of a few examples often leaves them in place.
        return any(list(order) != first for _ in range(1 if len(first) > 16 else 8))
