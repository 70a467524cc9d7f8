"""What is attributed: a task is data, a network and its training settings, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...errors import bad_choice, bad_type, bad_value
from ...influence.rows import checked_ids
from ...losses import MSE, BinaryCrossEntropy, CrossEntropy, Loss
from ...losses.summed_positions import SummedPositions
from . import networks as models
from .beyond_data import CANVAS, LINE, TAGS
from .built_in_data import BEYOND, built_in
from .class_labels import class_indices, is_one_hot
from .class_logits import check_logits, class_logits, unreadable
from .class_order import first_examples, shuffled_where_sorted
from .example_reading import Reader, check_finite, to_tensors
from .image_data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    MNIST_MEAN,
    MNIST_STD,
    image_tensors,
    normalise_images,
)
from .networks import TrainingSettings
from .new_network import new_network, seeded
from .own_data import import_factory, own_data
from .task_loss import is_plain

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "MNIST_MEAN",
    "MNIST_STD",
    "PRESETS",
    "TASKS",
    "Task",
    "image_tensors",
    "import_factory",
    "load_task",
    "normalise_images",
    "to_tensors",
]

TASKS = ("digits", "mnist", "cifar10", "synthetic", *BEYOND)
PRESETS = ("smoke", "small", "paper")
_SMALL_SIZE = {"mnist": 5_000, "cifar10": 2_000}
_SMOKE_SIZE = {"digits": 300, "mnist": 1_000, "cifar10": 500, "synthetic": 300, "digit-pairs": 400}
_SMOKE_SIZE |= {"diabetes": 200, "tagging": 300, "segmentation": 400}


@dataclass(frozen=True)
class Task:
    """A classification problem that can be trained from scratch.

    Attributes:
        name: What reports call it.
        train: `TensorDataset` of inputs `(n_train, ...)` and labels `(n_train,)`. Labels of other types
            (whole floats, one-hot rows, a column) become int64; other data sets of `(input, label)` are
            read into memory. A third tensor that numbers the examples is left out.
        test: The same for the test examples.
        build_model: Called without arguments, gives an untrained network with logits
            `(n, n_classes)`. A module-level function, so that other processes can import it.
        training: How it is trained.
        note: What a reader must know beside every figure, or "".
        loss: What it is trained with. With another one than cross-entropy, or with options, labels are what
            that loss takes; of an example with several positions, `SummedPositions`.
        ids: A name for each training example (a path, a row id), which reports show instead of its place;
            None takes the attribute `ids` of the data set, if it has one.

    Raises:
        ValueError: Examples that are not one input with one class label.

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
        """Whether each example has one class, and the loss is plain cross-entropy."""
        return is_plain(self.loss)

    def need_classes(self, what: str) -> None:
        """Refuse a task whose examples do not have one class each, for what shows or compares classes.

        Raises:
            ValueError: It has another loss.
        """
        if not self.has_classes:
            must = f"have one class for each example for {what}"
            remedy = "Ask the methods themselves, as STRIDE(model, task.train, loss=...)."
            raise bad_value("task", must, f"{self.name!r} with loss={self.loss.name!r}", remedy)

    @property
    def n_classes(self) -> int:
        """Number of classes, from the labels of the training set."""
        return int(self.train.tensors[1].max()) + 1

    def check_inputs(self) -> None:
        """Whether all inputs are finite.

        Raises:
            ValueError: A training or test example has a missing value.
        """
        for name, dataset in (("train", self.train), ("test", self.test)):
            check_finite(dataset.tensors[0], name)


