"""Networks of the paper (Table 2) and their training settings (Table 3)."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
#: Beyond one label an example.
DIABETES_TRAINING = TrainingSettings(optimizer="adam", learning_rate=3e-3, epochs=30, weight_decay=1e-3)
PAIRS_TRAINING = TrainingSettings(optimizer="adam", learning_rate=3e-3, epochs=30)
TAGGING_TRAINING = TrainingSettings(optimizer="adam", learning_rate=3e-3, epochs=12, batch_size=32)
SEGMENTATION_TRAINING = TrainingSettings(optimizer="adam", learning_rate=5e-3, epochs=25, batch_size=32)


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


def diabetes_mlp() -> nn.Sequential:
    """10-64-32-1 with ReLU, for the diabetes data."""
    return _mlp(10, 64, 32, 1)


def digit_pairs_mlp() -> nn.Sequential:
    """128-128-64-10 with ReLU, for pairs of digits."""
    return _mlp(128, 128, 64, 10)


class SourceTagger(nn.Module):
    """Characters to one row of logits for each, by two convolutions over five characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.conv1 = nn.Conv1d(16, 48, 5, padding=2)
        self.conv2 = nn.Conv1d(48, 48, 5, padding=2)
        self.head = nn.Linear(48, 6)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits `(n, length, 6)` of characters `(n, length)`."""
        x = self.embedding(characters).transpose(1, 2)
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.head(x.transpose(1, 2))  # type: ignore[no-any-return]


class CanvasSegmenter(nn.Module):
    """Images to logits of ten classes for each pixel, from maps of three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.coarse = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.context = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Conv2d(80, 10, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(n, 10, height, width)` of images `(n, 1, height, width)`."""
        fine = torch.relu(self.fine(images))
        coarse = torch.relu(self.coarse(torch.relu(self.middle(fine))))
        coarse = nn.functional.interpolate(torch.relu(self.context(coarse)), scale_factor=4.0)
        return self.head(torch.cat([fine, coarse], 1))  # type: ignore[no-any-return]


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
