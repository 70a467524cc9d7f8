"""Figures of the comparison report as inline SVG, drawn from the content of results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import COLORS, DASHES, MARKERS, N_SERIES, ends_of, number, svg_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def forest(rows: Sequence[Mapping[str, Any]]) -> str:
    """LDS of every method: mean and interval, single models as ticks, the ceiling and zero as lines.

    Args:
        rows: `rows` of results.json.
    """
    with svg_figure("forest", (7.5, 0.75 + 0.36 * len(rows))) as (figure, out):
        axes = figure.subplots()
        for i, row in enumerate(reversed(rows)):
            result = row["lds"]
            low, high = ends_of(result["interval"])
            axes.plot([low, high], [i, i], color=COLORS["accent"], linewidth=2.5)
            models = [math.nan if v is None else v for v in result["per_model"]]
            axes.plot(models, [i] * len(models), "|", color=COLORS["series-2"], markersize=12)
            axes.plot([number(result["value"])], [i], "o", color=COLORS["accent"], markersize=6)
        ceiling = rows[0]["lds"]["ceiling"]
        if ceiling:
            axes.axvline(ceiling, color=COLORS["soft"], linestyle="--", linewidth=1)
        axes.axvline(0, color=COLORS["soft"], linewidth=1)
        axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("LDS")
        axes.grid(axis="x", color=COLORS["line"], linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return out[0]


def cost_against_fidelity(rows: Sequence[Mapping[str, Any]]) -> str:
    """LDS against the seconds of setup and queries, on a log axis; every point is labeled.

    Args:
        rows: `rows` of results.json.

    Returns:
        The plot; "" if no LDS is defined.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    named = [row for row in rows if row["lds"]["value"] is not None]
    if not named:
        return ""
    seconds = [max(1e-6, row["cost"]["fit_seconds"] + row["cost"]["query_seconds"]) for row in named]
    values = [row["lds"]["value"] for row in named]
    known = [v for row in named for v in ends_of(row["lds"]["interval"]) if not math.isnan(v)]
    low, high = min([0.0, *values, *known]), max([0.1, *values, *known])
    room = 0.05 * (high - low)
    inches = max(3.2, 0.22 * len(named) + 0.8)
    with svg_figure("cost", (7.5, inches)) as (figure, out):
        axes = figure.subplots()
        axes.set_xscale("log")
        first, last = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
        axes.set_xlim(0.8 * 10.0**first, 1.25 * 10.0 ** max(last, first + 1))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if last - first <= 2 else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low - room, high + room)
        gap = 0.2 / (inches - 0.7) * (high - low + 2 * room)
        places = spread(values, gap, low, high)
        for row, x, y, place in zip(named, seconds, values, places, strict=True):
            ends = ends_of(row["lds"]["interval"])
            axes.plot([x, x], ends, color=COLORS["accent"], linewidth=1.2, alpha=0.5)
            axes.plot([x], [y], "o", color=COLORS["accent"], markersize=6)
            axes.annotate(
                row["name"],
                xy=(x, y),
                xytext=(1.03, place),
                textcoords=axes.get_yaxis_transform(),
                va="center",
                arrowprops={
                    "arrowstyle": "-",
                    "relpos": (0, 0.5),
                    "color": COLORS["soft"],
                    "linewidth": 0.5,
                    "shrinkA": 2,
                    "shrinkB": 5,
                },
            )
        axes.set_xlabel("setup and queries, seconds (log scale)")
        axes.set_ylabel("LDS")
        axes.grid(color=COLORS["line"], linewidth=0.6)
    return out[0]


def counterfactual_curves(rows: Sequence[Mapping[str, Any]], reference: str = "ClassRandom") -> list[str]:
    """The drop against the number removed and against the depletion of the class.

    Every method has its own plot, with the reference in gray; all plots have the same limits.

    Args:
        rows: Rows of `counterfactual` in results.json, all of proponents or all of opponents.
        reference: Name of the reference, if it is among the rows.

    Returns:
        A plot for each row.
    """
    results = [row["result"] for row in rows]
    ends = [v for r in results for v in (*r["drop"], *(e for i in r["intervals"] or () for e in ends_of(i)))]
    known = [v for v in (number(v) for v in ends) if not math.isnan(v)]
    low, high = min([0.0, *known]), max([0.05, *known])
    shares = [number(v) for r in results for v in r["depletion"]]
    deepest = max([0.01, *(v for v in shares if not math.isnan(v))])
    other = next((r for row, r in zip(rows, results, strict=True) if row["name"] == reference), None)
    plots = []
    for row, result in zip(rows, results, strict=True):
        arm = "opponents" if result["opponents"] else "proponents"
        with svg_figure(f"drop-{arm}-{row['name']}", (5.6, 2.5), layout=None) as (figure, out):
            figure.subplots_adjust(left=0.13, right=0.98, bottom=0.19, top=0.97, wspace=0.06)
            by_count, by_share = figure.subplots(1, 2, sharey=True)
            if other is not None and other is not result:
                _curves(by_count, by_share, other, "soft", "--")
            _curves(by_count, by_share, result, "accent", "-")
            for axes in (by_count, by_share):
                axes.axhline(0, color=COLORS["soft"], linewidth=0.8)
                axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
                axes.grid(color=COLORS["line"], linewidth=0.6)
            by_count.set_xlim(0, 1.03 * max(c for r in results for c in r["counts"]))
            by_share.set_xlim(0, 103 * deepest)
            by_count.xaxis.get_major_locator().set_params(integer=True)
            by_count.set_xlabel("examples removed")
            by_share.set_xlabel("class removed, %")
            by_count.set_ylabel("drop of the probability")
        plots.append(out[0])
    return plots


