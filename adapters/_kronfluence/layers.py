"""Layers that kronfluence can track, and how their rows are grouped by example.

kronfluence takes the first dimension of what a layer sees for the examples. Where it is not, a wrapper shows
its rows to a Linear layer as `(n, k, n_in)`:

    rows       the first dimension is the examples
    grouped    k rows an example, one example after another, as `x.flatten(0, 1)` gives them
    alone      rows in any order, which are those of one example where it is alone in its batch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...errors import bad_value
from ..gradients.traces import hooked, requiring_gradients

LAYOUTS = ("rows", "grouped", "alone")
_REMEDY = "Leave it out with `layers`."


class Grouped(nn.Module):
    """Linear layer whose rows are grouped by example, `(n, k, n_in)`.

    Args:
        layer: What it stands for.

    Attributes:
        n: Examples of the batch, to be set before each forward pass.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.n = layer, 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the network may read its weight
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer itself, `(..., n_out)`."""
        outputs: Tensor = self.layer(x.reshape(self.n, -1, x.shape[-1]))
        return outputs.reshape(*x.shape[:-1], outputs.shape[-1])


def group_rows(root: nn.Module, names: Sequence[str]) -> tuple[list[Grouped], list[str]]:
    """Wrap the named Linear layers in `Grouped`; returns the wrappers and the new names."""
    groups, inside = {}, []
    for name in names:
        layer = root.get_submodule(name)
        linear = type(layer) is nn.Linear
        if linear:
            groups[layer] = Grouped(layer)
        inside.append(f"{name}.layer" if linear else name)
    replace_modules(root, groups)
    return list(groups.values()), inside


def replace_modules(root: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules, under every name that they have."""
    for parent in list(root.modules()):
        if parent not in others.values():
            for name, child in parent._modules.items():
                if child is not None and child in others:
                    parent._modules[name] = others[child]


def tracked_layers(model: nn.Module, parameters: Collection[str], batch: ExampleBatch) -> list[str]:
    """Names of the layers that kronfluence can track: Linear and Conv2d on whose outputs the logits depend.

    Args:
        model: In eval mode.
        parameters: Names of parameters; a layer takes part if its weight is among them.
        batch: Some examples to call the model with.

    Raises:
        ValueError: A layer that is called more than once (kronfluence would keep one of the calls), a
            weight that two modules share (it would see one of them), or no layer.
    """
    names = {
        module: name
        for name, module in model.named_modules()
        if _supported(module) and f"{name}.weight".lstrip(".") in parameters
    }
    calls: Counter[nn.Module] = Counter()
    hooks = [(module, lambda module, *_: calls.update([module])) for module in names]
    with hooked(hooks), torch.no_grad():  # a backward pass may call layers again
        batch.outputs(model)
    weights = [module.weight for module in names]
    with torch.enable_grad(), requiring_gradients(weights) as chosen:
        response = batch.logits(model).sum()
        needed = torch.autograd.grad(response, chosen, allow_unused=True) if chosen else ()
    taken = [m for m, gradient in zip(names, needed, strict=True) if calls[m] and gradient is not None]
    for module in taken:
        _check_layer(model, module, names[module], calls[module])
    if not taken:
        raise bad_value("model", "have Linear or Conv2d layers with chosen weights for EKFAC", "none")
    return [names[module] for module in taken]


def _check_layer(model: nn.Module, layer: nn.Module, name: str, count: int) -> None:
    if count > 1:
        raise bad_value("model", "call each layer once for EKFAC", f"{count} calls of {name!r}", _REMEDY)
    for other, module in model.named_modules():
        if module is not layer and any(p is layer.weight for p in module._parameters.values()):
            raise bad_value(
                "model", "have no shared weights for EKFAC", f"one of {name!r} and {other!r}", _REMEDY
            )


def _supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear
