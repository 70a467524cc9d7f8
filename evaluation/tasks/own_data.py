"""The user's own data and network: read, checked against each other, and what a report must say of them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...errors import bad_value
from ...influence.rows import checked_ids
from ...losses import Loss
from ...losses.whole_examples import loss_of_outputs
from ...system.fingerprints import bits
from .class_labels import class_indices, is_one_hot
from .class_logits import check_logits, class_logits, unreadable
from .class_order import first_examples, in_class_order, in_order, shuffled_where_sorted
from .example_reading import Reader, check_finite
from .factories import import_factory
from .image_data import holds_raw_images, image_tensors
from .new_network import new_network, seeded
from .task_loss import check_outputs, is_plain

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OwnData:
    """Data as a task holds them.

    Attributes:
        train: Training inputs and labels.
        test: Test inputs and labels.
        loss: What a network is trained with on them.
        notes: For a report.
        ids: Names of the training examples.
    """

    train: TensorDataset
    test: TensorDataset
    loss: Loss
    notes: Sequence[str] = ()
    ids: Sequence[Any] | None = None


def own_data(
    data: str,
    data_root: str | Path | None,
    label_key: str | None,
    build_model: Callable[[], nn.Module],
    model: str | None,
    size: int | None,
    mix_test: bool,
    loss: Loss,
) -> OwnData:
    """The user's data, as a task holds them.

    Args:
        data: "module:factory".
        data_root: First argument of the factory, if there is one.
        label_key: As for `load_task`.
        build_model: Gives the network that the data are checked against.
        model: Name of the user's network for errors; None for the network of the task.
        size: How many training examples to keep; None keeps all.
        mix_test: As for `load_task`.
        loss: Of one position, if the network has several for each example.

    Raises:
        ValueError: The data cannot be read, or the network does not fit them.
        FileNotFoundError: The factory found no data.
    """
    train, test, notes, ids = _read_both(data, data_root, label_key)
    notes.insert(0, f"Data from {data}.")
    outputs, dtype = _first_outputs(build_model, model, train[0])
    (x, y), (x_test, y_test) = ((_cast(inputs, dtype), labels) for inputs, labels in (train, test))
    source = f" of {data!r}"
    if is_plain(loss) and getattr(outputs, "ndim", 0) < 3:
        logits = class_logits(outputs)
        check_logits(logits, len(x[:2]), 0, "model")
        y, y_test = (class_indices(labels, "data", source, logits.shape[1]) for labels in (y, y_test))
        if is_one_hot(train[1]):
            notes.append("One-hot labels were read as classes.")
        unordered = in_class_order
    else:
        loss, (y, y_test) = _of_loss(loss, outputs, (y, y_test))
        unordered = in_order
    if len(y_test) == 9_980:
        notes.append("The test set holds 9,980 of the 10,000 CIFAR-10 test images.")
    rows, said = first_examples(y, size, unordered)
    x, y = x[rows], y[rows]
    if ids is not None:
        ids = [ids[i] for i in torch.arange(len(ids))[rows].tolist()]
    notes += said
    if mix_test:
        rows, said = shuffled_where_sorted(y_test, unordered)
        x_test, y_test = x_test[rows], y_test[rows]
        notes += said
    unseen = sorted(set(y_test.tolist()) - set(y.tolist())) if is_plain(loss) else []
    if unseen:
        some = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        notes.append(f"No training example has class {some} of the test examples.")
    return OwnData(TensorDataset(x, y), TensorDataset(x_test, y_test), loss, notes, ids)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if values.is_floating_point() and dtype.is_floating_point else values


def _of_loss(loss: Loss, outputs: Any, labels: Pair) -> tuple[Loss, Pair]:
    """A loss other than plain cross-entropy of one row an example, and labels as it has them.

    Raises:
        ValueError: Outputs or labels that it does not take.
    """
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, Tensor):
        labels = _cast(labels[0], outputs.dtype), _cast(labels[1], outputs.dtype)
        loss = loss_of_outputs(loss, outputs)
    for part in labels:
        if part.is_floating_point() and not bool(part.isfinite().all()):
            row = int((~part.reshape(len(part), -1).isfinite().all(1)).nonzero()[0])
            must = "hold finite labels"
            raise bad_value("data", must, f"NaN or infinity in example {row}", "Leave out such examples.")
        check_outputs(loss, outputs, part, "data")
    return loss, labels


def check_classes(build_model: Callable[[], nn.Module], model: str, inputs: Tensor, n_classes: int) -> None:
    """Check that an untrained network reads the first inputs and returns logits of all classes.

    Args:
        build_model: Gives the network.
        model: Name of the user's network for errors.
        inputs: `(n, ...)`; two of them are read.
        n_classes: Classes of the labels: the network must have at least as many.

    Raises:
        ValueError: It does not.
    """
    logits = class_logits(_first_outputs(build_model, model, inputs)[0])
    check_logits(logits, len(inputs[:2]), n_classes, "model")


def _first_outputs(
    build_model: Callable[[], nn.Module], model: str | None, inputs: Tensor
) -> tuple[Any, torch.dtype]:
    """Outputs of an untrained network for two inputs, and the dtype of inputs that it reads."""
    with seeded(0):
        network = new_network(build_model, 0).eval()
        own = next((p for p in network.parameters() if p.is_floating_point()), inputs)
        x = inputs[:2].to(own.device)
        if x.dtype == torch.float64:  # the dtype of NumPy's arrays
            x = x.to(own.dtype)
        try:
            return network(x), x.dtype
        except Exception as error:
            name, remedy = repr(model), None
            if model is None:
                name = "the network of the task"
                remedy = "Name your network with --model module:factory (in Python: model=)."
            raise unreadable(network, x, error, "model", name, remedy) from error


def _read_both(
    path: str, data_root: str | Path | None = None, label_key: str | None = None
) -> tuple[Pair, Pair, list[str], Sequence[Any] | None]:
    """Call a factory for the training set and for the test set, and read both.

    Random states are seeded meanwhile and restored afterwards, so that two calls give the same examples.

    Returns:
        Training inputs and labels, test inputs and labels, notes for a report, and the attribute `ids` of
        the training set.
    """
    factory = import_factory("data", path)
    _check_takes(factory, path, data_root)
    reader = Reader("data", f" of {path!r}", label_key)
    notes: list[str] = []
    with seeded(0):
        dataset = _called(factory, path, data_root, train=True)
        train, changes = _read(reader, dataset)
        test, _ = _read(reader, _called(factory, path, data_root, train=False))
    if changes:
        notes.append(
            "Inputs change whenever they are read (augmentation): one draw of each is used throughout."
        )
    shapes = [tuple(inputs.shape[1:]) for inputs, _ in (train, test)]
    if shapes[0] != shapes[1]:
        came = f"{shapes[0]} for training and {shapes[1]} for test examples of {path!r}"
        raise bad_value("data", "have inputs of one shape", came)
    shared = _n_shared(train, test)
    if shared:
        of = "All" if shared == len(test[0]) else f"{shared} of the"
        notes.append(f"{of} {len(test[0])} test examples are training examples too.")
        if shared == len(test[0]):
            notes[-1] += " Does the factory heed `train`?"
    return train, test, notes, checked_ids(None, dataset)


def _read(reader: Reader, dataset: Any) -> tuple[Pair, bool]:
    """Inputs and labels, and whether the inputs change when they are read again (augmentation)."""
    if holds_raw_images(dataset):
        inputs, labels = image_tensors(dataset).tensors
        return (inputs, labels), False
    pair = reader.tensors(dataset)
    check_finite(pair[0], "data", reader.source)
    return pair, reader.changes(dataset, pair[0])


def _called(factory: Callable[..., Any], path: str, data_root: str | Path | None, *, train: bool) -> Any:
    root = () if data_root is None else (data_root,)
    try:
        return factory(*root, train=train)
    except (RuntimeError, OSError) as error:
        where = "its own place" if data_root is None else Path(data_root).resolve()
        raise FileNotFoundError(
            f"The data factory '{path}' found no data in {where} ({error}). "
            "Name the folder that it reads with --data-root DIR (in Python: data_root=)."
        ) from error
    except Exception as error:
        raise bad_value("data", "name a factory that returns data", f"{path!r}, {_raised(error)}") from error


def _check_takes(factory: Callable[..., Any], path: str, data_root: str | Path | None) -> None:
    root = () if data_root is None else (data_root,)
    try:
        inspect.signature(factory).bind(*root, train=True)
    except ValueError:  # a callable without a signature
        return
    except TypeError as error:
        name = path.rpartition(":")[2]
        if data_root is not None:
            remedy = f"Write it as def {name}(data_root, train), or leave out --data-root."
        elif "train" in str(error):
            remedy = f"Write it as def {name}(train): it is called for the training set and for the test set."
        else:
            remedy = "If it reads a folder, name it with --data-root DIR (in Python: data_root=)."
        raise bad_value(
            "data",
            f"name a factory that can be called with ({'data_root, ' if root else ''}train=...)",
            f"{path!r} ({error})",
            remedy,
        ) from error


def _n_shared(train: Pair, test: Pair) -> int:
    """Number of test examples that equal a training example in inputs and label."""
    known = set(_rows(train))
    return sum(row in known for row in _rows(test))


def _rows(pair: Pair) -> Iterator[tuple[int, ...]]:
    """A 64-bit hash of the inputs and one of the label of each example."""
    n = len(pair[0])
    parts = [bits(tensor).numpy().reshape(n, -1) for tensor in pair]
    return (tuple(hash(part[i].tobytes()) for part in parts) for i in range(n))


def _raised(error: Exception) -> str:
    """The error, and the line of the user's code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"which raised {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
