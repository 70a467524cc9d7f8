"""Owns the HTML report: one self-contained page, no network, readable on a phone and in the dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from torch import Tensor

from .comparison import Comparison
from .environment import one_line
from .explanation import Explanation
from .tasks import Task

_SIDE = 96


def write_explanation(explanation: Explanation, task: Task, path: str | Path) -> Path:
    """Write the report of `explain`: pictures of each test point, its proponents and its opponents.

    Args:
        explanation: What `explain` found.
        task: Where the pictures come from.
        path: File name.

    Returns:
        The path.
    """
    train, test = task.train.tensors[0], task.test.tensors[0]
    pictures = {"train": {}, "test": {}}  # type: dict[str, dict[int, str | None]]
    for point in explanation.points:
        pictures["test"][point.index] = picture(test[point.index])
        for neighbour in (*point.proponents, *point.opponents):
            pictures["train"][neighbour.index] = picture(train[neighbour.index])
    for neighbour in explanation.suspects:
        pictures["train"][neighbour.index] = picture(train[neighbour.index])
    return _write(
        "explanation.html.j2",
        path,
        explanation=explanation,
        pictures=pictures,
        environment=one_line(explanation.environment),
    )


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of `compare`: the table and a forest plot of LDS with intervals and ceiling."""
    return _write(
        "comparison.html.j2",
        path,
        comparison=comparison,
        forest=_forest(comparison),
        environment=one_line(comparison.environment),
    )


def picture(example: Tensor) -> str | None:
    """A PNG data URI of one example, or None where it is not an image.

    Args:
        example: `(1, h, w)`, `(3, h, w)` or `(h, w)`; values are stretched to the range of the image.
    """
    from matplotlib import image

    if example.ndim == 3 and example.shape[0] == 3:
        pixels = example.permute(1, 2, 0)
    elif example.ndim == 3 and example.shape[0] == 1:
        pixels = 1 - _stretch(example[0]) if example.shape[-1] <= 28 else example[0]
    elif example.ndim == 2:
        pixels = example
    else:
        return None
    pixels = _stretch(pixels)
    factor = max(1, _SIDE // max(pixels.shape[:2]))
    pixels = pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    buffer = io.BytesIO()
    image.imsave(buffer, pixels.numpy(), format="png", cmap="gray", vmin=0, vmax=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _stretch(pixels: Tensor) -> Tensor:
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low) if high > low else torch.zeros_like(pixels)


def _forest(comparison: Comparison) -> str:
    """Forest plot as inline SVG whose text and lines take the colour of the page."""
    from matplotlib.figure import Figure

    rows = comparison.rows[::-1]
    figure = Figure(figsize=(7.5, 0.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        interval = row.lds.interval
        if interval is not None:
            axes.plot([interval.low, interval.high], [i, i], color="#0a7d8c", linewidth=2.5)
        axes.plot(row.lds.per_model, [i] * len(row.lds.per_model), "|", color="#b8560f", markersize=11)
        axes.plot([row.lds.value], [i], "o", color="#0a7d8c")
    ceiling = comparison.rows[0].lds.ceiling
    if ceiling is not None:
        axes.axvline(ceiling, color="#808080", linestyle="--", linewidth=1)
    axes.axvline(0, color="#808080", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlabel("LDS: mean and 95% interval; bars are single models; the dashed line is the ceiling")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def _write(template: str, path: str | Path, **values: Any) -> Path:
    environment = Environment(
        loader=PackageLoader("stride_captum.evaluation", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8")
    return path
