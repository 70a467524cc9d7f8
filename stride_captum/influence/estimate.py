"""Estimates of what a method will cost, extrapolated from small runs.

Any method is fitted and asked twice on the first few of its training examples. Seconds and bytes are
taken to grow in a straight line with n_train from there. That is what methods do whose work is a pass over
the training set plus something that depends on the model alone.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from ..data import inputs as data
from ..data.batch import ExampleBatch
from ..data.passes import Passes
from ..errors import bad_value
from ..system.devices import synchronize
from ..system.peak_memory import PeakMemory, release_free_memory
from .checkpoints.checkpoint import weights_of

if TYPE_CHECKING:
    from .method import InfluenceMethod

Method = TypeVar("Method", bound="InfluenceMethod")
_SMALL = 1024
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `fit` and one `influence` of `n_test` points are expected to cost.

    Attributes:
        n_train: Number of training examples.
        n_test: Test points of the query.
        k: Training examples returned for each, None for all scores.
        fit_seconds: Of `fit`.
        query_seconds: Of `influence`.
        fit_bytes: Memory that `fit` adds at its peak; None where the system does not tell.
        query_bytes: Memory that `influence` adds at its peak, the scores included.
        disk_bytes: What `fit` writes to disk.
        basis: What was run to find out.

    >>> print(Estimate(n_train=50_000, n_test=100, k=None, fit_seconds=2.5, query_seconds=0.04,
    ...                fit_bytes=3 * 2**29, query_bytes=2**24, disk_bytes=0, basis="two small runs"))
    fit:   about 2.5 s, 1.5 GiB of memory, nothing on disk (50,000 training examples)
    query: about 0.04 s, 16 MiB of memory (100 test points, all scores)
    From two small runs.
    """

    n_train: int
    n_test: int
    k: int | None
    fit_seconds: float
    query_seconds: float
    fit_bytes: int | None
    query_bytes: int | None
    disk_bytes: int
    basis: str

    def __str__(self) -> str:
        disk = f"{readable(self.disk_bytes)} on disk" if self.disk_bytes else "nothing on disk"
        what = "all scores" if self.k is None else f"top {self.k}"
        return (
            f"fit:   about {self.fit_seconds:.2g} s, {readable(self.fit_bytes)} of memory, {disk} "
            f"({self.n_train:,} training examples)\n"
            f"query: about {self.query_seconds:.2g} s, {readable(self.query_bytes)} of memory "
            f"({self.n_test:,} test points, {what})\nFrom {self.basis}."
        )

    __repr__ = __str__


def readable(size: int | None) -> str:
    """A size with a unit.

    >>> readable(3 * 2**20), readable(1200), readable(None)
    ('3 MiB', '1.17 KiB', 'an unknown amount')
    """
    if size is None:
        return "an unknown amount"
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def from_small_runs(method: Method, n_test: int, k: int | None) -> Estimate:
    """Fit and ask copies of a method on its first training examples, and extrapolate in n_train.

    Args:
        method: Any method; it is not fitted and not changed.
        n_test: Test points of the query.
        k: As for `influence`.

    Raises:
        ValueError: The length of the training set is not known.
    """
    n_train = training_examples(method)
    high = min(n_train, 4 * min(_SMALL, max(method.batch_size, 64)))
    sizes = sorted({max(high // 4, 2), high})
    test, times = some_test_points(method, n_test)
    fits: list[tuple[float, int | None]] = []
    asks: list[tuple[float, int | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a fit warns of, it says when it runs
        warm = shortened(method, sizes[0]).fit()  # the first run of all imports and allocates
        # A method that has seen positions has the loss of all those of an example.
        reading = replace(test.reading, loss=warm.loss)
        test = ExampleBatch(test.content, reading, argument=test.argument)
        warm.influence(test[:1], k)
        for n in sizes:
            twin, device = shortened(method, n), method._work_device()
            fits.append(measured(twin.fit, device))
            asks.append(measured(lambda t=twin: t.influence(test, k), device))  # type: ignore[misc]
    fit, query = (
        [along_a_line(sizes, [part[i] for part in parts], n_train) for i in (0, 1)] for parts in (fits, asks)
    )
    return Estimate(
        n_train=n_train,
        n_test=n_test,
        k=k,
        fit_seconds=float(fit[0] or 0),
        query_seconds=float(query[0] or 0) * times,
        fit_bytes=None if fit[1] is None else int(fit[1]),
        query_bytes=None if query[1] is None else int(query[1]),
        disk_bytes=0,
        basis=f"runs on {' and '.join(f'{n:,}' for n in sizes)} training examples",
    )


def measured(run: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Median seconds of a few calls, and the memory that the first one adds."""
    release_free_memory()
    with PeakMemory(device) as memory:
        first = timed(run, device)
    return median_seconds(run, device, first), memory.bytes


def median_seconds(run: Callable[[], Any], device: torch.device, *before: float) -> float:
    """Median of three calls, or of fewer where they take more than a second; `before` are calls made."""
    seconds = list(before)
    while not seconds or (len(seconds) < _REPEATS and sum(seconds) < 1.0):
        seconds.append(timed(run, device))
    return statistics.median(seconds)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, work that a GPU still has to do included."""
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def along_a_line(sizes: list[int], values: list[Any], n: int) -> float | None:
    """The value at `n` of the line through one or two measurements; it does not fall.

    >>> along_a_line([10, 20], [3.0, 5.0], 100), along_a_line([10, 20], [5.0, 4.0], 100)
    (21.0, 5.0)
    """
    if any(value is None for value in values):
        return None
    if len(sizes) == 1 or values[1] <= values[0]:
        return float(max(values))
    slope = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return float(values[1] + slope * (n - sizes[1]))


def training_examples(method: InfluenceMethod) -> int:
    """N without a pass over the training set.

    Raises:
        ValueError: The training set is a stream.
    """
    n = data.count_examples(method.train_dataset)
    if n is None:
        raise bad_value("train_dataset", "have a length for an estimate", "a stream")
    return n


def some_test_points(method: InfluenceMethod, n_test: int) -> tuple[ExampleBatch, float]:
    """A batch that stands for the test points, made of training examples, and how many of it they are."""
    passes = Passes(method.train_dataset, min(n_test, method.batch_size), method._reading())
    batch, n = passes.first(), min(n_test, _SMALL)
    rows = torch.arange(n, device="cpu") % len(batch)
    return batch[rows], n_test / n


def shortened(method: Method, n: int) -> Method:
    """A copy of a method, not fitted, whose training set is the first n examples."""
    twin = copy.copy(method)
    twin._states, twin.train_dataset = None, first_examples(method.train_dataset, n)
    if method.checkpoints is not None:
        twin.checkpoints = [weights_of(checkpoint) for checkpoint in method.checkpoints]
    return twin


def first_examples(source: Any, n: int) -> Any:
    """The first n examples of a data set or loader."""
    if isinstance(source, DataLoader):
        size = source.batch_size
        if size is None:  # a batch sampler of the user's
            size = len(next(iter(source.batch_sampler or [[0]])))
        first = Subset(source.dataset, range(min(n, len(source.dataset))))  # type: ignore[arg-type]
        return DataLoader(first, batch_size=size, collate_fn=source.collate_fn)
    if type(source) is TensorDataset:
        return TensorDataset(*(tensor[:n] for tensor in source.tensors))
    return Subset(source, range(min(n, len(source))))


__all__ = ["Estimate", "from_small_runs", "readable"]
