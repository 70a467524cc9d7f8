"""Whether what two forward passes give agrees, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..system.devices import as_float64

#: Examples of the longer of two passes.
MANY = 3
#: Rounding of quantized activations, and of products in TF32, which cuDNN takes by default.
_QUANTIZED, _TF32 = 2.0**-7, 2.0**-10
_PLACES = 32


def rounding(model: nn.Module | None, *tensors: Tensor) -> float:
    """The coarsest unit of rounding in the weights of a model and in other tensors."""
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
    """Whether this is a tensor with a number in every place."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and not value.is_quantized
    )


def largest(tensor: Tensor) -> float:
    """The largest finite number of a tensor, without its sign; 0 where there is none."""
    tensor = _real(tensor)
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def are_alike(a: Tensor, b: Tensor, unit: float, scale: float | None = None) -> bool:
    """Whether two tensors are one up to rounding: they share half the digits of the format.

    Kernels for other batch sizes add in another order. That costs a few units a layer, far from half the
    digits; dropout or statistics of the batch change the first digit. Equal infinities are alike, and NaN
    in the same places.

    Args:
        a: Any shape.
        b: Another shape is not alike.
        unit: Of `rounding`; 0 for equality.
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
    """A copy of at most 32 places in each dimension that cannot count examples.

    Args:
        tensor: What a submodule gave in some pass.
        shape: What it had in the pass over `MANY` examples: dimensions of another size, or of a multiple
            of that number, stay whole.
    """
    for dim, (size, of_many) in enumerate(zip(tensor.shape, shape, strict=False)):
        if size == of_many and size % MANY and size > _PLACES:
            places = torch.linspace(0, size - 1, _PLACES, device=tensor.device).long()
            tensor = tensor.index_select(dim, places)
    return tensor.detach().clone()


def differing(a: Tensor, b: Tensor) -> list[int]:
    """Dimensions whose sizes differ; none where the number of dimensions does."""
    return [d for d in range(a.ndim) if a.shape[d] != b.shape[d]] if a.ndim == b.ndim else []
