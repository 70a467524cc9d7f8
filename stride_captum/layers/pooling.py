"""Pooling of activations to one row of features per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..errors import bad_type, bad_value
from ..system.saved_values import saved_as
from .patches import Patches

#: A submodule by name, and whether what it reads is meant instead of what it returns.
Place = tuple[str, bool]
INPUT_SUFFIX = ":input"


@saved_as("tap")
@dataclass(frozen=True)
class Tap:
    """One place in the network whose activations are features.

    Attributes:
        name: Name of the submodule, as in `model.named_modules()`.
        reads_input: Whether the input of the submodule is read instead of its output.
        spatial: Number of spatial dimensions: 0 for vectors and token sequences.
        pool: Side to which maps are pooled.
        width: Number of features.
        batch_dim: The batch dimension.
        rows: Rows per example in that dimension: "one"; or several, which are averaged, ordered by example
            ("examples first", `(n k, ...)`) or by position ("positions first", `(k n, ...)`).
        parts: Tensors per forward pass, whose features are concatenated: one for each call of the submodule
            and each of its inputs. 0: any number, averaged.
        per_position: Whether each position has a row: tokens are not averaged, maps are not pooled.
        patches: What the kernel of a convolution reads at each position is read, instead of the map.
    """

    name: str
    reads_input: bool
    spatial: int
    pool: int
    width: int
    batch_dim: int = 0
    rows: str = "one"
    parts: int = 1
    per_position: bool = False
    patches: Patches | None = None

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Tap:
        """From fields that JSON has kept."""
        return cls(**{**values, "patches": Patches.of_plain(values.get("patches"))})

    def __str__(self) -> str:
        return place_name((self.name, self.reads_input))


def place_name(place: Place) -> str:
    """A place in the notation of `layers`: submodule name, with ":input" for its input."""
    return place[0] + (INPUT_SUFFIX if place[1] else "")


def activation_in(value: Any, place: str) -> Tensor:
    """Tensor in an input or output: itself, the first of a tuple, or `.last_hidden_state`.

    Packed sequences and nested tensors become `(n, d)`, the mean over the steps of each example.

    Args:
        value: Input or output of a submodule.
        place: Name of the submodule in errors.

    Raises:
        TypeError: No tensor.
        ValueError: A tensor that holds no features: sparse, integer, complex, a single number, or empty.
    """
    if isinstance(value, tuple | list) and value and not isinstance(value, PackedSequence):
        value = value[0]
    value = getattr(value, "last_hidden_state", value)
    if not isinstance(value, Tensor | PackedSequence):
        raise bad_type(
            "layers",
            f"give a tensor ({place!r})",
            value,
            "Name a submodule that returns a tensor or a tuple.",
        )
    tensor = value.data if isinstance(value, PackedSequence) else value.detach()
    problem = None
    if not tensor.is_nested and tensor.layout != torch.strided:
        problem = "give dense tensors", f"the layout {tensor.layout}", "Name a layer behind `.to_dense()`."
    elif not tensor.is_floating_point():
        remedy = "Name a layer behind it, as in 'name:input' of the next one."
        problem = "give floating-point numbers", f"{tensor.dtype}", remedy
    elif not tensor.is_nested and tensor.ndim == 0:
        problem = (
            "give one row per example",
            "a single number",
            "Name a layer before the examples are reduced.",
        )
    elif tensor.numel() == 0:
        shape = "no numbers" if tensor.is_nested else f"the shape {tuple(tensor.shape)}"
        problem = "give at least one feature per example", shape, "Name another layer."
    if problem:
        raise bad_value("layers", problem[0], f"{problem[1]} from {place!r}", problem[2])
    if isinstance(value, PackedSequence):
        return _mean_of_packed(value)
    return _mean_of_nested(tensor) if tensor.is_nested else tensor


def _mean_of_packed(packed: PackedSequence) -> Tensor:
    steps = packed._replace(data=in_single(packed.data.detach()))
    padded, lengths = pad_packed_sequence(steps, batch_first=True)
    return padded.sum(1) / lengths.to(padded)[:, None]


def _mean_of_nested(nested: Tensor) -> Tensor:
    return torch.stack([to_rows(in_single(steps)[None], 0, 1)[0] for steps in nested.unbind()])


def in_single(activation: Tensor) -> Tensor:
    """Cast to float32; float64 is kept."""
    return activation if activation.dtype in (torch.float32, torch.float64) else activation.float()


def features_of(activation: Tensor, tap: Tap, mask: Tensor | None = None) -> Tensor:
    """What a tap makes of an activation: one row per example, or with `per_position` its channels last.

    Returns:
        `(n, width)`, or `(n, positions..., width)`; in float32, or float64 where the activation is.
    """
    if not tap.per_position:
        return to_rows(activation, tap.spatial, tap.pool, tap.batch_dim, mask)
    first = in_single(activation.movedim(tap.batch_dim, 0))
    if tap.patches is not None:
        return tap.patches.read(first)
    return first.movedim(1, -1) if tap.spatial and first.ndim > 2 else first


def to_rows(
    activation: Tensor, spatial: int, pool: int, batch_dim: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Activations as one row of features per example.

    Args:
        activation: `(n, d)`, `(n, tokens..., d)`, or with `spatial` > 0 `(n, channels, length...)`.
        spatial: Number of spatial dimensions; 0 averages over tokens.
        pool: Side to which maps are pooled by averaging.
        batch_dim: Dimension of the n examples.
        mask: `(n, tokens)`, 0 for tokens that are padding; ignored for activations of other shapes.

    Returns:
        `(n, width)`, in float32, or float64 if the activation is.
    """
    activation = in_single(activation.movedim(batch_dim, 0))
    if activation.ndim <= 2:
        return activation[:, None] if activation.ndim == 1 else activation
    if spatial == 0:
        if mask is not None and activation.ndim == 3 and mask.shape == activation.shape[:2]:
            return mean_of_tokens(activation, mask)
        return activation.flatten(1, -2).mean(1)
    sides = [min(pool, side) for side in activation.shape[2:]]
    if sides != list(activation.shape[2:]):
        pooling: list[Callable[..., Tensor]] = [
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
        ]
        activation = pooling[spatial - 1](activation, sides)
    return activation.flatten(1)


def mean_of_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding; 0 if all are.

    Args:
        tokens: `(n, tokens, d)`.
        mask: `(n, tokens)`, 0 for padding.

    Returns:
        `(n, d)`.
    """
    kept = (mask != 0)[..., None]
    return tokens.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp_min(1)
