"""Choice of the places that are read: named by the user, or the inputs of the weight layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import bad_type, bad_value, nearest
from .hooks import check_weights_exist, scripted_parts
from .patches import Patches
from .pooling import INPUT_SUFFIX, Place, Tap, place_name
from .tap_probe import TapProbe

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
#: Modules with several matrices of weights, all of which apply to what is read.
_ALL_READ = (*_RECURRENT, nn.MultiheadAttention)
_WRAPPERS = ("module", "_orig_mod")
_UNREAD_SHARE = 1 / 3


def named_taps(model: nn.Module, layers: Sequence[str], batch: Any) -> list[Tap]:
    """Taps for the names that the user gave.

    The features of a submodule that runs up to four times in a forward pass are concatenated; those of more
    runs, as in a recurrent loop, are averaged.

    Args:
        model: The network.
        layers: Submodule names, each with ":input" appended where its input is meant.
        batch: A batch of which a few examples are run.

    Raises:
        ValueError: A name that is not a submodule (the nearest names are given), or none; a layer that
            does not give one row of numbers per example, or gives the outputs of the model.
        TypeError: Layers that are no list of names, or a layer that gives no tensor.
    """
    check_weights_exist(model)
    places = layer_places(model, layers)
    probe = TapProbe(model, batch, places)
    taps = [probe.tap(place) for place in places]
    for place in places:
        if probe.is_output(place):
            _refuse_outputs(place)
    return taps


def _refuse_outputs(place: Place) -> None:
    """Refuse the outputs of the model as features: they add nothing to the residuals."""
    name = place[0]
    remedy = (
        f"Write {name + INPUT_SUFFIX!r} for what it reads." if not place[1] else "Name a layer before it."
    )
    must = "name layers that give features, not the outputs of the model"
    raise bad_value("layers", must, f"{place_name(place)!r}, whose values are these outputs", remedy)


def layer_places(model: nn.Module, layers: Sequence[str]) -> list[Place]:
    """Places that the user has named.

    Args:
        model: The network.
        layers: As for `named_taps`.

    Raises:
        ValueError: A name that is not a submodule, comes twice, or cannot be read; or none.
        TypeError: Something else than a list of names.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        one = names.get(layers) if isinstance(layers, nn.Module) else layers
        remedy = f"Write layers=[{one!r}]." if one and isinstance(one, str) else None
        raise bad_type("layers", "be a list of submodule names", layers, remedy)
    if not layers:
        raise bad_value("layers", "name at least one submodule", "an empty list", "None selects them.")
    modules = dict(model.named_modules(remove_duplicate=False))
    places: list[Place] = []
    for layer in layers:
        place = _place(layer, modules, names)
        if any(modules[place[0]] is modules[name] and place[1] == side for name, side in places):
            raise bad_value("layers", "name every place once", f"{layer!r} twice")
        places.append(place)
    closed = scripted_parts(model)
    for name, _ in places:
        if name in closed:
            raise bad_value(
                "layers",
                "name submodules that take hooks",
                f"{name!r}, in a model that `torch.jit` has compiled",
                "Name what a layer behind it reads, or pass the model before it was scripted.",
            )
    return places


def _place(layer: Any, modules: dict[str, nn.Module], names: dict[nn.Module, str]) -> Place:
    if isinstance(layer, nn.Module) and names.get(layer):
        name = names[layer]
        remedy = f"Write {name!r} for what it returns, or {name + INPUT_SUFFIX!r} for what it reads."
        raise bad_type("layers", "hold names of submodules", layer, remedy)
    if not isinstance(layer, str):
        raise bad_type("layers", "hold names of submodules of `model`", layer)
    name = layer.removesuffix(INPUT_SUFFIX)
    if name not in modules:
        # Wrappers such as torch.compile and DistributedDataParallel add a prefix.
        wrapped = [full for full in modules if full and name == _unwrapped(full)]
        name = wrapped[0] if len(wrapped) == 1 else name
    if name not in modules or not layer:
        bare = layer.removesuffix(":output")
        is_output = bool(bare) and bare in modules
        hint = f"The output is {bare!r}." if is_output else nearest(name, filter(None, modules))
        raise bad_value("layers", "name submodules of `model`", repr(layer), hint)
    return name, layer.endswith(INPUT_SUFFIX)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def default_taps(model: nn.Module, batch: Any, max_width: int, penultimate: bool = False) -> list[Tap]:
    """Taps on the inputs of all weight layers: post-activation features, and a flat float input.

    A weight layer owns a parameter with at least two dimensions and reads a float tensor: Linear,
    convolutions, attention, recurrent layers (whose outputs are tapped too, because their recurrent weights
    read them), and custom modules. Places that read the same tensors count once. Raw images and sequences
    (also normalized ones), integer inputs, layers that do not run, and layers without one row per example are
    left out. While the total width exceeds `max_width`, the widest tap is pooled to half its side, or read
    without patches, or dropped; the last tap is always kept.

    Args:
        model: The network.
        batch: A batch of which a few examples are run.
        max_width: Bound on the total width.
        penultimate: Only the last tap, as in B.1 of the paper.

    Warns:
        UserWarning: More than a third of the weights apply to nothing that could be tapped.

    Raises:
        ValueError: No weight layer was run.
    """
    check_weights_exist(model)
    places: list[Place] = []
    for name, module in _weight_layers(model).items():
        places.append((name, True))
        if isinstance(module, _RECURRENT):
            places.append((name, False))
    probe = TapProbe(model, batch, places)
    taps, read, problems = _readable(probe)
    if not taps:
        raise problems[-1] if problems else _nothing_to_read(model)
    if penultimate:
        return taps[-1:]
    _warn_of_unread(model, read, probe.ran)
    return _fit_width(taps, max_width, probe)


