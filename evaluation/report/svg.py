"""SVG for a page: drawn by matplotlib, with the colors of the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

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


@contextmanager
def inline_svg(
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
