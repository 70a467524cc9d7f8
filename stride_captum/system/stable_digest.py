"""Digests of Python values by content: data, code, closures, networks.

Two values with one digest compute the same, in any process. A function counts with its bytecode, its
defaults, what its closure holds and the global values that it reads; an object with its class and its state;
a network with its weights, hooks and classes; a data set with its examples. Code of installed packages counts
by its name and the version of the package.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from .code_digest import CodeParts, Parts
from .fingerprints import bits
from .random_states import same_random_state


class NoStableDigest(TypeError):
    """A value that another process could not recognize; the message names the part."""


@dataclass(frozen=True, eq=False)
class Examples:
    """A data set that counts with its examples alone, whatever it reads them from."""

    source: Any


def stable_digest(value: Any, name: str = "value", *, packages: Sequence[str] = ()) -> str:
    """SHA-256 of a value by its content, 64 hex digits.

    Args:
        value: Anything.
        name: What an error calls it.
        packages: Further packages whose code counts by its name.

    Raises:
        NoStableDigest: A part has no content that could be read, such as an open file, a lock or a generator.

    >>> stable_digest(lambda x: x + 1) == stable_digest(lambda x: x + 2)
    False
    """
    return _Walk(frozenset(packages)).of(value, name).hex()


_PLAIN = (type(None), bool, int, str, bytes, bytearray, complex, range, type(...), type(NotImplemented))


class _Walk(CodeParts):
    """One walk through a value. An object within itself counts as the number of steps back to it."""

    def __init__(self, packages: frozenset[str], names: Iterable[str] = ()) -> None:
        self.packages = packages
        self.names = list(names)
        self.known: dict[int, bytes] = {}
        self.kept: list[Any] = []  # an id is taken by another object once its own is gone
        self.open: dict[int, int] = {}

    def of(self, value: Any, name: str) -> bytes:
        if id(value) in self.known:
            return self.known[id(value)]
        if id(value) in self.open:
            return b"back %d" % (len(self.open) - self.open[id(value)])
        self.open[id(value)] = len(self.open)
        self.names.append(name)
        digest = hashlib.sha256()
        for part in self.parts(value):
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            digest.update(b"%d:" % len(content))
            digest.update(content)
        self.names.pop()
        del self.open[id(value)]
        self.kept.append(value)
        self.known[id(value)] = digest.digest()
        return self.known[id(value)]

    def parts(self, value: Any) -> Parts:
        """What is hashed, beginning with the kind of the value."""
        if type(value) in _PLAIN:
            return iter((type(value).__name__, repr(value)))
        read = _EXACT.get(type(value)) or next((r for kinds, r in _KINDS if isinstance(value, kinds)), None)
        found: Parts = _Walk.object(self, value) if read is None else read(self, value)
        return found

    def unstable(self, what: str) -> NoStableDigest:
        return NoStableDigest(f"`{'.'.join(self.names).replace('.[', '[')}` is {what}")

    # Data.

    def number(self, value: float) -> Parts:
        yield from ("float", value.hex())

    def tensor(self, value: Tensor) -> Parts:
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            yield "uninitialized"
            return
        if value.device.type == "meta" or value.is_quantized or value.is_nested:
            raise self.unstable("a tensor whose content cannot be read")
        if value.layout != torch.strided:
            yield from ("sparse", str(value.layout), str(tuple(value.shape)))
            value = value.detach().to_sparse_coo().coalesce()
            yield self.of(value.indices(), "indices")
            yield self.of(value.values(), "values")
            return
        yield from ("tensor", str(value.dtype), str(tuple(value.shape)), value.device.type)
        yield bits(value.detach().resolve_conj().resolve_neg()).numpy().data

    def array(self, value: Any) -> Parts:
        value = np.asarray(value)
        yield from ("array", value.dtype.str, str(value.shape))
        if value.dtype.hasobject:
            yield from self.sequence(value.reshape(-1).tolist())
        else:
            yield np.ascontiguousarray(value).tobytes()

    def sequence(self, values: Iterable[Any]) -> Parts:
        yield type(values).__name__
        for i, value in enumerate(values):
            yield self.of(value, f"[{i}]")

    def mapping(self, values: Mapping[Any, Any]) -> Parts:
        yield type(values).__name__
        for key, value in values.items():
            yield self.of(key, "key")
            yield self.of(value, str(key))

    def collection(self, values: Iterable[Any]) -> Parts:
        """A set: its elements have no order, and each is digested as if it stood alone."""
        yield type(values).__name__
        yield from sorted(_Walk(self.packages, self.names).of(value, "element") for value in values)

    def examples(self, value: Any) -> Parts:
        source = value.source if isinstance(value, Examples) else value
        yield "examples"
        if type(source) is TensorDataset:
            yield self.of(source.tensors, "tensors")
            return
        if hasattr(source, "__next__"):
            raise self.unstable("an iterator, which is spent by reading it")
        indexed = not isinstance(source, DataLoader | IterableDataset) and hasattr(source, "__len__")
        if not indexed and not hasattr(source, "__iter__"):
            raise self.unstable("data without a length")
        with same_random_state():
            for i, example in enumerate(map(source.__getitem__, range(len(source))) if indexed else source):
                yield _Walk(self.packages, self.names).of(example, f"[{i}]")

    def path(self, value: PurePath) -> Parts:
        if isinstance(value, Path) and value.is_file():
            yield from ("file", value.read_bytes())
        else:
            yield from ("path", str(value))

    # Objects.

    def network(self, value: nn.Module) -> Parts:
        if isinstance(value, torch.jit.ScriptModule):
            yield from ("script", str(value.inlined_graph))
            yield self.of([*value.named_parameters(), *value.named_buffers()], "weights")
            return
        if "_orig_mod" in value._modules:  # of torch.compile
            yield self.of(value._modules["_orig_mod"], "compiled")
            return
        yield "network"
        yield self.of(type(value), type(value).__name__)
        for name, state in sorted(vars(value).items()):
            if "_hooks" in name and isinstance(state, dict):
                state = list(state.values())  # numbered by a counter of the process
            if name != "training":
                yield name
                yield self.of(state, name.strip("_"))

    def generator(self, value: torch.Generator) -> Parts:
        yield "generator"
        yield self.of(value.get_state(), "state")

    def object(self, value: Any) -> Parts:
        """Any other object: what a pickle would hold of it."""
        if callable(value) and hasattr(value, "__wrapped__"):  # a cache around a function
            yield "wrapped"
            yield self.of(type(value), "type")
            yield self.of(value.__wrapped__, "wrapped")
            return
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise self.unstable(f"of type {type(value).__name__}, whose content cannot be read") from error
        yield "object"
        yield self.of(type(value), type(value).__name__)
        if isinstance(reduced, str):  # the name of a global object
            yield reduced
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        yield self.of(make, "make")
        yield self.of(arguments, "arguments")
        if isinstance(state, dict):
            for name, part in state.items():
                yield str(name)
                yield self.of(part, str(name))
        else:
            yield self.of(state, "state")
        yield self.of(None if items is None else list(items), "items")
        yield self.of(None if pairs is None else list(pairs), "items")


_EXACT: Mapping[type, Any] = {
    float: _Walk.number,
    list: _Walk.sequence,
    tuple: _Walk.sequence,
    dict: _Walk.mapping,
    OrderedDict: _Walk.mapping,
    types.MappingProxyType: _Walk.mapping,
    set: _Walk.collection,
    frozenset: _Walk.collection,
    Examples: _Walk.examples,
}
_KINDS: Sequence[tuple[Any, Any]] = (
    (Tensor, _Walk.tensor),
    (np.ndarray | np.generic, _Walk.array),
    (type, _Walk.cls),
    (FunctionType, _Walk.function),
    (MethodType, _Walk.method),
    (types.BuiltinFunctionType, _Walk.builtin),
    (CodeType, _Walk.code),
    (ModuleType, _Walk.module),
    (functools.partial, _Walk.partial),
    (property | staticmethod | classmethod | functools.cached_property, _Walk.descriptor),
    (types.GetSetDescriptorType | types.MemberDescriptorType, _Walk.slot),
    (nn.Module, _Walk.network),
    (Dataset | DataLoader, _Walk.examples),
    (torch.Generator, _Walk.generator),
    (PurePath, _Walk.path),
)
