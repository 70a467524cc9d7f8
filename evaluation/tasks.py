"""Owns what is attributed: a task is data, a network and its training settings, by name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..errors import bad_choice, bad_value
from ..responses import multiclass_logits
from ..restoring import same_random_state
from . import models
from .models import TrainingSettings
from .synthetic import planted_clusters

TASKS = ("digits", "mnist", "cifar10", "synthetic")
PRESETS = ("smoke", "small", "paper")
_SMALL_SIZE = {"mnist": 5_000, "cifar10": 2_000}
_SMOKE_SIZE = {"digits": 300, "mnist": 1_000, "cifar10": 500, "synthetic": 300}


@dataclass(frozen=True)
class Task:
    """A classification problem that can be trained from scratch.

    Attributes:
        name: What reports call it.
        train: `TensorDataset` of float inputs `(n_train, ...)` and int64 labels `(n_train,)`.
        test: The same for the test examples.
        build_model: Called without arguments, gives an untrained network with logits
            `(n, n_classes)`. A module-level function, so that other processes can import it.
        training: How it is trained.
        note: What a reader must know beside every figure, or "".

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

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.train)

    @property
    def n_classes(self) -> int:
        """Number of classes, from the labels of the training set."""
        return int(self.train.tensors[1].max()) + 1


def load_task(
    name: str = "digits",
    *,
    preset: str = "small",
    data_root: str | Path | None = None,
    data: str | None = None,
    model: str | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
) -> Task:
    """Load a task by name.

    Args:
        name: "digits" (ships with scikit-learn), "mnist", "cifar10" or "synthetic" (planted influence).
        preset: "smoke", "small" (5,000 MNIST, 2,000 CIFAR-10 or all 1,397 digits training examples)
            or "paper" (everything).
        data_root: Folder in torchvision's layout, for MNIST and CIFAR-10. Nothing is downloaded.
        data: "module:factory" of your own data, called as `factory(data_root, train=True)` and with
            `train=False` (without `data_root` where none is given). It returns a map-style data set of
            `(input, label)`; torchvision's uint8 image classes are normalised as the built-in tasks are.
        model: "module:factory" of your own network, called without arguments.
        training: Replaces the settings of the task (Table 3), or those of them that a mapping names.

    Raises:
        ValueError: Unknown name, preset or setting, a factory that cannot be imported, or a network that
            cannot read the inputs.
        FileNotFoundError: The data are not where they should be.

    >>> load_task("digits").n_train
    1397
    """
    if name not in TASKS:
        raise bad_choice("task", name, TASKS)
    if preset not in PRESETS:
        raise bad_choice("preset", preset, PRESETS)
    note = ""
    if data is not None:
        train, test = (_own_data(data, data_root, train=flag) for flag in (True, False))
        note = f"Data from {data}."
        if len(test) == 9_980:
            note += " The test set holds 9,980 of the 10,000 CIFAR-10 test images."
    elif name == "digits":
        train, test = _digits()
    elif name == "synthetic":
        planted = planted_clusters()
        train, test = planted.train, planted.test
    else:
        train, test = (_torchvision(name, data_root, train=flag) for flag in (True, False))
    size = {"smoke": _SMOKE_SIZE.get(name), "small": _SMALL_SIZE.get(name)}.get(preset)
    if size is not None and size < len(train):
        train = TensorDataset(*(t[:size].clone() for t in train.tensors))
    builders = {
        "digits": models.digits_mlp,
        "mnist": models.mnist_mlp,
        "cifar10": models.cifar10_cnn,
        "synthetic": models.synthetic_mlp,
    }
    settings = {
        "digits": models.DIGITS_TRAINING,
        "mnist": models.MNIST_TRAINING,
        "cifar10": models.CIFAR10_TRAINING,
        "synthetic": models.DIGITS_TRAINING,
    }
    task = Task(
        name=f"{data.rpartition(':')[2] if data and model else name}-{len(train)}",
        train=train,
        test=test,
        build_model=builders[name] if model is None else import_factory("model", model),
        training=_trained_with(settings[name], training),
        note=note,
    )
    if data is not None or model is not None:
        _check_fits(task, model)
    return task


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


