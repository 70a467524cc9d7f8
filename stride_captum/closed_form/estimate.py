"""Cost estimate of the closed form: a few timed batches and small products, and a count of bytes.

The time of a fit is that of a few forward passes, scaled to the number of batches, plus that of the closed
form on random features, `c_0(d) + c_1(d) n_train`. c_0, the factorization of d x d matrices, is slow for wide
features; it is then measured at d/4 and d/2 and extrapolated by a power law. Queries are timed on random
features of the right width. Bytes are counted, not measured.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..data.containers import walk
from ..data.passes import Passes
from ..influence.estimate import (
    Estimate,
    along_a_line,
    median_seconds,
    some_test_points,
    timed,
    training_examples,
)
from ..layers.activations import Tap, recording
from ..losses import Loss
from ..operators import STRIDEState
from ..residuals import one_hot
from ..system.fingerprints import weights_fingerprint
from ..system.peak_memory import PeakMemory, release_free_memory
from .curvature import CenteredMap, KroneckerCurvature
from .fit import fit_closed_form
from .memory import ClosedFormBytes, block_rows, closed_form_bytes, products_dtype
from .moments import Moments
from .operators import ClosedFormOperators
from .position_estimate import estimate_positions
from .ridge_head import RidgeHead
from .training_residuals import readable_widths

if TYPE_CHECKING:
    from ..stride import STRIDE
    from .options import ClosedForm

_BATCHES = 3
_NARROW = 768
_ROWS = (64, 2048)
_WRITTEN = 2**24


@dataclass(frozen=True)
class _Reading:
    """Measured cost of a pass over the training set.

    Attributes:
        seconds: Of the whole pass; includes the digests of the examples if there is a store.
        bytes: Memory of one forward pass.
        widths: Of the layers.
        n_classes: C.
        taps: Where features are read.
        rows: Of an example, on average: its positions that have a label, or 1.
    """

    seconds: float
    bytes: int
    widths: list[int]
    n_classes: int
    taps: list[Tap]
    rows: float = 1.0


def estimate_closed_form(method: STRIDE, n_test: int, k: int | None) -> Estimate:
    """Expected cost of a `STRIDE` with the closed form and one Kronecker term.

    Args:
        method: It is not fitted and not changed.
        n_test: Test points of the query.
        k: As for `influence`.
    """
    n, device = training_examples(method), method._work_device()
    test, times = some_test_points(method, n_test)
    with method._session() as model:
        reading = _read_a_little(method, model, n)
        if any(tap.per_position for tap in reading.taps):
            return estimate_positions(method, reading, n, n_test, k)
        fingerprint = timed(lambda: weights_fingerprint(model), device)
    d, copies = sum(reading.widths), len(method._checkpoints())
    solving = _solving_seconds(method, reading, n, device)
    query_seconds = _query_seconds(method, reading, test, k, n) * times
    stored = method.feature_store is not None
    held, most = _fit_bytes(method, reading, n)
    per_row = 4 * d if method.feature_store is None or method.feature_store.dtype == "float32" else 2 * d
    disk = n * (per_row + 4 * reading.n_classes + 8) if stored else 0
    return Estimate(
        n_train=n,
        n_test=n_test,
        k=k,
        fit_seconds=copies * (reading.seconds + fingerprint + solving),
        query_seconds=copies * query_seconds,
        fit_bytes=copies * held + most,
        query_bytes=_query_bytes(method, reading, len(test), n_test, n, k),
        disk_bytes=copies * disk,
        basis=f"{_BATCHES} batches of the training set and products of random features",
    )


def _options(method: STRIDE) -> ClosedForm:
    return cast("ClosedForm", method.operators)


def _read_a_little(method: STRIDE, model: nn.Module, n: int) -> _Reading:
    if method._precomputed is not None:
        known = method._precomputed
        return _Reading(0.0, 0, known.widths, known.logits.shape[1], method._choose_taps(model))
    method = copy.copy(method)  # reads the training set independently
    device = method._work_device()
    source = Passes(method.train_dataset, method.batch_size, method._reading()).walk()
    batches = [batch for _, batch in zip(range(_BATCHES), source, strict=False)]
    loading = timed(lambda: next(source, None), device) if len(batches) == _BATCHES else 0.0
    release_free_memory()
    with PeakMemory(device) as memory:
        choosing = timed(lambda: method._choose_taps(model), device)
        taps = method._choose_taps(model)
        with recording(model, taps) as run:

            def read(batch: ExampleBatch) -> Tensor:
                rows = method._compute(taps, run, batch)
                return torch.cat([*rows.features, rows.logits], 1)

            width, counts = read(batches[0].first(64)).shape[1], []
            times = [timed(lambda b=batch: counts.append(len(read(b))), device) for batch in batches]  # type: ignore[misc]
    widths = [tap.width for tap in taps]
    count = n / len(batches[0])
    if method.feature_store is not None:
        loading += _storing_seconds(method.feature_store.path, batches[0], sum(widths))
    return _Reading(
        choosing + count * (statistics.median(times) + loading),
        memory.bytes or 0,
        widths,
        width - sum(widths),
        taps,
        sum(counts) / sum(map(len, batches)),
    )


def _storing_seconds(path: str | Path, batch: ExampleBatch, width: int) -> float:
    """Seconds to digest one batch and to write its features."""
    values = [part for _, part in walk(batch.content) if isinstance(part, Tensor)]
    size = sum(v.numel() * v.element_size() for v in values)
    block, cpu = bytes(_WRITTEN), torch.device("cpu")
    digest = timed(lambda: hashlib.sha256(block), cpu)
    folder = next(
        parent for parent in [Path(path).absolute(), *Path(path).absolute().parents] if parent.exists()
    )
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        writing = timed(lambda: file.write(block), cpu)
    return (size * digest + 4 * width * len(batch) * writing) / _WRITTEN


def _solving_seconds(method: STRIDE, reading: _Reading, n: int, device: torch.device) -> float:
    """Of `fit_closed_form`: measured at the width d, or at d/4 and d/2 and extrapolated by powers of d."""
    d = sum(reading.widths)
    rows = sorted({min(size, n) for size in _ROWS})

    def parts(shrink: int) -> tuple[float, float]:
        widths = [max(width // shrink, 1) for width in reading.widths]
        seconds = [_closed_form_seconds(method, size, widths, reading.n_classes, device) for size in rows]
        if len(rows) == 1:
            return seconds[0], 0.0
        slope = max(seconds[1] - seconds[0], 0.0) / (rows[1] - rows[0])
        return max(seconds[0] - slope * rows[0], 0.0), slope

    if d <= _NARROW:
        fixed, slope = parts(1)
    else:
        quarter, half = parts(4), parts(2)
        fixed, slope = (_next_power(a, b, most) for a, b, most in zip(quarter, half, (3.0, 2.0), strict=True))
    return fixed + slope * n


def _next_power(first: float, second: float, most: float) -> float:
    """Next value of a power law through two values at sizes that double; the exponent is at most `most`."""
    if first <= 0 or second <= 0:
        return second * 2**most
    return second * 2 ** min(max(math.log2(second / first), 0.0), most)


def _closed_form_seconds(
    method: STRIDE, n: int, widths: Sequence[int], n_classes: int, device: torch.device
) -> float:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, sum(widths), generator=generator, device="cpu").to(device)
    logits = torch.randn(n, n_classes, generator=generator, device="cpu").to(device)
    labels = _some_labels(method.loss, n, n_classes, device)
    fit = partial(fit_closed_form, features, logits, labels, widths, _options(method), 2.0)
    return median_seconds(lambda: fit(memory_budget=method.memory_budget, loss=method.loss), device)


def _some_labels(loss: Loss, n: int, n_classes: int, device: torch.device) -> Tensor:
    """Labels that the loss accepts: classes, or 0 and 1 for each output."""
    classes = torch.arange(n, device=device) % n_classes
    return classes if loss.has_classes else one_hot(classes, torch.empty(0, n_classes, device=device))


def _query_seconds(method: STRIDE, reading: _Reading, test: Any, k: int | None, n: int) -> float:
    """Of `influence`, asked of random features at two sizes of the training set."""
    d, points = sum(reading.widths), len(test)
    like = _bytes(method, reading, n)
    low = max(2**23 // (4 * d), 2 * 2**22 // points if k else 0, 256)
    sizes = sorted({min(size, n) for size in (low, 4 * low)})
    seconds = []
    for size in sizes:
        twin = copy.copy(method)
        twin.checkpoints, twin._fitted_on, twin.n_train_ = None, None, size
        twin._states, twin._weights = [_random_state(method, reading, size, n, like)], [1.0]
        seconds.append(median_seconds(partial(twin.influence, test, k), method._work_device()))
    return float(along_a_line(sizes, seconds, n) or 0.0)


def _random_state(method: STRIDE, reading: _Reading, n: int, of: int, like: ClosedFormBytes) -> Any:
    """Closed form of n random examples with the dtypes and block sizes of one with `of` examples."""
    device, d, n_classes = method._work_device(), sum(reading.widths), reading.n_classes
    dtype = products_dtype(_options(method), of, d)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, n_classes, generator=generator, device="cpu").to(device)
    none, loss = logits[:0], method.loss
    eye, classes = (torch.eye(size, dtype=dtype, device=device) for size in (d + 1, n_classes))
    form = ClosedFormOperators(
        features=torch.randn(n, d, generator=generator, device="cpu").to(device),
        logits=logits,
        labels=_some_labels(loss, n, n_classes, device),
        widths=reading.widths,
        moments=Moments(torch.full((1, 1), float(n), device="cpu"), none, reading.widths, n),
        scale=torch.ones(d + 1, dtype=dtype, device=device),
        head=_random_head(reading, n, device, loss),
        ridge_ratio=1.0,
        curvature=KroneckerCurvature(1.0, CenteredMap(eye, 0 * eye[0], 0 * eye[0]), classes),
        kind=_options(method).residuals or "both",
        temperature=2.0,
        block_rows=block_rows(method.memory_budget, d, n_classes, dtype),
        residual_bytes=sys.maxsize if like.residuals else 0,
        loss=loss,
    )
    form.keep_residuals()
    return STRIDEState(reading.taps, form)


def _random_head(reading: _Reading, n: int, device: torch.device, loss: Loss) -> RidgeHead:
    d = sum(readable_widths(reading.widths))
    ones = torch.ones(n, dtype=torch.float64, device=device)
    weights = torch.zeros(d + 1, reading.n_classes, dtype=torch.float64, device=device)
    return RidgeHead(weights, ones, ones, ones < 0, ones, 1.0, loss)


def _bytes(method: STRIDE, reading: _Reading, n: int) -> ClosedFormBytes:
    in_memory = method.feature_store is None and method._precomputed is None
    return closed_form_bytes(
        _options(method),
        n,
        reading.widths,
        reading.n_classes,
        in_memory=in_memory,
        memory_budget=method.memory_budget,
    )


def _fit_bytes(method: STRIDE, reading: _Reading, n: int) -> tuple[int, int]:
    """Bytes that a fit keeps, and the most that it needs on top while running."""
    size = _bytes(method, reading, n)
    again = 4 * n * reading.n_classes if size.arrays else 0  # logits: per batch and concatenated
    return size.kept, max(reading.bytes + again, size.solving + size.block)


def _query_bytes(method: STRIDE, reading: _Reading, points: int, n_test: int, n: int, k: int | None) -> int:
    """Bytes of the scores, the test points, and the blocks of a streamed top-k or of residuals."""
    d, size = sum(reading.widths), _bytes(method, reading, n)
    prepared = 4 * points * (4 * d + 3 * reading.n_classes) + reading.bytes
    prepared += 0 if size.residuals else size.block
    if k is None:
        return 4 * n_test * n + prepared
    block = min(2**22, method.memory_budget // 16, points * n)
    return 4 * 3 * block + 12 * n_test * k + prepared
