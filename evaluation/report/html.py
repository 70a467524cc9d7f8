"""HTML reports: self-contained pages without network access, for phones too, with a dark scheme.

The report of `compare` is written from the content of results.json alone. Every figure carries its value and
its JSON pointer in that file: `<span data-path="/rows/0/lds/value" data-value="0.53">`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape
from markupsafe import Markup
from torch import Tensor

from ...errors import bad_value
from ..system.environment import one_line
from ..system.text_files import write_text
from . import figures as plots
from .budget_figure import budgets
from .drawing import N_SERIES
from .pictures import picture

#: Format of `Comparison.to_dict()`; increased when readers of results.json must change.
FORMAT = 1
#: The method that drops of the others are compared with by default, as in `measure_counterfactual`.
_REFERENCE = "ClassRandom"
#: How many values are shown of an example that is not an image.
_FIRST_VALUES = 8
#: Reliability below which no training example stands out for a test point.
LEAST_RELIABLE = 0.5
#: Three significant digits; from 1,000 on all digits of the integer part.
_SHORT = "{:.3g}"
_UNDEFINED = "\u2013"


def write_explanation(results: Mapping[str, Any], train: Tensor, test: Tensor, path: str | Path) -> Path:
    """Write the report of `explain`: pictures of each test point, its proponents and its opponents.

    Args:
        results: `Explanation.to_dict()`.
        train: Inputs of the training set, `(n_train, ...)`, for the pictures.
        test: Inputs of the test set.
        path: File name.

    Returns:
        The path.
    """
    pictures = {"train": {}, "test": {}}  # type: dict[str, dict[int, str | None]]
    shown = list(results["suspects"])
    for point in results["points"]:
        pictures["test"][point["index"]] = picture(test[point["index"]])
        shown += [*point["proponents"], *point["opponents"]]
    for neighbor in shown:
        pictures["train"][neighbor["index"]] = picture(train[neighbor["index"]])
    return _write(
        "explanation.html.j2",
        path,
        explanation=results,
        pictures=pictures,
        values={"train": partial(_first_values, train), "test": partial(_first_values, test)},
        environment=one_line(results["environment"]),
        least_reliable=LEAST_RELIABLE,
    )


def _first_values(inputs: Tensor, index: int) -> str:
    """The first values of an example that is not an image."""
    flat = inputs[index].reshape(-1)
    shown = " ".join(f"{value:.2g}" for value in flat[:_FIRST_VALUES].tolist())
    return shown + (" …" if len(flat) > _FIRST_VALUES else "")


def write_comparison(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of `compare`.

    Args:
        results: `Comparison.to_dict()`, or results.json as `read_results` gives it.
        path: File name.

    Returns:
        The path.

    Raises:
        ValueError: The results are not those of `compare` in this format.
    """
    _check(results, "a mapping")
    rows, mislabel = results["rows"], results["mislabel"]
    return _write(
        "comparison.html.j2",
        path,
        **_shared(results),
        with_cost=False,
        plots={
            "forest": plots.forest(rows) if rows else "",
            "cost": plots.cost_against_fidelity(rows) if rows else "",
            "roc": plots.roc(mislabel) if mislabel else "",
            "budgets": budgets(results["retrainings"]) if results.get("retrainings") else "",
        },
        names=", ".join(f"{row['name']} ({_text('{:.3f}', row['lds']['value'])})" for row in rows),
        told=", ".join(mislabel[i]["name"] for i in plots.highlighted(mislabel)),
        n_series=N_SERIES,
        arms=_arms(results["counterfactual"], _reference(results)),
        reference=_reference(results),
        of_the_class=_REFERENCE,
        leaks=_leaks(results["leakage"]),
        settings=[
            *_leaves(results["protocol"], ["protocol"]),
            *_leaves(results["environment"], ["environment"]),
        ],
        environment=one_line(results["environment"]),
    )


