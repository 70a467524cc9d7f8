"""Toy problems: small networks on generated data, without a download.

Every function takes a seed and leaves the global random states alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ..errors import bad_choice

N_TRAIN, N_TEST, N_CLASSES = 48, 7, 3


#: The loss that the problems are posed with.
_POSED: ContextVar[str] = ContextVar("loss of the toy problems", default="cross_entropy")


@contextmanager
def posed_with(loss: str) -> Iterator[None]:
    """Within it, labels and trained networks of all problems here are those of a loss.

    Args:
        loss: "cross_entropy": the class. "binary_cross_entropy": three labels, of which that of the class is
            on, and the next one where the first input is positive. "mse": three numbers, 2 for the class and
            -1 for the others, plus a third of the first input.

    >>> with posed_with("mse"):
    ...     print(planted_classes(4).tensors[1].shape)
    torch.Size([4, 3])
    """
    if loss not in _LABELS:
        raise bad_choice("loss", loss, list(_LABELS))
    token = _POSED.set(loss)
    try:
        yield
    finally:
        _POSED.reset(token)


def _several_labels(inputs: Tensor, classes: Tensor) -> Tensor:
    own = F.one_hot(classes, N_CLASSES)
    further = own.roll(1, 1) * (inputs.flatten(1)[:, :1] > 0)
    return (own + further).float()


def _numbers(inputs: Tensor, classes: Tensor) -> Tensor:
    return 3.0 * F.one_hot(classes, N_CLASSES) - 1 + inputs.flatten(1)[:, :1] / 3


_LABELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda inputs, classes: classes,
    "binary_cross_entropy": _several_labels,
    "mse": _numbers,
}


def planted_classes(
    n: int, shape: tuple[int, ...] = (6,), seed: int = 0, noise: float = 0.7
) -> TensorDataset:
    """Inputs `(n, *shape)` around one random centre per class, and their labels: `(n,)` classes, or those of
    the loss that the problem is posed with.
    """
    inputs, classes = _planted(n, shape, seed, noise)
    return TensorDataset(inputs, _LABELS[_POSED.get()](inputs, classes))


def classes_of(n: int, shape: tuple[int, ...] = (6,), seed: int = 0, noise: float = 0.7) -> Tensor:
    """The class around whose centre each example of `planted_classes` lies, `(n,)`."""
    return _planted(n, shape, seed, noise)[1]


def _planted(n: int, shape: tuple[int, ...], seed: int, noise: float) -> tuple[Tensor, Tensor]:
    centres = torch.randn(N_CLASSES, *shape, generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    inputs = centres[labels] + noise * torch.randn(n, *shape, generator=generator)
    return inputs, labels


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}


class MLP(nn.Module):
    """6-8-5-3 with ReLU modules; `shape` is that of its inputs, as for all networks here."""

    shape: tuple[int, ...] = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu1 = nn.Linear(6, 8), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(8, 5), nn.ReLU()
        self.fc3 = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        logits: Tensor = self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))
        return logits


class BatchNormCNN(nn.Module):
    """Convolution, BatchNorm, in-place ReLU and Dropout: wrong in train mode in every way."""

    shape: tuple[int, ...] = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True)
        self.conv2, self.relu2 = nn.Conv2d(4, 3, 3), nn.ReLU(True)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(3 * 4 * 4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        x = self.relu1(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.dropout(self.relu2(self.conv2(x)).flatten(1)))
        return logits


class TwoInputs(nn.Module):
    """A network that reads two tensors; with a list they go in by position, with a dict by name."""

    shape: tuple[int, ...] = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, N_CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        logits: Tensor = self.head(torch.cat([self.left(first), self.right(second)], 1).relu())
        return logits


class HuggingFaceLike(nn.Module):
    """Token ids and a mask by name, an output object with `.logits`."""

    shape: tuple[int, ...] = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, N_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """An object with logits `(n, 3)`."""
        hidden = self.encoder(self.embedding(input_ids)).tanh() * attention_mask[..., None]
        return SimpleNamespace(logits=self.classifier(hidden.mean(1)), hidden_states=hidden)


class ListOfDicts(Dataset[dict[str, Tensor]]):
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


class Items(Dataset[Any]):
    """Some items as a data set that is no `TensorDataset`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        return self.source[i]


class Fails(Items):
    """Raises at one example and draws from every global random state on the way there."""

    def __init__(self, source: Any, at: int | None = None) -> None:
        super().__init__(source)
        self.at = at

    def __getitem__(self, i: int) -> Any:
        torch.rand(1), np.random.rand(), random.random()
        if i == self.at:
            raise RuntimeError("a broken example")
        return super().__getitem__(i)


def built(build: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A network with the initial values of a seed; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def trained(
    build: Callable[[], nn.Module], n_train: int = N_TRAIN, seed: int = 0, steps: int = 30
) -> tuple[Any, TensorDataset, TensorDataset]:
    """A network in eval mode that fits planted classes, its training set and test set."""
    model: Any = copy.deepcopy(_fitted(build, n_train, seed, steps, _POSED.get()))
    return model, _planted_train(model, n_train), planted_classes(N_TEST, model.shape, seed=2)


def _planted_train(model: Any, n_train: int) -> TensorDataset:
    return planted_classes(n_train, model.shape, seed=1)


@cache
def _fitted(build: Callable[[], nn.Module], n_train: int, seed: int, steps: int, posed: str) -> nn.Module:
    model = built(build, seed)
    x, y = _planted_train(model, n_train).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            _LOSSES[posed](model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    fitted: nn.Module = model.eval()
    return fitted


def unusual(model: nn.Module) -> nn.Module:
    """The model in the middle of its training: mixed modes, a frozen layer, gradients, hooks."""
    model.train()
    children = list(model.children())
    children[1].eval()
    for parameter in children[0].parameters():
        parameter.requires_grad_(False)
    for i, parameter in enumerate(children[-1].parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + i)
    children[0].register_forward_hook(lambda module, args, output: None)
    children[0].register_forward_pre_hook(lambda module, args: None)
    return model


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that a caller could find changed in a model and in the global state, in comparable form."""
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
