"""Growth of costs: power laws in N, d, K and P, next to the exponents that the paper states.

N, d and K are varied one at a time: for STRIDE on random features, without the forward pass of a model; for
the gradient methods (N only) on one small model. P is varied with the models, where d grows with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ....errors import bad_value
from .case import GRADIENT_METHODS, Case, CaseResult
from .printed import CLOSED_FORM, PROPOSITION1


@dataclass(frozen=True)
class PowerLaw:
    """`cost = constant * size^exponent`, by least squares on logarithms.

    Attributes:
        exponent: The slope.
        standard_error: Standard error of the exponent; None for two points.
        constant: The cost at size 1.
    """

    exponent: float
    standard_error: float | None
    constant: float


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> PowerLaw:
    """Fit a power law.

    Args:
        sizes: Positive numbers, at least two different ones.
        seconds: The cost at each size, positive.

    Raises:
        ValueError: A number is not positive and finite, lengths differ, or all sizes are equal.

    >>> law = fit_exponent([1, 2, 4], [3, 12, 48])
    >>> round(law.exponent, 6), round(law.constant, 6)
    (2.0, 3.0)
    """
    for name, values in (("sizes", sizes), ("seconds", seconds)):
        if len(values) != len(sizes) or not all(0 < value < math.inf for value in values):
            raise bad_value(name, f"hold {len(sizes)} positive numbers", list(values))
    if len(set(sizes)) < 2:
        raise bad_value("sizes", "hold at least two different numbers", list(sizes))
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(seconds, dtype=float))
    centered = x - x.mean()
    spread = float(centered @ centered)
    slope = float(centered @ y) / spread
    residuals = y - y.mean() - slope * centered
    error = None
    if len(x) > 2:
        error = math.sqrt(float(residuals @ residuals) / (len(x) - 2) / spread)
    return PowerLaw(slope, error, math.exp(float(y.mean() - slope * x.mean())))


@dataclass(frozen=True, kw_only=True)
class Ladders:
    """Sizes that are varied, and those of the other quantities meanwhile.

    Attributes:
        paper: N, d, K, |S_k| and T of "STRIDE paper"; T does not change exponents.
        paper_n: Values of N for "STRIDE paper".
        paper_d: Values of d.
        paper_k: Values of K. `200 K` is below N; otherwise more subsets would not give the shared phi more
            examples.
        closed: N and d of the closed form.
        closed_n: Values of N for the closed form.
        closed_d: Values of d.
        model: Depth and width of the model for the gradient methods.
        model_n: Values of N for the gradient methods.
    """

    paper: tuple[int, int, int, int, int]
    paper_n: tuple[int, ...]
    paper_d: tuple[int, ...]
    paper_k: tuple[int, ...]
    closed: tuple[int, int]
    closed_n: tuple[int, ...]
    closed_d: tuple[int, ...]
    model: tuple[int, int]
    model_n: tuple[int, ...]


CPU_LADDERS = Ladders(
    paper=(8_000, 256, 20, 50, 20),
    paper_n=(4_000, 8_000, 16_000, 32_000),
    paper_d=(128, 256, 512, 1_024),
    paper_k=(5, 10, 20, 40),
    closed=(8_000, 512),
    closed_n=(4_000, 8_000, 16_000, 32_000),
    closed_d=(256, 512, 1_024, 2_048),
    model=(4, 16),
    model_n=(250, 500, 1_000, 2_000),
)
FULL_LADDERS = Ladders(
    paper=(40_000, 1_024, 50, 100, 200),
    paper_n=(20_000, 40_000, 80_000, 160_000),
    paper_d=(512, 1_024, 2_048, 4_096),
    paper_k=(25, 50, 100, 200),
    closed=(40_000, 1_024),
    closed_n=(20_000, 40_000, 80_000, 160_000),
    closed_d=(512, 1_024, 2_048, 4_096),
    model=(4, 64),
    model_n=(1_250, 2_500, 5_000, 10_000),
)


def ladder_cases(
    ladders: Ladders, methods: Sequence[str], common: Mapping[str, Any]
) -> dict[tuple[str, str], list[tuple[int, Case]]]:
    """The cases that vary N, d and K.

    Args:
        ladders: Sizes.
        methods: Names of the methods.
        common: Fields that all cases share.

    Returns:
        By method and quantity, each size with its case. A case may be there for several quantities.
    """
    n, d, k, size, iterations = ladders.paper
    paper = Case(
        **{**common, "method": "STRIDE paper", "depth": 0, "width": d, "n_train": n, "n_subsets": k},
        subset_size=size,
        iterations=iterations,
    )
    n, d = ladders.closed
    closed = Case(**{**common, "method": "STRIDE", "depth": 0, "width": d, "n_train": n})
    sweeps = {
        ("STRIDE paper", "N"): [(v, replace(paper, n_train=v)) for v in ladders.paper_n],
        ("STRIDE paper", "d"): [(v, replace(paper, width=v)) for v in ladders.paper_d],
        ("STRIDE paper", "K"): [(v, replace(paper, n_subsets=v)) for v in ladders.paper_k],
        ("STRIDE", "N"): [(v, replace(closed, n_train=v)) for v in ladders.closed_n],
        ("STRIDE", "d"): [(v, replace(closed, width=v)) for v in ladders.closed_d],
    }
    depth, width = ladders.model
    for method in GRADIENT_METHODS:
        case = Case(**{**common, "method": method, "depth": depth, "width": width, "n_train": 1})
        sweeps[method, "N"] = [(v, replace(case, n_train=v)) for v in ladders.model_n]
    return {key: cases for key, cases in sweeps.items() if key[0] in methods}


@dataclass(frozen=True)
class Growth:
    """How one cost of a method grows with one quantity.

    Attributes:
        method: The method.
        quantity: "N", "d", "K" or "P".
        cost: "setup", "setup less forward", "inference" or "memory".
        sizes: Values of the quantity whose cases have figures.
        values: Seconds, or bytes for "memory".
        law: The fitted power law; None for fewer than three sizes.
        stated: Exponent of Proposition 1 ("-" if it states none); for the closed form that of its operations.
    """

    method: str
    quantity: str
    cost: str
    sizes: tuple[float, ...]
    values: tuple[float, ...]
    law: PowerLaw | None
    stated: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def growth(method: str, quantity: str, points: Sequence[tuple[int, CaseResult]]) -> list[Growth]:
    """Fit a power law to every cost.

    Args:
        method: The method.
        quantity: The quantity that was varied.
        points: Each size with its result; phases without figures are left out.
    """
    stated = CLOSED_FORM if method == "STRIDE" else PROPOSITION1.get(_printed_name(method), {})
    found = []
    for cost in ("setup", "setup less forward", "inference", "memory"):
        if cost == "setup less forward" and (quantity != "P" or method in GRADIENT_METHODS):
            continue
        known = [(float(size), value) for size, result in points if (value := _cost(result, cost))]
        sizes, values = tuple(size for size, _ in known), tuple(value for _, value in known)
        law = fit_exponent(sizes, values) if len(set(sizes)) > 2 else None
        said = stated.get(cost.removesuffix(" less forward"), {}).get(quantity, "-")
        found.append(Growth(method, quantity, cost, sizes, values, law, said))
    return found


def _printed_name(method: str) -> str:
    return {"STRIDE paper": "STRIDE", "DiagonalEKFAC": "EKFAC"}.get(method, method)


def _cost(result: CaseResult, cost: str) -> float | None:
    """One cost of a result; None if it is not known or not above 0."""
    setup, forward, peak = result.setup.seconds, result.forward.seconds, result.setup.peak_bytes
    if cost == "memory":
        return float(peak) if peak else None
    if cost == "inference":
        return result.inference.seconds
    if cost == "setup less forward":
        return setup - forward if setup and forward and setup > forward else None
    return setup
