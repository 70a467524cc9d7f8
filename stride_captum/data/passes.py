"""Passes over a data source, checked to give the same examples in the same order each time.

Column i of all scores is the i-th example of a pass. Batches that were read ahead are put back in front of
the next pass, so that sources that can be walked only once lose nothing. The first complete pass stores a
digest of each example, with which later passes are compared. After it a few examples are read again, to check
that column i is still `train_dataset[i]` and that reading an example twice gives the same inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from ..errors import bad_value
from ..losses import Loss
from ..system.memory import spread_rows
from ..system.random_states import user_code
from . import inputs as data
from .batch import ExampleBatch, is_batch
from .digests import Digests
from .reading import LABEL_KEY, Reading

#: Examples that are read a second time after the first pass.
_READ_AGAIN = 8


class Passes:
    """Passes over the training set of one method.

    Args:
        source: Dataset or DataLoader.
        batch_size: Examples per batch, if the source does not determine it.
        reading: How batches are read, as declared by the user.
        argument: Name of the source in errors.

    Attributes:
        digests: Of the examples of the first complete pass; None before it.
        repeatable: Whether reading an example again gives the same inputs; None if unknown.
    """

    def __init__(
        self, source: Any, batch_size: int, reading: Reading, argument: str = "train_dataset"
    ) -> None:
        self.source, self.batch_size, self.argument = source, batch_size, argument
        self.said = reading
        self.reading: Reading | None = None
        self.digests: Digests | None = None
        self.repeatable: bool | None = None
        self._pending: tuple[Iterator[Any], list[Any]] | None = None
        self._warned = False
        self._first_length = 0

    def __len__(self) -> int:
        """Number of examples, after a complete pass."""
        return 0 if self.digests is None else len(self.digests)

    def restart(self, several: bool) -> None:
        """Discard the results of earlier passes, before a new fit.

        Args:
            several: Whether the fit, or the queries after it, take more than one pass.

        Raises:
            ValueError: More than one pass over a source that can be walked only once.
        """
        if several and data.is_one_pass(self.source):
            raise bad_value(
                self.argument,
                "be a source that can be walked several times, which this method needs to do",
                "a stream whose iterator is always the same",
                "Give a map-style Dataset, or a stream that starts anew with each iter().",
            )
        self.digests, self.repeatable, self._warned = None, None, False

    def first(self) -> ExampleBatch:
        """First batch; the next pass gives it again.

        Raises:
            ValueError: The source is empty.
        """
        iterator, read = self._pending or self._begin()
        self._pending = iterator, read
        if not read:
            read.extend(self._next(iterator, 1))
        if not read:
            self._pending = None
            raise self._empty()
        return self._batch(read[0], 0)

    def walk(self) -> Iterator[ExampleBatch]:
        """One pass over all batches, with the places of their examples.

        Raises:
            ValueError: No examples, or others than in the first pass.
        """
        self.first()  # also recognizes the parts of a batch
        assert self._pending is not None
        iterator, read = self._pending
        self._pending = None
        start, parts = 0, []
        while True:
            if not read and not (read := self._next(iterator, 1)):
                break
            batch = self._batch(read.pop(0), start)
            self._first_length = self._first_length or len(batch)
            parts.append(self._compared(batch))
            start += len(batch)
            yield batch
        self._finish(Digests.joined(parts))

    def read_with(self, loss: Loss) -> None:
        """Read all batches from now on with another loss."""
        self.said = replace(self.said, loss=loss)
        self.reading = None if self.reading is None else replace(self.reading, loss=loss)

    def release(self) -> None:
        """Release an unfinished pass and its workers."""
        self._pending = None

    def _begin(self) -> tuple[Iterator[Any], list[Any]]:
        """Start a pass, and read enough batches to recognize their parts."""
        iterator = data.raw_batches(self.source, self.batch_size, self.argument)
        if self.reading is not None:
            return iterator, []
        read: list[Any] = self._next(iterator, 1 if data.stacks_examples(self.source) else 2)
        if read:
            self._check_labels(read[0])
            self.said = self.said.with_parts_of(ExampleBatch(read[0], self.said, argument=self.argument))
        self.reading = self.said
        if not data.stacks_examples(self.source) and read and self.said.options.per_example is None:
            first, *others = [ExampleBatch(content, self.said, argument=self.argument) for content in read]
            self.reading = self.said.with_shared(first, others[0] if others else None)
        return iterator, read

    def _next(self, iterator: Iterator[Any], n: int) -> list[Any]:
        """Next `n` non-empty batches, or fewer at the end."""
        found: list[Any] = []
        for content in iterator:
            if len(ExampleBatch(content, self.said, argument=self.argument)):
                found.append(content)
            if len(found) == n:
                break
        return found

    def _check_labels(self, content: Any) -> None:
        """Refuse a dict without labels before the model is called with it."""
        key = self.said.options.label_key
        wanted = LABEL_KEY if key is None else key
        if isinstance(content, Mapping) and wanted not in content:
            raise bad_value(
                self.argument,
                f"give dicts with the key {wanted!r}",
                f"the keys {', '.join(map(repr, content))}",
                "Say which of them holds the labels: batch=Batch(label_key=...).",
            )

    def _batch(self, content: Any, start: int) -> ExampleBatch:
        assert self.reading is not None, "a pass has begun"
        batch = ExampleBatch(content, self.reading, argument=self.argument)
        batch.columns = slice(start, start + len(batch))
        return batch

    def _compared(self, batch: ExampleBatch) -> Digests:
        """Digests of a batch, after comparison with those of the first pass."""
        found = digests_of(batch)
        if self.digests is None or batch.columns is None:
            return found
        places = torch.arange(batch.columns.start, batch.columns.stop, device="cpu")
        if batch.columns.stop > len(self.digests):
            raise self._other(f"more than {len(self.digests)} examples in a later pass")
        self._check(found, places)
        return found

    def _check(self, found: Digests, places: Tensor) -> bool:
        """Compare examples that were read again with the digests at these places; whether inputs agree."""
        assert self.digests is not None
        labels, inputs = self.digests.labels[places], self.digests.inputs[places]
        other = (found.labels != labels).nonzero()
        if len(other):
            raise self._other(f"another label for example {int(places[other[0, 0]])} when it was read again")
        changed = found.inputs != inputs
        if not bool(changed.any()):
            return True
        if bool(torch.isin(found.inputs[changed], self.digests.inputs).any()):
            place = int(places[changed.nonzero()[0, 0]])
            raise self._other(f"another example at place {place} when it was read again")
        self._warn()
        return False

    def _finish(self, found: Digests) -> None:
        if not len(found):
            raise self._empty()
        if self.digests is None:
            self.digests = found
            self._read_again()
        elif len(found) < len(self.digests):
            raise self._other(f"{len(found)} examples in a later pass, {len(self.digests)} in the first")

    def _read_again(self) -> None:
        """Read a few examples again, and compare their places and contents."""
        if type(self.source) is TensorDataset:
            self.repeatable = True
        elif data.is_stream(self.source):
            self._read_stream_again()
        elif not isinstance(self.source, DataLoader):
            self._read_items_again(self.source, default_collate, _READ_AGAIN)
        elif self.source.batch_sampler is not None:  # else an item is a batch
            n = _READ_AGAIN if data.stacks_examples(self.source) else None
            self._read_items_again(self.source.dataset, self.source.collate_fn, n)

    def _read_stream_again(self) -> None:
        """Compare the first batch of another pass, if there is one."""
        if data.is_one_pass(self.source):
            return
        read = self._next(data.raw_batches(self.source, self.batch_size, self.argument), 1)
        if read:
            found = digests_of(self._batch(read[0], 0))
            n = min(len(found), len(self))
            self.repeatable = self._check(
                Digests(found.labels[:n], found.inputs[:n]), torch.arange(n, device="cpu")
            )

    def _read_items_again(self, dataset: Any, collate: Any, n: int | None) -> None:
        """Compare `n` items spread over a data set, one by one.

        None reads the first batch as before, because padding depends on the other examples of a batch.
        """
        if n is not None:
            groups = [[place] for place in spread_rows(len(self), n).tolist()]
        else:
            groups = [list(range(self._first_length))]
        parts = []
        for places in groups:
            with user_code("examples"):
                content = collate([dataset[place] for place in places])
            if not is_batch(content):
                return
            parts.append(digests_of(self._batch(content, places[0])))
        self.repeatable = self._check(
            Digests.joined(parts), torch.tensor([i for places in groups for i in places], device="cpu")
        )

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"`{self.argument}` gives other inputs when an example is read again, as random augmentation "
            "does. Scores are those of the views that were read; a method that reads several times mixes "
            "views. Give the training set with the transform of the evaluation.",
            UserWarning,
            stacklevel=2,
        )

    def _other(self, got: str) -> ValueError:
        return bad_value(
            self.argument,
            "give the same examples in the same order each time",
            got,
            "Column i of the scores is the i-th example: give a data set in a fixed order.",
        )

    def _empty(self) -> ValueError:
        walked_before = self._first_length and data.is_stream(self.source)
        remedy = "It can be walked once only: build it, and the method, anew." if walked_before else None
        return bad_value(self.argument, "hold at least one example", "an empty one", remedy)


def digests_of(batch: ExampleBatch) -> Digests:
    """Digests of the examples of a batch, over the parts with one row per example."""
    parts = [part for path, part in batch.parts() if _has_rows(batch, path, part)]
    if batch.weights is not None:
        parts.append(batch.weights)
    return Digests.of(len(batch), batch.labels, parts)


def _has_rows(batch: ExampleBatch, path: Any, part: Any) -> bool:
    try:
        return batch.has_rows(path, part)
    except ValueError:  # a part of unknown kind, which matters only if it is cut
        return False
