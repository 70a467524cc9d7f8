"""Plots for notebooks: values with their spread, curves, points, histograms, matrices, drops.

Every function returns a matplotlib figure, which a notebook displays if it is the last expression of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..comparison.runs.budget_row import BudgetRow
from ..comparison.runs.counterfactual import CounterfactualRow
from ..measures.statistics import Interval
from ..report.budget_figure import draw_budgets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACCENT, _SOFT = "#1f5fa8", "#777777"
_SERIES = ("#00679e", "#b54708", "#007a57", "#a1357b", "#7d6100", "#5546b0", "#4b5560")
_DPI = 72
_MARKERS = "os^DvPX"


def show_values(
    values: Mapping[str, Any],
    *,
    label: str,
    lines: Mapping[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Named values, one in each row, with their spread.

    Args:
        values: By name: a number; several numbers, shown as ticks with their mean; or a pair of a number and
            its `Interval` (or None).
        label: Label of the axis.
        lines: Vertical lines, by name.
        log: Whether the axis is logarithmic.

    >>> figure = show_values({"STRIDE": (0.58, Interval(0.55, 0.61)), "seeds": [0.5, 0.6]}, label="LDS")
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['0.55', '0.58']
    """
    figure = new_figure(7.0, 0.9 + 0.34 * len(values))
    axes = figure.subplots()
    for row, given in enumerate(reversed(list(values.values()))):
        ticks: list[float] = []
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Interval | None):
            value, spread = given
            if spread is not None:
                axes.plot([spread.low, spread.high], [row, row], color=_ACCENT, linewidth=2.5)
        else:
            ticks = np.ravel(given).astype(float).tolist()
            value = float(np.mean(ticks))
        if len(ticks) > 1:
            axes.plot(ticks, [row] * len(ticks), "|", color=_SOFT, markersize=11)
        axes.plot([value], [row], "o", color=_ACCENT, markersize=6)
        if not np.isfinite(value):
            continue
        axes.annotate(short(value), (value, row), (0, 6), textcoords="offset points", ha="center", size=8)
    for i, (name, x) in enumerate((lines or {}).items()):
        axes.axvline(x, color=_SOFT, linestyle=("--", ":", "-.")[i % 3], linewidth=1, label=name)
    if lines:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_yticks(range(len(values)), list(values)[::-1])
    axes.set_ylim(-0.6, len(values) - 0.3)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    tidy(axes, "x")
    return figure


def show_curves(
    curves: Mapping[str, tuple[Any, Any]], *, x: str, y: str, log: Sequence[str] = (), legend: bool = True
) -> Figure:
    """Named curves in one plot.

    Args:
        curves: By name: x and y, `(n,)` each.
        x: Label of the x axis.
        y: Label of the y axis.
        log: Logarithmic axes: "x", "y".
        legend: Whether to show the names.
    """
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    for i, (name, (along, up)) in enumerate(curves.items()):
        across, height = np.asarray(along), np.asarray(up)
        marker = _MARKERS[i % 7] if across.size <= 30 else ""
        axes.plot(across, height, marker=marker, markersize=4, label=name)
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes, "both")
    return figure


def show_matrix(matrix: Any, *, x: str, y: str, label: str = "") -> Figure:
    """A matrix as an image.

    Args:
        matrix: `(n_rows, n_columns)`.
        x: Label of the columns.
        y: Label of the rows.
        label: Label of the color bar; "" draws none.
    """
    values = np.asarray(matrix)
    figure = new_figure(7.0, 2.6)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if label:
        figure.colorbar(image, ax=axes, label=label)
    return figure