def _readable(probe: TapProbe) -> tuple[list[Tap], set[str], list[Exception]]:
    """Taps at readable places, names of the readable submodules, and errors for the others."""
    found: dict[tuple[Any, Patches | None], Tap] = {}
    read: set[str] = set()
    problems: list[Exception] = []
    first_layer = next(iter(probe.seen), ("", True))[0]
    for place in probe.seen:
        problem = probe.problem(place)
        if problem is not None:
            problems.append(problem)
            continue
        try:
            tap = probe.tap(place)
        except ValueError as error:
            problems.append(error)
            continue
        read.add(place[0])
        raw = probe.reads_raw_input(tap, place[0] == first_layer)
        if not raw and not probe.returns_outputs(place):
            found.setdefault((probe.key(place), tap.patches), tap)
    # A map that stands in the patches of another layer counts once.
    held = {key for key, patches in found if patches is not None and patches.hold_the_map}
    taps = [tap for (key, patches), tap in found.items() if patches is not None or key not in held]
    return taps, read, problems


def _nothing_to_read(model: nn.Module) -> ValueError:
    if "" in scripted_parts(model):
        return bad_value(
            "model",
            "be one whose submodules take hooks",
            f"{type(model).__name__}, which `torch.jit` has compiled",
            "Pass the model before it was scripted or traced.",
        )
    return bad_value(
        "layers",
        "be given for a model in whose forward pass no module with weights reads features",
        None,
        "Name the submodules whose outputs are features, for instance layers=['encoder'].",
    )


def _weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that apply weight matrices and have no submodule that does, by name."""
    closed = scripted_parts(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name not in closed
        and not isinstance(module, _TABLES)
        and (_matrices(module) or hasattr(module, "_packed_params"))
        and (_is_leaf(module) or isinstance(module, nn.MultiheadAttention))
    }


def _is_leaf(module: nn.Module) -> bool:
    """Whether no submodule has matrices; parametrizations count as the module's own."""
    children = [child for name, child in module.named_children() if name != "parametrizations"]
    return not any(_matrices(inner) for child in children for inner in child.modules())


def _matrices(module: nn.Module) -> dict[str, int]:
    """Sizes of a module's own parameters that are applied as matrices, by name.

    With more than two dimensions, two must be longer than 1: class tokens and channel scales are vectors.
    """
    convolves = isinstance(module, nn.modules.conv._ConvNd)
    own = dict(module.named_parameters(recurse=False))
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        own |= {f"parametrizations.{name}": p for name, p in parametrized.named_parameters()}
    return {
        name: p.numel()
        for name, p in own.items()
        if p.ndim == 2 or sum(side > 1 for side in p.shape) > 1 or (convolves and p.ndim > 2)
    }


def _warn_of_unread(model: nn.Module, read: set[str], ran: set[str]) -> None:
    """Warn if many weights of modules that ran have no readable input; embeddings do not count."""
    ran = ran | set(scripted_parts(model))
    total, unread = 0, dict[str, int]()
    for name, module in model.named_modules():
        if name not in ran or isinstance(module, _TABLES):
            continue
        sizes = {f"{name}.{own}".removeprefix("."): size for own, size in _matrices(module).items()}
        total += sum(sizes.values())
        if name in read:  # the input of the first of several matrices
            sizes = {} if isinstance(module, _ALL_READ) else dict(list(sizes.items())[1:])
        unread |= sizes
    if sum(unread.values()) > _UNREAD_SHARE * total:
        largest = sorted(unread, key=lambda name: -unread[name])
        some = ", ".join(map(repr, largest[:3]))
        some += f" and {len(largest) - 3} more" if len(largest) > 3 else ""
        warnings.warn(
            f"The default layers leave out {sum(unread.values()) / total:.0%} of the weights of `model`: no "
            f"submodule shows, in one row per example, what {some} apply to. Name submodules in `layers` to "
            "choose others.",
            UserWarning,
            stacklevel=3,
        )


def _fit_width(taps: list[Tap], max_width: int, probe: TapProbe) -> list[Tap]:
    taps = list(taps)
    while len(taps) > 1 and sum(tap.width for tap in taps) > max_width:
        # The last tap is reduced only if no other is as wide; among equals the earliest comes first.
        i = max(range(len(taps)), key=lambda i: (taps[i].width, i != len(taps) - 1, -i))
        plain = probe.without_patches(taps[i])
        if taps[i].pool > 1:
            taps[i] = probe.pooled(taps[i], taps[i].pool // 2)
        elif plain is not None:
            taps[i] = plain
        elif i < len(taps) - 1:
            del taps[i]
        else:
            del taps[max(range(len(taps) - 1), key=lambda i: (taps[i].width, -i))]
    return taps
