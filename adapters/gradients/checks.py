"""Checks, on a few examples, that per-example gradients of a model are valid."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...data.batch import ExampleBatch
from ...errors import bad_value
from .traces import hooked, requiring_gradients

#: Examples that are looked at.
PROBE = 3


def probe_of(batch: ExampleBatch) -> ExampleBatch:
    """A few examples of a batch, repeated if it has fewer.

    Raises:
        ValueError: It has none.
    """
    if not len(batch):
        raise bad_value("train_dataset", "start with a batch that holds examples", "an empty one")
    return batch[torch.arange(PROBE) % len(batch)]


def check_layers(model: nn.Module) -> None:
    """Refuse quantized layers, which do not propagate gradients.

    Raises:
        ValueError: The model has some.
    """
    for name, module in model.named_modules():
        home = type(module).__module__
        if home.startswith("torch.") and ".quantized" in home:
            raise bad_value(
                "model",
                "be differentiable",
                f"the quantized layer {name!r}",
                "Give the model as it was before it was quantized.",
            )


def agree(found: Tensor, wanted: Tensor, rounding: float) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest number."""
    if found.shape != wanted.shape:
        return False
    return bool(((found.to(wanted) - wanted).abs() <= rounding * wanted.abs().max()).all())


def check_model(model: nn.Module, names: Iterable[str], probe: ExampleBatch) -> float:
    """Refuse a model whose per-example gradients would be wrong.

    Args:
        model: In eval mode.
        names: Of the parameters that gradients are taken of.
        probe: Some examples (`probe_of`).

    Returns:
        What rounding may change, relative to the largest number: of the least precise dtype inside.

    Raises:
        ValueError: Examples meet in a batch, or the logits do not depend on the parameters.
    """
    seen: list[Tensor] = []
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    with torch.no_grad():
        with hooked((module, lambda *found: seen.append(found[-1])) for module in modules):
            together = probe.logits(model)
        alone = _logits_alone(model, probe)
    floats = [t for t in [together, *seen] if isinstance(t, Tensor) and t.is_floating_point()]
    rounding = max(torch.finfo(t.dtype).eps for t in floats) ** 0.5
    finite = bool(torch.isfinite(together).all() and torch.isfinite(alone).all())
    if finite and not agree(alone, together, rounding):
        raise bad_value(
            "model",
            "give an example the same logits alone as in a batch, which per-example gradients need",
            f"logits that differ by {float((together - alone).abs().max()):.1e}",
            "Look for BatchNorm without running statistics, for dropout that eval() does not turn off, and "
            "for other random numbers.",
        )
    _check_dependence(model, names, probe)
    return float(rounding)


def _logits_alone(model: nn.Module, probe: ExampleBatch) -> Tensor:
    pieces = [probe[i : i + 1] for i in range(len(probe))]
    try:
        return torch.cat([piece.logits(model) for piece in pieces])
    except Exception as error:
        raise bad_value(
            "model",
            "take one example alone, which per-example gradients need",
            f"{type(error).__name__}: {error}",
        ) from error


def _check_dependence(model: nn.Module, names: Iterable[str], probe: ExampleBatch) -> None:
    """Refuse logits without a gradient, whose scores would all be 0."""
    named = dict(model.named_parameters())
    chosen = {name: named[name] for name in names}
    with torch.enable_grad(), requiring_gradients(chosen.values()) as parameters:
        logits = probe.logits(model)
        found: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if logits.requires_grad:
            found = _gradients(logits, parameters)
        if any(gradient is None for gradient in found):
            _check_backward(model, dict(zip(chosen, found, strict=True)), probe)
    if all(gradient is None for gradient in found):
        raise bad_value(
            "model",
            "give logits that depend on the parameters that are chosen",
            "logits without a gradient with respect to any of them",
            "Look for torch.no_grad or detach in `forward`, for a Batch(forward=...) that calls another "
            "model, and at `layers`.",
        )


def _gradients(logits: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        raise bad_value(
            "model",
            "be differentiable by autograd with respect to the parameters that are chosen",
            f"the error: {error}",
            "Choose others by `layers`, or change `forward`.",
        ) from error


def _check_backward(model: nn.Module, found: dict[str, Tensor | None], probe: ExampleBatch) -> None:
    """Refuse parameters that get a gradient from `backward` but not from `torch.autograd.grad`."""
    logits = probe.logits(model)
    try:
        if logits.requires_grad:
            logits.sum().backward()
        missed = [n for n, p in model.named_parameters() if p.grad is not None and found.get(n, p) is None]
    finally:
        model.zero_grad(set_to_none=True)
    if missed:
        raise bad_value(
            "model",
            "give gradients to torch.autograd.grad",
            f"none for {missed[0]!r}, which backward() has one for",
            "Turn gradient checkpointing off, or write checkpoint(..., use_reentrant=False).",
        )


def check_gradients(sides: Tensor, start: int) -> None:
    """Refuse training examples whose gradients are not finite.

    Args:
        sides: Gradients of some training examples, `(n, ...)`.
        start: Place of the first in the training set.

    Raises:
        ValueError: NaN or infinity.
    """
    rows = sides.flatten(1)
    if bool(torch.isfinite(rows.sum(1)).all()):  # one look at each number, not three
        return
    finite = torch.isfinite(rows).all(1)
    if not bool(finite.all()):
        raise bad_value(
            "train_dataset",
            "give finite gradients",
            f"NaN or infinity for example {start + int((~finite).nonzero()[0])}",
            "Look in `model` for the root or the norm of 0, or for an overflow.",
        )
