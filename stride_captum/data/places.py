"""Places in the training set: indices, masks and slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import bad_type, bad_value


def places(chosen: Any, n_train: int, name: str) -> NDArray[np.int64]:
    """Places as sorted indices, each once, `(n,)`; arguments and errors are those of `places_in_order`.

    >>> places([2, 0], 5, "indices").tolist()
    [0, 2]
    """
    return np.sort(places_in_order(chosen, n_train, name))


def places_in_order(chosen: Any, n_train: int, name: str) -> NDArray[np.int64]:
    """Places as indices, each once, in the order in which they are given, `(n,)`.

    Args:
        chosen: Integers of any kind (a list, a set, a range, an array or a tensor), a boolean mask of length
            `n_train`, or a slice.
        n_train: Number of training examples.
        name: Name of the argument in errors.

    Raises:
        TypeError: Another type, such as a single number or floats.
        ValueError: Out of range, twice the same, or a mask of another length.

    >>> places_in_order(slice(1, 3), 5, "indices").tolist(), places_in_order([2, 0], 3, "indices").tolist()
    ([1, 2], [2, 0])
    >>> places_in_order([True, False, True], 3, "indices").tolist()
    [0, 2]
    """
    must = "hold places in the training set: integers, a boolean mask or a slice"
    if isinstance(chosen, slice):
        return np.arange(n_train, dtype=np.int64)[chosen]
    if isinstance(chosen, str | bytes | Mapping) or not isinstance(chosen, Iterable):
        raise bad_type(name, must, chosen, f"Write [{chosen}]." if isinstance(chosen, int) else None)
    found = chosen.detach().cpu().numpy() if isinstance(chosen, Tensor) else chosen
    found = np.asarray(found if isinstance(found, np.ndarray) else list(found))
    if found.ndim == 0:
        raise bad_type(name, must, chosen, "Put it in a list.")
    if found.size == 0:
        return np.empty(0, dtype=np.int64)
    if found.dtype == np.bool_:
        if found.shape != (n_train,):
            raise bad_value(name, f"be a mask of length {n_train}", f"shape {found.shape}")
        return np.flatnonzero(found).astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise bad_value(name, must, f"values of type {found.dtype} in shape {found.shape}")
    ordered = np.sort(found.astype(np.int64))
    if ordered[0] < 0 or ordered[-1] >= n_train:
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise bad_value(name, f"hold places in [0, {n_train})", wrong)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
        raise bad_value(name, "hold every place once", f"{twice[0]} twice")
    return found.astype(np.int64)


def groups_of_places(groups: Any, n_train: int) -> list[NDArray[np.int64]]:
    """Several groups of places, each as for `places`; they may overlap.

    Raises:
        TypeError: A dict, or a number instead of a group.
        ValueError: As for `places`.
    """
    if isinstance(groups, Mapping | str) or not isinstance(groups, Iterable):
        remedy = "Write list(groups.values())." if isinstance(groups, Mapping) else None
        raise bad_type("groups", "be a list of groups of training examples", groups, remedy)
    return [places(group, n_train, f"groups[{i}]") for i, group in enumerate(groups)]
