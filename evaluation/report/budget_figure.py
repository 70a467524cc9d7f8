"""Figure of LDS against the retraining budget, for reports and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import COLORS, DASHES, MARKERS, N_SERIES, ends_of, number, svg_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: Sources that share the places of "cross-fitted", and how their lines are drawn.
_BESIDE = {"checkpoints and parts": DASHES[2], "refined": DASHES[1]}
_LABELS = {"checkpoints and parts": "with checkpoints", "refined": "refined"}


def budget_steps(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Source and cost of each budget, from the cheapest to the most expensive.

    Args:
        rows: `retrainings` of results.json.

    >>> costs = {"cross-fitted": 1.0, "last checkpoint": 0.0}
    >>> budget_steps([{"source": source, "trainings": cost} for source, cost in costs.items()])
    [('last checkpoint', 0.0), ('cross-fitted', 1.0)]
    """
    order = {"last checkpoint": 0, "checkpoints": 1}
    found = {(row["source"], row["trainings"]) for row in rows if row["source"] not in _BESIDE}
    return sorted(found, key=lambda step: (step[1], order.get(step[0], 2)))


def budgets(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure as SVG (`draw_budgets`).

    Args:
        rows: `retrainings` of results.json.
    """
    colors = [COLORS[f"series-{i + 1}"] for i in range(N_SERIES)]
    with svg_figure("budgets", (8.4, 4.2)) as (figure, out):
        draw_budgets(figure.subplots(), rows, colors, COLORS["soft"], COLORS["line"])
    return out[0]


def draw_budgets(
    axes: Axes, rows: Sequence[Mapping[str, Any]], colors: Sequence[str], soft: str, grid: str
) -> None:
    """Draw a line for each method with its interval as a band, and lines of the same color beside it.

    Dotted are models of parts together with the checkpoints, dashed are refined scores.

    Budgets are evenly spaced. Methods beyond the number of colors are not drawn.

    Args:
        axes: Axes to draw on.
        rows: `retrainings` of results.json.
        colors: Colors of the methods.
        soft: Color of the ceiling.
        grid: Color of the grid.
    """
    steps = budget_steps(rows)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for name, color, marker in zip(names, colors, MARKERS, strict=False):
        for beside in ("", *_BESIDE):
            own = [r for r in rows if r["name"] == name and beside == _beside(r["source"])]
            if not own:
                continue
            kinds = [("cross-fitted" if beside else row["source"], row["trainings"]) for row in own]
            places = [steps.index(kind) for kind in kinds]
            axes.plot(
                places,
                [number(row["lds"]["value"]) for row in own],
                color=color,
                linestyle=_BESIDE.get(beside, "-"),
                marker=marker,
                markersize=5,
                linewidth=1.8,
                label=(f"{name}, {_LABELS[beside]}" if beside else name).replace(", ", ",\n"),
            )
            if not beside and all(row["lds"]["interval"] for row in own):
                low, high = zip(*(ends_of(row["lds"]["interval"]) for row in own), strict=True)
                axes.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)
    ceiling = rows[0]["lds"]["ceiling"]
    if ceiling:
        axes.axhline(ceiling, color=soft, linestyle="--", linewidth=1)
    labels = [source.replace(" ", "\n") if not cost else f"{cost:g}" for source, cost in steps]
    axes.set_xticks(range(len(steps)), labels)
    axes.set_xlabel("no retraining, then models of parts: cost in trainings on everything")
    axes.set_ylabel("LDS")
    axes.grid(color=grid, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, handlelength=3, fontsize=9)


def _beside(source: str) -> str:
    """A source with a line of its own; "" for the others."""
    return source if source in _BESIDE else ""
