"""Cost estimate of trained operators, from runs with two small numbers of steps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from ..influence.estimate import Estimate, along_a_line, from_small_runs

if TYPE_CHECKING:
    from ..stride import STRIDE
    from .options import Trained

_STEPS = (4, 16)


def from_fewer_steps(method: STRIDE, options: Trained, n_test: int, k: int | None) -> Estimate:
    """Cost of trained operators, by `from_small_runs` with two small numbers of steps.

    The query is timed on barely trained operators and gives only the order of magnitude.
    """
    found = []
    for steps in _STEPS:
        twin = copy.copy(method)
        twin.operators = replace(options, iterations=steps)
        found.append(from_small_runs(twin, n_test, k))
    seconds = along_a_line(list(_STEPS), [part.fit_seconds for part in found], options.iterations)
    basis = f"{found[-1].basis} with {' and '.join(map(str, _STEPS))} steps"
    return replace(found[-1], fit_seconds=float(seconds or 0), basis=basis)
