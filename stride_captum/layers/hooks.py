"""Forward hooks on named submodules for one block of code, removed even if it raises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from ..data.batch import ExampleBatch
from ..errors import bad_type, bad_value
from .pooling import Place

See = Callable[[Place, list[Any]], None]

#: Modules with several inputs that weights are applied to, by the names of these inputs.
_SEVERAL_INPUTS = {
    nn.Bilinear: ("input1", "input2"),
    nn.MultiheadAttention: ("query", "key", "value"),
}


@contextmanager
def watching(
    model: nn.Module, places: Iterable[Place], see: See
) -> Iterator[Callable[[ExampleBatch], Tensor]]:
    """Context manager that observes places during forward passes; its hooks are removed on exit.

    Code compiled by `torch.compile` runs uncompiled inside, since compiled code may skip hooks. Forward
    passes of other threads are not observed.

    Args:
        model: The network, in eval mode.
        places: Which submodules, and on which side.
        see: Called with a place and its tensors each time the submodule runs: the first floating-point input
            (all inputs of Bilinear and MultiheadAttention), or the output.

    Yields:
        `forward(batch) -> outputs`; it may overwrite the tensors of the batch.

    Raises:
        ValueError: The submodules of the model cannot be observed.
    """
    _check_one_process_runs_it(model)
    modules = dict(model.named_modules(remove_duplicate=False))

    thread = get_ident()  # other threads may run the same model

    def catch_input(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if get_ident() == thread:
                see(place, _given(module, args, kwargs or {}))

        return hook

    def catch_output(place: Place) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if get_ident() == thread:
                see(place, [output])

        return hook

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for place in places:
            module = modules[place[0]]
            if place[1]:
                handle = module.register_forward_pre_hook(catch_input(place), with_kwargs=True)
            else:
                handle = module.register_forward_hook(catch_output(place))
            stack.callback(handle.remove)
        yield lambda batch: batch.outputs_of_these(model)


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Inputs of a module that are features, without repetitions."""
    for kind, names in _SEVERAL_INPUTS.items():
        if isinstance(module, kind):
            given = [*args[: len(names)], *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
            return [value for i, value in enumerate(given) if all(value is not v for v in given[:i])]
    values = [*args, *kwargs.values()]
    return [next((value for value in values if _is_float(value)), values[0] if values else None)]


def _is_float(value: Any) -> bool:
    if isinstance(value, PackedSequence):
        return value.data.is_floating_point()
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context manager that runs compiled code as plain Python."""
    # If code is compiled, dynamo has been imported; importing it here would take seconds.
    if "torch._dynamo.eval_frame" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def scripted_parts(model: nn.Module) -> dict[str, str]:
    """Submodules that take no hooks, by name, with the name of the scripted module that contains them."""
    parts: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):
            parent = name.rpartition(".")[0]
            parts[name] = parts.get(parent, name) if name else ""
    return parts


def check_weights_exist(model: nn.Module) -> None:
    """Refuse lazy modules that are not initialized.

    Raises:
        ValueError: A parameter or buffer is uninitialized.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise bad_value(
                "model",
                "be initialized",
                f"a lazy module without weights, {name.rpartition('.')[0]!r}",
                "Run one batch through the model, then train it.",
            )


def _check_one_process_runs_it(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise bad_type(
                "model",
                "run on one device",
                module,
                "Pass its `.module`: hooks would mix the batches of the threads of DataParallel.",
            )
        if hasattr(module, "_orig_mod") and not hasattr(torch.compiler, "set_stance"):
            raise bad_type(
                "model", "be uncompiled with this version of torch", module, "Pass its `._orig_mod`."
            )
