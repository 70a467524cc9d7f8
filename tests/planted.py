"""One generator of planted data and small networks, and what tells whether a method left a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, ClassSimilarity, Random, Similarity

METHODS = [STRIDE, Random, ClassRandom, Similarity, ClassSimilarity]
N_TRAIN, N_TEST, N_CLASSES = 48, 7, 3


def planted_classes(
    n: int, shape: tuple[int, ...] = (6,), seed: int = 0, noise: float = 0.7
) -> TensorDataset:
    """Inputs `(n, *shape)` around one random centre per class, and their labels `(n,)`."""
    centres = torch.randn(N_CLASSES, *shape, generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    inputs = centres[labels] + noise * torch.randn(n, *shape, generator=generator)
    return TensorDataset(inputs, labels)


class MLP(nn.Module):
    """6-8-5-3 with ReLU modules; `shape` is that of its inputs, as for all networks here."""

    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu1 = nn.Linear(6, 8), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(8, 5), nn.ReLU()
        self.fc3 = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))


class BatchNormCNN(nn.Module):
    """Convolution, BatchNorm, in-place ReLU and Dropout: wrong in train mode in every way."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True)
        self.conv2, self.relu2 = nn.Conv2d(4, 3, 3), nn.ReLU(True)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(3 * 4 * 4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.dropout(self.relu2(self.conv2(x)).flatten(1)))


class TwoInputs(nn.Module):
    """A network that reads two tensors; with a list they go in by position, with a dict by name."""

    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, N_CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(first), self.right(second)], 1).relu())


class HuggingFaceLike(nn.Module):
    """Token ids and a mask by name, an output object with `.logits`."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, N_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.encoder(self.embedding(input_ids)).tanh() * attention_mask[..., None]
        return SimpleNamespace(logits=self.classifier(hidden.mean(1)), hidden_states=hidden)


class OneLogit(nn.Module):
    """A binary network with the outputs `(n, 1)`, or `(n,)` with `squeeze`."""

    shape = (6,)

    def __init__(self, squeeze: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.squeeze = nn.Linear(6, 5), nn.Linear(5, 1), squeeze

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.fc2(self.fc1(x).relu())
        return outputs.squeeze() if self.squeeze else outputs


class ListOfDicts(Dataset):
    """Examples as dicts for `HuggingFaceLike`."""

    def __init__(self, n: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(11, (n, 5), generator=generator)
        self.attention_mask = (torch.rand(n, 5, generator=generator) > 0.2).float()
        self.labels = torch.randint(N_CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "labels")
        return {name: getattr(self, name)[i] for name in names}


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with the initial values of a seed; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def trained(
    build: Callable[[], nn.Module], n_train: int = N_TRAIN, seed: int = 0, steps: int = 30
) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A network in eval mode that fits planted classes, its training set and test set."""
    model = built(build, seed)
    train = planted_classes(n_train, model.shape, seed=1)
    test = planted_classes(N_TEST, model.shape, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval(), train, test


def loader(dataset: Dataset, batch_size: int = 4) -> DataLoader:
    return DataLoader(dataset, batch_size=batch_size)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that a caller could find changed, in comparable form."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "bits": [
            (name, t.dtype, t.detach().clone().reshape(-1).view(torch.uint8).tolist()) for name, t in tensors
        ],
        "objects": [(name, id(t), t.data_ptr()) for name, t in tensors],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(getattr(module, kind))
            for module in model.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad_mode": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def expect_untouched(model: nn.Module) -> Iterator[None]:
    before = trace(model)
    try:
        yield
    finally:
        after = trace(model)
        assert [key for key in before if before[key] != after[key]] == []


class Fails(Dataset):
    """Raises at one example and draws from every global random state on the way there."""

    def __init__(self, dataset: TensorDataset, at: int | None = None) -> None:
        self.dataset, self.at = dataset, at

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        torch.rand(1), np.random.rand(), random.random()
        if i == self.at:
            raise RuntimeError("a broken example")
        return self.dataset[i]
