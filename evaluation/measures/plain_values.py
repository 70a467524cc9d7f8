"""Conversion of results to plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .statistics import Interval


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for JSON: arrays and tuples as lists, NumPy's numbers as Python's, NaN and infinity as None.

    Any other object becomes its `str`.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, Interval):
            return plain(vars(value))
        if isinstance(value, np.ndarray | np.generic):
            return convert(value.tolist())
        if isinstance(value, list | tuple | set | frozenset | range):
            return [convert(v) for v in value]
        if isinstance(value, Mapping):
            return plain(value)
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value if isinstance(value, str | int | float | None) else str(value)

    return {str(name): convert(value) for name, value in values.items()}
