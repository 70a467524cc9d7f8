"""Inline SVG for the reports.

Lines and texts take their colors from CSS custom properties of the page (`--ink`, `--series-1`, ...), so that
they change with its light and dark scheme. Series in one plot differ in color, marker and dash.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest number of series in one plot; the style sheet has a color for each in both schemes.
N_SERIES = 7
#: Placeholder colors, which are replaced by the custom properties of the page.
COLORS = {
    "ink": "#000001",
    "soft": "#000002",
    "line": "#000003",
    "accent": "#000004",
    **{f"series-{i + 1}": f"#0000a{i + 1}" for i in range(N_SERIES)},
}
MARKERS = "os^DvPX"
DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))


@contextmanager
def svg_figure(
    name: str, inches: tuple[float, float], layout: Literal["constrained"] | None = "constrained"
) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, and a list that holds its SVG after the `with` block."""
    import matplotlib
    from matplotlib.figure import Figure

    out: list[str] = []
    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLORS["soft"])
    names = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    texts = dict.fromkeys(names, COLORS["ink"])
    style = {
        **lines,
        **texts,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.family": "DejaVu Sans",
        "font.size": 10.0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout=layout)
        yield figure, out
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    out.append(_for_a_page(buffer.getvalue()))


def _for_a_page(svg: str) -> str:
    """SVG for a page with others: colors of the page, and no ids but those that it refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" xmlns(:xlink)?=\"[^\"]*\"", "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<svg width=\"[\d.]+pt\" height=\"[\d.]+pt\"", '<svg focusable="false"', svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r" id=\"([^\"]*)\"", lambda m: m.group() if m.group(1) in used else "", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg)


def ends_of(interval: Mapping[str, Any] | None) -> tuple[float, float]:
    """Both ends of an interval; NaN if there is none."""
    return (math.nan, math.nan) if interval is None else (number(interval["low"]), number(interval["high"]))


def number(value: float | None) -> float:
    """A number of results.json; NaN if it is None."""
    return math.nan if value is None else value
