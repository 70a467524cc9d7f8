"""Reading of a data set into two tensors: inputs and labels."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ...errors import bad_value

LABEL_KEYS = ("labels", "label")
_PAIRS = "be a data set of (input, label)"
_FEW = 8


@dataclass(frozen=True)
class Reader:
    """How the examples of one data set are read.

    Attributes:
        argument: Name of the argument, for errors.
        source: Where the data set comes from, for errors, such as " of 'module:factory'".
        label_key: Key of the label if examples are dicts; None takes "labels" or "label".
    """

    argument: str = "dataset"
    source: str = ""
    label_key: str | None = None

    def tensors(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """Inputs `(n, ...)` and labels `(n, ...)`, in the types that the data set gives.

        A third part of each example that only numbers the examples is dropped.

        Raises:
            ValueError: An example is not one input with one label, inputs differ in shape, or there are no
                examples.
        """
        if holds_pairs(dataset) and len(dataset):
            inputs, labels = dataset.tensors
            return self._input(inputs), self._label(labels)
        return self._stacked(self._items(dataset))

    def changes(self, dataset: Any, inputs: Tensor) -> bool:
        """Whether inputs change when they are read again, as with augmentation.

        Args:
            dataset: The data set.
            inputs: What the first reading gave, `(n, ...)`.
        """
        if (
            holds_pairs(dataset)
            or isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
        ):
            return False
        items = (dataset[i] for i in range(min(_FEW, len(inputs))))
        again = (self._pair(x if isinstance(x, Mapping) else x[:2])[0] for x in items)
        return any(not torch.equal(self._input(x), inputs[i]) for i, x in enumerate(again))

    def _items(self, dataset: Any) -> Iterator[Any]:
        if isinstance(dataset, DataLoader):
            raise self._refused("a DataLoader", "Return the data set that it loads.")
        by_index = not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__")
        if isinstance(dataset, str | bytes) or not (by_index or hasattr(dataset, "__iter__")):
            raise self._refused(f"{_article(type(dataset).__name__)}", _HOW)
        n_read = 0
        try:
            for item in map(dataset.__getitem__, range(len(dataset))) if by_index else dataset:
                yield item
                n_read += 1
        except Exception as error:
            name, said = _article(type(dataset).__name__), f"{type(error).__name__}: {error}"
            raise self._refused(f"{name}, which raised {said} for example {n_read}", _HOW) from error

    def _stacked(self, items: Iterable[Any]) -> tuple[Tensor, Tensor]:
        inputs, labels = [], []
        first = None
        for i, item in enumerate(items):
            if isinstance(item, tuple | list) and len(item) == 3 and (place := _whole(item[2])) is not None:
                first = place if i == 0 else first
                item = item[:2] if first == place - i else item
            x, y = self._pair(item)
            inputs.append(self._input(x))
            labels.append(self._label(y))
            if inputs[-1].shape != inputs[0].shape:
                shapes = f"{tuple(inputs[0].shape)} and {tuple(inputs[-1].shape)}"
                raise self._refused(
                    f"inputs of several shapes, {shapes} (example {i})",
                    "Bring them to one shape: images with torchvision.transforms.Resize, texts by padding.",
                )
            if labels[-1].shape != labels[0].shape:
                raise self._refused(
                    f"labels of several shapes, {tuple(labels[0].shape)} and {tuple(labels[-1].shape)}", _HOW
                )
        if not inputs:
            raise self._refused("no examples", None)
        if first is not None and len(inputs) == 1:
            raise self._refused("one example of 3 parts", _TWO)
        return torch.stack(inputs), torch.stack(labels)

    def _pair(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            return self._pair_of_dict(item)
        if not isinstance(item, tuple | list):
            raise self._refused(f"examples that are {kind_of(item)}", _HOW)
        if self.label_key is not None:
            raise self._refused(
                f"examples of {_parts(item)}", "`label_key` is for examples that are dicts: leave it out."
            )
        if len(item) != 2:
            raise self._refused(f"examples of {_parts(item)}", _TWO)
        return item[0], item[1]

    def _pair_of_dict(self, item: Mapping[Any, Any]) -> tuple[Any, Any]:
        known = LABEL_KEYS if self.label_key is None else (self.label_key,)
        found = [key for key in known if key in item]
        inputs = [key for key in item if key not in known]
        if len(found) != 1 or len(inputs) != 1:
            keys = ", ".join(map(repr, item))
            what = " or ".join(map(repr, known))
            raise bad_value(
                self.argument,
                f"have examples of one input and one label, whose key is {what}",
                f"dicts with {keys}{self.source}",
                "Name the key of the label with --label-key (in Python: label_key=), and leave out what is "
                "neither the input nor the label.",
            )
        return item[inputs[0]], item[found[0]]

    def _input(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return self._plain(value, "inputs")
        found = _numbers(value)
        if found is not None:
            return found
        remedy = _HOW
        if type(value).__module__.startswith("PIL"):
            remedy = "Make tensors of images: transform=torchvision.transforms.ToTensor()."
        elif isinstance(value, str | bytes):
            remedy = "Make tensors of texts: token ids, or features."
        elif isinstance(value, tuple | list | Mapping):
            remedy = "Join the parts to one tensor, and take it apart in the network."
        raise self._refused(f"inputs that are {kind_of(value)}", remedy)

    def _label(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return self._plain(value, "labels")
        if isinstance(value, list):
            value = np.asarray(value)
        found = _numbers(value)
        if found is not None:
            return found
        remedy = _HOW
        if isinstance(value, str | bytes | np.str_):
            remedy = "Map the names to numbers: {name: i for i, name in enumerate(sorted(set(names)))}."
        raise self._refused(f"labels that are {kind_of(value)}", remedy)

    def _plain(self, tensor: Tensor, what: str) -> Tensor:
        """A tensor that NumPy can hold, on the CPU."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise self._refused(f"{what} that are {kind_of(tensor)}", "Give dense tensors: x.to_dense().")
        if tensor.dtype == torch.bfloat16:
            raise self._refused(f"{what} in bfloat16", "Convert them: x.float().")
        if type(tensor) is not Tensor or tensor.requires_grad:
            tensor = tensor.detach().as_subclass(Tensor)
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        return tensor.clone() if tensor.is_inference() else tensor

    def _refused(self, came: str, remedy: str | None) -> ValueError:
        return bad_value(self.argument, _PAIRS, f"{came}{self.source}", remedy)


