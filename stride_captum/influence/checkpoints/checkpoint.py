"""Checkpoints: the formats that Captum accepts, and loading into a model."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.places import places
from ...errors import bad_type, bad_value
from .state_dicts import first_few, load_fitting
from .weight_files import model_folders, read_weights, weight_files

LoadCheckpoint = Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that knows which training examples its model has seen.

    Attributes:
        weights: State dict or path, as `checkpoints` takes them.
        seen: Places of the examples that it was trained on; None means all of them.

    >>> Checkpoint("half.pt", seen=range(0, 100, 2)).weights
    'half.pt'
    """

    weights: Any
    seen: Sequence[int] | None = None


def unseen_by(checkpoint: Any, n_train: int) -> Tensor:
    """Which training examples the model of a checkpoint has not seen, `(n_train,)` bool.

    Raises:
        TypeError: `seen` does not hold integers.
        ValueError: They are not places in the training set, or there are none.
    """
    seen = checkpoint.seen if isinstance(checkpoint, Checkpoint) else None
    unseen = torch.zeros(n_train, dtype=torch.bool, device="cpu")
    if seen is not None:
        unseen[:] = True
        found = places(seen, n_train, "seen")
        if not len(found):
            must = "hold at least one place in the training set"
            raise bad_value("seen", must, "none", "Leave this checkpoint out.")
        unseen[torch.from_numpy(found)] = False
    return unseen


def seen_by(checkpoint: Any, n_train: int) -> Tensor | None:
    """Places of the training examples that the model has seen, in order, `(n_seen,)`; None for all."""
    if not isinstance(checkpoint, Checkpoint) or checkpoint.seen is None:
        return None
    return (~unseen_by(checkpoint, n_train)).nonzero()[:, 0]


def seen_among(checkpoint: Any, keep: Tensor, n_train: int) -> Any:
    """The checkpoint of a training set of which only some examples are kept.

    Args:
        checkpoint: As given.
        keep: Places of the examples that stay, `(n_kept,)` int64.
        n_train: Number of examples before.

    Raises:
        ValueError: The model has seen none of those that stay.
    """
    if not isinstance(checkpoint, Checkpoint) or checkpoint.seen is None:
        return checkpoint
    seen = (~unseen_by(checkpoint, n_train))[keep].nonzero()[:, 0].tolist()
    if not seen:
        must = "leave at least one example that each checkpoint has seen"
        raise bad_value("indices", must, f"all that {named(checkpoint.weights)} has seen")
    return replace(checkpoint, seen=seen)


def weights_of(checkpoint: Any) -> Any:
    """Weights of a `Checkpoint`, or the checkpoint itself."""
    return checkpoint.weights if isinstance(checkpoint, Checkpoint) else checkpoint


def load_checkpoint(model: nn.Module, checkpoint: Any) -> float:
    """Load weights into a model: a state dict, or the path of a file or Hugging Face folder.

    The state dict may be nested under a key ("state_dict", "model", ...), and its keys may have the prefix of
    a wrapper ("module.", "_orig_mod.", "model."), if it is the only one in the file that fits the model. No
    code in a file is executed.

    Returns:
        The learning rate at the checkpoint for methods that use it: 1, because it is not known.

    Raises:
        ValueError: A file that is damaged or holds more than weights, or weights of another model.
        TypeError: Neither a state dict nor a path.
    """
    if isinstance(checkpoint, Mapping):
        content: Any = checkpoint
    elif isinstance(checkpoint, str | os.PathLike):
        content = read_weights(Path(checkpoint))
    else:
        raise bad_type("checkpoint", "be a state dict or a path", checkpoint)
    name = named(checkpoint)
    if not isinstance(content, Mapping):
        raise bad_value("checkpoint", "hold a state dict", f"{name}, which holds a {type(content).__name__}")
    load_fitting(model, content, name)
    return 1.0


def checkpoint_list(checkpoints: str | os.PathLike[str] | Iterable[Any]) -> list[Any]:
    """Checkpoints as Captum takes them: a list, an iterator, or the path of a folder, in natural order.

    Of a folder these are its files of weights, or its Hugging Face folders (`checkpoint-500`, ...).

    Raises:
        ValueError: A path that does not exist, a folder with files and with folders of weights, or nothing.
        TypeError: A single state dict, or something else that is no list.
    """
    if isinstance(checkpoints, str | os.PathLike):
        path = Path(checkpoints)
        if not path.exists():
            raise bad_value("checkpoints", "name a file or folder that exists", repr(str(path)))
        return _in_folder(path) if path.is_dir() else [str(path)]
    if isinstance(checkpoints, Mapping):
        raise bad_type("checkpoints", "be a list of state dicts or paths", checkpoints, "Write [state_dict].")
    if not isinstance(checkpoints, Iterable) or isinstance(checkpoints, Tensor | nn.Module):
        raise bad_type("checkpoints", "be a list of state dicts or paths, or a folder", checkpoints)
    every = list(checkpoints)
    if not every:
        raise bad_value("checkpoints", "hold at least one checkpoint", "none", "Leave it out to use `model`.")
    return every


