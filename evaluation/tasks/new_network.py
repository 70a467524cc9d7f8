"""Untrained networks from the caller's factory: seeding, and checks of the factory."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ...errors import bad_type, bad_value
from ...system.fingerprints import weights_fingerprint
from ...system.random_states import same_random_state

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


def checked_network(build_model: Callable[[], nn.Module]) -> nn.Module:
    """Build the network under a fixed seed, and check that its initial weights follow the seed alone.

    It warns if the factory seeds itself, so that all seeds give the same initial weights.

    Raises:
        TypeError: As for `new_network`.
        ValueError: As for `new_network`; or two calls return the same weights in memory, or different
            weights for the same seed.
    """
    first, states = _built(build_model, _SEEDS[0])
    again, _ = _built(build_model, _SEEDS[0])
    places = {p.data_ptr() for p in first.parameters() if p.numel()}
    if any(p.data_ptr() in places for p in again.parameters() if p.numel()):
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
    _, other = _built(build_model, _SEEDS[1])
    own = [name for name in states if states[name] == other[name]]
    if own:
        warnings.warn(
            f"The network seeds {' and '.join(own)} itself: what it draws there is the same for every seed "
            "of a training. Retrainings with different seeds differ too little, and a ceiling from them is "
            "too high. Take the seed out of build_model.",
            stacklevel=2,
        )
    return first


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
