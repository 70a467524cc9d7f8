"""Per-example gradients: `J_i^T v_i` of every example of a batch.

All at once through `torch.func`, where it can run the model. One example after another by autograd, which is
right and slow, where an example has a part that is no tensor (a text), and for models that `vmap` cannot run:
recurrent layers, branches that look at values, TorchScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ...data.batch import ExampleBatch
from ...errors import bad_type, bad_value, nearest
from .traces import attributes_put_back, process_wide, requiring_gradients

Gradients = dict[str, Tensor]


def chosen_parameters(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Tensor]:
    """The parameters that gradients are taken of, by name.

    Args:
        model: The network.
        layers: Submodules whose parameters are taken; None takes all that require a gradient, or
            simply all where none does.

    Raises:
        ValueError: A layer that does not exist, or no parameters, or complex ones.
        TypeError: A name instead of a list of names.
    """
    if isinstance(layers, str):
        raise bad_type("layers", "be a list of submodule names", layers, f"Write layers=[{layers!r}].")
    if layers is None:
        every = dict(model.named_parameters())
        kept = {name: p for name, p in every.items() if p.requires_grad} or every
    else:
        if not len(layers):
            raise bad_value("layers", "name at least one submodule", "an empty list", "None takes all.")
        known = dict(model.named_modules(remove_duplicate=False))
        for layer in layers:
            if layer not in known:
                raise bad_value("layers", "name submodules of `model`", repr(layer), nearest(layer, known))
        taken = {id(p) for layer in layers for p in known[layer].parameters()}
        kept = {name: p for name, p in model.named_parameters() if id(p) in taken}
    for name, parameter in kept.items():
        if parameter.is_complex():
            remedy = "Choose others by `layers`, or freeze it."
            raise bad_value("model", "have real parameters", f"the complex {name!r}", remedy)
    tensors = {name: p.detach() for name, p in kept.items() if p.is_floating_point()}
    if not tensors:
        raise bad_value("layers" if layers else "model", "have parameters", "none")
    return tensors


def example_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: ExampleBatch, vectors: Tensor
) -> Gradients:
    """`J_i^T v_i` of every example of a batch, by parameter, `(n, *shape)` each.

    Those of parameters of several precisions have the highest of them.

    Args:
        model: In eval mode.
        parameters: Those that the gradient is taken of (`chosen_parameters`), as they are in the model.
        batch: Batch of n examples.
        vectors: v, `(n, n_classes)`.
    """
    batch = ExampleBatch.of(batch)
    if all(isinstance(part, Tensor) for _, part in batch.example_parts()) and len(batch):
        try:
            return _of_one_dtype(_at_once(model, parameters, batch, vectors))
        except Exception:
            # Not every error of vmap says so. One that is the model's own comes again below.
            pass
    return gradients_one_by_one(model, parameters, batch, vectors)


class _Logits(nn.Module):
    """Module that returns the logits of a batch, for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ExampleBatch) -> Tensor:
        return batch.logits_of(batch.call(self.model))


def _at_once(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: ExampleBatch, vectors: Tensor
) -> Gradients:
    given = batch.copied()  # the model may write to it
    one, parts = given[:1], dict(given.example_parts())
    network = _Logits(model)

    def response(parameters: dict[str, Tensor], example: dict[Any, Tensor], vector: Tensor) -> Tensor:
        alone = one.with_parts({path: part[None] for path, part in example.items()})
        logits: Tensor = functional_call(network, parameters, (alone,))
        return (logits[0].to(vector.dtype) * vector).sum()

    named = {f"model.{name}": p for name, p in parameters.items()}
    with process_wide, attributes_put_back(model), torch.no_grad():  # `grad` takes its own all the same
        found = vmap(grad(response), in_dims=(None, 0, 0))(named, parts, vectors)
    return {name: found[f"model.{name}"] for name in parameters}


def gradients_one_by_one(
    model: nn.Module, names: Iterable[str], batch: ExampleBatch, vectors: Tensor
) -> Gradients:
    """The same by plain autograd, one example after another.

    Args:
        model: In eval mode.
        names: Of the parameters; a mapping by name will do.
        batch: Batch of n examples.
        vectors: v, `(n, n_classes)`.
    """
    named = dict(model.named_parameters())
    wanted = {name: named[name] for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.enable_grad(), requiring_gradients(wanted.values()) as parameters, _backward_in_eval(model):
        for i, vector in enumerate(vectors):
            logits = batch[i : i + 1].logits(model)[0].to(vector.dtype)
            found = torch.autograd.grad((logits * vector).sum(), parameters, materialize_grads=True)
            for name, gradient in zip(rows, found, strict=True):
                rows[name].append(gradient)
    return _of_one_dtype({name: _stacked(rows[name], parameter) for name, parameter in wanted.items()})


def _of_one_dtype(gradients: Gradients) -> Gradients:
    highest = highest_dtype(gradients.values())
    return {name: gradient.to(highest) for name, gradient in gradients.items()}


def highest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the highest precision among some tensors, at least one."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _stacked(rows: list[Tensor], parameter: Tensor) -> Tensor:
    return torch.stack(rows) if rows else parameter.detach().new_zeros(0, *parameter.shape)


@contextmanager
def _backward_in_eval(model: nn.Module) -> Iterator[None]:
    """Context manager without cuDNN, whose recurrent layers have no backward pass in eval mode."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if not (recurrent and next(model.parameters()).is_cuda):
        yield
        return
    with process_wide, torch.backends.cudnn.flags(enabled=False):
        yield


def flat(gradients: Gradients) -> Tensor:
    """Concatenate the gradients of all parameters, `(n, n_parameters)`."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
