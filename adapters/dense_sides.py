"""Owns the two sides of the gradient of a dense layer's weight: its inputs and its output gradients.

For `y = W a`, the gradient of an example is the sum of `b a^T` over its positions, b the gradient of y.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..batch import ExampleBatch


def dense_layers(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[nn.Module, str]:
    """The Linear layers whose weights are among some parameters, with the names of these weights.

    Args:
        model: The network.
        parameters: By name; layers that share a weight share its name.
    """
    names = {id(p): name for name, p in model.named_parameters() if name in parameters}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in names]
    return {layer: names[id(layer.weight)] for layer in linear}


def dense_sides(
    model: nn.Module, layers: Mapping[nn.Module, str], batch: ExampleBatch, vectors: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs a and gradients b of `<logits, v>` with respect to the outputs, of one batch.

    Args:
        model: In eval mode, so that examples do not meet.
        layers: Names of the weights by layer (`dense_layers`).
        batch: Batch of n examples.
        vectors: v, `(n, n_classes)`.

    Returns:
        `(n_positions, n_in)` and `(n_positions, n_out)` by name of the weight, where n_positions is n for
        one position an example. A layer that the network does not call is left out.
    """
    batch = ExampleBatch.of(batch)
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        calls.append((layers[layer], inputs[0].detach(), probe))
        return output + probe  # whose gradient survives what is done to the output in place

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        response = (batch.logits(model) * vectors).sum()
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        return {}
    gradients = torch.autograd.grad(response, [probe for *_, probe in calls], materialize_grads=True)
    positions: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, a, _), b in zip(calls, gradients, strict=True):
        positions.setdefault(name, []).append((a.flatten(0, -2), b.flatten(0, -2)))
    return {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        for name, pairs in positions.items()
    }
