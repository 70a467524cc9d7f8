"""Devices by name, refused where they are not there."""

from __future__ import annotations

import torch

from ..doctor import accelerators
from ..errors import bad_value


def found_device(name: torch.device | str) -> torch.device:
    """The device of a name.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps" or a device.

    Raises:
        ValueError: It is not a device that models can be trained on, or this machine has none.

    >>> found_device("cpu")
    device(type='cpu')
    """
    there = ["cpu", *accelerators()]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise bad_value("device", "be 'cpu', 'cuda', 'cuda:1' or 'mps'", repr(name)) from error
    kinds = {known.partition(":")[0] for known in there}
    named = ":" in str(device)
    if str(device) not in there and (named or device.type not in kinds):
        remedy = "This build of torch sees no other." if len(there) == 1 else None
        raise bad_value("device", "be one that is here: " + ", ".join(there), repr(str(name)), remedy)
    if device.type == "cuda" and not named:
        return torch.device("cuda", torch.cuda.current_device())
    return device
