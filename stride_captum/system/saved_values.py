"""Serialization: tensors by name, everything else as JSON, dataclasses by registered names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from scipy import sparse
from torch import Tensor

from ..errors import bad_type, bad_value
from .devices import float64_device

Class = TypeVar("Class", bound=type)
_CLASSES: dict[str, type] = {}
_NAMES: dict[type, str] = {}


def saved_as(name: str) -> Callable[[Class], Class]:
    """Class decorator that registers a class for saved methods.

    The class is a dataclass, all fields of which are saved, or has `to_saved() -> dict` and its inverse, the
    class method `from_saved(**parts)`.

    A file holds the name and not the module, so that classes can move, and reading it imports nothing: the
    module that registers the class must have been imported before.

    Args:
        name: Short and permanent; outside this package it starts with the name of yours.

    Raises:
        ValueError: Another class has the name.
        TypeError: The class is neither of the two.

    >>> @saved_as("example.pair")
    ... @dataclasses.dataclass
    ... class Pair:
    ...     left: Tensor
    ...     right: Tensor
    """

    def register(cls: Class) -> Class:
        if not dataclasses.is_dataclass(cls) and not hasattr(cls, "to_saved"):
            raise bad_type("cls", "be a dataclass", cls)
        known = _CLASSES.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise bad_value("name", "be one that no other class has", f"{name!r}, of {known.__qualname__}")
        _CLASSES[name], _NAMES[cls] = cls, name
        return cls

    return register


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON tree of a value, with tensors replaced by their names.

    Args:
        value: A tensor, sparse matrix, registered dataclass, container or plain value.
        name: What an error calls it.
        tensors: Dictionary that receives the tensors.

    Raises:
        TypeError: It is none of these; the error says where.
    """
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors)
    if type(value) in _NAMES:
        parts = {field: encode(part, f"{name}.{field}", tensors) for field, part in _parts_of(value).items()}
        return {"class": _NAMES[type(value)], "fields": parts}
    if sparse.issparse(value):
        csr = sparse.csr_matrix(value)
        arrays = {part: torch.from_numpy(getattr(csr, part)) for part in ("data", "indices", "indptr")}
        return {"csr": encode(arrays, name, tensors), "shape": list(csr.shape)}
    if isinstance(value, dict):
        return {"dict": [[_key(k, name), encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    if dataclasses.is_dataclass(value):
        must = "be of a class that is registered to be saved"
        remedy = 'Decorate it with @saved_as("your_package.its_name") of stride_captum.influence.persistence.'
        raise bad_type(name, must, value, remedy)
    raise bad_type(name, "be a tensor, a dataclass, a container or a plain value to be saved", value)


def _parts_of(value: Any) -> dict[str, Any]:
    if hasattr(value, "to_saved"):
        return dict(value.to_saved())
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _encode_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> Any:
    if value.layout != torch.strided:
        raise bad_type(name, "be a dense tensor to be saved", value)
    while name in tensors:  # as for {"a.b": ...} and {"a": {"b": ...}}
        name += "'"
    # The layout is kept, because products with a transposed layout round differently.
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    layout = value.detach().cpu().permute(order)
    tensors[name] = layout.clone(memory_format=torch.contiguous_format)
    return {"tensor": name, "order": order}


def _key(key: Any, name: str) -> Any:
    if key is None or isinstance(key, str | int | float):
        return key
    raise bad_type(f"a key of {name}", "be a plain value to be saved", key)


def decode(tree: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Inverse of `encode`; imports nothing.

    Raises:
        ValueError: A class that is not registered.
    """

    def again(part: Any, device: torch.device = device) -> Any:
        return decode(part, tensors, device)

    if "tensor" in tree:
        order = tree["order"]
        # A copy, because safetensors does not align tensors as torch does.
        saved = tensors[tree["tensor"]].clone()
        if sorted(order) != list(range(saved.ndim)):
            raise KeyError("order")
        saved = saved.to(float64_device(device) if saved.dtype == torch.float64 else device)
        return saved.permute([order.index(d) for d in range(len(order))])
    if "class" in tree:
        cls = _CLASSES.get(tree["class"])
        if cls is None:
            raise bad_value(
                "path",
                "hold objects of registered classes",
                f"one of {tree['class']!r}",
                "Import the module that registers it (@saved_as), and load again.",
            )
        parts = {key: again(value) for key, value in tree["fields"].items()}
        return getattr(cls, "from_saved", cls)(**parts)
    if "csr" in tree:
        parts = {key: value.numpy() for key, value in again(tree["csr"], torch.device("cpu")).items()}
        return sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=tree["shape"])
    if "dict" in tree:
        return {key: again(value) for key, value in tree["dict"]}
    if "list" in tree:
        return [again(value) for value in tree["list"]]
    return tuple(map(again, tree["tuple"])) if "tuple" in tree else tree["value"]
