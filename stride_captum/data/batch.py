"""Batches of examples: what the model is given, which parts have one row for each example, and the labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import bad_type, bad_value
from ..losses import CrossEntropy, Loss
from ..system.random_states import user_code

LABEL_KEY = "labels"

#: Where a part stands in a batch: keys and places from the outside to the inside.
Path = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a batch of yours is read, where the conventions do not fit.

    By convention a batch is a tuple or list whose last element is the labels, and the model is called as
    `model(*batch[:-1])`; or a dict with the key "labels", and the model is called as
    `model(**batch without "labels")`. Inputs may be nested in any way that the model takes.

    Args:
        forward: `f(model, batch) -> outputs`, how the model is called; the batch that it gets is yours,
            with the labels, on the device of the model.
        label_key: Key of the labels in a dict, or their place in a tuple. `forward` is needed too where
            the model takes other parts of the batch than all the rest.
        per_example: The parts that have one row for each example, by key or place (a tuple of keys and
            places for a part inside a part). All others are given to the model whole. None recognizes them:
            what the default `collate_fn` stacks has one row for each example, and of batches that a
            `collate_fn` of yours makes, the parts whose length follows the number of labels.
        sample_weight: What the loss of each training example was multiplied with: `(n_train,)`, in the order
            of the training set; or the key or place of a part of the batch, `(n,)`, which the model is not
            given. With P positions an example also `(n_train, P)`, or `(n, P)`, one for each position. A
            weight of 0 is as good as no example, 2 is an example that is there twice.

    >>> Batch(label_key="label").label_key
    'label'
    """

    forward: Callable[[nn.Module, Any], Any] | None = None
    label_key: str | int | None = None
    per_example: Sequence[Any] | None = None
    sample_weight: Any = None

    def __post_init__(self) -> None:
        if self.forward is not None and not callable(self.forward):
            raise bad_type("forward", "be a function of a model and a batch", self.forward)
        if isinstance(self.label_key, bool) or not isinstance(self.label_key, str | int | None):
            raise bad_type("label_key", "be a key, a place in a tuple, or None", self.label_key)
        if isinstance(self.per_example, str) or not isinstance(self.per_example, Sequence | None):
            raise bad_type("per_example", "be a list of keys or places", self.per_example, "Write ['x'].")
        if self.sample_weight is not None and not isinstance(self.sample_weight, str | int):
            object.__setattr__(self, "sample_weight", _sample_weights(self.sample_weight, "sample_weight"))

    def with_weights_of(self, rows: Tensor) -> Batch:
        """How a data set of some of the training examples is read."""
        weights = self.sample_weight
        return replace(self, sample_weight=weights[rows]) if isinstance(weights, Tensor) else self


@dataclass(frozen=True)
class Reading:
    """How the batches of one source are read.

    Attributes:
        options: What the user has said.
        loss: What turns outputs into logits.
        shared: Parts that are the same for all examples, as far as they were recognized.
    """

    options: Batch = field(default_factory=Batch)
    loss: Loss = field(default_factory=CrossEntropy)
    shared: frozenset[Path] = frozenset()

    def with_shared(self, first: ExampleBatch, second: ExampleBatch | None) -> Reading:
        """This reading with the parts that two batches of the source show to be the same for all examples."""
        return replace(self, shared=frozenset(_shared_parts(first, second)))