def show_points(points: Mapping[str, tuple[Any, Any]], *, x: str, y: str, share_x: bool = False) -> Figure:
    """Named sets of points, each in its own plot, with a shared y axis.

    Args:
        points: By name: x and y, `(n,)` each.
        x: Label of the x axes.
        y: Label of the y axis.
        share_x: Whether the x axis is shared, too.
    """
    figure = new_figure(2.9 * len(points) + 0.4, 2.9)
    axes = figure.subplots(1, len(points), sharey=True, sharex=share_x, squeeze=False)[0]
    for one, (name, (along, up)) in zip(axes, points.items(), strict=True):
        one.plot(np.ravel(along), np.ravel(up), "o", color=_ACCENT, markersize=4, alpha=0.6)
        one.set_title(name, size=10)
        one.set_xlabel(x)
        tidy(one, "both")
    axes[0].set_ylabel(y)
    return figure


def show_histograms(values: Mapping[str, Any], *, label: str, bins: int = 40) -> Figure:
    """Named sets of values, each in its own histogram; bars are shares of the set.

    Args:
        values: Arrays of any shape, by name.
        label: Label of the shared axis.
        bins: Number of bins over the common range.
    """
    every = {name: np.ravel(given) for name, given in values.items()}
    edges = np.linspace(min(v.min() for v in every.values()), max(v.max() for v in every.values()), bins + 1)
    figure = new_figure(7.0, 0.5 + 1.0 * len(every))
    axes = figure.subplots(len(every), 1, sharex=True, squeeze=False)[:, 0]
    for i, (one, (name, given)) in enumerate(zip(axes, every.items(), strict=True)):
        one.hist(given, edges, weights=np.full(len(given), 1 / len(given)), color=f"C{i}")
        one.set_title(f"{name} ({len(given)})", size=9, loc="left")
        tidy(one, "x")
    axes[-1].set_xlabel(label)
    return figure


def show_drops(rows: Sequence[CounterfactualRow]) -> Figure:
    """Drop of the true class's probability, against the number and against the share of the class removed.

    If opponents were removed, which are mostly of other classes, the second plot is left out.

    Args:
        rows: From `measure_counterfactual`; bands are its intervals.
    """
    shares = not any(row.result.opponents for row in rows)  # opponents are of other classes
    figure = new_figure(9.0 if shares else 6.0, 3.4)
    panels = figure.subplots(1, 2 if shares else 1, sharey=True, squeeze=False)[0]
    for i, row in enumerate(rows):
        result, color = row.result, f"C{i}"
        for axes, x in zip(
            panels, ([0, *result.counts], [0.0, *(100 * v for v in result.depletion)]), strict=False
        ):
            axes.plot(x, [0.0, *result.drop], color=color, marker=_MARKERS[i % 7], ms=5, label=row.name)
            if result.intervals is not None:
                low, high = ([0.0, *(getattr(v, end) for v in result.intervals)] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    for axes, label in zip(panels, ("examples removed", "share of the class removed, %"), strict=False):
        axes.axhline(0, color=_SOFT, linewidth=0.8)
        axes.set_xlabel(label)
        tidy(axes, "both")
    panels[0].set_ylabel("drop of the probability")
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def short(value: float) -> str:
    """Three digits, with a true minus sign.

    >>> short(-0.01234), short(1234.5)
    ('−0.0123', '1,230')
    """
    text = f"{value:,.3g}" if 1e-4 <= abs(value) < 1e3 or value == 0 else f"{value:.1e}"
    if 1e3 <= abs(value) < 1e9:
        text = f"{float(f'{value:.3g}'):,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def show_budgets(rows: Sequence[BudgetRow]) -> Figure:
    """LDS against the retraining budget: a line for each method, its interval as a band.

    Args:
        rows: `Comparison.retrainings`.
    """
    figure = new_figure(7.6, 3.6)
    plain = [row.to_dict() for row in rows]
    draw_budgets(figure.subplots(), plain, _SERIES, _SOFT, "#e7e4de")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, which a notebook displays once, as the value of its cell."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    plt.close(figure)  # an open figure would be displayed again at the end of the cell
    return figure


def tidy(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Thin grid lines behind the data, and a frame on two sides."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
