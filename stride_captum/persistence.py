"""Owns the file format of fitted methods: tensors in safetensors, everything else as JSON beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import sparse
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, TensorDataset

from .config import STRIDEConfig
from .devices import float64_device
from .errors import bad_type, bad_value
from .operators import SteeringOperators
from .restoring import bits, same_random_state
from .whole_files import write_whole

if TYPE_CHECKING:
    from .influence import InfluenceMethod

Method = TypeVar("Method", bound="InfluenceMethod")
_FORMAT = 2
_SAMPLES = 64
_DEFAULTS = ("response", "target", "normalize")


def save_method(method: InfluenceMethod, path: str | Path) -> None:
    """Write a fitted method atomically to one file (see `InfluenceMethod.save`)."""
    if method._states is None or method._fitted_on is None:
        raise bad_value("method", "be fitted before it is saved", "one that is not", "Call fit() first.")
    tensors: dict[str, Tensor] = {}
    learned = {
        name: value
        for name, value in vars(method).items()
        if name.endswith("_") and not name.startswith("_") and name not in ("query_seconds_", "peak_bytes_")
    }
    description = {
        "format": _FORMAT,
        "class": type(method).__name__,
        "settings": method._settings(),
        "defaults": {name: getattr(method, name) for name in _DEFAULTS},
        "weights": method._fitted_on[1],
        "data": data_fingerprint(method.train_dataset),
        "checkpoint_weights": method._weights,
        "states": _encode(method._states_to_save(), "states", tensors),
        "learned": _encode(learned, "learned", tensors),
    }
    metadata = {"stride_captum": json.dumps(description)}
    write_whole(Path(path), lambda name: save_file(tensors, name, metadata))


def load_method(
    cls: type[Method], path: str | Path, model: nn.Module, train_dataset: Any, options: dict[str, Any]
) -> Method:
    """Read a fitted method (see `InfluenceMethod.load`)."""
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})["stride_captum"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise bad_value("path", "name a file that `save` has written", repr(str(path))) from error
    if description["class"] != cls.__name__ or description["format"] != _FORMAT:
        raise bad_value(
            "path",
            f"hold a {cls.__name__} in format {_FORMAT}",
            f"a {description['class']} in format {description['format']}",
        )
    from .feature_store import FeatureStore  # which needs this module

    settings = dict(description["settings"])
    for name in options:
        if name in settings and name not in ("batch_size", "feature_store"):
            raise bad_value("options", "leave what has been fitted as it is", repr(name), "Fit again.")
    if "config" in settings:
        settings["config"] = STRIDEConfig.from_dict(settings["config"])
    if settings.get("feature_store"):
        settings["feature_store"] = FeatureStore(**settings["feature_store"])
    method = cls(model, train_dataset, **{**settings, **options})
    if method._fingerprint() != description["weights"]:
        raise bad_value(
            "model" if method.checkpoints is None else "checkpoints",
            "have the weights of the saved method",
            "other weights",
            "Pass the same `checkpoints`, if there were any, or fit again.",
        )
    if data_fingerprint(method.train_dataset) != description["data"]:
        raise bad_value("train_dataset", "be the data of the saved method", "other data", "Fit again.")
    device = method._work_device()
    for name, value in description["defaults"].items():
        setattr(method, name, value)
    with same_random_state():
        states = _decode(description["states"], tensors, device, cls.__module__)
        learned = _decode(description["learned"], tensors, torch.device("cpu"), cls.__module__)
    method._states = method._loaded_states(states, description["weights"].split())
    method._weights = description["checkpoint_weights"]
    method._mark_fitted(description["weights"])
    for name, value in learned.items():
        setattr(method, name, value)
    return method


def data_fingerprint(dataset: Any, sampled: bool = False) -> str:
    """SHA-256 of a data set's length and contents, and of the order in which a loader reads it.

    All of a `TensorDataset` is read; of others, 64 examples spread evenly over it: a change between these
    goes unseen.

    Args:
        dataset: Data set or loader.
        sampled: Take 64 examples of a `TensorDataset` as well.
    """
    source = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        return "unknown: an iterable data set"
    n, digest = len(source), hashlib.sha256()
    with same_random_state():
        if isinstance(dataset, DataLoader) and type(dataset.sampler) is not SequentialSampler:
            order = dataset.sampler if dataset.batch_sampler is None else dataset.batch_sampler
            digest_item(list(order), digest)
        digest.update(str(n).encode())
        if type(source) is TensorDataset and not sampled:
            digest_item(source.tensors, digest)
        else:
            for i in np.unique(np.linspace(0, n - 1, num=min(n, _SAMPLES)).astype(int)):
                digest_item(source[int(i)], digest)
    return digest.hexdigest()


def digest_item(item: Any, digest: Any) -> None:
    """Feed the content of an example or a part of one to a hash; of an unknown object only its type."""
    if isinstance(item, Tensor):
        digest.update(f"{item.dtype} {tuple(item.shape)}".encode())
        digest.update(bits(item).numpy().data)
    elif isinstance(item, Mapping):
        for key in sorted(item):
            digest.update(str(key).encode())
            digest_item(item[key], digest)
    elif isinstance(item, tuple | list):
        for part in item:
            digest_item(part, digest)
    elif hasattr(item, "__array__") or hasattr(item, "__array_interface__"):
        array = np.ascontiguousarray(item)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    elif isinstance(item, str | bytes | int | float | None):
        digest.update(repr(item).encode())
    else:  # the repr of other objects may hold their address
        digest.update(type(item).__qualname__.encode())


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree in which tensors are replaced by their names."""
    if isinstance(value, Tensor):
        # The layout is kept, because a product of a transposed matrix rounds differently.
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
        layout = value.detach().cpu().permute(order)
        tensors[name] = layout.clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "order": order}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _encode(getattr(value, f.name), f"{name}.{f.name}", tensors)
            for f in dataclasses.fields(value)
        }
        return {"dataclass": f"{type(value).__module__}:{type(value).__name__}", "fields": fields}
    if isinstance(value, SteeringOperators):
        options = {
            "n_features": value.n_features,
            "n_classes": value.n_classes,
            "n_subsets": value.n_subsets,
            "rank": value.rank,
            "encoder": value.encoder,
            "steering": value.steering,
        }
        state = _encode(dict(value.state_dict()), name, tensors)
        return {"operators": options, "state": state}
    if sparse.issparse(value):
        csr = sparse.csr_matrix(value)
        parts = {
            "data": torch.from_numpy(csr.data),
            "indices": torch.from_numpy(csr.indices),
            "indptr": torch.from_numpy(csr.indptr),
        }
        return {"csr": _encode(parts, name, tensors), "shape": list(csr.shape)}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    raise bad_type(name, "be a tensor, a dataclass, a container or a plain value to be saved", value)


