"""Detection of leaked test examples: does a planted duplicate come first? (C.3)

    rank(z) = number of training examples that score higher than the duplicate of z (0 = first)
    leakage rate at k = |top_k(scores of z) & L| / k,  mean over z

L are all planted duplicates, and copies of their test examples that were in the training set before. As in
D.4 the training set is *extended* with duplicates: nothing is replaced. Ties are in random order; every
figure is the expected value over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import bad_choice, bad_value
from . import statistics
from .linear_datamodeling import finite_array
from .mislabel_precision import expected_hits
from .plain_values import plain
from .statistics import Array, Interval

#: How a planted example differs from its test example.
KINDS = ("exact", "shift", "noise", "brightness", "flip")


@dataclass(frozen=True, repr=False, eq=False)
class LeakageResult:
    """How high the duplicates of test points rank; means over attributed models.

    Attributes:
        mean_rank: Mean over test points of the rank of their duplicate; 0 is first.
        sd_rank: Standard deviation over test points and models, the ± of the paper.
        median_rank: Median over test points and models.
        top1: Share of test points whose duplicate comes first.
        rates: Leakage rate by k. It also counts duplicates of *other* test points, for k = 1 too (`top1` does
            not). A test point has only one of its own, so a perfect detector can have a rate of 1 / k.
        chance_rank: Mean rank in a random order.
        ranks: `(n_models, n_planted)`.
        interval: Bootstrap interval of `mean_rank` over test points, for these models; None for a single test
            point, or without resamples.
        interval_top1: The same for `top1`.
        n_train: Number of training examples, with the planted ones.

    >>> result = leakage(np.array([[0.1, 0.9, 0.5]]), [2], n_resamples=0)
    >>> result.top1, result.chance_rank
    (0.0, 1.0)
    """

    mean_rank: float
    sd_rank: float
    median_rank: float
    top1: float
    rates: dict[int, float]
    chance_rank: float
    ranks: Array
    interval: Interval | None
    interval_top1: Interval | None
    n_train: int

    def __repr__(self) -> str:
        return (
            f"Mean rank {self.mean_rank:.2f} ± {self.sd_rank:.2f} of {self.n_train} "
            f"(chance {self.chance_rank:.0f}), top-1 {self.top1:.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON."""
        return plain({**vars(self), "rates": {str(k): rate for k, rate in self.rates.items()}})


