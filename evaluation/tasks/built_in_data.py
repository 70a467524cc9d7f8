"""Data sets that tasks have by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from .beyond_data import diabetes, digit_canvases, digit_pairs, source_lines
from .image_data import torchvision_data
from .synthetic import planted_clusters

_BEYOND_DATA: dict[str, Callable[[], tuple[TensorDataset, TensorDataset]]] = {
    "diabetes": diabetes,
    "digit-pairs": digit_pairs,
    "tagging": source_lines,
    "segmentation": digit_canvases,
}
#: Tasks beyond one class an example, from packages that are installed.
BEYOND = tuple(_BEYOND_DATA)


def built_in(name: str, data_root: str | Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Training set and test set of a task of ours, in a fixed order."""
    if name == "digits":
        return _digits()
    if name in BEYOND:
        return _BEYOND_DATA[name]()
    if name == "synthetic":
        planted = planted_clusters()
        return planted.train, planted.test
    return (
        torchvision_data(name, data_root, train=True),
        torchvision_data(name, data_root, train=False),
    )


def _digits() -> tuple[TensorDataset, TensorDataset]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.tensor(bunch.images[order] / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(bunch.target[order], dtype=torch.int64)
    return TensorDataset(x[:1397], y[:1397]), TensorDataset(x[1397:], y[1397:])
