"""Traversal of nested dicts, tuples and lists."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Path of a part in a batch: keys and places from the outside to the inside.
Path = tuple[Any, ...]


def _is_container(value: Any) -> bool:
    """Whether a value holds parts: a dict, a named tuple, or a list or tuple of more than texts and numbers.

    The default `collate_fn` makes a tuple of texts, which is one part with one item per example.
    """
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return False
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return any(isinstance(item, Tensor | np.ndarray | Mapping | tuple | list) for item in value)
    return isinstance(value, Mapping | tuple)


def walk(content: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Parts of nested dicts, tuples and lists, with their paths."""
    if path and not _is_container(content):  # a batch itself always is one
        yield path, content
        return
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        yield from walk(value, (*path, key))


def rebuilt(content: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Same nested containers, with `function(path, part)` in place of each part."""
    if path and not _is_container(content):
        return function(path, content)
    if isinstance(content, Mapping):
        parts = {key: rebuilt(value, function, (*path, key)) for key, value in content.items()}
        if type(content) is dict:
            return parts
        try:  # an OrderedDict, a BatchEncoding, ...: the model may read its attributes
            same = copy.copy(content)
            same.update(parts)  # type: ignore[attr-defined]
        except (TypeError, AttributeError):
            return parts
        return same
    values = [rebuilt(value, function, (*path, i)) for i, value in enumerate(content)]
    if hasattr(content, "_fields"):  # a named tuple
        return type(content)(*values)
    return values if isinstance(content, list) else tuple(values)


def copied(part: Any) -> Any:
    """Copy of a part that a model may overwrite."""
    if isinstance(part, Tensor):
        return part.detach().clone()
    if isinstance(part, np.ndarray | list):
        return part.copy()
    return part.clone() if callable(getattr(part, "clone", None)) else part


def rows_of(part: Any) -> int | None:
    """Number of rows of a part; None for numbers, texts and other objects."""
    if isinstance(part, Tensor | np.ndarray):
        return len(part) if part.ndim else None
    if isinstance(part, list | tuple) and not isinstance(part, torch.nn.utils.rnn.PackedSequence):
        return len(part)
    return -1 if isinstance(part, torch.nn.utils.rnn.PackedSequence) else None


def same_values(one: Any, other: Any) -> bool:
    """Whether two parts have equal types and values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return type(one) is type(other) and not isinstance(one, np.ndarray) and bool(one == other)


def place_name(path: Path) -> str:
    """Path of a part as an index expression."""
    return "".join(f"[{key!r}]" for key in path)


def described(part: Any) -> str:
    """Description of a part for an error."""
    if isinstance(part, Tensor | np.ndarray):
        return f"a {'tensor' if isinstance(part, Tensor) else 'array'} of shape {tuple(part.shape)}"
    if isinstance(part, list | tuple) and part:
        return f"a {type(part).__name__} of {len(part)} ({type(part[0]).__name__})"
    return f"a {type(part).__name__}"
