"""Working copies of models whose own tensors are unsuitable for gradients.

Gradients of half precision have three digits (bfloat16) or four, and products of them fewer: scores were off
by 10 to 35%. Tensors made under `torch.inference_mode` have no gradients at all, those with hooks may have
others. All are copied into tensors that autograd knows, in float32 or wider.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...data.containers import rebuilt, walk
from ...errors import bad_value
from .traces import hooked


def needs_copy(model: nn.Module) -> bool:
    """Whether a model's own tensors are unsuitable for gradients.

    They are in half precision, were made under `inference_mode`, or have user hooks, which may change
    gradients or (an optimizer that steps in the backward pass) the weights.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return any(_is_narrow(t) or t.is_inference() or _has_hooks(t) for t in tensors)


def wide_copy(model: nn.Module) -> nn.Module:
    """A copy in float32 where the model is narrower, which takes the inputs of the model.

    Raises:
        ValueError: The model cannot be copied.
    """
    copied = independent_copy(model)
    narrow = [t for t in [*copied.parameters(), *copied.buffers()] if _is_narrow(t)]
    if narrow and isinstance(copied, torch.jit.ScriptModule):
        raise bad_value(
            "model", "be in float32 or float64 as TorchScript", narrow[0].dtype, "Give model.float()."
        )
    for tensor in narrow:
        tensor.data = tensor.data.float()
    for module in copied.modules() if narrow else ():
        own = module is copied or len(module._parameters) > 0
        if own and not isinstance(module, torch.jit.ScriptModule):
            _cast_inputs(module)
    return copied


def independent_copy(model: nn.Module) -> nn.Module:
    """A copy of ordinary tensors, without gradients and graphs.

    Raises:
        ValueError: The model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for _, value in walk(vars(module)):  # an activation that the model keeps, as it is or in a list
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                memo[id(value)] = value.detach().clone()
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise bad_value(
            "model",
            "be copyable by copy.deepcopy, since this method works on a copy",
            f"{type(error).__name__}: {error}",
            "Keep what cannot be copied (locks, files, ...) outside of it; or, where the copy is because "
            "of half precision, give model.float().",
        ) from error


def check_copy(model: nn.Module, copied: nn.Module, batch: ExampleBatch) -> None:
    """Refuse a copy that still calls layers of the original, whose gradients would be missing.

    A function that holds the model (`self.run = lambda x: self.fc(x)`) still holds it when it is copied.

    Args:
        model: The original.
        copied: Its copy.
        batch: Some examples to call the copy with.

    Raises:
        ValueError: It does.
    """
    called: list[str] = []
    names = {m: name for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    hooks = [(module, lambda module, *_: called.append(names[module])) for module in names]
    with hooked(hooks), torch.no_grad():
        try:
            batch.outputs(copied)
        except Exception as error:
            raise bad_value(
                "model",
                "run in float32, in which this method takes gradients",
                f"{type(error).__name__}: {error}",
                "Take the casts to half precision out of `forward`.",
            ) from error
    if called:
        raise bad_value(
            "model",
            "be copyable, since this method works on a copy",
            f"a copy that calls {called[0]!r} of the original",
            "A lambda or a patched `forward` holds the original: make it a method of the module.",
        )


def widened(values: Tensor) -> Tensor:
    """Cast half precision to float32; others are unchanged."""
    return values.float() if _is_narrow(values) else values


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _cast_inputs(module: nn.Module) -> None:
    def widen(path: Any, part: Any) -> Any:
        return widened(part) if isinstance(part, Tensor) else part

    def cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return rebuilt(args, widen), rebuilt(kwargs, widen)

    module.register_forward_pre_hook(cast, with_kwargs=True)
