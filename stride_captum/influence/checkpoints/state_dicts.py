"""Fit of a state dict to a model, under other names and beside other things."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...errors import bad_value

State = Mapping[str, Any]
_SHOWN = 3


def load_fitting(model: nn.Module, content: State, name: str) -> None:
    """Load the weights in `content` that fit the model.

    They are `content` itself or a mapping in it, and their keys those of the model, perhaps behind one
    prefix. Where two sets fit (a model and its moving average), it is not known which is meant.

    Args:
        model: Gets the weights; left as it was if nothing fits.
        content: Of a file.
        name: What an error calls the file.

    Raises:
        ValueError: Nothing fits, or several sets of weights do.
    """
    wanted = model.state_dict()
    sets = dict(_sets(content, wanted))
    fitting = [where for where, state in sets.items() if not _differences(state, wanted)]
    if len(fitting) > 1:
        raise bad_value(
            "checkpoint",
            "hold one set of weights that fits `model`",
            f"{name} with {' and '.join(fitting)}",
            "Give one of these state dicts itself, or a `checkpoints_load_func` that takes it.",
        )
    if fitting:
        model.load_state_dict(sets[fitting[0]])
        return
    state = max(sets.values(), key=lambda s: len(wanted.keys() & s.keys()), default={})
    differences = _differences(state, wanted)
    if not wanted.keys() & state.keys():
        raise _no_fit(name, _content(content))
    if any(f" of {kind} " in text for kind in ("shape", "type") for text in differences):
        raise _no_fit(name, "; ".join(differences))
    before = {key: value.clone() for key, value in wanted.items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(state)  # may fill in keys that older versions of a module did not have
    except RuntimeError as error:
        model.load_state_dict(before, strict=False)
        raise _no_fit(name, "; ".join(differences)) from error


def first_few(names: Sequence[Any]) -> str:
    """The first names of a list, and how many more there are.

    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = len(names) - _SHOWN
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _sets(content: State, wanted: State) -> Iterator[tuple[str, State]]:
    """Sets of weights that may be meant, under the keys of the model, by where they are."""
    places = {"": content, **{k: v for k, v in content.items() if isinstance(v, Mapping)}}
    for place, state in places.items():
        for prefix, renamed in _renamed(state, wanted):
            inner = f"{place!r} ({prefix}*)" if prefix else repr(place)
            yield inner if place else repr(f"{prefix}*"), renamed


def _renamed(state: State, wanted: State) -> Iterator[tuple[str, State]]:
    """What is behind each prefix under which there are keys of the model; without one, the state itself.

    The prefix may also be on the side of the model. Parts of keys that `torch.compile` adds do not count.
    """
    if state.keys() == wanted.keys():
        yield "", state
        return
    theirs = {key.replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(key, str)}
    ours = {key.replace("_orig_mod.", ""): key for key in wanted}
    for prefix in sorted(_prefixes(theirs, ours)):
        part = {key[len(prefix) :]: value for key, value in theirs.items() if key.startswith(prefix)}
        yield prefix, _whole({ours.get(key, key): value for key, value in part.items()}, wanted)
    for prefix in sorted(_prefixes(ours, theirs) - {""}):
        if all(key.startswith(prefix) for key in ours):
            yield "", {ours.get(prefix + key, prefix + key): value for key, value in theirs.items()}


def _prefixes(long: Iterable[str], short: State) -> set[str]:
    """What stands before keys of `short` in keys of `long`."""
    found = set()
    for key in long:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in short:
                found.add("".join(f"{part}." for part in parts[:i]))
    return found


def _whole(state: dict[str, Any], wanted: State) -> State:
    """The state with weights that two modules share, which Hugging Face saves once."""
    for key in wanted.keys() - state.keys():
        same = next((k for k in state if k in wanted and _same_memory(wanted[k], wanted[key])), None)
        if same is not None:
            state[key] = state[same]
    return state


def _same_memory(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.numel() == 0:
        return False
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _differences(state: State, wanted: State) -> list[str]:
    """How a state dict differs from that of the model, the first keys of each kind."""
    missing, more = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    found = [f"without {first_few(missing)}"] if missing else []
    if more:
        found.append(f"with {first_few(more)}")
    of: Callable[[Any], Any]
    for kind, of in (("shape", _shape), ("type", _kind)):
        other = [
            f"{key} of {kind} {of(state[key])}, not {of(value)}"
            for key, value in wanted.items()
            if isinstance(value, Tensor) and key in state and _must_agree(kind, value)
            if of(state[key]) != of(value)
        ]
        if other:
            found.append(f"with {first_few(other)}")
    return found


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else "none"


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "complex" if value.is_complex() else "float" if value.is_floating_point() else "integer"


def _must_agree(kind: str, value: Tensor) -> bool:
    """Whether another shape or type is refused: counters become floats where they were averaged."""
    return kind == "shape" or value.is_floating_point() or value.is_complex()


def _content(content: State) -> str:
    """Words for a file in which nothing fits."""
    if {"state", "param_groups"} <= content.keys():
        return "with the state of an optimizer"
    return f"with {first_few(list(content))}" if content else "with nothing in it"


def _no_fit(name: str, what: str) -> ValueError:
    return bad_value(
        "checkpoint",
        "hold the weights of `model`",
        f"{name} {what}",
        "Give weights of this architecture, or a `checkpoints_load_func` that makes them fit.",
    )