def along_training(checkpoints: str | os.PathLike[str] | Iterable[Any]) -> list[Any]:
    """The checkpoints of a training that are worth averaging over: few, and more of them early than late.

    A network changes most at its start, so late checkpoints say almost the same as the last one. Of
    checkpoints in the order of the training, those at places 1, 2, 3, 5, 8, 12, 20, 30, 50, 80, ... and the
    last are taken. If you choose when to save, save after these epochs.

    Args:
        checkpoints: A folder, whose files are put in natural order, or a list in the order of the training.

    >>> along_training([f"epoch-{i}.pt" for i in range(1, 16)])
    ['epoch-1.pt', 'epoch-2.pt', 'epoch-3.pt', 'epoch-5.pt', 'epoch-8.pt', 'epoch-12.pt', 'epoch-15.pt']
    """
    every = checkpoint_list(checkpoints)
    return [every[place - 1] for place in log_positions(len(every))]


def log_positions(n: int) -> list[int]:
    """1, 2, 3, 5, 8, 12, 20, 30, 50, 80, 120, ... below n, and n.

    >>> log_positions(20)
    [1, 2, 3, 5, 8, 12, 20]
    """
    steps = [1, 2, 3, 5, 8, *(factor * 10**power for power in range(6) for factor in (12, 20, 30, 50, 80))]
    return [*(step for step in steps if step < n), n]


def apart_from(model: nn.Module, checkpoints: Sequence[Any]) -> list[Any]:
    """Checkpoints whose tensors are not those of the model, which loading another checkpoint would overwrite.

    `[model.state_dict()]` holds the parameters themselves. What shares memory with the model is copied.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}

    def copied(value: Any) -> Any:
        if isinstance(value, Checkpoint):
            return replace(value, weights=copied(value.weights))
        if isinstance(value, Tensor):
            return value.detach().clone() if value.untyped_storage().data_ptr() in own else value
        if isinstance(value, dict):
            parts = {key: copied(part) for key, part in value.items()}
            if any(parts[key] is not part for key, part in value.items()):
                value = copy.copy(value)  # with the attributes that a state dict has
                value.update(parts)
        return value

    return [copied(checkpoint) for checkpoint in checkpoints]


def _in_folder(path: Path) -> list[str]:
    files, folders = weight_files(path), model_folders(path)
    if files and folders:
        raise bad_value(
            "checkpoints",
            "name a folder with files of weights or with folders of them",
            f"{str(path)!r} with both ({files[0].name}, {folders[0].name}, ...)",
            "Give the list of those that are wanted.",
        )
    if not files and not folders:
        found = first_few(sorted(entry.name for entry in path.iterdir()))
        raise bad_value(
            "checkpoints",
            "hold at least one checkpoint",
            f"none in {str(path)!r}" + (f", which has {found}" if found else ""),
            "Leave it out to use `model`.",
        )
    return [str(file) for file in files or folders]


def named(checkpoint: Any) -> str:
    """Name of a checkpoint in errors: its path or type."""
    if isinstance(checkpoint, str | os.PathLike):
        return repr(str(checkpoint))
    return "a state dict" if isinstance(checkpoint, Mapping) else type(checkpoint).__name__


def warn_of_equal(checkpoints: Sequence[Any], fingerprints: Sequence[str]) -> None:
    """Warn if two paths have the same weights: they count twice, or the load function reads another file.

    Args:
        checkpoints: As the user gave them; state dicts may be equal.
        fingerprints: `weights_fingerprint` of the model after each was loaded.
    """
    seen: dict[str, Any] = {}
    for checkpoint, fingerprint in zip(map(weights_of, checkpoints), fingerprints, strict=True):
        if not isinstance(checkpoint, str | os.PathLike):
            continue
        if fingerprint in seen and str(seen[fingerprint]) != str(checkpoint):
            warnings.warn(
                f"The checkpoints {named(seen[fingerprint])} and {named(checkpoint)} have the same weights, "
                "which count twice in the mean. Leave one of them out.",
                stacklevel=3,
            )
        seen.setdefault(fingerprint, checkpoint)
