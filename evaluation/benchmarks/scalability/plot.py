"""Plot of the scalability benchmark: setup, query and memory against parameters, as in Figure 2."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .case import SCALED_METHODS, CaseResult
from .network import n_parameters
from .printed import TABLE5

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = dict(zip(SCALED_METHODS, ("#0b6e4f", "#3a86c8", "#d1495b", "#8d3b8a", "#b8860b"), strict=True))
_MARKERS = dict(zip(SCALED_METHODS, "os^Dv", strict=True))


def scalability_plot(results: Sequence[CaseResult]) -> str:
    """An SVG of three panels on log axes, with the forward pass and the paper's seconds of setup.

    A cross marks a model on which a method failed, at the height of its last figure, with M for memory or T
    for time.

    Args:
        results: Results for all models, by number of parameters.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scalability", "font.size": 9.0}):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        setup, query, memory = figure.subplots(1, 3)
        methods = [method for method in SCALED_METHODS if any(r.case.method == method for r in results)]
        for method in methods:
            own = [result for result in results if result.case.method == method]
            _draw(setup, method, own, lambda r: r.setup.seconds, ("forward", "setup"))
            _draw(query, method, own, lambda r: r.inference.seconds, ("inference",))
            _draw(memory, method, own, _peak, ("forward", "setup"))
        forward = {r.n_params: r.forward.seconds for r in results if r.forward.seconds}
        setup.plot(list(forward), list(forward.values()), ":", color="black", label="forward pass")
        _draw_printed(setup)
        titles = ("setup, s", "query of all test points, s", "peak memory added, bytes")
        for axes, title in zip((setup, query, memory), titles, strict=True):
            axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=title)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        handles, labels = setup.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw(
    axes: Axes,
    method: str,
    results: Sequence[CaseResult],
    value: Callable[[CaseResult], float | None],
    phases: Sequence[str],
) -> None:
    """Draw the line of a method, and crosses where one of the phases failed."""
    color = _COLORS[method]
    known = [(r.n_params, v) for r in results if (v := value(r))]
    sizes, values = [size for size, _ in known], [v for _, v in known]
    axes.plot(sizes, values, marker=_MARKERS[method], color=color, label=method, markersize=4)
    height = values[-1] if values else 1.0
    for result in results:
        statuses = {getattr(result, phase).status for phase in phases}
        for status, letter in (("out of memory", "M"), ("over time limit", "T")):
            if status in statuses:
                axes.plot([result.n_params], [height], "x", color=color, markersize=8)
                axes.annotate(letter, (result.n_params, height), (4, 4), textcoords="offset points")


def _draw_printed(axes: Axes) -> None:
    """Draw the seconds of Table 5, in gray."""
    sizes = [n_parameters(row.depth, row.width) for row in TABLE5]
    for name, dash in (("stride", "--"), ("ekfac", "-.")):
        known = [
            (size, float(getattr(row, name)))
            for size, row in zip(sizes, TABLE5, strict=True)
            if getattr(row, name) != "OOM"
        ]
        label = f"paper: {name.upper()} (H100)"
        axes.plot(*zip(*known, strict=True), dash, color="#888888", label=label, linewidth=1)


def _peak(result: CaseResult) -> float | None:
    return result.setup.peak_bytes or None
