"""Files of weights: which files of a folder are some, and how one is read without running code from it."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ...errors import bad_value

#: The files of a Hugging Face model, the best one first: they all hold the same weights.
_HUGGING_FACE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
#: What trainers leave beside weights, by name.
_BESIDE = re.compile(
    r"\..*|readme|license|events\.out\.tfevents.*|tf_model\.h5|flax_model\.msgpack|model\.onnx"
    r"|(optimizer|optim|scheduler|lr_scheduler|scaler|rng_state|random_states|training_args)[\d_.-]*"
    r"\.(pt|pth|bin|pkl)"
    r"|.*\.(md|txt|rst|json|jsonl|ya?ml|toml|cfg|ini|csv|tsv|log|py|ipynb|sh|html|png|jpe?g|svg|pdf|part|lock|tmp)",
    re.IGNORECASE,
)
_MUST = "be a file of weights, as torch.save(model.state_dict(), path) writes it"
_DAMAGED = "Save it again, or leave it out."


def natural_order(path: Path) -> str:
    """Key that puts epoch_2 before epoch_10."""
    return re.sub(r"\d+", lambda n: n[0].zfill(20), path.name)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, in natural order, without what trainers leave beside them.

    A model in several files is its index; a Hugging Face model in several formats is one file.
    """
    files = [path for path in folder.iterdir() if path.is_file()]
    indices = {path.name for path in files if path.name.endswith(".index.json")}
    best = next((name for name in _HUGGING_FACE if any(path.name == name for path in files)), None)

    def wanted(path: Path) -> bool:
        if path.name in _HUGGING_FACE:
            return path.name == best
        if path.name in indices:
            return True
        return not (_BESIDE.fullmatch(path.name) or (indices and _SHARD.fullmatch(path.name)))

    return sorted(filter(wanted, files), key=natural_order)


def model_folders(folder: Path) -> list[Path]:
    """The folders in a folder that hold a Hugging Face model each, in natural order."""
    found = [
        path
        for path in folder.iterdir()
        if path.is_dir() and any((path / name).is_file() for name in _HUGGING_FACE)
    ]
    return sorted(found, key=natural_order)


def files_like(path: Path) -> list[Path]:
    """Other files beside a file of weights that hold the same names: probably checkpoints of one training.

    At most 50 of them are looked at, and no tensor is read.
    """
    keys = _keys(path)
    others = [other for other in weight_files(path.parent) if other.resolve() != path.resolve()]
    return [other for other in others[:50] if keys is not None and _keys(other) == keys]


def _keys(path: Path) -> frozenset[str] | None:
    """The names of the tensors in a file; None if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return frozenset(file.keys())
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a file of another kind raises almost anything
        return None
    return frozenset(map(str, content)) if isinstance(content, Mapping) else None


def read_weights(path: Path) -> Any:
    """What a file of weights holds, with its tensors on the CPU; nothing in it is run.

    Args:
        path: A file of torch or safetensors, the index of a model in several files, or a folder with one
            of these.

    Raises:
        ValueError: There is none, it is damaged, or it holds Python objects beside tensors.
    """
    if path.is_dir():
        files = weight_files(path)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise bad_value("checkpoint", f"hold one file of weights in the folder {str(path)!r}", names)
        path = files[0]
    if not path.exists():
        raise bad_value("checkpoint", "name a file or folder that exists", repr(str(path)))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise _refused(path, "which is empty", _DAMAGED)
    if path.suffix == ".safetensors" or head[8:] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _refused(path, "which is cut off or damaged", _DAMAGED) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise _refused(path, *_what_is_wrong(head, error)) from error


def _what_is_wrong(head: bytes, error: Exception) -> tuple[str, str]:
    """Why torch has not read a file that begins so, and the remedy."""
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        return "which is none", "Leave it out."
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
        found = re.search(r"Unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))
        return (
            f"which holds Python objects{f' ({found[1]})' if found else ''} beside tensors",
            "Save `model.state_dict()` alone, or give a `checkpoints_load_func` that unpickles the file if "
            "you trust it.",
        )
    return "which is cut off or damaged", _DAMAGED


def _read_shards(index: Path) -> dict[str, Any]:
    """The weights of a model in several files."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(index, "an index without a whole 'weight_map'", _DAMAGED) from error
    if outside:
        raise _refused(index, f"an index that names {outside[0]!r} outside its folder", None)
    state: dict[str, Any] = {}
    for name in names:
        part = read_weights(index.with_name(name))
        if not isinstance(part, Mapping):
            raise _refused(index.with_name(name), "which is none", _DAMAGED)
        state.update(part)
    return state


def _refused(path: Path, what: str, remedy: str | None) -> ValueError:
    return bad_value("checkpoint", _MUST, f"{str(path)!r}, {what}", remedy)
