"""Networks of the paper (Table 2) and their training settings (Table 3)."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import bad_choice, bad_value, whole_number

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a base model is trained from scratch (Table 3).

    Attributes:
        optimizer: "adam" or "sgd".
        learning_rate: Step size.
        batch_size: Examples a step.
        weight_decay: L2 coefficient.
        momentum: For SGD; Adam has none.
        epochs: Passes over the training set.

    Raises:
        ValueError: A setting that no training can have.

    """

    optimizer: str
    learning_rate: float
    epochs: int
    batch_size: int = 64
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise bad_choice("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("epochs", "batch_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("learning_rate", "weight_decay", "momentum"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        if self.momentum >= 1:
            raise bad_value("momentum", "be below 1", self.momentum)


def _number(name: str, value: Any) -> float:
    """A finite number of at least 0, as plain Python has it."""
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise bad_value(name, "be a finite number, at least 0", repr(value))
    return number


#: Table 3.
MNIST_TRAINING = TrainingSettings(optimizer="adam", learning_rate=1e-3, epochs=20)
CIFAR10_TRAINING = TrainingSettings(
    optimizer="sgd", learning_rate=0.01, epochs=40, weight_decay=1e-4, momentum=0.9
)
#: Not in the paper: the embedded digits data, and planted clusters.
DIGITS_TRAINING = TrainingSettings(optimizer="adam", learning_rate=1e-3, epochs=30)


def _mlp(*widths: int) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    last = len(widths) - 1
    for i in range(1, len(widths)):
        modules[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i])
        if i < last:
            modules[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(modules)


def digits_mlp() -> nn.Sequential:
    """64-128-64-10 with ReLU, for scikit-learn's 8x8 digits."""
    return _mlp(64, 128, 64, 10)


def synthetic_mlp() -> nn.Sequential:
    """20-64-32-4 with ReLU, for planted clusters."""
    return _mlp(20, 64, 32, 4)


def mnist_mlp() -> nn.Sequential:
    """Table 2, left: 784-512-256-10 with ReLU. The paper's feature layer is `relu2` (256)."""
    return _mlp(784, 512, 256, 10)


def cifar10_cnn() -> nn.Sequential:
    """Table 2, right: two convolution blocks, 1024-512-10. The paper's feature layer is `relu3` (512)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 32, 3, padding=1),
            bn1=nn.BatchNorm2d(32),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            bn2=nn.BatchNorm2d(64),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            pool3=nn.AdaptiveAvgPool2d((4, 4)),
            flatten=nn.Flatten(),
            fc1=nn.Linear(1024, 512),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(0.5),
            fc2=nn.Linear(512, 10),
        )
    )
