"""Owns the features h(x): which layers are read, and how their activations become one row per example.

A *tap* names a place in the network: "fc1" is the output of the submodule fc1 and "fc1:input" what it
reads. Convolution maps are pooled to at most 4 x 4, token sequences are averaged, vectors are taken as
they are. Rows are concatenated in the order of the taps; scaling is left to the closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch import ExampleBatch
from .errors import bad_type, bad_value, nearest

_POOL = 4
_INPUT_SUFFIX = ":input"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Tap:
    """One place in the network whose activations are features.

    Attributes:
        name: Name of the submodule, as in `model.named_modules()`.
        reads_input: Whether it is what the submodule reads instead of what it returns.
        spatial: Dimensions of the maps behind the channels: 0 for vectors and token sequences.
        pool: Side to which maps are pooled.
        width: Features it gives.
    """

    name: str
    reads_input: bool
    spatial: int
    pool: int
    width: int

    def __str__(self) -> str:
        return self.name + (_INPUT_SUFFIX if self.reads_input else "")


def to_rows(activation: Tensor, spatial: int, pool: int) -> Tensor:
    """Activations as one row of features per example.

    Args:
        activation: `(n, d)`, `(n, tokens..., d)`, or with `spatial` > 0 `(n, channels, length...)`.
        spatial: Dimensions of the maps behind the channels; 0 averages over tokens.
        pool: Side to which maps are pooled by averaging.

    Returns:
        `(n, width)`, in float32, or float64 where the activation is.
    """
    if activation.dtype not in (torch.float32, torch.float64):
        activation = activation.float()
    if spatial == 0:
        return (
            activation[:, None]
            if activation.ndim == 1
            else activation.flatten(1, -2).mean(1)
            if (activation.ndim > 2)
            else activation
        )
    sides = [min(pool, side) for side in activation.shape[2:]]
    if sides != list(activation.shape[2:]):
        pooling: list[Callable[..., Tensor]] = [
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
        ]
        activation = pooling[spatial - 1](activation, sides)
    return activation.flatten(1)


@contextmanager
def recording(
    model: nn.Module, taps: Sequence[Tap]
) -> Iterator[Callable[[ExampleBatch], tuple[Tensor, list[Tensor]]]]:
    """Record the taps during forward passes; the hooks are gone afterwards.

    Yields:
        A function of one batch that returns the outputs of the model and the rows of each tap, a list
        of `(n, width)`. A submodule that runs several times in one pass is read the last time.
    """
    places = [(tap.name, tap.reads_input) for tap in taps]
    overwritten: set[tuple[str, bool]] = set()
    with _hooks(model, places, overwritten) as caught:

        def run(batch: ExampleBatch) -> tuple[Tensor, list[Tensor]]:
            outputs = _run_hooked(model, batch, places, caught, overwritten)
            rows = [to_rows(caught[p][0], t.spatial, t.pool) for p, t in zip(places, taps, strict=True)]
            for tap, row in zip(taps, rows, strict=True):
                if row.shape[0] != outputs.shape[0]:
                    raise bad_value(
                        "layers",
                        f"give one row per example ({outputs.shape[0]} in this batch)",
                        f"{row.shape[0]} rows from {str(tap)!r}",
                        "Is a batch dimension missing from the inputs, as in x[0] instead of x[:1]?",
                    )
            return outputs, rows

        yield run


_Caught = dict[tuple[str, bool], tuple[Tensor, int]]


def _run_hooked(
    model: nn.Module,
    batch: ExampleBatch,
    places: Sequence[tuple[str, bool]],
    caught: _Caught,
    overwritten: set[tuple[str, bool]],
) -> Tensor:
    """One forward pass; repeated with a copy where an in-place operation wrote over what was caught."""
    caught.clear()
    outputs = batch.outputs(model)
    for place in places:
        if place not in caught:
            raise bad_value("layers", "name submodules that run in the forward pass", repr(place[0]))
    changed = {p for p, (tensor, version) in caught.items() if tensor._version != version}
    if changed:
        overwritten |= changed
        caught.clear()
        outputs = batch.outputs(model)
    return outputs


@contextmanager
def _hooks(
    model: nn.Module, places: Sequence[tuple[str, bool]], overwritten: set[tuple[str, bool]]
) -> Iterator[_Caught]:
    caught: _Caught = {}
    modules = dict(model.named_modules())
    handles = []

    def keep(place: tuple[str, bool], value: Any) -> None:
        if isinstance(value, tuple | list) and value:
            value = value[0]
        value = getattr(value, "last_hidden_state", value)
        if not isinstance(value, Tensor):
            raise bad_type("layers", f"give a tensor ({place[0]!r})", value)
        value = value.detach().clone() if place in overwritten else value.detach()
        caught[place] = (value, value._version)

    def catch_input(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: keep((name, True), args or list(kwargs.values()))

    def catch_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: keep((name, False), output)

    try:
        for name, reads_input in places:
            if reads_input:
                handles.append(modules[name].register_forward_pre_hook(catch_input(name), with_kwargs=True))
            else:
                handles.append(modules[name].register_forward_hook(catch_output(name)))
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def check_finite(values: Tensor, what: str = "activations") -> None:
    """Refuse a training set that makes NaN or infinities, which every score would inherit.

    Args:
        values: One row per training example.
        what: What an error calls them.
    """
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values).all(1)).nonzero()[0])
        raise bad_value(
            "train_dataset",
            f"give finite {what}",
            f"NaN or infinity for example {row}",
            "Look for it in the inputs or the weights, or for an overflow in half precision.",
        )


def named_taps(model: nn.Module, layers: Sequence[str], batch: ExampleBatch) -> list[Tap]:
    """Taps for the names that the user gave.

    Args:
        model: The network.
        layers: Submodule names, each with ":input" appended where its input is meant.
        batch: A small batch that is run once.

    Raises:
        ValueError: A name that is not a submodule (the nearest names are given), or none.
    """
    if isinstance(layers, str):
        raise bad_type("layers", "be a list of submodule names", layers, f"Write layers=[{layers!r}].")
    if not layers:
        raise bad_value("layers", "name at least one submodule", "an empty list", "None selects them.")
    modules = dict(model.named_modules())
    places = []
    for layer in layers:
        name = str(layer).removesuffix(_INPUT_SUFFIX)
        if name not in modules or not name:
            known = [n for n in modules if n]
            raise bad_value("layers", "name submodules of `model`", repr(layer), nearest(name, known))
        places.append((name, str(layer).endswith(_INPUT_SUFFIX)))
    overwritten: set[tuple[str, bool]] = set()
    with _hooks(model, places, overwritten) as caught:
        _run_hooked(model, batch, places, caught, overwritten)
    return [_tap(modules[n], n, r, caught[n, r][0]) for n, r in places]


def default_taps(
    model: nn.Module, batch: ExampleBatch, max_width: int, penultimate: bool = False
) -> list[Tap]:
    """Tap what every Linear and convolution reads: post-activation features, and a flat float input.

    Places that read the same tensor count once. Raw images (also where the network normalises
    them first), integer inputs and layers that do not run are left out. Where the total width exceeds
    `max_width`, the widest tap is pooled to half its side, or dropped if it cannot be pooled, until the
    rest fits; the last tap is always kept.

    Args:
        model: The network.
        batch: A small batch that is run once.
        max_width: Bound on the total width.
        penultimate: Only the last tap, as in B.1 of the paper.

    Raises:
        ValueError: No Linear or convolution was run.
    """
    weight_layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS))}
    with _hooks(model, [(name, True) for name in weight_layers], set()) as caught:
        given = batch.copied()
        given.outputs_of_these(model)
    raw = given.first_tensor
    found: dict[tuple[int, int, tuple[int, ...]], Tap] = {}
    for position, ((name, _), (value, version)) in enumerate(caught.items()):
        is_raw = raw is not None and (
            value.data_ptr() == raw.data_ptr() or (position == 0 and value.shape == raw.shape)
        )
        if value.is_floating_point() and not (is_raw and value.ndim > 2):
            key = (value.data_ptr(), version, tuple(value.shape))
            found.setdefault(key, _tap(weight_layers[name], name, True, value))
    taps = list(found.values())
    if not taps:
        raise bad_value(
            "layers",
            "be given for a model in whose forward pass no Linear or convolution module runs on features",
            None,
            "Name the submodules whose outputs are features, for instance layers=['encoder'].",
        )
    return taps[-1:] if penultimate else _fit_width(taps, max_width)


def _fit_width(taps: list[Tap], max_width: int) -> list[Tap]:
    taps = list(taps)
    while len(taps) > 1 and sum(tap.width for tap in taps) > max_width:
        # The last tap goes only where nothing else is as wide; among equals the earliest goes first.
        i = max(range(len(taps)), key=lambda i: (taps[i].width, i != len(taps) - 1, -i))
        tap = taps[i]
        if tap.pool > 1:
            shrunk = tap.width // (tap.pool // (tap.pool // 2)) ** tap.spatial
            taps[i] = replace(tap, pool=tap.pool // 2, width=shrunk)
        elif i < len(taps) - 1:
            del taps[i]
        else:
            del taps[max(range(len(taps) - 1), key=lambda i: (taps[i].width, -i))]
    return taps


def _tap(module: nn.Module, name: str, reads_input: bool, value: Tensor) -> Tap:
    """Describe the tap at a place where `value` was seen; maps smaller than the pooling keep their side."""
    is_map = isinstance(module, _CONVOLUTIONS) or (value.ndim > 3 and not isinstance(module, nn.Linear))
    spatial = value.ndim - 2 if is_map and 3 <= value.ndim <= 5 else 0
    pool = min([_POOL, *value.shape[2:]]) if spatial else 1
    pool = 1 << (pool.bit_length() - 1)
    return Tap(name, reads_input, spatial, pool, to_rows(value[:1], spatial, pool).shape[1])
