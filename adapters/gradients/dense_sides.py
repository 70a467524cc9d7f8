"""The two sides of the gradient of a dense layer's weight: its inputs and its output gradients.

For `y = W a`, the gradient of an example is the sum of `b a^T` over its positions, b the gradient of y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...losses.weights import times_root
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


def mean_weights(weights: Tensor) -> Tensor:
    """Mean weight of the positions of each example that count, `(n,)`; 0 where none does.

    Args:
        weights: Of the positions, `(n, P)`.
    """
    counted, most = weights > 0, weights.amax(1)
    below = (most[:, None] - weights) * counted  # exactly 0 where all of an example are the same
    return most - below.sum(1) / counted.sum(1).clamp_min(1)


def all_weigh_1(weights: Tensor | None) -> bool:
    """Whether every position has weight 1, so that `weights_of_rows` gives none.

    Args:
        weights: Of the positions, `(n, P)`; None where examples have one, whose weight is theirs.
    """
    return weights is None or bool((weights == 1).all())


def weights_of_rows(
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    batch: ExampleBatch,
    weights: Tensor | None,
    n_outputs: int,
) -> dict[str, Tensor]:
    """Weights of the rows of inputs in a mean over positions: those of the positions.

    A position of weight 0, as one without a label, has weight 0 where outputs with a weight do not read it,
    as padding. Where they do, as a prompt, it has the mean of the weights in its example. So has every row of
    a layer with another number of rows.

    Args:
        model: As for `dense_sides`.
        layers: As for `dense_sides`; their rows are by example (`order_of_rows`), or n is 1.
        batch: As for `dense_sides`.
        weights: Of the positions, `(n, P)`, in the order of the outputs; None where examples have one.
        n_outputs: Of an example, in all of its positions.

    Returns:
        `(n_rows,)` by name of the weight; none where all rows have weight 1.
    """
    if weights is None or all_weigh_1(weights) or not layers:
        return {}
    means, weighs = mean_weights(weights), weights > 0
    n, each = len(weights), torch.where(weighs, weights, means[:, None])
    # Entries of all kinds: that their products with the Jacobian vanish by chance is out of the question.
    some = torch.arange(1, n * n_outputs + 1, dtype=torch.float64, device="cpu").cos().reshape(n, -1)
    every = some.to(next(model.parameters()))
    with torch.enable_grad():
        labeled = dense_sides(model, layers, batch, times_root(every, weights))
        read_by_any = dense_sides(model, layers, batch, every)
    found = {}
    for name, (_, b) in labeled.items():
        if len(b) == weights.numel():
            # Rows without a label may be in another order than the labels.
            unlabeled = (read_by_any[name][1] != 0).any(1) | ~weighs.flatten().to(b.device)
            found[name] = each.flatten().to(b) * ((b != 0).any(1) | ~unlabeled)
        else:
            found[name] = means.to(b).repeat_interleave(len(b) // n)
    return found


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def order_of_rows(
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    batch: ExampleBatch,
    vectors: Tensor,
    rounding: float,
) -> str:
    """How the rows of the sides of a batch belong to its examples.

    Args:
        model: As for `dense_sides`.
        layers: As for `dense_sides`.
        batch: A few examples.
        vectors: As for `dense_sides`.
        rounding: Of `check_model`.

    Returns:
        "by example": one example after another; "any": each row belongs to one example, so that products of
        rows add up; "shared": they do not, as where a layer reads what all examples share (a learned query).
    """
    together = dense_sides(model, layers, batch, vectors)
    alone = [dense_sides(model, layers, batch[i : i + 1], vectors[i : i + 1]) for i in range(len(batch))]
    order = "by example"
    for name, sides in together.items():
        for k, side in enumerate(sides):
            parts = [one[name][k] for one in alone]
            if not agree(side, torch.cat(parts), rounding):
                order = "any"
            wanted = torch.stack([part.T @ part for part in parts]).sum(0)
            if not agree(side.T @ side, wanted, rounding):
                return "shared"
    return order