def comparison_table(results: Mapping[str, Any]) -> str:
    """The summary and the main table of `compare` alone, for a notebook.

    Args:
        results: As for `write_comparison`.
    """
    return _template("comparison_notebook.html.j2").render(**_shared(results), with_cost=True)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json of `compare`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or not the results of `compare` in this format.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_value(
            "results", "be a results.json of `stride-captum compare`", f"{path} ({error})"
        ) from error
    _check(results, str(path))
    return dict(results)


@dataclass(frozen=True)
class Figures:
    """Formats the value at a path of results.json, marked with its value and its path.

    Attributes:
        results: The content of results.json.
    """

    results: Mapping[str, Any]

    def __call__(self, form: str, path: Sequence[str | int], scale: float | None = None) -> Markup:
        """The formatted value as HTML; a dash if it is None.

        Args:
            form: Format, such as "{:.3f}".
            path: Keys and indices.
            scale: Factor of the value that is shown; None for 1.
        """
        value: Any = self.results
        for key in path:
            value = value[key]
        shown = _text(form, value if scale is None or value is None else value * scale)
        if isinstance(value, int | float):
            shown = shown.replace("-", "\u2212")
        return Markup('<span data-path="{}" data-value="{}">{}</span>').format(
            pointer(path), json.dumps(value), shown
        )


def pointer(path: Sequence[str | int]) -> str:
    """A path as a JSON pointer (RFC 6901).

    >>> pointer(["rows", 0, "a/b"])
    '/rows/0/a~1b'
    """
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _check(results: Any, name: str) -> None:
    found = results.get("format") if isinstance(results, Mapping) else None
    if found != FORMAT:
        raise bad_value(
            "results",
            f"be the results of `compare` in format {FORMAT}",
            f"{name} with format {found!r}",
            "Run `stride-captum compare` again: what its store holds is not computed again.",
        )


def _text(form: str, value: Any) -> str:
    if value is None:
        return _UNDEFINED
    return ("{:,.0f}" if form == _SHORT and 1000 <= abs(value) < 1e9 else form).format(value)


def _shared(results: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the main table."""
    intervals = [row["lds"]["interval"] for row in results["rows"] if row["lds"]["interval"] is not None]
    level = intervals[0]["level"] if intervals else 0.95
    figures = {"num": Figures(results), "pointer": pointer, "short": _SHORT}
    return {"results": results, "level": level, **figures}


def _reference(results: Mapping[str, Any]) -> str:
    """Name of the method that drops of the others are compared with."""
    asked = results["protocol"].get("measures", {}).get("counterfactual", {})
    return str(asked.get("reference", _REFERENCE))


def _arms(rows: Sequence[Mapping[str, Any]], reference: str) -> Iterator[dict[str, Any]]:
    """Counterfactual rows with their indices, for proponents and for opponents."""
    for name, opponents in (("proponents", False), ("opponents", True)):
        own = [(i, row) for i, row in enumerate(rows) if row["result"]["opponents"] is opponents]
        if own:
            drawn = plots.counterfactual_curves([row for _, row in own], reference)
            known = any(row["name"] == reference for _, row in own)
            yield {"name": name, "rows": own, "plots": drawn, "reference": known}


def _leaks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each method and planted set, with the indices of its plain and its normalized row."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, row in enumerate(rows):
        key = (row["kind"], row["n_planted"], row["name"])
        entry = found.setdefault(
            key, {"name": row["name"], "kind": row["kind"], "any": i, "plain": None, "cosine": None}
        )
        entry["cosine" if row["normalize"] else "plain"] = i
    return list(found.values())


def _leaves(value: Any, path: list[str]) -> Iterator[list[str]]:
    """Paths of all settings, without models and their fingerprints, which have their own table."""
    if path[1:] == ["models"] or path[1:] == ["fingerprints", "models"]:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, [*path, key])
    else:
        yield path


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("stride_captum.evaluation.report", "templates"),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = json.dumps
    return environment.get_template(name)


def _write(template: str, path: str | Path, **values: Any) -> Path:
    return write_text(path, _template(template).render(**values))
