"""The built-in tasks: data, network, training and loss of each, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn
from torch.utils.data import TensorDataset

from ...losses import MSE, BinaryCrossEntropy, CrossEntropy, Loss
from ...losses.summed_positions import SummedPositions
from . import networks as models
from .bundled_data import CANVAS, LINE, TAGS, diabetes, digit_canvases, digit_pairs, digits, source_lines
from .image_data import torchvision_data
from .networks import TrainingSettings
from .synthetic import planted_clusters

DataSets = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class BuiltIn:
    """One built-in task.

    Attributes:
        data: Gives the training set and the test set, always in the same order; it is called with the
            folder of MNIST or CIFAR-10, which the other tasks do not need.
        build_model: Gives an untrained network.
        training: How it is trained.
        sizes: Training examples by preset; a preset that is not there takes all.
        loss: What it is trained with.
    """

    data: Callable[[str | Path | None], DataSets]
    build_model: Callable[[], nn.Module]
    training: TrainingSettings
    sizes: Mapping[str, int]
    loss: Loss = field(default_factory=CrossEntropy)


def _from_torchvision(name: str, data_root: str | Path | None) -> DataSets:
    train, test = (torchvision_data(name, data_root, train=train) for train in (True, False))
    return train, test


def _synthetic() -> DataSets:
    planted = planted_clusters()
    return planted.train, planted.test


def _bundled(make: Callable[[], DataSets]) -> Callable[[str | Path | None], DataSets]:
    return lambda data_root: make()


#: Tasks by name; the last four have no single class for each example.
BUILT_IN: dict[str, BuiltIn] = {
    "digits": BuiltIn(_bundled(digits), models.digits_mlp, models.DIGITS_TRAINING, {"smoke": 300}),
    "mnist": BuiltIn(
        partial(_from_torchvision, "mnist"),
        models.mnist_mlp,
        models.MNIST_TRAINING,
        {"smoke": 1_000, "small": 5_000},
    ),
    "cifar10": BuiltIn(
        partial(_from_torchvision, "cifar10"),
        models.cifar10_cnn,
        models.CIFAR10_TRAINING,
        {"smoke": 500, "small": 2_000},
    ),
    "synthetic": BuiltIn(_bundled(_synthetic), models.synthetic_mlp, models.DIGITS_TRAINING, {"smoke": 300}),
    "diabetes": BuiltIn(
        _bundled(diabetes), models.diabetes_mlp, models.DIABETES_TRAINING, {"smoke": 200}, MSE()
    ),
    "digit-pairs": BuiltIn(
        _bundled(digit_pairs),
        models.digit_pairs_mlp,
        models.PAIRS_TRAINING,
        {"smoke": 400},
        BinaryCrossEntropy(),
    ),
    "tagging": BuiltIn(
        _bundled(source_lines),
        models.SourceTagger,
        models.TAGGING_TRAINING,
        {"smoke": 300},
        SummedPositions(position=CrossEntropy(), n_positions=LINE, n_outputs=len(TAGS)),
    ),
    "segmentation": BuiltIn(
        _bundled(digit_canvases),
        models.CanvasSegmenter,
        models.SEGMENTATION_TRAINING,
        {"smoke": 300},
        SummedPositions(position=CrossEntropy(), n_positions=CANVAS**2, n_outputs=10),
    ),
}
TASKS = tuple(BUILT_IN)
#: Tasks whose examples do not have one class each.
WITHOUT_CLASSES = tuple(name for name, task in BUILT_IN.items() if not task.loss.plain)