_TWO = "Leave the other parts out: weights and groups are not used. Several inputs go into one tensor."
_HOW = (
    "For instance TensorDataset(torch.as_tensor(x), torch.as_tensor(y)), with x of shape (n, ...) and y of "
    "shape (n,)."
)


def holds_pairs(dataset: Any) -> TypeGuard[TensorDataset]:
    """Whether examples are the rows of two tensors: a subclass with its own `__getitem__` changes them."""
    return (
        isinstance(dataset, TensorDataset)
        and len(dataset.tensors) == 2
        and type(dataset).__getitem__ is TensorDataset.__getitem__
        and type(dataset).__len__ is TensorDataset.__len__
    )


def check_finite(inputs: Tensor, argument: str, source: str = "") -> None:
    """Refuse inputs that are not finite.

    Args:
        inputs: `(n, ...)`.
        argument: Name of the argument, for errors.
        source: Where the inputs come from, for errors.

    Raises:
        ValueError: An example holds NaN or infinity.
    """
    if not inputs.is_floating_point() or bool(torch.isfinite(inputs).all()):
        return
    wrong = ~torch.isfinite(inputs.reshape(len(inputs), -1)).all(1)
    first = int(wrong.long().argmax())
    raise bad_value(
        argument,
        "hold finite inputs",
        f"NaN or infinity in example {first} ({int(wrong.sum())} of {len(inputs)} like it){source}",
        "Fill in missing values, or leave these examples out.",
    )


def kind_of(value: Any) -> str:
    """Type and shape of a part of an example, for errors.

    >>> kind_of(torch.zeros(6)), kind_of("a"), kind_of([1, 2.0])
    ('float32 (6,)', "str 'a'", 'a list of 2 parts: int, float')
    """
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f", {str(value.layout).removeprefix('torch.')}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{layout}"
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.str_):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} {value[:20]!r}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {_parts(value)}"
    if isinstance(value, Mapping):
        return "a dict with " + ", ".join(map(repr, value))
    return type(value).__name__


def _parts(values: tuple[Any, ...] | list[Any]) -> str:
    shown = ", ".join(map(kind_of, values[:4])) + (", ..." if len(values) > 4 else "")
    return f"{len(values)} part{'' if len(values) == 1 else 's'}" + (f": {shown}" if shown else "")


def _whole(value: Any) -> int | None:
    """The value as an int if it is a single whole number, else None."""
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def _numbers(value: Any) -> Tensor | None:
    """The value as a tensor if it is a number or an array of numbers, else None."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value))  # a copy: the array may be read-only
    return torch.as_tensor(value) if isinstance(value, bool | int | float) else None


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