def roc(rows: Sequence[Mapping[str, Any]]) -> str:
    """ROC curves of flipped labels: the best ranking of each method, at most `N_SERIES` in color.

    Detectors that use no influence are dashed. All other rankings are thin gray lines.

    Args:
        rows: `mislabel` of results.json.
    """
    told = highlighted(rows)
    with svg_figure("roc", (8.4, 4.2)) as (figure, out):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=COLORS["soft"], linewidth=0.8, linestyle=":")
        for i, row in enumerate(rows):
            if i not in told:
                grid = np.linspace(0, 1, len(row["result"]["roc"]))
                axes.plot(grid, row["result"]["roc"], color=COLORS["line"], linewidth=1)
        for place, i in enumerate(told):
            row = rows[i]
            curve = row["result"]["roc"]
            dashed = not row["uses_influence"]
            axes.plot(
                np.linspace(0, 1, len(curve)),
                curve,
                color=COLORS[f"series-{place + 1}"],
                linestyle=DASHES[1] if dashed else "-",
                marker=MARKERS[place],
                markevery=(3 + 2 * place, 18),
                markersize=5,
                linewidth=1.8,
                label=f"{row['name']} ({'no influence' if dashed else row['ranking']})",
            )
        axes.set_xlabel("share of correct labels that are inspected")
        axes.set_ylabel("share of flipped labels that are found")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.03)
        axes.grid(color=COLORS["line"], linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3, fontsize=9)
    return out[0]


def highlighted(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the rows of `mislabel` with a color in the ROC plot: the best of each name, by AUC.

    Args:
        rows: `mislabel` of results.json.

    Returns:
        At most `N_SERIES`.

    >>> result = {"auc": 0.5}
    >>> highlighted([{"name": "a", "result": {"auc": 0.6}}, {"name": "a", "result": {"auc": 0.9}}])
    [1]
    """
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["result"]["auc"])
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(rows[i]["name"], i)
    return list(first.values())[:N_SERIES]


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions of labels near the values, at least a gap apart (least squares), and inside the limits.

    Args:
        values: The values.
        gap: Smallest distance of neighbors; smaller if the labels do not fit otherwise.
        low: Lower limit.
        high: Upper limit.

    >>> spread([0.5, 0.5, 0.9], 0.2, 0.0, 1.0)
    [0.4, 0.6, 0.9]
    """
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    # With z_i = y_i - i * gap, z must not decrease: pool neighbors that violate this.
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([values[i] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, n = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * n) / (blocks[-1][1] + n), blocks[-1][1] + n]
    flat = [mean for mean, n in blocks for _ in range(int(n))]
    places = [0.0] * len(values)
    for rank, i in enumerate(order):
        lowest, highest = low, high - (len(values) - 1) * gap
        places[i] = round(min(max(flat[rank], lowest), highest) + rank * gap, 12)
    return places


def _curves(by_count: Axes, by_share: Axes, result: Mapping[str, Any], color: str, dash: Any) -> None:
    """Draw one method's drop with its band on both axes, from (0, 0) on."""
    drop = [0.0, *map(number, result["drop"])]
    ends: NDArray[np.float64] = np.array([(0.0, 0.0), *map(ends_of, result["intervals"] or ())])
    shares = [0.0, *(100 * number(v) for v in result["depletion"])]
    for axes, x in ((by_count, [0, *result["counts"]]), (by_share, shares)):
        axes.plot(x, drop, color=COLORS[color], linestyle=dash, marker="o", markersize=4, linewidth=1.8)
        if result["intervals"]:
            axes.fill_between(x, *ends.T, color=COLORS[color], alpha=0.18, linewidth=0)
