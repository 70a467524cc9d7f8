"""Owns the two linear losses whose gradients TracIn multiplies, and their data as Captum wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .. import inputs as data
from ..influence import InfluenceMethod
from ..responses import multiclass_logits
from .captum_calls import batch_of, inputs_by_position


class Positional(nn.Module):
    """A network that takes tensors by position, as Captum calls it, and gives `(n, n_outputs)`."""

    def __init__(self, network: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, *values: Any) -> Tensor:
        """Outputs for the inputs in the order of their names."""
        outputs = data.forward(self.network, batch_of(self.names, values))
        return outputs[:, None] if outputs.ndim == 1 else outputs


class ResidualsAsLabels(IterableDataset[Any]):
    """The training batches `(inputs..., residuals)` of a method, of at most `size` examples."""

    def __init__(self, method: InfluenceMethod, residuals: Tensor, size: int | None) -> None:
        self.method, self.residuals, self.size = method, residuals, size or len(residuals)

    def __iter__(self) -> Iterator[Any]:
        for rows, batch in self.method._train_blocks(self.size, False):
            yield (*inputs_by_position(batch), self.residuals[rows])


def has_batched_gradients(module: nn.Module) -> bool:
    """Whether Captum has batched per-example gradients for it."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def linear_losses(outputs: Tensor, vectors: Tensor) -> Tensor:
    """`-<logits, v>` of each example, `(n,)`; its gradient with respect to the logits is -v."""
    return -(multiclass_logits(outputs) * vectors).sum(1)


def linear_loss(outputs: Tensor, vectors: Tensor) -> Tensor:
    """Their sum."""
    return linear_losses(outputs, vectors).sum()


def owners(names: Sequence[str]) -> list[str]:
    """The modules that hold these parameters."""
    return sorted({name.rpartition(".")[0] for name in names})
