"""Devices: which one is meant, what a model is on, and products in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import bad_value


def existing_device(device: torch.device | str, name: str = "device") -> torch.device:
    """A device as tensors name it: with the index that "cuda" alone leaves out.

    Raises:
        ValueError: There is no such device.
    """
    try:
        # A tensor that is put there says which it is, and whether it is there at all.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"]
        if torch.cuda.is_available():
            there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise bad_value(
            name, "be a device that torch can use here", repr(str(device)), f"Here: {', '.join(there)}."
        ) from error


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer of a model is; the CPU where it has none."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever the caller allows (TF32 on CUDA has ten bits).

    Args:
        device: Where they are taken; others have nothing like it.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