def leakage(
    scores: Any,
    positions: Any,
    *,
    copies: Sequence[Any] | None = None,
    ks: Sequence[int] = (1,),
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> LeakageResult:
    """Rank of the duplicate of every test point among all training examples.

    Args:
        scores: `(n_planted, n_train)`, one row for each test point with a duplicate, or a list with one such
            matrix for each attributed model.
        positions: The training example that duplicates each test point, `(n_planted,)`.
        copies: For each test point, indices of other training examples that are copies of it. Finding one
            counts too: the best rank is taken. None means that there are none.
        ks: The k of the leakage rates.
        n_resamples: Draws of the bootstrap over test points; 0 leaves the intervals out. They do not cover
            the randomness of the training, since all test points share the model.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Shapes do not match, a score is not finite, or a position or k is out of range.

    >>> scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.1, 0.7]])  # two test points, three training examples
    >>> leakage(scores, [1, 0], n_resamples=0).mean_rank  # the duplicates come first and second
    0.5
    """
    single = not isinstance(scores, list | tuple) and np.ndim(scores) == 2
    matrices = [finite_array("scores", s) for s in ([scores] if single else scores)]
    places = np.asarray(positions)
    if not matrices or any(m.ndim != 2 or m.shape != (len(places), matrices[0].shape[1]) for m in matrices):
        raise bad_value(
            "scores", f"have shape ({len(places)}, n_train) for each model", [m.shape for m in matrices]
        )
    n_planted, n_train = matrices[0].shape
    if not n_planted or places.min() < 0 or places.max() >= n_train or len(set(places.tolist())) < n_planted:
        raise bad_value("positions", f"be distinct training indices in [0, {n_train})", places.tolist())
    if copies is not None and len(copies) != n_planted:
        raise bad_value("copies", f"hold a sequence for each of the {n_planted} test points", len(copies))
    every = [i for others in copies or () for i in np.asarray(others).tolist()]
    if every and not 0 <= min(every) <= max(every) < n_train:
        raise bad_value("copies", f"hold training indices in [0, {n_train})", every)
    for k in ks:
        if not 1 <= k <= n_train:
            raise bad_value("ks", f"be in [1, {n_train}]", k)
    if n_resamples < 0:
        raise bad_value("n_resamples", "be at least 0", n_resamples)
    own = np.zeros((n_planted, n_train), dtype=bool)
    own[np.arange(n_planted), places] = True
    for row, others in zip(own, copies or (), strict=False):
        row[np.asarray(others, dtype=np.int64)] = True
    stack = np.stack(matrices)
    best = np.where(own, stack, -np.inf).max(2, keepdims=True)
    higher, ties = (stack > best).sum(2), ((stack == best) & ~own).sum(2)
    of_own = ((stack == best) & own).sum(2)
    ranks = higher + ties / (of_own + 1)  # expected number of tied others before the first of its own
    first = np.where(higher == 0, of_own / (of_own + ties), 0.0)
    leaked = own.any(0)
    rates = {
        int(k): float(np.mean([expected_hits(row, leaked, k) / k for m in matrices for row in m])) for k in ks
    }
    intervals: list[Interval | None] = [None, None]
    if n_resamples and n_planted > 1:
        counts = np.random.default_rng(seed).multinomial(
            n_planted, np.full(n_planted, 1 / n_planted), size=n_resamples
        )
        intervals = [
            statistics.interval(counts @ values.mean(0) / n_planted, level) for values in (ranks, first)
        ]
    return LeakageResult(
        mean_rank=float(ranks.mean()),
        sd_rank=float(ranks.std(ddof=1)) if ranks.size > 1 else 0.0,
        median_rank=float(np.median(ranks)),
        top1=float(first.mean()),
        rates=rates,
        chance_rank=(n_train - 1) / 2,
        ranks=ranks,
        interval=intervals[0],
        interval_top1=intervals[1],
        n_train=n_train,
    )


def near_duplicate(x: Tensor, kind: str, *, scale: float, seed: int = 0) -> Tensor:
    """Copies of inputs that differ a little.

    Args:
        x: `(n, ...)`; for "shift" and "flip" images `(n, channels, height, width)`.
        kind: "exact"; "shift" (one pixel to the right, the left column repeated); "noise" (Gaussian, with a
            standard deviation of `scale / 10`); "brightness" (`scale / 10` added); "flip" (left and right
            exchanged, which is no duplicate for digits and letters). uint8 is rounded and stays in [0, 255].
        scale: Standard deviation of the inputs of the training set.
        seed: Seed of the noise.

    Raises:
        ValueError: The kind does not exist, is for images and the inputs are none, or is for floats and the
            inputs are integers.
    """
    if kind not in KINDS:
        raise bad_choice("kind", kind, KINDS)
    if kind in ("shift", "flip") and x.ndim != 4:
        raise bad_value(
            "kind", "be 'exact', 'noise' or 'brightness' for inputs that are not images", repr(kind)
        )
    if kind in ("noise", "brightness"):
        if x.dtype == torch.uint8:
            return near_duplicate(x.float(), kind, scale=scale, seed=seed).round().clamp(0, 255).to(x.dtype)
        if not x.is_floating_point():
            must = "be 'exact', 'shift' or 'flip' for inputs that are integers"
            raise bad_value("kind", must, f"{kind!r} for {str(x.dtype).removeprefix('torch.')}")
    if kind == "shift":
        return F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1]
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return x + 0.1 * scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if kind == "brightness":
        return x + 0.1 * scale
    return x.flip(-1) if kind == "flip" else x.clone()
