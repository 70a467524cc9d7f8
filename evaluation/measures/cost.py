"""Cost of a method: setup, queries and memory, in units of one forward pass over the training set.

    setup ratio      = fit seconds / F
    query ratio      = query seconds / (n_queries F)

where F is the time of one forward pass of the model over the training set, measured in the same run. Ratios
can be compared between machines; seconds cannot.
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

#: `build(model, train_dataset, options)` returns a method.
Build = Callable[[nn.Module, Any, Mapping[str, Any]], InfluenceMethod]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one method.

    Attributes:
        fit_seconds: Setup.
        query_seconds: Scores of all `n_queries` test points together.
        n_queries: Number of test points.
        forward_seconds: F, one forward pass over the training set.
        peak_bytes: Peak memory of the method; None if it was not measured.

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
        """Setup, in forward passes over the training set."""
        return self.fit_seconds / self.forward_seconds

    @property
    def seconds_per_query(self) -> float:
        """Seconds for each test point, without setup."""
        return self.query_seconds / self.n_queries

    @property
    def query_ratio(self) -> float:
        """One test point without setup, in forward passes over the training set."""
        return self.seconds_per_query / self.forward_seconds

    def to_dict(self) -> dict[str, Any]:
        """Seconds, bytes and ratios as plain values for JSON."""
        return plain({**vars(self), "fit_ratio": self.fit_ratio, "query_ratio": self.query_ratio})


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Cost over several models or repetitions: median times, and the highest peak memory.

    Raises:
        ValueError: There is no cost, or the numbers of queries differ.
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
    """Cost of a method that has been fitted and queried.

    Args:
        method: The method.
        n_queries: Number of test points of its last query.
        forward_seconds: F, from `forward_seconds`.

    Raises:
        ValueError: It has not been fitted or queried.
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
    """Median seconds of a call.

    Args:
        run: The call.
        repeats: How often it is timed.
        before: Called before each of them, and not timed.
        warm_up: Whether to call it once more at the beginning, untimed.
        device: Where the work is done; the device is synchronized after each call.
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
    """Call a function in a new process, so that memory and caches of earlier work do not matter.

    Args:
        run: A module-level function.
        arguments: Its arguments.

    Returns:
        What it returns.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def forward_seconds(model: nn.Module, dataset: Any, *, batch_size: int = 1024, repeats: int = 3) -> float:
    """Median seconds of one forward pass of a model over a data set, after one untimed pass.

    Args:
        model: Run in eval mode on its own device, without gradients; its state does not change.
        dataset: Dataset or DataLoader.
        batch_size: Examples in a batch, unless `dataset` is a DataLoader.
        repeats: Number of timed passes.

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
    """Fit and query every method on the same test points, and time a forward pass over the training set.

    Args:
        methods: Builders by name.
        model: The attributed model.
        dataset: Its training set.
        test: A batch `(inputs..., labels)`.
        options: By name of a method, the options that its builder is given.
        repeats: How often each method is built, fitted and queried; medians are reported.
        batch_size: Examples in a batch of the forward pass.

    Returns:
        The cost of each method by name; peak memory is the highest of all repetitions.

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
