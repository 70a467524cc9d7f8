"""Comparison of a training set with what a saved method was fitted on, example by example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from ..data import inputs as data
from ..data.batch import ExampleBatch
from ..data.digests import Digests, n_bytes, row_digests
from ..data.passes import digests_of
from ..errors import bad_value
from ..system.memory import spread_rows
from ..system.random_states import draws_put_back
from .checkpoints.state_dicts import first_few

if TYPE_CHECKING:
    from ..influence.method import InfluenceMethod

#: Bytes of inputs up to which all examples are read. Of a larger training set whose labels can be had alone,
#: all labels are compared, and the inputs of as many examples as this holds, spread evenly over it.
INPUT_BYTES = 2**30
#: Examples that are looked at to learn about the others.
_FEW = 64


@dataclass(frozen=True)
class Comparison:
    """How a training set differs from that of a saved method.

    Attributes:
        labels: Rows with another label, `(k,)` int64.
        inputs: Rows with other inputs, `(k,)` int64.
        compared: What was compared, for a reader.
        digests: Of the training set as it is now, as far as it was read.
    """

    labels: Tensor
    inputs: Tensor
    compared: str
    digests: Digests

    @property
    def rows(self) -> Tensor:
        """All rows that differ, `(k,)` int64."""
        rows: Tensor = torch.cat([self.labels, self.inputs]).unique()
        return rows


def batch_layout(method: InfluenceMethod) -> int | None:
    """Examples a batch: what one that pads its batches gives may depend on it."""
    source = method.train_dataset
    return source.batch_size if isinstance(source, DataLoader) else method.batch_size


def compare(method: InfluenceMethod, saved: Digests, layout: int | None) -> Comparison:
    """Compare the training set of a method with the digests of the one that it was fitted on.

    Inputs that differ from one reading to the next (random augmentation), or with the batch that they come in
    (padding), cannot be compared: labels alone are.

    Args:
        method: Its `train_dataset` is read; the model is not run.
        saved: In the order of the columns.
        layout: `batch_layout` when they were made.

    Raises:
        ValueError: Another number of examples.
    """
    check_length(method, len(saved))
    with draws_put_back():
        now, n_inputs = _read(method, saved)
        _same_length(len(saved), len(now))
        labels = (now.labels != saved.labels).nonzero()[:, 0]
        inputs = (now.inputs != saved.inputs).nonzero()[:, 0]
        why = _incomparable(method, now, inputs, layout != batch_layout(method)) if len(inputs) else None
    compared = f"{len(saved):,} labels"
    if why is not None:
        return Comparison(
            labels, inputs[:0], f"{compared}, not the inputs, which {why}", Digests(now.labels, saved.inputs)
        )
    compared += " and inputs" if n_inputs == len(saved) else f" and {n_inputs:,} inputs"
    return Comparison(labels, inputs, compared, now)


def check_length(method: InfluenceMethod, n: int) -> None:
    """Refuse a training set that has a length, and another one."""
    found = data.count_examples(method.train_dataset)
    if found is not None:
        _same_length(n, found)


def _same_length(wanted: int, found: int) -> None:
    if found != wanted:
        must = f"hold the {wanted:,} examples of the saved method"
        raise bad_value("train_dataset", must, f"{found:,}", "Fit again.")


def changed_data(method: InfluenceMethod, saved: Digests, found: Comparison, remedy: str) -> ValueError:
    """The error for a training set that is not the one of the saved method; names the rows."""
    first = getattr(method, "columns", slice(0)).start or 0  # of this process, where several share the set
    n = f"{len(saved):,} examples"
    kinds = [
        f"other {kind} in {len(rows):,} of {n} (rows {first_few((rows + first).tolist())})"
        for kind, rows in (("labels", found.labels), ("inputs", found.inputs))
        if len(rows)
    ]
    if torch.equal(_sorted(saved), _sorted(found.digests)):
        kinds = ["the same examples in another order"]
    return bad_value("train_dataset", "be the data of the saved method", " and ".join(kinds), remedy)


def _sorted(digests: Digests) -> Tensor:
    return (digests.labels * 2**32 + digests.inputs).sort().values


# Reading.


def read_digests(method: InfluenceMethod) -> Digests:
    """Digests of a method's training set, in the order of its columns; the data set is read once."""
    passes = method._training_passes()
    for _ in passes.walk():
        pass
    assert passes.digests is not None, "a pass is done"
    return passes.digests


