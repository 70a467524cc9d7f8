"""Owns the promise that the caller's model and random state come back bit for bit as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Value = TypeVar("Value")


@contextmanager
def same_random_state(devices: Sequence[int] = ()) -> Iterator[None]:
    """Draw random numbers without a trace in the global states of torch, numpy and Python.

    Args:
        devices: CUDA devices whose states are kept as well.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def untouched(model: nn.Module, *, weights: bool = False) -> Iterator[nn.Module]:
    """Evaluate a model without leaving a trace, also after an exception.

    Inside, every module is in eval mode and no parameter has a gradient. Afterwards training modes,
    `requires_grad`, gradients, buffers (and parameters, with `weights`) and the random states of torch,
    numpy and Python are what they were; a parameter or buffer that was replaced is put back.

    Args:
        model: The caller's model.
        weights: Whether other weights will be loaded into it meanwhile, so that parameters must be
            copied and put back.
    """
    modules = [(m, m.training, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    places = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    changing = [*model.buffers(), *(model.parameters() if weights else ())]
    copies = [(tensor, tensor.detach().clone()) for tensor in changing]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with same_random_state(devices):
            for parameter, _, _ in grads:
                parameter.grad = None
            model.eval()
            yield model
    finally:
        for module, mode, parameters, buffers in modules:
            module.training = mode
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
        for tensor, place in places:
            if tensor.data_ptr() != place.data_ptr() or tensor.dtype != place.dtype:
                tensor.data = place
        with torch.no_grad():
            for tensor, copy in copies:
                if not torch.equal(tensor.detach(), copy):
                    tensor.copy_(copy)
        for parameter, requires_grad, grad in grads:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _put_back(now: dict[str, Value], before: dict[str, Value]) -> None:
    if len(now) != len(before) or any(now.get(name) is not value for name, value in before.items()):
        now.clear()
        now.update(before)


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
    """Changes whenever a parameter or buffer is replaced or written to, in practice also through `.data`.

    Reads the weights once, on their device. A change that keeps the addresses, torch's own counters and
    the sum of the bits and of the values of every tensor goes unseen.
    """
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()]]
    places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
    sums = [_sums(t) for t in tensors if t.numel()]
    return (*places, tuple(torch.stack(sums).reshape(-1).tolist()) if sums else ())


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1).contiguous().view(_SAME_SIZE[tensor.element_size()])
    total = flat.sum(dtype=torch.int64)
    if not tensor.is_floating_point():
        return torch.stack([total, total]).cpu()
    value = tensor.sum(dtype=torch.float32)
    return torch.stack([total, value.view(torch.int32).long()]).cpu()
