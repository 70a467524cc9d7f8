"""Memory budgets: size in bytes, and number of rows that fit.

A budget is a number of bytes, text such as "4GiB", or "auto": an eighth of the memory that is free on the
working device, rounded down to a power of two, so that small changes of the free memory do not change the
chunk sizes. Chunk sizes affect results only through rounding.

The budget bounds the temporary arrays of one block of work. The arrays that a method keeps (features, logits,
operators) and returns come on top; `method.estimate()` adds them up. Residuals of the closed form are kept
only if they fit the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_value

#: "auto" is the free memory of the device divided by this.
AUTO_SHARE = 8
#: Rows of one block of work, at most: more are not faster.
MOST_ROWS = 8192
#: Bytes of the default budget.
DEFAULT_BUDGET = 2**28
_UNKNOWN_FREE = 2**31
_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}


def parse_bytes(amount: int | str, device: torch.device | str = "cpu", name: str = "memory_budget") -> int:
    """A memory amount in bytes.

    Args:
        amount: A number of bytes, text with a unit, or "auto".
        device: Device whose free memory "auto" uses.
        name: What an error calls it.

    Raises:
        ValueError: It is none of these, or below one byte.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 MB"), parse_bytes(10)
    (2147483648, 1500000, 10)
    """
    number: Any = amount
    if isinstance(amount, str):
        text, factor = amount.strip().lower(), 1
        if text == "auto":
            return auto_bytes(free_bytes(torch.device(device)))
        for unit, size in _UNITS.items():
            if text.endswith(unit):
                text, factor = text.removesuffix(unit), size
                break
        try:
            number = float(text) * factor
        except ValueError:
            number = None
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 1 <= number < float("inf"):
        must = "be a positive number of bytes or text such as '512MiB', or 'auto'"
        raise bad_value(name, must, repr(amount))
    return int(number)


def auto_bytes(free: int) -> int:
    """Budget "auto" for `free` bytes: an eighth, rounded down to a power of two.

    >>> auto_bytes(20 * 2**30) == 2 * 2**30
    True
    """
    return 1 << (max(free // AUTO_SHARE, 1).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes; on a CPU, available memory within the cgroup limit.

    2 GiB if the system does not report it.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [size for size in (_available(), _group_free()) if size is not None]
    return min(found, default=_UNKNOWN_FREE)


def rows_that_fit(budget: int, bytes_per_row: int, most: int | None = MOST_ROWS) -> int:
    """How many rows of `bytes_per_row` a budget holds: at least one, at most `most`.

    >>> rows_that_fit(1000, 300), rows_that_fit(1000, 300, most=2), rows_that_fit(10, 300)
    (3, 2, 1)
    """
    rows = max(budget // max(bytes_per_row, 1), 1)
    return rows if most is None else min(rows, most)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def spread_rows(n: int, k: int) -> Tensor:
    """`k` of `n` rows, spread evenly; all rows if there are fewer. On the CPU."""
    rows = torch.linspace(0, n - 1, min(n, k), dtype=torch.float64, device="cpu")
    return rows.round().long().unique()  # type: ignore[no-any-return]


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _group_free() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)


__all__ = ["AUTO_SHARE", "MOST_ROWS", "auto_bytes", "blocks", "free_bytes", "parse_bytes", "rows_that_fit"]
