"""The user's own data and network: read, checked against each other, and what a report must say of them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...errors import bad_value
from ...influence.rows import checked_ids
from ...system.fingerprints import bits
from .class_labels import class_indices, is_one_hot
from .class_logits import check_logits, class_logits, unreadable
from .class_order import first_examples, shuffled_where_sorted
from .example_reading import Reader, check_finite
from .factories import import_factory
from .image_data import holds_raw_images, image_tensors
from .new_network import new_network, seeded

Pair = tuple[Tensor, Tensor]


def own_data(
    data: str,
    data_root: str | Path | None,
    label_key: str | None,
    build_model: Callable[[], nn.Module],
    model: str | None,
    size: int | None,
    mix_test: bool,
) -> tuple[TensorDataset, TensorDataset, list[str], Sequence[Any] | None]:
    """The user's data, as a task holds them.

    Args:
        data: "module:factory".
        data_root: First argument of the factory, if there is one.
        label_key: As for `load_task`.
        build_model: Gives the network that the data are checked against.
        model: Name of the user's network for errors; None for the network of the task.
        size: How many training examples to keep; None keeps all.
        mix_test: As for `load_task`.

    Returns:
        The training set, the test set, notes for a report, and names of the training examples, or None.

    Raises:
        ValueError: The data cannot be read, or the network does not fit them.
        FileNotFoundError: The factory found no data.
    """
    train, test, notes, ids = _read_both(data, data_root, label_key)
    n_classes, dtype = check_fits(build_model, model, train[0])
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


def check_fits(
    build_model: Callable[[], nn.Module], model: str | None, inputs: Tensor, n_classes: int = 0
) -> tuple[int, torch.dtype]:
    """Check that an untrained network reads the first inputs and returns logits.

    Args:
        build_model: Gives the network.
        model: Name of the user's network for errors; None for the network of the task.
        inputs: `(n, ...)`; two of them are read.
        n_classes: Classes of the labels, if they are known: the network must have at least as many.

    Returns:
        The number of classes that it tells apart, and the dtype of the inputs that it reads.

    Raises:
        ValueError: It does not.
    """
    with seeded(0):
        network = new_network(build_model, 0).eval()
        own = next((p for p in network.parameters() if p.is_floating_point()), inputs)
        x = inputs[:2].to(own.device)
        if x.dtype == torch.float64:  # the dtype of NumPy's arrays
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
