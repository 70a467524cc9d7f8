"""Cost estimate of the closed form with several positions an example: counted bytes, small runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from ..influence.estimate import Estimate, from_small_runs
from .memory import PositionBytes, position_bytes, products_dtype

if TYPE_CHECKING:
    from ..stride import STRIDE
    from .options import ClosedForm


def estimate_positions(method: STRIDE, reading: Any, n: int, n_test: int, k: int | None) -> Estimate:
    """Expected cost of a `STRIDE` with the closed form, where an example has several positions.

    Args:
        method: It is not fitted and not changed.
        reading: Of a few batches: `bytes`, `widths`, `n_classes`, and the `rows` of an example on average.
        n: Training examples.
        n_test: Test points of the query.
        k: As for `influence`.
    """
    options, copies = cast("ClosedForm", method.operators), len(method._checkpoints())
    size = position_bytes(
        options,
        n,
        round(n * reading.rows),
        reading.widths,
        reading.n_classes,
        in_memory=method.feature_store is None,
        memory_budget=method.memory_budget,
    )
    found = from_small_runs(method.without_store(), n_test, k)
    again = size.rows.arrays  # per batch and concatenated
    most = max(reading.bytes + again, size.rows.solving + size.rows.block, size.at_the_end)
    basis = f"{found.basis}; bytes for {reading.rows:.3g} positions an example in the form {size.form!r}"
    return replace(
        found,
        fit_bytes=copies * size.kept + most,
        disk_bytes=copies * _disk_bytes(method, reading, n),
        query_bytes=_query_bytes(method, reading, size, n_test, n, k),
        basis=basis,
    )


def _disk_bytes(method: STRIDE, reading: Any, n: int) -> int:
    """Bytes of features, logits, labels and places of all rows in the store, and of how many there are."""
    if method.feature_store is None:
        return 0
    per_feature = 4 if method.feature_store.dtype == "float32" else 2
    each = per_feature * sum(reading.widths) + 4 * reading.n_classes + 8 + 4
    return int(round(n * reading.rows) * each + 4 * n)


def _query_bytes(
    method: STRIDE, reading: Any, size: PositionBytes, n_test: int, n: int, k: int | None
) -> int:
    """Bytes of the scores, of the rows and matrices of test points, and of a block of training examples."""
    d, n_classes = sum(reading.widths), reading.n_classes
    itemsize = products_dtype(cast("ClosedForm", method.operators), round(n * reading.rows), d).itemsize
    points = min(n_test, method._test_rows())
    each = reading.rows * 4 * (d + n_classes) + 2 * (d + 1) * n_classes
    prepared = min(int(points * each * itemsize), method.memory_budget) + reading.bytes
    if size.form == "rows":
        prepared += min(int(n * each * itemsize), method.memory_budget)
    scores = 4 * n_test * n
    if k is not None:
        scores = 4 * 3 * min(2**22, method.memory_budget // 16, points * n) + 12 * n_test * k
    return int(scores + prepared)
