"""`method.estimate()` against measurements of the same work.

Each case has its own process, in which the estimate is made first. Measured seconds are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.utils.data import TensorDataset

from ...influence.method import InfluenceMethod
from ...system.peak_memory import release_free_memory
from ..measures.cost import in_a_fresh_process
from .networks import examples, network

#: Estimated quantities.
QUANTITIES = ("fit_seconds", "query_seconds", "fit_bytes")
_REPEATS = 3


@dataclass(frozen=True)
class Case:
    """A model, a number of synthetic training examples and a method.

    Attributes:
        model: Name of a network.
        n_train: N.
        method: Name of the class.
        k: Training examples returned for each test point, None for all scores.
    """

    model: str
    n_train: int
    method: str = "STRIDE"
    k: int | None = None


CASES = (
    Case("MLP of Table 2", 5_000),
    Case("MLP of Table 2", 50_000),
    Case("MLP of Table 2", 50_000, k=100),
    Case("width 512", 5_000),
    Case("width 512", 50_000),
    Case("CNN of Table 2", 5_000),
    Case("MLP of Table 2", 5_000, "Similarity"),
    Case("MLP of Table 2", 5_000, "TracIn"),
    Case("MLP of Table 2", 5_000, "DiagonalEKFAC"),
)


@dataclass(frozen=True)
class Compared:
    """One quantity, in seconds or bytes.

    Attributes:
        estimated: Before fit and query.
        measured: During fit and query.
        ratio: estimated / measured.
    """

    estimated: float
    measured: float
    ratio: float


def bench_estimate(cases: Sequence[Case] = (), n_test: int = 100) -> list[dict[str, Any]]:
    """A row for each case: estimated, measured and their ratio.

    Args:
        cases: The cases; none means all of `CASES`.
        n_test: Test points of a query.
    """
    rows = []
    for case in cases or CASES:
        row = in_a_fresh_process(run_case, case, n_test)
        for name in QUANTITIES:
            row.update({f"{name}_{part}": value for part, value in row.pop(name).items()})
        rows.append(row)
    return rows


def run_case(case: Case, n_test: int = 100) -> dict[str, Any]:
    """Estimate, then fit and query; returns the case and a `Compared` for each quantity, as plain values."""
    model = network(case.model)
    dataset, test = examples(case.model, case.n_train, n_test)
    estimate = _method(case.method, model, dataset).estimate(n_test, case.k)
    fits, queries, peaks = [], [], []
    for _ in range(_REPEATS):
        release_free_memory()
        method = _method(case.method, model, dataset).fit()
        fits.append(method.fit_seconds_)
        peaks.append(method.peak_bytes_ or 0)
        asked = []
        for _ in range(_REPEATS):
            method.influence(test, case.k)
            asked.append(method.query_seconds_)
        queries.append(statistics.median(asked))
        del method
    found = {
        "fit_seconds": (estimate.fit_seconds, statistics.median(fits)),
        "query_seconds": (estimate.query_seconds, statistics.median(queries)),
        "fit_bytes": (float(estimate.fit_bytes or 0), float(max(peaks))),
    }
    compared = {name: asdict(Compared(a, b, a / b)) for name, (a, b) in found.items()}
    return {**asdict(case), "n_test": n_test, **compared}


def _method(name: str, model: nn.Module, dataset: TensorDataset) -> InfluenceMethod:
    from ... import STRIDE, adapters

    method: InfluenceMethod = (STRIDE if name == "STRIDE" else getattr(adapters, name))(model, dataset)
    return method