def load_task(
    name: str = "digits",
    *,
    preset: str = "small",
    data_root: str | Path | None = None,
    data: str | None = None,
    model: str | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
    label_key: str | None = None,
    mix_test: bool = True,
) -> Task:
    """Load a task by name.

    Args:
        name: "digits" (ships with scikit-learn), "mnist", "cifar10" or "synthetic" (planted influence).
            Beyond one class an example: "diabetes" (regression), "digit-pairs" (several labels), "tagging"
            (a tag for each character of source text) and "segmentation" (a class for each pixel).
        preset: "smoke", "small" (5,000 MNIST, 2,000 CIFAR-10 or all 1,397 digits training examples)
            or "paper" (everything).
        data_root: Folder in torchvision's layout, for MNIST and CIFAR-10. Nothing is downloaded.
        data: "module:factory" of your own data, called as `factory(data_root, train=True)` and with
            `train=False` (without `data_root` where none is given). It returns a data set of
            `(input, label)`, or of dicts with one input and the key "labels" or "label"; labels are class
            indices of any type, or one-hot rows. An attribute `ids` of the data set names its training
            examples in reports. torchvision's uint8 image classes are normalized as the
            built-in tasks are.
        model: "module:factory" of your own network, called without arguments. It returns logits
            `(n, n_classes)`, or one logit for two classes.
        training: Replaces the settings of the task (Table 3), or those of them that a mapping names.
        label_key: Key of the label where examples of `data` are dicts; None takes "labels" or "label".
        mix_test: Whether to shuffle the test set of `data` where it comes in the order of its classes: a
            comparison takes its first points.

    Raises:
        ValueError: Unknown name, preset or setting, a factory that cannot be imported or called, examples
            without one input and one class label, or a network that cannot read the inputs or returns no
            logits for all classes.
        FileNotFoundError: The data are not where they should be.
        ImportError: A task needs torchvision, which is not installed.

    >>> load_task("digits").n_train
    1397
    """
    if name not in TASKS:
        raise bad_choice("task", name, TASKS)
    if preset not in PRESETS:
        raise bad_choice("preset", preset, PRESETS)
    if label_key is not None and data is None:
        raise bad_value("label_key", "be left out without data of your own", repr(label_key))
    if name in BEYOND and (data is not None or model is not None):
        raise bad_value("data", f"be left out for the task {name!r}, as `model`", repr(data or model))
    settings = _trained_with(_SETTINGS[name], training)
    build_model = _BUILDERS[name] if model is None else import_factory("model", model)
    size = {"smoke": _SMOKE_SIZE.get(name), "small": _SMALL_SIZE.get(name)}.get(preset)
    notes: list[str] = []
    ids: Sequence[Any] | None = None
    if data is not None:
        train, test, notes, ids = _of_user(data, data_root, label_key, build_model, model, size, mix_test)
    else:
        train, test = built_in(name, data_root)
        if size is not None and size < len(train):
            train = TensorDataset(*(t[:size].clone() for t in train.tensors))
        if model is not None:
            _check_fits(build_model, model, train.tensors[0], int(train.tensors[1].max()) + 1)
    return Task(
        name=f"{data.rpartition(':')[2] if data and model else name}-{len(train)}",
        train=train,
        test=test,
        build_model=build_model,
        training=settings,
        note=" ".join(notes),
        loss=_LOSSES.get(name, CrossEntropy()),
        ids=ids,
    )


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "digits": models.digits_mlp,
    "mnist": models.mnist_mlp,
    "cifar10": models.cifar10_cnn,
    "synthetic": models.synthetic_mlp,
    "diabetes": models.diabetes_mlp,
    "digit-pairs": models.digit_pairs_mlp,
    "tagging": models.SourceTagger,
    "segmentation": models.CanvasSegmenter,
}
_SETTINGS = {
    "digits": models.DIGITS_TRAINING,
    "mnist": models.MNIST_TRAINING,
    "cifar10": models.CIFAR10_TRAINING,
    "synthetic": models.DIGITS_TRAINING,
    "diabetes": models.DIABETES_TRAINING,
    "digit-pairs": models.PAIRS_TRAINING,
    "tagging": models.TAGGING_TRAINING,
    "segmentation": models.SEGMENTATION_TRAINING,
}
_LOSSES: dict[str, Loss] = {
    "diabetes": MSE(),
    "digit-pairs": BinaryCrossEntropy(),
    "tagging": SummedPositions(position=CrossEntropy(), n_positions=LINE, n_outputs=len(TAGS)),
    "segmentation": SummedPositions(position=CrossEntropy(), n_positions=CANVAS**2, n_outputs=10),
}


