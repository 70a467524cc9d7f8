"""Tables of `stride-captum bench` in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.core import CoreRow
from ..report.terminal import show_measured
from ..system.environment import describe
from .output import Console
from .results import write_json


def show_core(rows: Sequence[CoreRow], environment: dict[str, Any]) -> None:
    """Print the rows of `bench core`."""
    title = "Medians of one run; in the titles the goal of each ratio: at most (<) or at least (>)"
    columns = (
        "model", "N", "d", "n_test", "fit / floor (<1.5)", "dense / floor (<1.5)", "top-100 / floor (<2)",
        "4 checkpoints / 4 queries (<1.1)",
        "one point: x TracInCPFast (>50)", "n_test points: x TracInCPFast (>3)", "fit MiB", "formula MiB",
    )  # fmt: skip
    cells = [
        (
            row.model,
            f"{row.n_train:,}",
            str(row.n_features),
            f"{row.n_test:,}",
            f"{row.fit_ratio:.2f} ({row.fit:.3f} s)",
            f"{row.dense_ratio:.2f} ({row.dense:.3f} s)",
            f"{row.top100_ratio:.2f} ({row.top100:.3f} s)",
            f"{row.ensemble_ratio:.2f} ({row.ensemble:.3f} s)",
            f"{row.single_speedup:.0f} ({1e3 * row.single:.1f} ms, {1e3 * row.tracin_single:.0f} ms)",
            f"{row.many_speedup:.1f} ({row.tracin_many:.2f} s)",
            f"{row.fit_bytes / 2**20:.0f}",
            f"{row.formula_bytes / 2**20:.0f}",
        )
        for row in rows
    ]
    show_measured(title, columns, cells, environment)


def show_peers(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Print the rows of `bench peers`."""
    title = "Medians of one run; in brackets the ratio to feature similarity on the same layers"
    columns = (
        "network", "N", "d", "method", "fit s (forward passes)", "test points",
        "query ms", "top-k ms", "one point ms",
    )  # fmt: skip
    cells = [
        (
            row["network"],
            f"{row['n_train']:,}",
            str(row["n_features"]),
            row["method"],
            f"{row['fit']:.3f} ({row['fit_ratio']:.1f})",
            str(row["n_test"]),
            *(f"{1e3 * row[key]:.1f} ({row[key + '_ratio']:.2f})" for key in ("query", "top_k", "one_point")),
        )
        for row in rows
    ]
    show_measured(title, columns, cells, environment)


def show_rows(title: str, rows: Sequence[dict[str, Any]], path: Path, voice: Console) -> None:
    """Write rows of plain values as JSON to a file, and print them as a table."""
    environment = describe()

    def show() -> None:
        columns = [column.replace("_", " ") for column in rows[0]]
        cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
        show_measured(title, columns, cells, environment)

    voice.results(write_json(path, {"environment": environment, "rows": list(rows)}), show)
