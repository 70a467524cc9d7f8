"""MNIST, CIFAR-10 and data sets in torchvision's layout, as normalized tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...system.packages import install_command


def normalise_images(images: Any, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images `(n, height, width, channels)` to normalized floats `(n, channels, height, width)`."""
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return x.sub_(mean[:, None, None]).div_(std[:, None, None]).contiguous()


MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CIFAR10_MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
CIFAR10_STD = torch.tensor([0.2470, 0.2435, 0.2616])


def import_torchvision(module: str, needed_by: str) -> Any:
    """Import a module of torchvision, which the extra `vision` installs.

    Args:
        module: Its name below torchvision, such as "datasets".
        needed_by: Subject of the error message: what needs torchvision.

    Raises:
        ImportError: It cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError as error:
        hint = f"{needed_by} needs torchvision: {install_command('vision')}"
        raise ImportError(f"{hint} ({error}).") from error


def torchvision_data(name: str, data_root: str | Path | None, *, train: bool) -> TensorDataset:
    """MNIST or CIFAR-10 from a folder in torchvision's layout.

    Raises:
        FileNotFoundError: No folder is named, or it does not hold the data.
        ImportError: torchvision is not installed.
    """
    if data_root is None:
        raise FileNotFoundError(
            f"The task '{name}' reads files in torchvision's layout, and no folder is given. "
            "Name their folder with --data-root DIR (in Python: data_root=)."
        )
    datasets = import_torchvision("datasets", f"The task '{name}'")
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

    Pixels are normalized per channel, with the mean and standard deviation of the training set.

    Returns:
        Inputs `(n, channels, height, width)` float32, and labels `(n,)` int64.
    """
    labels = torch.as_tensor(np.asarray(dataset.targets), dtype=torch.int64)
    if isinstance(dataset.data, Tensor):
        x = dataset.data.unsqueeze(1).float().div_(255)
        return TensorDataset(x.sub_(MNIST_MEAN).div_(MNIST_STD), labels)
    return TensorDataset(normalise_images(dataset.data, CIFAR10_MEAN, CIFAR10_STD), labels)


def holds_raw_images(dataset: Any) -> bool:
    """Whether a data set is one of torchvision's uint8 image classes and has no transforms."""
    images, of_class = getattr(dataset, "data", None), getattr(type(dataset), "__getitem__", None)
    if not hasattr(dataset, "targets") or not getattr(of_class, "__module__", "").startswith("torchvision."):
        return False
    if any(getattr(dataset, name, None) is not None for name in ("transform", "target_transform")):
        return False
    if isinstance(images, Tensor):
        return images.dtype == torch.uint8 and images.ndim == 3
    return isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[3:] == (3,)