class ExampleBatch:
    """Some examples: what the model is given, and their labels.

    Args:
        content: A tuple, list or dict as the user has it; its tensors are never changed.
        reading: How it is read.
        columns: The places of the examples in the training set; None for other examples.
        argument: What errors call the source of the batch.

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
        """A batch that is read by the conventions; one that is an `ExampleBatch` stays as it is."""
        return batch if isinstance(batch, ExampleBatch) else cls(batch, Reading())

    @cached_property
    def _label_path(self) -> Path | None:
        """Where the labels stand; None where there are none."""
        key, content = self.reading.options.label_key, self.content
        if isinstance(content, Mapping):
            key = LABEL_KEY if key is None else key
            return (key,) if key in content else None
        if key is None:
            return (len(content) - 1,) if len(content) > 1 else None
        if not isinstance(key, int):
            raise bad_value("label_key", "be a place in a tuple, such as -1", repr(key))
        return (key % len(content),) if -len(content) <= key < len(content) > 1 else None

    @cached_property
    def labels(self) -> Tensor | None:
        """The labels as a tensor; None where there are none."""
        if self._label_path is None:
            return None
        labels = self.content[self._label_path[0]]
        if labels is None:
            return None
        if isinstance(labels, Tensor):
            return labels.detach()
        try:
            return torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise bad_value(
                self.argument,
                "give labels that are numbers",
                _described(labels),
                "Map the names of the classes to 0, 1, 2, ...; labels stand last in a tuple or under "
                "'labels' in a dict, see Batch(label_key=...).",
            ) from error

    @cached_property
    def _weight_path(self) -> Path | None:
        """Where weights stand in the batch; None where they do not."""
        key: Any = self.reading.options.sample_weight
        content = self.content
        if isinstance(key, bool) or not isinstance(key, str | int):
            return None
        if isinstance(content, Mapping):
            return (key,) if key in content else None
        if not isinstance(key, int):
            raise bad_value("sample_weight", "be a place in a tuple, such as 1", repr(key))
        return (key % len(content),) if -len(content) <= key < len(content) else None

    @cached_property
    def weights(self) -> Tensor | None:
        """The weight of each training example, `(n,)` float64; None where all are 1.

        Raises:
            ValueError: Weights are declared, and there are none, or one is negative or not a number.
        """
        said = self.reading.options.sample_weight
        if said is None:
            return None
        if isinstance(said, Tensor):
            if self.columns is None:
                return None
            found = said[self.columns]
            got = str(len(said))
        elif self._weight_path is None:
            raise bad_value("sample_weight", "be a key or place in a batch", repr(said))
        else:
            found = _sample_weights(self.content[self._weight_path[0]], self.argument)
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
            raise bad_value(
                self.argument,
                "hold a batch of examples",
                "one label without a batch dimension",
                "Write x[:1] and y[:1] instead of x[0] and y[0].",
            )
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
        """All tensors, arrays, texts and other things that are given to the model, with where they stand."""
        for path, part in walk(self.content):
            if path[:1] not in (self._label_path, self._weight_path):
                yield path, part

    @property
    def first_tensor(self) -> Tensor | None:
        """The first tensor that is given to the model."""
        for _, part in self.parts():
            if isinstance(part, Tensor):
                return part
        return None

    def declared(self, path: Path) -> bool | None:
        """Whether a part has one row for each example, as far as it was said or recognized."""
        if path[:1] in (self._label_path, self._weight_path):
            return True
        said = self.reading.options.per_example
        if said is not None:
            places = [place if isinstance(place, tuple) else (place,) for place in said]
            return any(path[: len(place)] == place for place in places)
        return False if path in self.reading.shared else None

    def has_rows(self, path: Path, part: Any) -> bool:
        """Whether a part has one row for each example.

        Raises:
            ValueError: That cannot be known.
        """
        declared, length = self.declared(path), _rows_of(part)
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
            f"{_described(part)} at {_place(path)}",
            f"Say which parts have one row for each example: batch=Batch(per_example=[{path[0]!r}, ...]).",
        )

    def example_parts(self) -> Iterator[tuple[Path, Any]]:
        """The parts given to the model that have one row for each example."""
        return ((path, part) for path, part in self.parts() if self.has_rows(path, part))

    def can_be_cut(self) -> bool:
        """Whether it is known of each part how to take some examples of it."""
        try:
            for path, part in walk(self.content):
                self.has_rows(path, part)
        except ValueError:
            return False
        return True

    def __getitem__(self, rows: slice | Tensor) -> ExampleBatch:
        """Some of the examples: a slice, or indices `(n,)` int64."""

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
        """The first `n` examples; all of them where the batch cannot be cut."""
        return self[:n] if len(self) > n and self.can_be_cut() else self

    def split(self, size: int) -> Iterator[ExampleBatch]:
        """Pieces of at most `size` examples; a batch that fits is given as it is."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device) -> ExampleBatch:
        """The batch on a device."""

        def move(path: Path, part: Any) -> Any:
            if isinstance(part, Tensor):
                # Inference tensors do not count the writes to them, which reading activations relies on.
                return part.clone().to(device) if part.is_inference() else part.to(device)
            return part.to(device) if callable(getattr(part, "to", None)) else part

        return ExampleBatch(rebuilt(self.content, move), self.reading, self.columns, self.argument)

    def with_parts(self, parts: Mapping[Path, Any]) -> ExampleBatch:
        """The batch with other parts in some places."""
        content = rebuilt(self.content, lambda path, part: parts.get(path, part))
        return ExampleBatch(content, self.reading, argument=self.argument)

    def copied(self) -> ExampleBatch:
        """A copy whose tensors a model may destroy."""
        return ExampleBatch(
            rebuilt(self.content, lambda path, part: _copy(part)), self.reading, self.columns, self.argument
        )

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: arguments by position and by name."""
        others = [path[0] for path in (self._label_path, self._weight_path) if path is not None]
        if isinstance(self.content, Mapping):
            return (), {key: value for key, value in self.content.items() if key not in others}
        return tuple(value for i, value in enumerate(self.content) if i not in others), {}

    def outputs(self, model: Callable[..., Any]) -> Tensor:
        """Outputs of the model, `(n, ...)`; it is given copies, so that it may destroy them.

        Outputs that carry `.logits` or have the key "logits" (Hugging Face) are unwrapped; a single number,
        which is what a binary model that squeezes its output makes of one example, becomes `(1,)`.

        Raises:
            TypeError: The model returns something else.
        """
        return self.copied().outputs_of_these(model)

    def outputs_of_these(self, model: Callable[..., Any]) -> Tensor:
        """`outputs`, where the tensors of this very batch are given away."""
        with user_code(model):
            return self.call(model)

    def call(self, model: Callable[..., Any]) -> Tensor:
        """`outputs_of_these` for code that is transformed by `torch.func`."""
        forward = self.reading.options.forward
        if forward is not None:
            outputs = forward(model, self.content)  # type: ignore[arg-type]
        else:
            args, kwargs = self.inputs()
            outputs = model(*args, **kwargs)
        outputs = getattr(outputs, "logits", outputs)
        if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
            outputs = outputs["logits"]
        if not isinstance(outputs, Tensor):
            raise bad_type(
                "model",
                "return a tensor, an object with a tensor `.logits`, or a dict with the key 'logits'",
                outputs,
                "Say how to get the logits: batch=Batch(forward=lambda model, batch: ...).",
            )
        return outputs if outputs.ndim else outputs[None]

    def logits(self, model: Callable[..., Any]) -> Tensor:
        """Logits of the model, `(n, n_classes)`.

        Raises:
            ValueError: Outputs that are no logits, or not one row for each example.
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


