"""Owns per-example gradients: `J_i^T v_i` of every example of a batch through `torch.func`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..batch import ExampleBatch
from ..errors import bad_value, nearest

Gradients = dict[str, Tensor]


def chosen_parameters(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters that gradients are taken of, by name.

    Args:
        model: The network.
        layers: Submodules whose parameters are taken; None takes all that require a gradient, or
            simply all where none does.

    Raises:
        ValueError: A layer that does not exist, or no parameters.
    """
    if layers is None:
        every = dict(model.named_parameters())
        kept = {name: p for name, p in every.items() if p.requires_grad} or every
    else:
        known = dict(model.named_modules(remove_duplicate=False))
        for layer in layers:
            if layer not in known:
                raise bad_value("layers", "name submodules of `model`", repr(layer), nearest(layer, known))
        taken = {id(p) for layer in layers for p in known[layer].parameters()}
        kept = {name: p for name, p in model.named_parameters() if id(p) in taken}
    tensors = {name: p.detach() for name, p in kept.items() if p.is_floating_point()}
    if not tensors:
        raise bad_value("layers" if layers else "model", "have parameters", "none")
    return tensors


def example_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: ExampleBatch, vectors: Tensor
) -> Gradients:
    """`J_i^T v_i` of every example of a batch, by parameter, `(n, *shape)` each.

    Args:
        model: In eval mode.
        parameters: Those that the gradient is taken of (`chosen_parameters`).
        batch: Batch of n examples.
        vectors: v, `(n, n_classes)`.

    Raises:
        ValueError: A model that `torch.func.vmap` cannot run.
    """
    one = batch.copied()[:1]
    tensors = {path: part for path, part in batch.copied().example_parts() if isinstance(part, Tensor)}

    def response(parameters: dict[str, Tensor], example: dict[Any, Tensor], vector: Tensor) -> Tensor:
        alone = one.with_parts({path: part[None] for path, part in example.items()})
        outputs = alone.call(partial(_call, model, parameters))
        return (alone.logits_of(outputs)[0] * vector).sum()

    try:
        with torch.no_grad():  # of the others; `grad` takes its own all the same
            gradients: Gradients = vmap(grad(response), in_dims=(None, 0, 0))(
                dict(parameters), tensors, vectors
            )
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise bad_value(
            "model", "run under torch.func.vmap, which per-example gradients need", f"the error: {error}"
        ) from error
    return gradients


def _call(model: nn.Module, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, parameters, args, kwargs)


def flat(gradients: Gradients) -> Tensor:
    """All parameters side by side, `(n, n_parameters)`."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
