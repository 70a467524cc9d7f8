"""Owns checkpoints: the list that a caller may give in Captum's ways, and how one is loaded into a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import bad_type, bad_value

LoadCheckpoint = Callable[[nn.Module, Any], float]


def load_checkpoint(model: nn.Module, checkpoint: Any) -> float:
    """Load weights into a model: a state dict, or the path of one saved by torch or safetensors.

    Returns:
        The learning rate at the checkpoint for methods that use it; 1 where it is not known.
    """
    if isinstance(checkpoint, Mapping):
        state = checkpoint
    elif str(checkpoint).endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(checkpoint)
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise bad_type("checkpoint", "hold a state dict", state)
    for key in ("state_dict", "model_state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    model.load_state_dict(state)
    return 1.0


def checkpoint_list(checkpoints: str | Path | Iterable[Any]) -> list[Any]:
    """Checkpoints as Captum takes them: a list, an iterator, or the path of a folder, in natural order.

    Raises:
        ValueError: A path that does not exist, or nothing at all.
        TypeError: A single state dict.
    """
    if isinstance(checkpoints, str | Path):
        path = Path(checkpoints)
        if not path.exists():
            raise bad_value("checkpoints", "name a file or folder that exists", repr(str(path)))
        found = [str(file) for file in path.iterdir() if file.is_file()] if path.is_dir() else [str(path)]
        checkpoints = sorted(found, key=lambda file: re.sub(r"\d+", lambda n: n[0].zfill(20), file))
    elif isinstance(checkpoints, Mapping):
        raise bad_type("checkpoints", "be a list of state dicts or paths", checkpoints, "Write [state_dict].")
    every = list(checkpoints)
    if not every:
        raise bad_value("checkpoints", "hold at least one checkpoint", "none", "Leave it out to use `model`.")
    return every
