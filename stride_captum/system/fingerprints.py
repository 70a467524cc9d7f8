"""Fingerprints of weights, and the bytes of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, `(n_bytes,)` uint8 on the CPU."""
    return tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name, dtype, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits(tensor).numpy().data)
    return digest.hexdigest()


def weights_version(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Value that changes if a parameter or buffer is replaced or written to, even through `.data`.

    Reads the weights once, on their device. A change is missed only if it keeps the addresses, torch's
    version counters, and the sums of bits and of values of every tensor.
    """
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()]]
    places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    return (*places, weights_sums(model))


def weights_sums(model: nn.Module) -> tuple[int, ...]:
    """The sums of bits and of values of every parameter and buffer, read once on their device."""
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()]]
    sums: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.numel():
            sums.setdefault(t.device, []).append(_sums(t))
    read = [
        torch.stack(found).reshape(-1).tolist() for found in sums.values()
    ]  # one synchronization per device
    return tuple(number for numbers in read for number in numbers)


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).contiguous().view(_SAME_SIZE[tensor.element_size()])
    total = flat.sum(dtype=torch.int64)
    if not tensor.is_floating_point():
        return torch.stack([total, total])
    value = tensor.sum(dtype=torch.float32)
    return torch.stack([total, value.view(torch.int32).long()])
