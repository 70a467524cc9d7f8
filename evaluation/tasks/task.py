"""`Task`: what a comparison runs on, that is data, a network and its training settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import TensorDataset

from ...errors import bad_type, bad_value
from ...influence.rows import checked_ids
from ...losses import CrossEntropy, Loss, loss_of
from .class_labels import class_indices
from .example_reading import Reader, check_finite, holds_pairs
from .networks import TrainingSettings
from .task_loss import is_plain


@dataclass(frozen=True)
class Task:
    """A problem that a network can be trained on from scratch; classification unless `loss` says otherwise.

    Attributes:
        name: Name in reports.
        train: `TensorDataset` of inputs `(n_train, ...)` and labels `(n_train,)`. Labels of other types
            (whole floats, one-hot rows, a column) become int64; other data sets of `(input, label)` are
            read into memory. A third part of each example that only numbers the examples is dropped.
        test: The same for the test examples.
        build_model: Called without arguments, gives an untrained network with logits
            `(n, n_classes)`. A module-level function, so that other processes can import it.
        training: Optimizer, learning rate, epochs, ...
        note: A warning that every report shows, or "".
        loss: What the network is trained with, or its name. With a loss other than plain cross-entropy,
            `train` and `test` must be a `TensorDataset` whose labels are those of the loss. Examples with
            several positions (tokens, pixels) take `SummedPositions`.
        ids: A name for each training example (a path, a row id), which reports show instead of its index;
            None takes the attribute `ids` of the data set, if it has one.

    Raises:
        ValueError: Examples that are not one input with one class label.
        TypeError: A data set that is not a `TensorDataset`, for a loss other than plain cross-entropy.

    >>> from stride_captum.evaluation import load_task
    >>> task = load_task("synthetic", preset="smoke")
    >>> task.name, task.n_train, task.n_classes
    ('synthetic-300', 300, 4)
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    build_model: Callable[[], nn.Module]
    training: TrainingSettings
    note: str = ""
    loss: Loss = field(default_factory=CrossEntropy)
    ids: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", loss_of(self.loss))
        ids = checked_ids(self.ids, self.train)
        object.__setattr__(self, "ids", None if ids is None else tuple(map(str, ids)))
        for name in ("train", "test"):
            object.__setattr__(self, name, _examples(getattr(self, name), name, self.loss))

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class and the loss is plain cross-entropy."""
        return is_plain(self.loss)

    def need_classes(self, what: str) -> None:
        """Refuse a task whose examples do not have one class each.

        Args:
            what: What needs the classes, for the message.

        Raises:
            ValueError: The loss is not plain cross-entropy.
        """
        if not self.has_classes:
            must = f"have one class for each example for {what}"
            remedy = "Ask the methods themselves, as STRIDE(model, task.train, loss=...)."
            raise bad_value("task", must, f"{self.name!r} with loss={self.loss.name!r}", remedy)

    @property
    def n_classes(self) -> int:
        """Number of classes: the largest training label plus 1."""
        return int(self.train.tensors[1].max()) + 1

    def check_inputs(self) -> None:
        """Refuse inputs that are not finite.

        Raises:
            ValueError: A training or test example holds NaN or infinity.
        """
        for name, dataset in (("train", self.train), ("test", self.test)):
            check_finite(dataset.tensors[0], name)


def _examples(dataset: Any, name: str, loss: Loss) -> TensorDataset:
    """A data set in the form of `Task.train`; the same object if it has that form already."""
    if not is_plain(loss):
        if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
            raise bad_type(name, f"be a TensorDataset of inputs and labels for loss={loss.name!r}", dataset)
        return dataset if holds_pairs(dataset) else TensorDataset(*Reader(name).tensors(dataset))
    inputs, labels = Reader(name).tensors(dataset)
    classes = class_indices(labels, name)
    if holds_pairs(dataset):
        x, y = dataset.tensors
        if x is inputs and y is classes:
            return dataset
    return TensorDataset(inputs, classes)
