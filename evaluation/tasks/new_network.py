"""Untrained networks from the caller's factory: seeding, and checks of the factory."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import bad_type, bad_value
from ...system.fingerprints import weights_fingerprint
from ...system.random_states import same_random_state
from ...system.stable_digest import NoStableDigest, stable_digest

#: Two unlikely seeds, to check what a factory does with a seed.
_SEEDS = (314_159_265, 271_828_182)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the global random states of torch, NumPy and Python inside, and restore them afterwards.

    Args:
        seed: Seed of all three.
        device: Device that torch draws on; a GPU has random states of its own.
    """
    kind = torch.device(device).type
    with ExitStack() as stack:
        stack.enter_context(same_random_state(range(torch.cuda.device_count()) if kind == "cuda" else ()))
        if kind == "cuda":
            torch.cuda.manual_seed_all(seed)
        elif kind == "mps":
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
            torch.mps.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def drawn_on() -> str:
    """The kind of device, beside the processor, whose random state is in use."""
    if torch.cuda.is_initialized():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def new_network(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build an untrained network inside `seeded(seed)`.

    If the factory sets torch's seed itself, the seed of the training is set again afterwards, so that it
    still decides the order of the batches and Dropout.

    Args:
        build_model: The factory.
        seed: Seed of the training.

    Raises:
        TypeError: `build_model` does not return a `torch.nn.Module`.
        ValueError: The network has lazy parameters, or none that can be trained.
    """
    before = torch.default_generator.initial_seed()
    model = build_model()
    if torch.default_generator.initial_seed() != before:
        torch.default_generator.manual_seed(seed)
    if not isinstance(model, nn.Module):
        raise bad_type("build_model", "return a torch.nn.Module", model)
    if any(is_lazy(p) for p in model.parameters()):
        raise bad_value(
            "build_model",
            "return a network whose parameters have values",
            "lazy modules without any",
            "Give their sizes, or call the network once inside build_model.",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise bad_value("build_model", "return a network with a parameter that can be trained", "none")
    return model


def checked_network(build_model: Callable[[], nn.Module], inputs: Tensor | None = None) -> nn.Module:
    """Build the network under a fixed seed, and check that its initial weights follow the seed alone.

    It warns if the factory seeds itself, so that all seeds give the same initial weights.

    Args:
        build_model: The factory.
        inputs: A few inputs `(n, ...)`, for `check_restored`; None leaves that check out.

    Raises:
        TypeError: As for `new_network`.
        ValueError: As for `new_network` and `check_restored`; or two calls return the same weights in
            memory, or different weights for the same seed.
    """
    first, states = _built(build_model, _SEEDS[0])
    again, _ = _built(build_model, _SEEDS[0])
    if _places(first) & _places(again):
        raise bad_value(
            "build_model",
            "return a new network at each call",
            "the same weights twice, so that a training would start where the last one ended",
            "Build the network inside the function, or return a copy (copy.deepcopy).",
        )
    if weights_fingerprint(first) != weights_fingerprint(again):
        raise bad_value(
            "build_model",
            "give the same first weights for the same seed",
            "different ones for two calls with one seed",
            "Draw them from the global random state of torch, NumPy or Python, which is seeded for each "
            "training, not from a generator without a seed.",
        )
    second, other = _built(build_model, _SEEDS[1])
    own = [name for name in states if states[name] == other[name]]
    if own:
        warnings.warn(
            f"The network seeds {' and '.join(own)} itself: what it draws there is the same for every seed "
            "of a training. Retrainings with different seeds differ too little, and a ceiling from them is "
            "too high. Take the seed out of build_model.",
            stacklevel=2,
        )
    if inputs is not None:
        _check_restored(again, second, inputs)
    return first


def check_restored(build_model: Callable[[], nn.Module], inputs: Tensor) -> None:
    """Check that the `state_dict` of a network restores it, in a network that was built under another seed.

    It does not if the network draws a plain attribute or a buffer with `persistent=False` at random.

    Args:
        build_model: The factory.
        inputs: A few inputs `(n, ...)`.

    Raises:
        TypeError: As for `new_network`.
        ValueError: As for `new_network`; or something that outputs depend on is not in the `state_dict`.
    """
    first, second = (_built(build_model, seed)[0] for seed in _SEEDS)
    _check_restored(first, second, inputs)


def _check_restored(first: nn.Module, second: nn.Module, inputs: Tensor) -> None:
    """`check_restored` for two networks, whose parameters change: at first some outputs may all be zero."""
    if _places(first) & _places(second):  # the caller's own weights, which must not change
        return
    with seeded(0), torch.no_grad():
        for parameter in first.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    try:
        second.load_state_dict(first.state_dict())
    except RuntimeError as error:
        must = "return networks of one architecture for all seeds"
        raise bad_value("build_model", must, str(error).strip().split("\n")[-1].strip()) from error
    names = list(_differences(first, second))
    if names and not _same_outputs(first, second, inputs):
        raise bad_value(
            "build_model",
            "return a network that its state_dict restores",
            f"one with random values outside of it: {', '.join(map(repr, names[:3]))}",
            "Register them as a persistent buffer: self.register_buffer(name, values).",
        )


def _places(network: nn.Module) -> set[int]:
    """Where the parameters are in memory."""
    return {p.data_ptr() for p in network.parameters() if p.numel()}


def _differences(first: nn.Module, second: nn.Module) -> Iterator[str]:
    """Names of attributes and buffers that differ, without what is in the `state_dict`."""
    others = dict(second.named_modules())
    for path, one in first.named_modules():
        theirs = _outside(others[path]) if path in others else {}
        for name, value in _outside(one).items():
            if name not in theirs or not _same(value, theirs[name]):
                yield f"{path}.{name}".lstrip(".")


def _outside(module: nn.Module) -> dict[str, Any]:
    """The attributes of one module that its `state_dict` does not hold."""
    held = ("_parameters", "_buffers", "_modules", "training")
    found = {name: value for name, value in vars(module).items() if name not in held}
    for name, value in found.items():
        if "_hooks" in name and isinstance(value, dict):
            found[name] = list(value.values())  # numbered by a counter of the process
    return {**found, **{name: module._buffers[name] for name in module._non_persistent_buffers_set}}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; a value whose content cannot be read counts as equal."""
    try:
        return one is other or stable_digest(one) == stable_digest(other)
    except NoStableDigest:
        return True


def _same_outputs(first: nn.Module, second: nn.Module, inputs: Tensor) -> bool:
    """Whether two networks return the same for some inputs; also if they cannot read them."""
    found: list[Any] = []
    for network in (first, second):
        own = next((p.device for p in network.parameters()), inputs.device)
        try:
            with seeded(0, own), torch.no_grad():
                outputs = network.eval()(inputs.to(own))
        except Exception:  # of the user's network: other checks say what is wrong
            return True
        found.append(getattr(outputs, "logits", outputs))
    one, other = found
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
        return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    return _same(one, other)


def _built(build_model: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network, and the random states that its factory left: whether it seeded them itself."""
    states: dict[str, Any] = {}

    def build() -> nn.Module:
        model = build_model()
        states["torch"] = torch.default_generator.initial_seed()
        states["NumPy"] = np.random.get_state()[1].tolist()  # type: ignore[index]
        states["Python's random"] = random.getstate()
        return model

    with seeded(seed):
        return new_network(build, seed), states


def built(task: Any, seed: int = 0) -> nn.Module:
    """An untrained network of a `Task` under a fixed seed; the caller's random states do not change."""
    with seeded(seed):
        return new_network(task.build_model, seed)