def _read(method: InfluenceMethod, saved: Digests) -> tuple[Digests, int]:
    """Digests of the training set, and of how many inputs; the others are taken to be as they were."""
    n, labels = len(saved), own_labels(method.train_dataset)
    if labels is not None and len(labels) == n:
        batch = next(_batches(method, spread_rows(n, _FEW)))
        size = n_bytes(part for _, part in batch.example_parts()) // len(batch)
        if batch.labels is not None and n * size > INPUT_BYTES:
            rows = spread_rows(n, max(INPUT_BYTES // size, _FEW))
            part = _digests_of(method, rows)
            own = row_digests(n, [labels.to(batch.labels)])
            if torch.equal(own[rows], part.labels):
                return Digests(own, saved.inputs.index_copy(0, rows, part.inputs)), len(rows)
    return read_digests(method), n


def _incomparable(method: InfluenceMethod, now: Digests, rows: Tensor, other_layout: bool) -> str | None:
    """Why inputs that differ in these rows say nothing; None if they do."""
    again = "differ from one reading to the next"
    source, rows = method.train_dataset, rows[:_FEW]
    if method._training_passes().repeatable is False:
        return again
    by_items = isinstance(source, DataLoader) and source.batch_sampler is None
    if data.count_examples(source) is None or by_items:  # no row can be read alone
        if data.is_one_pass(source):
            return None
        return None if torch.equal(_digests_of(method, None).inputs, now.inputs) else again
    first, second = (_digests_of(method, rows, 1).inputs for _ in range(2))
    if not torch.equal(first, second):
        return again
    padded = other_layout and not torch.equal(first, now.inputs[rows])
    return "depend on the batch that they come in" if padded else None


def _digests_of(method: InfluenceMethod, rows: Tensor | None, size: int | None = None) -> Digests:
    """Digests of some training examples, which are read in batches of `size`; None reads all."""
    return Digests.joined([digests_of(batch) for batch in _batches(method, rows, size)])


def _batches(method: InfluenceMethod, rows: Tensor | None, size: int | None = None) -> Iterator[ExampleBatch]:
    source = method.train_dataset
    examples = source if rows is None else data.some_examples(source, rows)
    if size is not None and isinstance(source, DataLoader):
        examples = DataLoader(examples.dataset, size, collate_fn=source.collate_fn)
    start = 0
    for content in data.raw_batches(examples, size or method.batch_size, "train_dataset"):
        batch = method._example_batch(content, "train_dataset")
        stop = start + len(batch)
        yield _with_weights_of(batch, slice(start, stop) if rows is None else rows[start:stop])
        start = stop


def _with_weights_of(batch: ExampleBatch, rows: slice | Tensor) -> ExampleBatch:
    """The batch with the weights of these training examples, where weights are given by number."""
    options = batch.reading.options
    if not isinstance(options.sample_weight, Tensor):
        return batch
    reading = replace(batch.reading, options=options.with_weights_of(rows))
    return ExampleBatch(batch.content, reading, slice(0, len(batch)), batch.argument)


def own_labels(source: Any) -> Tensor | None:
    """All labels of a data set, without reading its items; None where that is not sure to be the same.

    Those of a `TensorDataset`, or of a data set whose `__getitem__` itself looks at `targets`, `labels` or
    `samples` (pairs that end in a label) of its own and has no `target_transform`.
    """
    if isinstance(source, DataLoader):
        if source.collate_fn is not default_collate or data.in_order(source) is not source.dataset:
            return None
        source = source.dataset
    if type(source) is TensorDataset:
        return source.tensors[-1] if len(source.tensors) > 1 else None
    code = getattr(getattr(type(source), "__getitem__", None), "__code__", None)
    if code is None or getattr(source, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "samples"):
        if name in code.co_names and name in vars(source):
            values = vars(source)[name]
            try:
                return torch.as_tensor([item[-1] for item in values] if name == "samples" else values)
            except (TypeError, ValueError, RuntimeError):  # texts, or rows of other lengths
                return None
    return None