def _check_fits(task: Task, model: str | None) -> None:
    """Whether the network reads the first training example and knows the label."""
    with same_random_state():
        network = task.build_model().eval()
    x = task.train.tensors[0][:2]
    try:
        with torch.no_grad():
            logits = multiclass_logits(network(x))
    except (RuntimeError, TypeError) as error:
        raise bad_value(
            "model",
            f"read inputs of shape {tuple(x.shape)}",
            f"{'the network of the task' if model is None else repr(model)} ({error})",
            "Name your network with --model module:factory (in Python: model=)." if model is None else None,
        ) from error
    if task.n_classes > logits.shape[1]:
        raise bad_value("model", f"give {task.n_classes} logits", f"{logits.shape[1]}")


def import_factory(argument: str, path: str) -> Callable[..., Any]:
    """Import what "module:factory" names.

    Raises:
        ValueError: The module or the factory is not there.

    """
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise bad_value(argument, "be written as module:factory", repr(path))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise bad_value(
            argument,
            "name a module that can be imported",
            f"{module_name!r} ({error})",
            "Run from the folder that holds it, or put that folder on PYTHONPATH.",
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        has = f"It has {', '.join(map(repr, names))}." if names else f"{module.__file__} has none."
        raise bad_value(argument, f"name a callable of {module_name!r}", repr(attribute), has)
    found: Callable[..., Any] = factory
    return found


def to_tensors(dataset: Dataset[Any]) -> TensorDataset:
    """Read a map-style data set of `(input, label)` once into memory."""
    if isinstance(dataset, TensorDataset):
        return dataset
    batches = list(DataLoader(dataset, batch_size=1024))
    return TensorDataset(torch.cat([b[0] for b in batches]), torch.cat([b[-1] for b in batches]).long())


def normalise_images(images: Any, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images `(n, height, width, channels)` to normalised floats `(n, channels, height, width)`."""
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(mean[:, None, None]).div_(std[:, None, None]).contiguous()


MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CIFAR10_MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
CIFAR10_STD = torch.tensor([0.2470, 0.2435, 0.2616])


def _digits() -> tuple[TensorDataset, TensorDataset]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.tensor(bunch.images[order] / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(bunch.target[order], dtype=torch.int64)
    return TensorDataset(x[:1397], y[:1397]), TensorDataset(x[1397:], y[1397:])


def _torchvision(name: str, data_root: str | Path | None, *, train: bool) -> TensorDataset:
    from torchvision import datasets

    if data_root is None:
        raise FileNotFoundError(
            f"The task '{name}' reads files in torchvision's layout and nothing says where they are. "
            "Name their folder with --data-root DIR (in Python: data_root=)."
        )
    cls = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        dataset = cls(root=str(data_root), train=train, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"The task '{name}' found no data in {Path(data_root).resolve()} ({error}). Point --data-root at "
            f"a folder where torchvision.datasets.{cls.__name__}(root, download=True) has been run, "
            "or give your own data with --data module:factory."
        ) from error
    return image_tensors(dataset)


def image_tensors(dataset: Any) -> TensorDataset:
    """A torchvision MNIST or CIFAR-10 data set (or a subclass) as tensors.

    Pixels are normalised to mean 0 and variance 1 over the training set, per channel.
    """
    labels = torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)
    if isinstance(dataset.data, Tensor):
        x = dataset.data.unsqueeze(1).float().div_(255)
        return TensorDataset(x.sub_(MNIST_MEAN).div_(MNIST_STD), labels)
    return TensorDataset(normalise_images(dataset.data, CIFAR10_MEAN, CIFAR10_STD), labels)


def _own_data(path: str, data_root: str | Path | None, *, train: bool) -> TensorDataset:
    factory = import_factory("data", path)
    root = () if data_root is None else (data_root,)
    try:
        inspect.signature(factory).bind(*root, train=train)
    except TypeError as error:
        raise bad_value(
            "data",
            f"name a factory that can be called with ({'data_root, ' if root else ''}train=...)",
            f"{path!r} ({error})",
            None if root else "If it reads a folder, name it with --data-root DIR (in Python: data_root=).",
        ) from error
    try:
        dataset = factory(*root, train=train)
    except (RuntimeError, OSError) as error:
        where = "its own place" if data_root is None else Path(data_root).resolve()
        raise FileNotFoundError(
            f"The data factory '{path}' found no data in {where} ({error}). "
            "Name the folder that it reads with --data-root DIR (in Python: data_root=)."
        ) from error
    if (
        hasattr(dataset, "targets")
        and hasattr(dataset, "data")
        and getattr(dataset, "transform", None) is None
    ):
        return image_tensors(dataset)
    return to_tensors(dataset)
