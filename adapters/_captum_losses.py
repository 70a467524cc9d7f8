"""The two linear losses whose gradients TracIn multiplies, and their data in Captum's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..data.batch import ExampleBatch
from ..influence.method import InfluenceMethod
from ..losses import Loss
from ._captum import outputs_by_position, parts_by_position


class Positional(nn.Module):
    """Network that takes the parts of a batch by position, as Captum passes them; returns `(n, n_outputs)`.

    Args:
        network: The network itself.
        template: A batch, for what is the same for all examples.
        chosen: Parameters that Captum asks gradients of, in the graph whether the network uses them or not.
    """

    def __init__(self, network: nn.Module, template: ExampleBatch, chosen: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.network = network
        self.template = template
        self.chosen = nn.ParameterList(chosen)

    def forward(self, *parts: Any) -> Tensor:
        """Outputs for the parts in the order of `parts_by_position`."""
        outputs = outputs_by_position(self.template, self.network, parts)
        for parameter in self.chosen:  # Captum fails where there is no gradient
            outputs = outputs + 0 * (parameter - parameter.detach()).sum().to(outputs)
        return outputs[:, None] if outputs.ndim == 1 else outputs


class ResidualsAsLabels(IterableDataset[Any]):
    """The training batches `(inputs..., residuals)` of a method, of at most `size` examples."""

    def __init__(self, method: InfluenceMethod, residuals: Tensor, size: int | None) -> None:
        self.method, self.residuals, self.size = method, residuals, size or len(residuals)

    def __iter__(self) -> Iterator[Any]:
        for rows, batch in self.method.train_blocks(self.size, False):
            yield (*parts_by_position(batch), self.residuals[rows])


def has_batched_gradients(module: nn.Module) -> bool:
    """Whether Captum has batched per-example gradients for it."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def linear_losses(loss: Loss, outputs: Tensor, vectors: Tensor) -> Tensor:
    """`-<logits, v>` of each example, `(n,)`; its gradient with respect to the logits is -v."""
    return -(loss.logits(outputs) * vectors).sum(1)


def linear_loss(loss: Loss, outputs: Tensor, vectors: Tensor) -> Tensor:
    """Their sum."""
    return linear_losses(loss, outputs, vectors).sum()


def owners(names: Sequence[str]) -> list[str]:
    """The modules that hold these parameters."""
    return sorted({name.rpartition(".")[0] for name in names})
