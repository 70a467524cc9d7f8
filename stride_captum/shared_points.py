"""Test points of rank 0 on every rank of a process group."""

from __future__ import annotations

import torch

from .operators import FittedOperators, TestPoints
from .positions import Positions
from .system.processes import Ranks


def points_of_rank_0(
    ranks: Ranks,
    points: TestPoints | None,
    n: int,
    n_features: int,
    operators: FittedOperators,
    response: str,
) -> TestPoints:
    """Broadcast a batch of test points: how many rows each has, then the rows.

    Args:
        ranks: The group.
        points: On rank 0; None elsewhere.
        n: Test points of the batch.
        n_features: Width of h.
        operators: Which take them.
        response: What is asked.
    """
    n_classes = operators.n_classes
    shape = torch.zeros(n + 3, dtype=torch.int64, device="cpu")  # positions? classes? P, rows of each
    shape[3:] = 1
    if points is not None:
        shape[:3] = torch.tensor([points.positions is not None, points.asked.ndim == 1, points.n_positions])
        if points.positions is not None:
            shape[3:] = points.positions.counts
    kinds, counts = ranks.broadcast(shape, "numbers of rows").split([3, n])
    several, classes, n_positions = kinds.tolist()
    sizes = [n_features, n_classes, n_classes, n_classes, 1]
    rows = torch.empty(int(counts.sum()), sum(sizes), dtype=operators.dtype, device=operators.device)
    if points is not None:
        asked = points.asked[:, None].expand(-1, n_classes) if classes else points.asked
        places = torch.zeros(len(rows)) if points.positions is None else points.positions.places
        assert places is not None, "rows of a batch know their places"
        parts = (points.features, points.logits, points.gradients, asked, places[:, None])
        rows = torch.cat([part.to(rows) for part in parts], 1)
    h, z, gradients, asked, places = ranks.broadcast(rows, "test points").split(sizes, 1)
    return TestPoints(
        h,
        z,
        asked[:, 0].long() if classes else asked,
        gradients,
        response,
        Positions(counts, places[:, 0].int()) if several else None,
        n_positions,
    )