def _sample_weights(weights: Any, argument: str) -> Tensor:
    """Weights as `(n,)` float64.

    Raises:
        TypeError: No numbers.
        ValueError: Another shape, or a weight that is negative or not a number.
    """
    try:
        flat = torch.as_tensor(weights).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_type(argument, "hold a weight for each training example", weights) from error
    if flat.ndim not in (1, 2):
        must = "hold weights of shape (n,), or (n, P) for examples with P positions"
        raise bad_value(argument, must, f"shape {tuple(flat.shape)}")
    wrong = ~(torch.isfinite(flat) & (flat >= 0))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0, 0])
        must = "hold weights that are numbers of at least 0"
        raise bad_value(argument, must, f"{float(flat[wrong][0])} at place {place}")
    return flat


def is_batch(inputs: Any) -> bool:
    """Whether this is one batch (tuple, list or dict), not a source of batches."""
    return isinstance(inputs, tuple | list | Mapping | ExampleBatch)


def _is_container(value: Any) -> bool:
    """Whether parts stand inside: dicts, named tuples, lists and tuples of anything but texts and numbers.

    The default `collate_fn` makes a tuple of texts, which is one part with one item for each example.
    """
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return False
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return any(isinstance(item, Tensor | np.ndarray | Mapping | tuple | list) for item in value)
    return isinstance(value, Mapping | tuple)


def walk(content: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The parts of nested dicts, tuples and lists, with where they stand."""
    if path and not _is_container(content):  # a batch itself always is one
        yield path, content
        return
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        yield from walk(value, (*path, key))


def rebuilt(content: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Nested dicts, tuples and lists of the same kinds, with `function(path, part)` for each part."""
    if path and not _is_container(content):
        return function(path, content)
    if isinstance(content, Mapping):
        parts = {key: rebuilt(value, function, (*path, key)) for key, value in content.items()}
        if type(content) is dict:
            return parts
        try:  # an OrderedDict, a BatchEncoding, ...: the model may read its attributes
            same = copy.copy(content)
            same.update(parts)  # type: ignore[attr-defined]
        except (TypeError, AttributeError):
            return parts
        return same
    values = [rebuilt(value, function, (*path, i)) for i, value in enumerate(content)]
    if hasattr(content, "_fields"):  # a named tuple
        return type(content)(*values)
    return values if isinstance(content, list) else tuple(values)


def _copy(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.detach().clone()
    if isinstance(part, np.ndarray | list):
        return part.copy()
    return part.clone() if callable(getattr(part, "clone", None)) else part


def _rows_of(part: Any) -> int | None:
    """Length of what can be cut into rows; None of numbers, texts and other objects."""
    if isinstance(part, Tensor | np.ndarray):
        return len(part) if part.ndim else None
    if isinstance(part, list | tuple) and not isinstance(part, torch.nn.utils.rnn.PackedSequence):
        return len(part)
    return -1 if isinstance(part, torch.nn.utils.rnn.PackedSequence) else None


def _slice_of(columns: slice, rows: slice) -> slice | None:
    start, stop, step = rows.indices(columns.stop - columns.start)
    return slice(columns.start + start, columns.start + stop) if step == 1 else None


def _shared_parts(first: ExampleBatch, second: ExampleBatch | None) -> Iterator[Path]:
    """Parts that two batches of a source show to be the same for all examples.

    Raises:
        ValueError: A part that is as long as there are examples and equal in both batches.
    """
    if second is None:
        return
    others, undecided = dict(second.parts()), []
    for path, part in first.parts():
        other = others.get(path)
        n, m = _rows_of(part), _rows_of(other)
        if first.declared(path) is not None or n is None or m is None:
            continue
        follows = n == len(first) and m == len(second)
        if n == m and not follows:
            yield path
        elif follows and n == m and _same(part, other) and not _same(part[:1], part[-1:]):
            undecided.append(path)
    everything_is_the_same = all(_same(part, others.get(path)) for path, part in first.parts())
    if undecided and not everything_is_the_same:
        raise bad_value(
            first.argument,
            "show which parts of a batch have one row for each example",
            f"{_described(dict(first.parts())[undecided[0]])} at {_place(undecided[0])}, which has as many "
            "rows as there are examples and is the same in two batches",
            "Say which parts have one row for each example: batch=Batch(per_example=[...]).",
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and not isinstance(one, np.ndarray) and bool(one == other)


def _place(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _described(part: Any) -> str:
    if isinstance(part, Tensor | np.ndarray):
        return f"a {'tensor' if isinstance(part, Tensor) else 'array'} of shape {tuple(part.shape)}"
    if isinstance(part, list | tuple) and part:
        return f"a {type(part).__name__} of {len(part)} ({type(part[0]).__name__})"
    return f"a {type(part).__name__}"