def _examples(dataset: Any, name: str, loss: Loss) -> TensorDataset:
    """A data set as a task holds it; the same object where nothing is to be changed."""
    if not is_plain(loss):
        if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
            raise bad_type(name, f"be a TensorDataset of inputs and labels for loss={loss.name!r}", dataset)
        return dataset
    inputs, labels = Reader(name).tensors(dataset)
    classes = class_indices(labels, name)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        x, y = dataset.tensors
        if x is inputs and y is classes:
            return dataset
    return TensorDataset(inputs, classes)


def _trained_with(
    usual: TrainingSettings, given: TrainingSettings | Mapping[str, Any] | None
) -> TrainingSettings:
    if given is None or isinstance(given, TrainingSettings):
        return given or usual
    known = [setting.name for setting in dataclasses.fields(usual)]
    for name in given:
        if name not in known:
            raise bad_choice("training", name, known)
    return dataclasses.replace(usual, **given)


def _of_user(
    data: str,
    data_root: str | Path | None,
    label_key: str | None,
    build_model: Callable[[], nn.Module],
    model: str | None,
    size: int | None,
    mix_test: bool,
) -> tuple[TensorDataset, TensorDataset, list[str], Sequence[Any] | None]:
    """Training set, test set, notes and ids of the user's data, checked against the network."""
    train, test, notes, ids = own_data(data, data_root, label_key)
    n_classes, dtype = _check_fits(build_model, model, train[0])
    source = f" of {data!r}"
    y, y_test = (class_indices(labels, "data", source, n_classes) for _, labels in (train, test))
    x, x_test = (inputs.to(dtype) if inputs.is_floating_point() else inputs for inputs, _ in (train, test))
    notes.insert(0, f"Data from {data}.")
    if len(y_test) == 9_980:
        notes.append("The test set holds 9,980 of the 10,000 CIFAR-10 test images.")
    if is_one_hot(train[1]):
        notes.append("One-hot labels were read as classes.")
    rows, said = first_examples(y, size)
    x, y = x[rows], y[rows]
    if ids is not None:
        ids = [ids[i] for i in torch.arange(len(ids))[rows].tolist()]
    notes += said
    if mix_test:
        rows, said = shuffled_where_sorted(y_test)
        x_test, y_test = x_test[rows], y_test[rows]
        notes += said
    unseen = sorted(set(y_test.tolist()) - set(y.tolist()))
    if unseen:
        some = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        notes.append(f"No training example has class {some} of the test examples.")
    return TensorDataset(x, y), TensorDataset(x_test, y_test), notes, ids


def _check_fits(
    build_model: Callable[[], nn.Module], model: str | None, inputs: Tensor, n_classes: int = 0
) -> tuple[int, torch.dtype]:
    """Whether the network reads the first inputs and returns logits.

    Returns:
        The number of classes that it tells apart, and the type of the inputs that it reads.
    """
    with seeded(0):
        network = new_network(build_model, 0).eval()
        own = next((p for p in network.parameters() if p.is_floating_point()), inputs)
        x = inputs[:2].to(own.device)
        if x.dtype == torch.float64:  # what arrays become
            x = x.to(own.dtype)
        try:
            outputs = network(x)
        except Exception as error:
            name, remedy = repr(model), None
            if model is None:
                name = "the network of the task"
                remedy = "Name your network with --model module:factory (in Python: model=)."
            raise unreadable(network, x, error, "model", name, remedy) from error
    logits = class_logits(outputs)
    check_logits(logits, len(x), n_classes, "model")
    return logits.shape[1], x.dtype
