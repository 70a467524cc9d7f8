"""A few examples of a batch for small passes, and the places to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .agreement import MANY
from .hooks import scripted_parts
from .pooling import Place

Take = Callable[[Any, Tensor], Any]


def copied(batch: Any) -> Any:
    """A batch with copies of its tensors, for a model that writes to its inputs."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, Mapping):
        return {key: copied(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [copied(value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return [t for value in batch for t in tensors_in(value)] if isinstance(batch, tuple | list) else []


def spread(n: int) -> list[int]:
    """Three of n examples from the first to the last; the last are repeated where there are fewer."""
    return [0, n // 2, n - 1] if n >= MANY else [0, n - 1, n - 1]


def both_sides(model: nn.Module) -> list[Place]:
    """The places of all submodules that take hooks, and of the model itself."""
    closed = scripted_parts(model)
    names = [name for name, _ in model.named_modules() if name not in closed]
    return [(name, reads_input) for name in names for reads_input in (True, False)]