def _decode(tree: Any, tensors: dict[str, Tensor], device: torch.device, trusted: str = "") -> Any:
    """The inverse of `_encode`; data classes come from this package or from the module `trusted`."""

    def again(part: Any, device: torch.device = device) -> Any:
        return _decode(part, tensors, device, trusted)

    if "tensor" in tree:
        order = tree["order"]
        # A copy, because what safetensors gives is not aligned as torch aligns.
        saved = tensors[tree["tensor"]].clone()
        saved = saved.to(float64_device(device) if saved.dtype == torch.float64 else device)
        return saved.permute([order.index(d) for d in range(len(order))])
    if "dataclass" in tree:
        module, _, name = tree["dataclass"].partition(":")
        ours = module.startswith("stride_captum.") or module == trusted
        cls = getattr(importlib.import_module(module), name, None) if ours else None
        if not dataclasses.is_dataclass(cls):
            raise bad_value("path", "hold data classes of stride_captum only", repr(tree["dataclass"]))
        return cls(**{key: again(value) for key, value in tree["fields"].items()})  # type: ignore[operator]
    if "operators" in tree:
        state = again(tree["state"])
        operators = SteeringOperators(**tree["operators"], head_weight=state.get("head_weight"))
        operators.to(next(iter(state.values())).dtype).load_state_dict(state)
        return operators.requires_grad_(False).to(device)
    if "csr" in tree:
        parts = {key: value.numpy() for key, value in again(tree["csr"], torch.device("cpu")).items()}
        return sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=tree["shape"])
    if "dict" in tree:
        return {key: again(value) for key, value in tree["dict"].items()}
    if "list" in tree:
        return [again(value) for value in tree["list"]]
    return tree["value"]
