"""Batches of examples: inputs of the model, parts with one row per example, labels and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from ..system.random_states import user_code
from .containers import Path, copied, described, place_name, rebuilt, rows_of, walk
from .model_outputs import tensor_of
from .reading import LABEL_KEY, Reading, checked_weights, label_tensor


class ExampleBatch:
    """A batch of examples: inputs of the model, and labels.

    Args:
        content: A tuple, list or dict as the user has it; its tensors are never changed.
        reading: How it is read.
        columns: Places of the examples in the training set; None for other examples.
        argument: Name of the source in errors.

    >>> batch = ExampleBatch((torch.ones(3, 2), torch.tensor([0, 1, 0])), Reading())
    >>> len(batch), batch.labels.tolist(), len(batch[1:])
    (3, [0, 1, 0], 2)
    """

    def __init__(
        self, content: Any, reading: Reading, columns: slice | None = None, argument: str = "inputs"
    ) -> None:
        self.content = tuple(content) if isinstance(content, list) else content
        self.reading = reading
        self.columns = columns
        self.argument = argument

    @classmethod
    def of(cls, batch: Any) -> ExampleBatch:
        """Wrap a batch that follows the conventions; an `ExampleBatch` is returned as is."""
        return batch if isinstance(batch, ExampleBatch) else cls(batch, Reading())

    @cached_property
    def _label_path(self) -> Path | None:
        """Path of the labels; None without labels."""
        key = self.reading.options.label_key
        if key is None:
            key = LABEL_KEY if isinstance(self.content, Mapping) else -1
        path = self._path(key, "label_key")
        return path if isinstance(self.content, Mapping) or len(self.content) > 1 else None

    @cached_property
    def _weight_path(self) -> Path | None:
        """Path of the weights in the batch; None if they are not in it."""
        key = self.reading.weight_key
        if isinstance(key, bool) or not isinstance(key, str | int):
            return None
        return self._path(key, "sample_weight")

    def _path(self, key: Any, argument: str) -> Path | None:
        """Path of a top-level part, by key or place; None if it does not exist."""
        if isinstance(self.content, Mapping):
            return (key,) if key in self.content else None
        if not isinstance(key, int):
            raise bad_value(argument, "be a place in a tuple, such as -1", repr(key))
        n = len(self.content)
        return (key % n,) if -n <= key < n else None

    @cached_property
    def labels(self) -> Tensor | None:
        """Labels as a tensor; None without labels."""
        if self._label_path is None:
            return None
        return label_tensor(self.content[self._label_path[0]], self.argument)

    @property
    def has_weights(self) -> bool:
        """Whether weights stand in the batch, and not in the place of its labels."""
        return self._weight_path not in (None, self._label_path)

    @cached_property
    def weights(self) -> Tensor | None:
        """Weight of each training example, `(n,)` float64; None if all are 1.

        Raises:
            ValueError: Declared weights are missing, negative or not finite.
        """
        said = self.reading.options.sample_weight
        if said is None:
            return None
        if isinstance(said, Tensor):
            if self.columns is None:
                return None
            found = said[self.columns]
            got = str(len(said))
        elif self._weight_path is None or not self.has_weights:
            raise bad_value("sample_weight", "be a key or place in a batch, not of its labels", repr(said))
        else:
            found = checked_weights(self.content[self._weight_path[0]], self.argument)
            got = str(len(found))
        if len(found) != len(self):
            raise bad_value("sample_weight", "hold one for each training example", got)
        return found

    @cached_property
    def _length(self) -> int:
        labels = self.labels
        if labels is not None:
            if labels.ndim:
                return len(labels)
            must, got = "hold a batch of examples", "one label without a batch dimension"
            raise bad_value(self.argument, must, got, "Write x[:1] and y[:1] instead of x[0] and y[0].")
        for path, part in self.parts():
            if isinstance(part, Tensor) and part.ndim and self.declared(path) is not False:
                return len(part)
        for path, part in self.parts():
            if isinstance(part, list | tuple | np.ndarray) and len(part) and self.declared(path) is not False:
                return len(part)
        raise bad_type(self.argument, "hold at least one tensor with a batch dimension", self.content)

    def __len__(self) -> int:
        return self._length

    def parts(self) -> Iterator[tuple[Path, Any]]:
        """Inputs of the model (tensors, arrays, texts, ...) with their paths."""
        for path, part in walk(self.content):
            if path[:1] not in (self._label_path, self._weight_path):
                yield path, part

    @property
    def first_tensor(self) -> Tensor | None:
        """First tensor among the inputs of the model."""
        for _, part in self.parts():
            if isinstance(part, Tensor):
                return part
        return None

    def declared(self, path: Path) -> bool | None:
        """Whether a part is declared or known to have one row per example; None if unknown."""
        if path[:1] in (self._label_path, self._weight_path):
            return True
        said = self.reading.options.per_example
        if said is not None:
            places = [place if isinstance(place, tuple) else (place,) for place in said]
            return any(path[: len(place)] == place for place in places)
        return False if path in self.reading.shared else None

    def has_rows(self, path: Path, part: Any) -> bool:
        """Whether a part has one row per example.

        Raises:
            ValueError: It cannot be determined.
        """
        declared, length = self.declared(path), rows_of(part)
        if part is None or declared is False or (declared is None and length is None):
            return False
        if length == len(self):
            return True
        packed = isinstance(part, torch.nn.utils.rnn.PackedSequence)
        if declared is None and isinstance(part, list | tuple) and not packed:  # a size, names, ...
            return False
        raise bad_value(
            self.argument,
            f"have {len(self)} rows in each part, or parts that are known to be the same for all examples",
            f"{described(part)} at {place_name(path)}",
            f"Say which parts have one row for each example: batch=Batch(per_example=[{path[0]!r}, ...]).",
        )

    def example_parts(self) -> Iterator[tuple[Path, Any]]:
        """Inputs of the model that have one row per example."""
        return ((path, part) for path, part in self.parts() if self.has_rows(path, part))

    def can_be_cut(self) -> bool:
        """Whether examples can be selected from every part."""
        try:
            for path, part in walk(self.content):
                self.has_rows(path, part)
        except ValueError:
            return False
        return True

    def __getitem__(self, rows: slice | Tensor) -> ExampleBatch:
        """Select examples by a slice, or by indices `(n,)` int64."""

        def some(path: Path, part: Any) -> Any:
            if not self.has_rows(path, part):
                return part
            if isinstance(part, list | tuple) and isinstance(rows, Tensor):
                return type(part)(part[int(i)] for i in rows)
            if isinstance(part, Tensor) and isinstance(rows, Tensor):
                return part[rows.to(part.device)]
            return part[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]

        columns = self.columns
        if columns is not None:
            columns = _slice_of(columns, rows) if isinstance(rows, slice) else None
        return ExampleBatch(rebuilt(self.content, some), self.reading, columns, self.argument)

    def first(self, n: int) -> ExampleBatch:
        """First `n` examples; all of them if the batch cannot be cut."""
        return self[:n] if len(self) > n and self.can_be_cut() else self

    def split(self, size: int) -> Iterator[ExampleBatch]:
        """Split into pieces of at most `size` examples."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device) -> ExampleBatch:
        """The batch on a device."""

        def move(path: Path, part: Any) -> Any:
            if isinstance(part, Tensor):
                # Inference tensors have no version counter, which reading activations relies on.
                return part.clone().to(device) if part.is_inference() else part.to(device)
            return part.to(device) if callable(getattr(part, "to", None)) else part

        return ExampleBatch(rebuilt(self.content, move), self.reading, self.columns, self.argument)

    def with_parts(self, parts: Mapping[Path, Any]) -> ExampleBatch:
        """Copy of the batch with some parts replaced."""
        content = rebuilt(self.content, lambda path, part: parts.get(path, part))
        return ExampleBatch(content, self.reading, argument=self.argument)

    def copied(self) -> ExampleBatch:
        """Copy whose tensors a model may overwrite."""
        content = rebuilt(self.content, lambda path, part: copied(part))
        return ExampleBatch(content, self.reading, self.columns, self.argument)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        others = [path[0] for path in (self._label_path, self._weight_path) if path is not None]
        if isinstance(self.content, Mapping):
            return (), {key: value for key, value in self.content.items() if key not in others}
        return tuple(value for i, value in enumerate(self.content) if i not in others), {}

    def outputs(self, model: Callable[..., Any]) -> Tensor:
        """Outputs of the model, `(n, ...)`; it is given copies, which it may overwrite.

        Outputs with `.logits` or the key "logits" (Hugging Face) are unwrapped; a scalar, which a binary
        model that squeezes its output returns for one example, becomes `(1,)`.

        Raises:
            TypeError: The model returns something else.
        """
        return self.copied().outputs_of_these(model)

    def outputs_of_these(self, model: Callable[..., Any]) -> Tensor:
        """`outputs` without copies: the model may overwrite the tensors of this batch."""
        with user_code(model):
            return self.call(model)

    def call(self, model: Callable[..., Any]) -> Tensor:
        """`outputs_of_these` for code transformed by `torch.func`."""
        forward = self.reading.options.forward
        if forward is not None:
            outputs = forward(model, self.content)  # type: ignore[arg-type]
        else:
            args, kwargs = self.inputs()
            outputs = model(*args, **kwargs)
        return tensor_of(outputs)

    def logits(self, model: Callable[..., Any]) -> Tensor:
        """Logits of the model, `(n, n_classes)`.

        Raises:
            ValueError: Outputs are not logits, or not one row per example.
        """
        return self.logits_of(self.outputs(model))

    def logits_of(self, outputs: Tensor) -> Tensor:
        """Outputs of this batch as logits, `(n, n_classes)`."""
        logits = self.reading.loss.logits(outputs)
        if len(logits) == len(self):
            return logits
        remedy = (
            f"The model returned outputs of shape {tuple(outputs.shape)}. Is a batch dimension missing from "
            "the inputs, as in x[0] instead of x[:1]? Several rows for one example must be put together by "
            "the model."
        )
        if self.labels is not None:
            must = f"carry one label for each of {len(logits)} examples"
            raise bad_value(self.argument, must, len(self), remedy)
        raise bad_value("model", f"return one row for each of {len(self)} examples", len(logits), remedy)


def is_batch(inputs: Any) -> bool:
    """Whether this is one batch (tuple, list or dict), not a source of batches."""
    return isinstance(inputs, tuple | list | Mapping | ExampleBatch)


def _slice_of(columns: slice, rows: slice) -> slice | None:
    start, stop, step = rows.indices(columns.stop - columns.start)
    return slice(columns.start + start, columns.start + stop) if step == 1 else None
