"""Detectors of label noise that a comparison knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import nn

from .... import adapters

#: `detector(model, train_dataset)` returns `(n_train,)`: high = the label is suspect.
Detector = Callable[..., Any]


@dataclass(frozen=True)
class DetectorSpec:
    """A detector of label noise that uses no influence.

    Attributes:
        build: Its class.
        partitions: Partitions of the training set into halves whose models it is given as `checkpoints`.
        needs: Module of an extra that it needs.
    """

    build: Callable[..., adapters.LabelNoiseDetector]
    partitions: int = 0
    needs: str | None = None

    @property
    def available(self) -> bool:
        """Whether the extra that it needs is installed."""
        return self.needs is None or find_spec(self.needs) is not None

    def __call__(self, model: nn.Module, train_dataset: Any, **options: Any) -> Any:
        """Scores `(n_train,)`, high = the label is suspect."""
        return self.build(model, train_dataset, **options).mislabel_scores()


#: Detectors of label noise that use no influence.
DETECTORS = {
    "loss": DetectorSpec(adapters.LossDetector),
    "confident learning": DetectorSpec(adapters.ConfidentLearning, needs="cleanlab"),
    "confident learning, cross-fitted": DetectorSpec(
        adapters.ConfidentLearning, partitions=1, needs="cleanlab"
    ),
}


def partitions_of(detector: Detector) -> int:
    """Partitions into halves whose models a detector is given."""
    return detector.partitions if isinstance(detector, DetectorSpec) else 0
