"""Restoration of the caller's model, bit for bit, on any thread and after any exception.

Other code that reads the model in the meantime sees it in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .locks import exclusive, members
from .random_states import draws_put_back

Value = TypeVar("Value")


@contextmanager
def preserve_state(model: nn.Module, *, weights: bool = False) -> Iterator[nn.Module]:
    """Context manager that restores everything a session changes in a model, also after an exception.

    Inside, every module is in eval mode, no parameter has a gradient, and no other thread uses the model
    (`exclusive`). On exit, training modes, `requires_grad`, gradients, buffers (and parameters, with
    `weights`), random states, and replaced parameters or buffers are restored.

    Args:
        model: The caller's model.
        weights: Whether other weights will be loaded, so that parameters must be copied and restored.
    """
    with exclusive(model), ExitStack() as undo:
        modules, parameters, buffers = members(model)
        devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
        undo.enter_context(draws_put_back(devices))
        # Steps are undone in reverse order, each one even if another fails.
        changing = [*buffers, *(parameters if weights else ())]
        held = [m for module in modules for m in (module._parameters, module._buffers) if isinstance(m, dict)]
        for function, before in (
            (_restore_gradient, [(p, p.requires_grad, p.grad) for p in parameters]),
            (_restore_values, _copies(changing)),
            (_restore_storage, [(tensor, tensor.data) for tensor in [*parameters, *buffers]]),
            (_put_back, [(members, dict(members)) for members in held]),
            (_restore_mode, [(module, module.training) for module in modules]),
        ):
            undo.callback(_for_each, function, before)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = None
        model.eval()
        yield model


def _for_each(function: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    """Call a function for all items; the first error is raised after the last call."""
    failed: Exception | None = None
    for item in items:
        try:
            function(*item)
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _restore_mode(module: nn.Module, training: bool) -> None:
    if module.training != training:
        module.training = training


def _put_back(now: dict[str, Value], before: dict[str, Value]) -> None:
    if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
        now.clear()
        now.update(before)


def _restore_storage(tensor: Tensor, place: Tensor) -> None:
    if tensor.data_ptr() != place.data_ptr() or tensor.dtype != place.dtype:
        tensor.data = place


def _copies(tensors: Sequence[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Tensors with their copies, by device."""
    found = []
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        found.append((here, [tensor.detach().clone() for tensor in here]))
    return found


def _restore_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Restore the tensors that changed; all are on one device, which is synchronized once."""
    pairs = list(zip(tensors, values, strict=True))
    same = torch.stack([(tensor.detach() == before).all() for tensor, before in pairs]).tolist()
    _for_each(_copy_into, [pair for pair, unchanged in zip(pairs, same, strict=True) if not unchanged])


def _copy_into(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)


def _restore_gradient(parameter: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)
    if parameter.grad is not gradient:
        parameter.grad = gradient
