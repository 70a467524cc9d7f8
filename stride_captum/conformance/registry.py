"""Registry of the laws, and helpers that they share.

A law is a function of `build(model, train_dataset, **options) -> method`, the constructor or a factory of
the method under test; options are `batch_size`, `checkpoints` and, for positions, `batch`. It returns
nothing, or raises: a `Violation` that says what was found, or whatever the method raised where it should not
have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

#: `build(model, train_dataset, **options)`, the class of a method or a factory of it.
Build = Callable[..., Any]
#: What is called with a `Build` and raises where the method does not keep it.
Check = Callable[[Build], None]

#: What rounding may change in float32, relative to the largest score of the row.
ROUNDING = 1e-5

#: All laws by name, in the order in which they are stated.
CHECKS: dict[str, Check] = {}

#: Those of examples with several positions, which are added where problems are posed with "positions".
POSITION_CHECKS: dict[str, Check] = {}


class Violation(AssertionError):
    """A law that does not hold, and what was found instead."""


def law(function: Check) -> Check:
    """Enter a law into `CHECKS` under its name, which states it."""
    CHECKS[function.__name__] = function
    return function


def position_law(function: Check) -> Check:
    """Enter a law into `POSITION_CHECKS`."""
    POSITION_CHECKS[function.__name__] = function
    return function


def laws_of(loss: str) -> dict[str, Check]:
    """The laws for problems that are posed with a loss, or with "positions".

    >>> len(laws_of("positions")) - len(laws_of("mse"))
    8
    """
    return CHECKS | POSITION_CHECKS if loss == "positions" else dict(CHECKS)


def require(holds: Any, why: str) -> None:
    """Raise a `Violation` with the reason unless something holds."""
    if not bool(holds):
        raise Violation(why)


def same_bits(found: Tensor, wanted: Tensor, what: str) -> None:
    """Both tensors are equal, entry by entry."""
    _same_shape(found, wanted, what)
    require(torch.equal(found, wanted), f"{what}: other values")


def close(found: Tensor, wanted: Tensor, what: str, scale: Tensor | None = None) -> None:
    """Equal up to rounding of the largest of each row of `scale`, which is `wanted` unless given."""
    _same_shape(found, wanted, what)
    largest = (wanted if scale is None else scale).abs().amax(-1, keepdim=True)
    error = (found - wanted).abs() / torch.where(largest > 0, largest, 1.0)
    require((error <= ROUNDING).all(), f"{what}: off by {float(error.max()):.1e} of the row's largest")


def _same_shape(found: Tensor, wanted: Tensor, what: str) -> None:
    require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")


def refuses(call: Callable[[], Any], what: str) -> None:
    """The call raises a ValueError."""
    try:
        call()
    except ValueError:
        return
    raise Violation(f"{what}: no ValueError")


def loader(data: Any, batch_size: int) -> DataLoader[Any]:
    """The data in batches, in order."""
    return DataLoader(data, batch_size=batch_size)
