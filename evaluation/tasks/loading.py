"""`load_task`: built-in tasks and the user's own data and network, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from ...errors import bad_choice, bad_value
from ...losses import Loss, loss_of
from .built_in import BUILT_IN, TASKS, WITHOUT_CLASSES
from .factories import import_factory
from .networks import TrainingSettings
from .own_data import OwnData, check_classes, own_data
from .task import Task

PRESETS = ("smoke", "small", "paper")


def load_task(
    name: str = "digits",
    *,
    preset: str = "small",
    data_root: str | Path | None = None,
    data: str | None = None,
    model: str | None = None,
    training: TrainingSettings | Mapping[str, Any] | None = None,
    label_key: str | None = None,
    loss: str | Loss | None = None,
    mix_test: bool = True,
) -> Task:
    """Load a task by name.

    Args:
        name: Classification: "digits" (ships with scikit-learn), "mnist", "cifar10" or "synthetic" (planted
            influence). Other problems: "diabetes" (regression), "digit-pairs" (several labels for each
            example), "tagging" (a tag for each character of source code) and "segmentation" (a class for
            each pixel).
        preset: "smoke" (a few hundred training examples), "small" (5,000 of MNIST, 2,000 of CIFAR-10, all of
            the others) or "paper" (everything).
        data_root: Folder in torchvision's layout, for MNIST and CIFAR-10. Nothing is downloaded.
        data: "module:factory" of your own data, called as `factory(data_root, train=True)` and with
            `train=False`; without `data_root` if none is given. It returns a data set of `(input, label)`,
            or of dicts with one input and the key "labels" or "label". Labels are class indices of any type,
            one-hot rows, or what `loss` takes. If the data set has an attribute `ids`, reports name training
            examples by it. torchvision's uint8 image classes are normalized as the built-in tasks are.
        model: "module:factory" of your own network, called without arguments. The network returns logits
            `(n, n_classes)`, or one logit for two classes; outputs of three axes `(n, P, C)` or four
            `(n, C, H, W)` are those of several positions, each with a label of its own.
        training: Settings that replace those of the task (Table 3), or a mapping with some of them.
        label_key: Key of the label if examples of `data` are dicts; None takes "labels" or "label".
        loss: What a network on `data` is trained with: "mse" (regression), "binary_cross_entropy" (several
            labels), or a loss with its options; None for cross-entropy. The built-in tasks have their own.
        mix_test: Whether to shuffle the test set of `data` if it is sorted by label. A comparison takes the
            first test points.

    Raises:
        ValueError: An unknown name, preset or setting; a factory that cannot be imported or called; examples
            without one input and one label that the loss takes; or a network that cannot read the inputs or
            whose outputs do not fit the labels.
        FileNotFoundError: The data were not found.
        ImportError: The task needs torchvision, which is not installed.

    >>> load_task("digits").n_train
    1397
    """
    if name not in TASKS:
        raise bad_choice("task", name, TASKS)
    if preset not in PRESETS:
        raise bad_choice("preset", preset, PRESETS)
    if label_key is not None and data is None:
        raise bad_value("label_key", "be left out without data of your own", repr(label_key))
    if loss is not None and data is None:
        raise bad_value("loss", "be left out without data of your own", repr(loss))
    if name in WITHOUT_CLASSES and (data is not None or model is not None):
        raise bad_value("data", f"be left out for the task {name!r}, as `model`", repr(data or model))
    task = BUILT_IN[name]
    settings = _trained_with(task.training, training)
    build_model = task.build_model if model is None else import_factory("model", model)
    size = task.sizes.get(preset)
    given = loss_of(task.loss if loss is None else loss)
    if data is not None:
        own = own_data(data, data_root, label_key, build_model, model, size, mix_test, given)
    else:
        train, test = task.data(data_root)
        if size is not None and size < len(train):
            train = TensorDataset(*(t[:size].clone() for t in train.tensors))
        if model is not None:
            check_classes(build_model, model, train.tensors[0], int(train.tensors[1].max()) + 1)
        own = OwnData(train, test, given)
    return Task(
        name=f"{data.rpartition(':')[2] if data and model else name}-{len(own.train)}",
        train=own.train,
        test=own.test,
        build_model=build_model,
        training=settings,
        note=" ".join(own.notes),
        loss=own.loss,
        ids=own.ids,
    )


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
