"""Inline SVG for the reports, in colors that follow the page.

Lines and texts take their colors from custom properties of the page (`--ink`, `--series-1`, ...), so that
they follow it into the dark. Where several series share a plot they differ in color, marker and dash.
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

#: Series that one plot tells apart; the report's style sheet has a color for each in both schemes.
N_SERIES = 7
#: What is drawn in these colors is given the custom properties instead.
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
    """A figure to draw on, and a list that afterwards holds it as SVG."""
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
    """SVG that can stand in a page beside others: its colors, no names but those it refers to."""
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
    """Both ends of an interval, NaN where there is none."""
    return (math.nan, math.nan) if interval is None else (number(interval["low"]), number(interval["high"]))


def number(value: float | None) -> float:
    """A figure of results.json; NaN where it is None."""
    return math.nan if value is None else value
