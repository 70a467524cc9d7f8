"""Comparison of tensors of two forward passes, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..system.devices import as_float64
from ..system.memory import spread_rows

#: Examples of the longer of two passes.
MANY = 3
#: Rounding of quantized activations, and of products in TF32, which cuDNN takes by default.
_QUANTIZED, _TF32 = 2.0**-7, 2.0**-10
_PLACES = 32


def rounding(model: nn.Module | None, *tensors: Tensor) -> float:
    """Largest machine epsilon among the weights of a model and other tensors."""
    modules = [] if model is None else list(model.modules())
    weights = [] if model is None else [*model.parameters(), *model.buffers()]
    floats = {(t.dtype, t.is_cuda) for t in [*weights, *tensors] if t.is_floating_point()}
    units = [torch.finfo(dtype).eps for dtype, _ in floats]
    if (torch.float32, True) in floats:
        units.append(_TF32)
    if any(hasattr(module, "_packed_params") for module in modules):
        units.append(_QUANTIZED)
    return max(units, default=torch.finfo(torch.float32).eps)


def is_plain(value: Any) -> bool:
    """Whether this is a dense tensor of numbers."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and not value.is_quantized
    )


def largest(tensor: Tensor) -> float:
    """Largest finite absolute value of a tensor; 0 if there is none."""
    tensor = _real(tensor)
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def are_alike(a: Tensor, b: Tensor, unit: float, scale: float | None = None) -> bool:
    """Whether two tensors agree to half the digits of their format.

    Kernels for other batch sizes sum in another order, which costs a few epsilons per layer, far less than
    half the digits; dropout or batch statistics change the first digit. Equal infinities agree, and NaN in
    the same places.

    Args:
        a: Any shape.
        b: A tensor of another shape does not agree.
        unit: From `rounding`; 0 for equality.
        scale: What differences are relative to; None for the largest number in `a`.
    """
    if a.shape != b.shape:
        return False
    scale = largest(a) if scale is None else scale
    a, b = _real(a), _real(b)
    apart = (a - b).abs()[(a != b) & ~(a.isnan() & b.isnan())]
    return bool((apart <= unit**0.5 * scale).all())


def _real(tensor: Tensor) -> Tensor:
    return as_float64(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def thinned(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Copy with at most 32 entries in each dimension that cannot be the batch dimension.

    Args:
        tensor: Activation of some pass.
        shape: Its shape in the pass over `MANY` examples: dimensions whose size differs, or is a multiple of
            that number, are kept whole.
    """
    for dim, (size, of_many) in enumerate(zip(tensor.shape, shape, strict=False)):
        if size == of_many and size % MANY and size > _PLACES:
            tensor = tensor.index_select(dim, spread_rows(size, _PLACES).to(tensor.device))
    return tensor.detach().clone()


def differing(a: Tensor, b: Tensor) -> list[int]:
    """Dimensions whose sizes differ; empty if the number of dimensions differs."""
    return [d for d in range(a.ndim) if a.shape[d] != b.shape[d]] if a.ndim == b.ndim else []
