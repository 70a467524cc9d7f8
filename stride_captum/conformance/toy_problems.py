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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ..errors import bad_choice
from .toy_networks import AT_POSITIONS, MLP, N_CLASSES, BatchNormCNN, HuggingFaceLike, TwoInputs

N_TRAIN, N_TEST = 48, 7
#: Positions of an example with several, and the label of those that are padding.
N_POSITIONS, IGNORED = 4, -100

#: What the problems are posed with.
_POSED: ContextVar[str] = ContextVar("loss of the toy problems", default="cross_entropy")


@contextmanager
def posed_with(loss: str) -> Iterator[None]:
    """Within it, labels and trained networks of all problems here are those of a loss.

    Args:
        loss: "cross_entropy": the class. "binary_cross_entropy": three labels, of which that of the class is
            on, and the next one where the first input is positive. "mse": three numbers, 2 for the class and
            -1 for the others, plus a third of the first input. "positions": cross-entropy at several
            positions of each example, tokens or pixels, of which the last ones may be padding.

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
    "positions": lambda inputs, classes: classes,
}


def planted_classes(
    n: int, shape: tuple[int, ...] = (6,), seed: int = 0, noise: float = 0.7
) -> TensorDataset:
    """Inputs `(n, *shape)` around one random centre per class, and their labels: `(n,)` classes, or those of
    the loss that the problem is posed with.

    With positions: tokens `(n, 4, width)` and labels `(n, 4)`, or images and labels `(n, height, width)`.
    """
    planted = _planted_positions if _POSED.get() == "positions" else _planted
    inputs, classes = planted(n, shape, seed, noise)
    return TensorDataset(inputs, _LABELS[_POSED.get()](inputs, classes))


def classes_of(n: int, shape: tuple[int, ...] = (6,), seed: int = 0, noise: float = 0.7) -> Tensor:
    """The class around whose centre each example of `planted_classes` lies, or most of it, `(n,)`."""
    return _planted(n, shape, seed, noise)[1]


def _centres(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(N_CLASSES, *shape, generator=torch.Generator().manual_seed(1234))


def _planted(n: int, shape: tuple[int, ...], seed: int, noise: float) -> tuple[Tensor, Tensor]:
    centres = _centres(shape)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    inputs = centres[labels] + noise * torch.randn(n, *shape, generator=generator)
    return inputs, labels


def _planted_positions(n: int, shape: tuple[int, ...], seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Three positions in four are of the class of the example, the fourth of the next one; then padding."""
    tokens, grid = len(shape) == 1, shape[1:] or (N_POSITIONS,)
    places = torch.arange(torch.Size(grid).numel())
    labels = (classes_of(n, shape, seed)[:, None] + (places % N_POSITIONS == 3)) % N_CLASSES
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(len(places) // 2, len(places) + 1, (n, 1), generator=generator)
    centres = _centres(shape)
    inputs = centres[labels] if tokens else centres.flatten(2).transpose(1, 2)[labels, places]
    inputs = inputs + noise * torch.randn(inputs.shape, generator=generator)
    inputs[places >= lengths], labels[places >= lengths] = 0.0, IGNORED
    if not tokens:
        inputs = inputs.transpose(1, 2).contiguous().reshape(n, *shape)
    return inputs, labels.reshape(n, *grid)


def _of_positions(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of outputs `(n, P, 3)` or `(n, 3, height, width)`."""
    return F.cross_entropy(outputs if outputs.ndim == 4 else outputs.transpose(1, 2), labels)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "positions": _of_positions,
}


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
    if _POSED.get() == "positions":
        build = AT_POSITIONS.get(build, build)
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


__all__ = [
    "IGNORED",
    "MLP",
    "N_CLASSES",
    "N_POSITIONS",
    "N_TEST",
    "N_TRAIN",
    "BatchNormCNN",
    "Fails",
    "HuggingFaceLike",
    "Items",
    "ListOfDicts",
    "TwoInputs",
    "built",
    "classes_of",
    "planted_classes",
    "posed_with",
    "trace",
    "trained",
    "unusual",
]
