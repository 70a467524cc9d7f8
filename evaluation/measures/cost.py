"""Cost of a method: setup, queries and memory, in units of one forward pass over the training set.

    setup ratio      = fit seconds / F
    query ratio      = query seconds / (n_queries F)

with F the seconds of one forward pass of the model over the training set, measured in the same run: seconds
belong to a machine, ratios travel.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data.batch import ExampleBatch
from ...data.passes import Passes
from ...data.reading import Reading
from ...errors import bad_value
from ...influence.method import InfluenceMethod
from ...system.devices import CPU, device_of, synchronize
from ...system.preserve_state import preserve_state
from .plain_values import plain

#: Makes a method: `build(model, train_dataset, options)`.
Build = Callable[[nn.Module, Any, Mapping[str, Any]], InfluenceMethod]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method cost.

    Attributes:
        fit_seconds: Setup, once.
        query_seconds: All `n_queries` test points together.
        n_queries: Number of test points.
        forward_seconds: One forward pass over the training set, F.
        peak_bytes: The most memory that the method held at once; None where it does not say.

    >>> cost = Cost(fit_seconds=3.0, query_seconds=4.0, n_queries=8, forward_seconds=1.5)
    >>> cost.fit_ratio, cost.seconds_per_query
    (2.0, 0.5)
    """

    fit_seconds: float
    query_seconds: float
    n_queries: int
    forward_seconds: float
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.n_queries < 1:
            raise bad_value("n_queries", "be at least 1", self.n_queries)
        if not self.forward_seconds > 0:
            raise bad_value("forward_seconds", "be positive", self.forward_seconds)

    @property
    def fit_ratio(self) -> float:
        """Setup in forward passes over the training set."""
        return self.fit_seconds / self.forward_seconds

    @property
    def seconds_per_query(self) -> float:
        """Of one test point, setup not counted."""
        return self.query_seconds / self.n_queries

    @property
    def query_ratio(self) -> float:
        """One test point in forward passes over the training set, setup not counted."""
        return self.seconds_per_query / self.forward_seconds

    def to_dict(self) -> dict[str, Any]:
        """Seconds, bytes and ratios as plain values for JSON."""
        return plain({**vars(self), "fit_ratio": self.fit_ratio, "query_ratio": self.query_ratio})


def median_cost(costs: Sequence[Cost]) -> Cost:
    """One cost for several models or repetitions: medians, and the highest peak memory.

    Raises:
        ValueError: There is none, or they are not about equally many queries.
    """
    if len({cost.n_queries for cost in costs}) != 1:
        raise bad_value("costs", "be of one number of queries", [cost.n_queries for cost in costs])
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return Cost(
        fit_seconds=float(np.median([cost.fit_seconds for cost in costs])),
        query_seconds=float(np.median([cost.query_seconds for cost in costs])),
        n_queries=costs[0].n_queries,
        forward_seconds=float(np.median([cost.forward_seconds for cost in costs])),
        peak_bytes=max(peaks, default=None),
    )


def cost_of(method: InfluenceMethod, n_queries: int, forward_seconds: float) -> Cost:
    """Read the cost of a method that has been fitted and has answered `n_queries` test points.

    Args:
        method: A method after `influence`.
        n_queries: Test points of its last query.
        forward_seconds: F, from `forward_seconds`.

    Raises:
        ValueError: It has not been fitted, or has answered no query.
    """
    found: dict[str, float] = {}
    for name in ("fit_seconds_", "query_seconds_"):
        value = getattr(method, name, None)
        if value is None:
            raise bad_value("method", f"have `{name}`", "none", "Call `influence` on it first.")
        found[name.rstrip("_")] = float(value)
    peak = getattr(method, "peak_bytes_", None)
    return Cost(
        **found,
        n_queries=n_queries,
        forward_seconds=forward_seconds,
        peak_bytes=None if peak is None else int(peak),
    )


def median_seconds(
    run: Callable[[], Any],
    repeats: int = 3,
    before: Callable[[], Any] = lambda: None,
    warm_up: bool = True,
    device: torch.device = CPU,
) -> float:
    """Median seconds of some calls, after one that is not counted.

    Args:
        run: What is timed.
        repeats: Calls that are timed.
        before: Called before each of them, and not timed.
        warm_up: Whether there is one that is not counted; what takes minutes needs none.
        device: Where the work is done: a call has ended when the device has.
    """
    seconds = []
    for _ in range(repeats + warm_up):
        before()
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[warm_up:]))


def in_a_fresh_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """What a module-level function returns in a process of its own, whose memory and caches are its own.

    Args:
        run: The function.
        arguments: Given to it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def forward_seconds(model: nn.Module, dataset: Any, *, batch_size: int = 1024, repeats: int = 3) -> float:
    """Median seconds of one forward pass of a model over a data set, after one that is not counted.

    Args:
        model: Evaluated in eval mode, without gradients, where it is, and left as it was.
        dataset: Dataset or DataLoader.
        batch_size: Examples a batch, where the data set does not decide.
        repeats: Passes that are timed.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise bad_value("repeats", "be at least 1", repeats)
    device = device_of(model)

    def forward() -> None:
        for batch in Passes(dataset, batch_size, Reading(), "dataset").walk():
            batch.to(device).outputs(model)

    with preserve_state(model), torch.no_grad():
        return median_seconds(forward, repeats, device=device)


def measure_cost(
    methods: Mapping[str, Build],
    model: nn.Module,
    dataset: Any,
    test: Any,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    repeats: int = 3,
    batch_size: int = 1024,
) -> dict[str, Cost]:
    """Fit every method and ask it about the same test points, next to a forward pass of the training set.

    Args:
        methods: By name, how each is built.
        model: The attributed model.
        dataset: Its training set.
        test: A batch `(inputs..., labels)`.
        options: By name, what `build` is given beside the model and the data.
        repeats: Each method is built, fitted and asked so often, and the median is reported.
        batch_size: Examples a batch of the forward pass.

    Returns:
        The cost of each method; peak memory is that of the dearest repetition.

    Raises:
        ValueError: `repeats` is below 1.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> from stride_captum.adapters import Similarity
    >>> from stride_captum.evaluation.comparison.shared.methods import adapter
    >>> costs = measure_cost({"Similarity": adapter(Similarity)}, model, train, test.tensors, repeats=1)
    >>> costs["Similarity"].n_queries
    7
    """
    costs = {}
    for name, build in methods.items():
        forward = forward_seconds(model, dataset, batch_size=batch_size, repeats=repeats)
        runs = []
        for _ in range(repeats):
            method = build(model, dataset, (options or {}).get(name, {})).fit()
            method.influence(test, response="margin", target="label")
            runs.append(cost_of(method, len(ExampleBatch(test, Reading())), forward))
        costs[name] = median_cost(runs)
    return costs
