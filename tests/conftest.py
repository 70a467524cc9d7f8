from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from planted import MLP, trained
from torch import nn
from torch.utils.data import TensorDataset

# The tensors of the tests are small. Another number shows results that depend on the order of sums.
torch.set_num_threads(int(os.environ.get("STRIDE_CAPTUM_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist one worker runs a whole file, whose fixtures are then made once.

    Files that start processes or measure memory are in one group, "processes": they run one after the other.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def planted() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A trained MLP in eval mode, its 48 training examples and 7 test examples of 3 classes."""
    return trained(MLP)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real MNIST and CIFAR-10 files; tests that use it are marked `data`."""
    folder = os.environ.get("STRIDE_CAPTUM_DATA")
    if not folder:
        pytest.skip("STRIDE_CAPTUM_DATA does not name a folder with MNIST and CIFAR-10")
    return Path(folder)
