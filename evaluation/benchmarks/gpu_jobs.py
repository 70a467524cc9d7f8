"""Jobs of `bench_gpu`, their time limit, and the comparison of two calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...influence.estimate import timed


@dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        head: What is measured, and its sizes.
        run: Measures it; returns the figures.
        work: Its work, relative to the other jobs of the part.
    """

    head: dict[str, Any]
    run: Callable[[], dict[str, Any]]
    work: float = 1.0


class Clock:
    """A time limit of some seconds."""

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.until - time.monotonic(), 0.0)


def side_by_side(
    run: Callable[[], Any], other: Callable[[], Any], device: torch.device, turns: int = 3
) -> dict[str, Any]:
    """Time two calls in turns, after one untimed call of each.

    Returns:
        Median seconds of both, and the median and extremes of the ratio run / other.
    """
    times = [(timed(run, device), timed(other, device)) for _ in range(turns + 1)][1:]
    ratios = [own / beside for own, beside in times]
    return {
        "seconds": statistics.median(own for own, _ in times),
        "other_seconds": statistics.median(beside for _, beside in times),
        "ratio": statistics.median(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }
