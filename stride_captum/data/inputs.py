"""Sources of examples (data sets, loaders, single batches), and their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    default_collate,
)

from ..errors import bad_type, bad_value
from ..system.random_states import draws_put_back, user_code
from .batch import ExampleBatch, is_batch
from .reading import Reading

_END = object()


def raw_batches(source: Any, batch_size: int, argument: str) -> Iterator[Any]:
    """Raw batches of a data set or loader, in order.

    A `TensorDataset` is cut by slices instead of example by example.

    Args:
        source: Dataset or DataLoader.
        batch_size: Examples per batch, if the source does not determine it.
        argument: Name of the source in errors.
    """
    if type(source) is TensorDataset:
        for start in range(0, len(source), batch_size):
            yield tuple(tensor[start : start + batch_size] for tensor in source.tensors)
        return
    with user_code("order"):  # of a sampler; workers
        iterator = iter(_loader_of(source, batch_size))
    while True:
        with user_code("examples") as code:
            batch = next(iterator, _END)
            code.did_something = batch is not _END
        if batch is _END:
            return
        if not is_batch(batch):
            raise bad_type(
                argument,
                "give batches (inputs..., labels) or dicts",
                batch,
                "An example is (inputs..., label), or (input,) with target='predicted'.",
            )
        yield batch


def _loader_of(source: Any, batch_size: int) -> DataLoader[Any]:
    """The source itself, or a loader of it that does not draw from the global random state."""
    if isinstance(source, DataLoader):
        return source
    return PrivateLoader(source, batch_size=batch_size)


class PrivateLoader(DataLoader[Any]):
    """DataLoader that does not draw from the global random state, on any default device."""

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__(source, generator=torch.Generator("cpu"), **options)

    def __iter__(self) -> Any:
        with torch.device("cpu"):  # torch draws a seed with the generator on the default device
            return super().__iter__()


def stacks_examples(source: Any) -> bool:
    """Whether batches are stacked examples, so that each part has one row per example."""
    if not isinstance(source, DataLoader):
        return True
    return source.collate_fn is default_collate and source.batch_sampler is not None


def is_one_pass(source: Any) -> bool:
    """Whether a source is its own iterator, and can be walked only once."""
    if not is_stream(source):
        return False
    stream = source.dataset if isinstance(source, DataLoader) else source
    with user_code("stream"):
        first = iter(stream)
        return first is iter(stream)


def is_stream(source: Any) -> bool:
    """Whether a source is iterated without indices."""
    return isinstance(source.dataset if isinstance(source, DataLoader) else source, IterableDataset)


def check_training_set(dataset: Any) -> None:
    """Refuse sources that cannot be a training set.

    Raises:
        TypeError: A batch of tensors, or another object that is not a data set.
        ValueError: A loader whose order is not that of its data set.
    """
    if is_batch(dataset):
        remedy = "Write TensorDataset(inputs, labels)."
        raise bad_type("train_dataset", "be a Dataset or a DataLoader", dataset, remedy)
    check_source(dataset, "train_dataset")
    check_places(dataset, "train_dataset")


def check_source(source: Any, argument: str) -> None:
    """Refuse sources that cannot be read in a fixed order.

    Raises:
        TypeError: Not a Dataset, DataLoader or batch.
        ValueError: A shuffling or empty loader.
    """
    if isinstance(source, ExampleBatch):
        source = source.content
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
        empty = len(source) == 0 or len(ExampleBatch(source, Reading(), argument=argument)) == 0
    else:
        empty = _length(source) == 0
    if empty:
        raise bad_value(argument, "hold at least one example", "an empty one")


def check_places(source: Any, argument: str) -> None:
    """Refuse a loader whose order is not that of its data set.

    Raises:
        ValueError: Column i of the scores would not be `dataset[i]`.
    """
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return
    if type(source.sampler) is SequentialSampler and type(source.batch_sampler) in (BatchSampler, type(None)):
        return
    with draws_put_back(), user_code("order"):
        if source.batch_sampler is None:  # an item is a batch
            order = list(source.sampler)
        else:
            order = [i for batch in source.batch_sampler for i in batch]
    wrong = next((place for place, i in enumerate(order) if place != i), None)
    if wrong is not None:
        raise bad_value(
            argument,
            "give the examples of its data set in their order",
            f"a DataLoader whose sampler puts example {order[wrong]} in place {wrong}",
            "Column i of the scores is dataset[i]. Write DataLoader(Subset(dataset, order), ...) for another "
            "order or a part of the data.",
        )


def some_examples(source: Any, rows: slice | Tensor) -> Any:
    """Subset of a training set with a length, of the same kind.

    Rows of a DataLoader count in its own order; its sampler and batches are kept.
    """
    if isinstance(source, DataLoader):
        return loader_like(source, some_examples(in_order(source), rows))
    if type(source) is TensorDataset:
        return TensorDataset(*(tensor[rows] for tensor in source.tensors))
    order = range(len(source))[rows] if isinstance(rows, slice) else rows.tolist()
    return Subset(source, order)


def in_order(source: Any) -> Any:
    """Data set with the examples of a DataLoader in its order; other sources are returned as they are."""
    if not isinstance(source, DataLoader):
        return source
    if type(source.sampler) is SequentialSampler and not source.drop_last:
        return source.dataset
    return Subset(source.dataset, [i for batch in source.batch_sampler or () for i in batch])


def joined(source: Any, more: Any) -> Any:
    """Training set with other examples appended, of the same kind.

    Raises:
        ValueError: Tensors of another shape.
    """
    if isinstance(source, DataLoader):
        return loader_like(source, joined(in_order(source), more))
    more = in_order(more)
    if type(source) is type(more) is TensorDataset:
        shapes, others = ([tuple(t.shape[1:]) for t in part.tensors] for part in (source, more))
        if shapes != others:
            must = f"hold tensors whose rows have the shapes {shapes}, as in the training set"
            remedy = "Pad positions to one length, with `ignore_index` as the label of what is added."
            raise bad_value("examples", must, others, remedy)
        return TensorDataset(*(torch.cat(pair) for pair in zip(source.tensors, more.tensors, strict=True)))
    return ConcatDataset([source, more])


def loader_like(loader: DataLoader[Any], dataset: Any) -> DataLoader[Any]:
    """Sequential loader of another data set, with the options of this one."""
    return DataLoader(
        dataset, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


def count_batches(source: Any, batch_size: int) -> int | None:
    """Number of batches for a progress bar; None if unknown."""
    n = _length(source)
    return n if n is None or isinstance(source, DataLoader) else -(-n // batch_size)


def count_examples(source: Any) -> int | None:
    """Number of examples; None if unknown."""
    if not isinstance(source, DataLoader):
        return _length(source)
    if isinstance(source.dataset, IterableDataset) or type(source.batch_sampler) is not BatchSampler:
        return None
    n = _length(source.sampler)
    return n - n % source.batch_sampler.batch_size if n is not None and source.drop_last else n


def _length(source: Any) -> int | None:
    """`len(source)`, or None if unknown; the length that a stream declares is not trusted."""
    if is_stream(source):
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
    with draws_put_back(), user_code("order"):
        first = list(order)
        # Several times, because shuffling a few examples often leaves them in place.
        return any(list(order) != first for _ in range(1 if len(first) > 16 else 8))
