"""Networks for benchmarks, and random examples for them.

Weights are random too, since the cost of a method does not depend on what a network has learned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...errors import bad_choice
from ...system.random_states import same_random_state
from ..tasks.image_data import import_torchvision
from ..tasks.networks import cifar10_cnn, mnist_mlp

N_CLASSES = 10


def _width_512() -> nn.Module:
    layers = OrderedDict(fc1=nn.Linear(784, 512), relu=nn.ReLU(), fc2=nn.Linear(512, N_CLASSES))
    return nn.Sequential(layers)


def _resnet18() -> nn.Module:
    models = import_torchvision("models", "The network 'resnet18'")
    network: nn.Module = models.resnet18(num_classes=N_CLASSES)
    return network


def _vit_b_16() -> nn.Module:
    models = import_torchvision("models", "The network 'vit_b_16'")
    network: nn.Module = models.vit_b_16(image_size=32, num_classes=N_CLASSES)
    return network


#: By name: the builder, and the shape of one input. The last two need torchvision.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP of Table 2": (mnist_mlp, (784,)),
    "width 512": (_width_512, (784,)),
    "CNN of Table 2": (cifar10_cnn, (3, 32, 32)),
    "resnet18": (_resnet18, (3, 32, 32)),
    "vit_b_16": (_vit_b_16, (3, 32, 32)),
}


def network(name: str) -> nn.Module:
    """A network in eval mode, with the same weights at every call.

    Args:
        name: One of `NETWORKS`. vit_b_16 reads images of 32 x 32 pixels, as four patches.

    Raises:
        ValueError: There is no such network.
    """
    if name not in NETWORKS:
        raise bad_choice("network", name, list(NETWORKS))
    with same_random_state():
        torch.manual_seed(0)
        return NETWORKS[name][0]().eval()


def examples(name: str, n_train: int, n_test: int) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """A training set `(n_train, ...)` and a batch of `n_test` test points with labels, for a network.

    >>> train, (x, y) = examples("width 512", 5, 2)
    >>> len(train), x.shape, y.shape
    (5, torch.Size([2, 784]), torch.Size([2]))
    """
    generator = torch.Generator().manual_seed(0)
    shape = NETWORKS[name][1]
    x = torch.randn(n_train, *shape, generator=generator)
    y = torch.randint(N_CLASSES, (n_train,), generator=generator)
    test = torch.randn(n_test, *shape, generator=generator)
    return TensorDataset(x, y), (test, torch.randint(N_CLASSES, (n_test,), generator=generator))
