"""The two sides of the gradient of a dense layer's weight: its inputs and its output gradients.

For `y = W a`, the gradient of an example is the sum of `b a^T` over its positions, b the gradient of y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...losses.summed_positions import SummedPositions
from .checks import agree
from .traces import hooked
from .working_copies import widened


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

    def record(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        inputs = args[0] if args else kwargs["input"]
        calls.append((layers[layer], inputs.detach(), probe))
        return output + probe  # whose gradient survives what is done to the output in place

    with hooked((layer, record) for layer in layers):
        response = (widened(batch.logits(model)) * vectors).sum()
    if not calls:
        return {}
    gradients = torch.autograd.grad(response, [probe for *_, probe in calls], materialize_grads=True)
    positions: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, a, _), b in zip(calls, gradients, strict=True):
        positions.setdefault(name, []).append((_rows(a).to(vectors.dtype), _rows(b).to(vectors.dtype)))
    return {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        for name, pairs in positions.items()
    }


def rows_that_count(
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    batch: ExampleBatch,
    labels: Tensor,
    loss: SummedPositions,
) -> dict[str, Tensor]:
    """Which rows of the inputs belong in a mean over positions: all but those that no label depends on.

    A position without a label is left out where outputs with a label do not read it, as padding. A prompt
    stays, which later positions read.

    Args:
        model: As for `dense_sides`.
        layers: As for `dense_sides`.
        batch: As for `dense_sides`.
        labels: Of the positions, `(n, P)` or `(n, P, C)`.
        loss: Of whole examples.

    Returns:
        `(n_rows,)` bool by name of the weight, for layers with a row for each position; empty if all
        positions have labels.
    """
    counted = loss.position.counted(labels)
    if bool(counted.all()):
        return {}
    # Entries of all kinds: that their products with the Jacobian vanish by chance is out of the question.
    some = torch.arange(1, counted.numel() * loss.n_outputs + 1, dtype=torch.float64).cos()
    every = some.to(labels.device).reshape(len(labels), -1)
    with torch.enable_grad():
        labeled = dense_sides(model, layers, batch, loss.of_counted(every, labels))
        read_by_any = dense_sides(model, layers, batch, every)
    found = {}
    for name, (_, b) in labeled.items():
        if len(b) == counted.numel():
            # The rows may be in another order than the labels, where positions stand before examples.
            unlabeled = (read_by_any[name][1] != 0).any(1) | ~counted.flatten().to(b.device)
            found[name] = (b != 0).any(1) | ~unlabeled
    return found


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def sides_of_examples(
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    batch: ExampleBatch,
    vectors: Tensor,
    rounding: float,
) -> bool:
    """Whether each row of the sides of a batch belongs to one example, so that products of rows add up.

    They do not where a layer reads what all examples share, such as a learned query.

    Args:
        model: As for `dense_sides`.
        layers: As for `dense_sides`.
        batch: A few examples.
        vectors: As for `dense_sides`.
        rounding: Of `check_model`.
    """
    together = dense_sides(model, layers, batch, vectors)
    alone = [dense_sides(model, layers, batch[i : i + 1], vectors[i : i + 1]) for i in range(len(batch))]
    for name, sides in together.items():
        for k, side in enumerate(sides):
            parts = [one[name][k] for one in alone]
            wanted = torch.stack([part.T @ part for part in parts]).sum(0)
            if not agree(side.T @ side, wanted, rounding):
                return False
    return True
