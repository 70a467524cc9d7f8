"""The planted data and networks of the package, and what only the tests need beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, ClassSimilarity, Random, Similarity
from stride_captum.conformance.toy_problems import (
    MLP,
    N_CLASSES,
    N_TEST,
    N_TRAIN,
    BatchNormCNN,
    Fails,
    HuggingFaceLike,
    Items,
    ListOfDicts,
    TwoInputs,
    built,
    planted_classes,
    trace,
    trained,
    unusual,
)
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading

METHODS = [STRIDE, Random, ClassRandom, Similarity, ClassSimilarity]


class OneLogit(nn.Module):
    """A binary network with the outputs `(n, 1)`, or `(n,)` with `squeeze`."""

    shape = (6,)

    def __init__(self, squeeze: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.squeeze = nn.Linear(6, 5), nn.Linear(5, 1), squeeze

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.fc2(self.fc1(x).relu())
        return outputs.squeeze() if self.squeeze else outputs


def loader(dataset: Dataset, batch_size: int = 4) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size)


def scripted(model: nn.Module) -> nn.Module:
    """A network as TorchScript, which torch now advises against."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(model)


@contextmanager
def expect_untouched(model: nn.Module) -> Iterator[None]:
    before = trace(model)
    try:
        yield
    finally:
        after = trace(model)
        assert [key for key in before if before[key] != after[key]] == []


__all__ = [
    "METHODS",
    "MLP",
    "N_CLASSES",
    "N_TEST",
    "N_TRAIN",
    "BatchNormCNN",
    "Fails",
    "HuggingFaceLike",
    "Items",
    "ListOfDicts",
    "OneLogit",
    "TwoInputs",
    "built",
    "expect_untouched",
    "loader",
    "planted_classes",
    "scripted",
    "trace",
    "trained",
    "unusual",
]


def examples(content: object) -> ExampleBatch:
    """A batch `(inputs..., labels)` or dict as methods see it."""
    return ExampleBatch(content, Reading())
