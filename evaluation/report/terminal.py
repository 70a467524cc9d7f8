"""Tables of results in the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from ..system.environment import one_line
from .html import LEAST_RELIABLE

if TYPE_CHECKING:
    from ..comparison.explain import Explanation, Neighbor
    from ..comparison.results import Comparison
    from ..measures.statistics import Interval
    from ..tasks.paper_tables import PaperTable

#: Length of a column title beyond which it is wrapped.
_WRAPPED = 12
#: Width of tables that are not printed to a terminal.
_FILE_WIDTH = 240
#: Mean training residual above which a model does not fit its training set.
_UNDERFITTED = 0.25

console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = _FILE_WIDTH


def show_explanation(explanation: Explanation) -> None:
    """Print the proponents, opponents and suspects of an explanation."""
    table = Table(title=f"{explanation.task}: training examples, as label #index (score)")
    for column in ("test", "label", "says", "reliability", "proponents", "opponents"):
        table.add_column(column)
    for point in explanation.points:
        table.add_row(
            f"#{point.index}",
            str(point.label),
            str(point.predicted),
            "" if point.reliability is None else f"{point.reliability:.2f}",
            *(
                ", ".join(f"{n.label} {_named(n)} ({n.score:+.2g})" for n in neighbors[:3])
                for neighbors in (point.proponents, point.opponents)
            ),
        )
    console.print(table)
    unclear = [p for p in explanation.points if p.reliability is not None and p.reliability < LEAST_RELIABLE]
    if unclear:
        which = ", ".join(f"#{point.index}" for point in unclear)
        console.print(f"Nothing stands out for {which}: estimates of the scores agree too little.")
    suspects = ", ".join(f"{n.label} {_named(n)}" for n in explanation.suspects[:8])
    console.print(f"Most suspect labels: {suspects}")
    seconds = explanation.seconds
    console.print(
        f"Forward pass {1e3 * seconds['forward']:.0f} ms, fit {1e3 * seconds['fit']:.0f} ms, "
        f"query {1e3 * seconds['query']:.1f} ms. {one_line(explanation.environment)}"
    )


def _named(neighbor: Neighbor) -> str:
    return f"#{neighbor.index}" if neighbor.id is None else neighbor.id


def show_comparison(result: Comparison) -> None:
    """Print a table for each measure, and the summary."""
    if result.rows:
        _show_fidelity(result)
    if result.retrainings:
        _show_retrainings(result)
    _show_counterfactual(result)
    if result.mislabel:
        _print(
            "Flipped labels",
            ("method", "ranked by", "precision at M", "95%", "average precision", "AUC"),
            [
                (
                    row.name,
                    row.ranking if row.uses_influence else "uses no influence",
                    f"{row.result.precision:.3f}",
                    _interval(row.result.interval),
                    f"{row.result.average_precision:.3f}",
                    f"{row.result.auc:.3f}",
                )
                for row in result.mislabel
            ],
        )
    if result.leakage:
        _print(
            "Leaked test examples: rank of the duplicate (0 is first)",
            ("method", "planted", "kind", "normalized", "mean rank", "median", "first"),
            [
                (
                    row.name,
                    str(row.n_planted),
                    row.kind,
                    row.normalize or "no",
                    f"{row.result.mean_rank:.1f}",
                    f"{row.result.median_rank:.1f}",
                    f"{row.result.top1:.2f}",
                )
                for row in result.leakage
            ],
        )
    for name, rows in result.others.items():
        figures = [_cells(row.to_dict()) for row in rows]
        if figures:
            _print(name, tuple(figures[0]), [tuple(row.values()) for row in figures])
    for name, reason in result.skipped.items():
        console.print(f"Left out: {name}, which {reason}")
    console.print(" ".join(result.summary()))
    console.print(one_line(result.environment), result.note)


def show_printed(table: PaperTable) -> None:
    """Print a table of the paper as it is printed there."""
    rows = [(name, *figures) for name, figures in table.printed.items()]
    _print(f"Table {table.number} of the paper: {table.title}", ("method", *table.columns), rows)
    if table.differs:
        console.print(table.differs)


def _show_fidelity(result: Comparison) -> None:
    protocol = result.protocol
    _print(
        f"{result.task}: LDS, {protocol['n_subsets']} halves x {protocol['n_seeds']} retrainings, "
        f"{protocol['n_test_reported']} reported test points",
        ("method", "LDS", "95%", "worst", "each model", "first - this", "slope", "retrainings", "fit s",
         "query s", "MiB", "chosen"),
        [
            (
                row.name,
                _figure(row.lds.value),
                _interval(row.lds.interval),
                _figure(row.lds.worst),
                " ".join(map(_figure, row.lds.per_model)),
                "" if row.against_first is None else _gap(*row.against_first),
                "" if row.calibration is None else _figure(row.calibration.slope, 2),
                f"{row.trainings:g}",
                f"{row.cost.fit_seconds:.2f}",
                f"{row.cost.query_seconds:.2f}",
                "" if row.cost.peak_bytes is None else f"{row.cost.peak_bytes / 2**20:.0f}",
                ", ".join(f"{k}={v}" for k, v in row.options.items()),
            )
            for row in result.rows
        ],
    )  # fmt: skip
    console.print(f"Ceiling: {_ceiling(result.rows[0].lds.ceiling)}")
    for name, residual in protocol["models"].items():
        console.print(f"Attributed model {name}: mean training residual {residual:.4f}")
    if max(protocol["models"].values()) > _UNDERFITTED:
        console.print(
            f"These models hardly fit their training set ({_settings(protocol['training'])}): retrainings "
            "differ more by chance than by their examples. Train longer or with larger steps (--training)."
        )
    if any(row.linearized is not None for row in result.rows):
        _print(
            "C.1: scores against per-example effects",
            ("method", "Spearman", "95% (test points only)", "Pearson", "ceiling"),
            [
                (
                    row.name,
                    _figure(row.linearized.spearman),
                    _interval(row.linearized.interval),
                    _figure(row.linearized.pearson),
                    "" if row.linearized.ceiling is None else _figure(row.linearized.ceiling),
                )
                for row in result.rows
                if row.linearized is not None
            ],
        )


def _show_retrainings(result: Comparison) -> None:
    first = result.retrainings[0].name
    gap_names = (f"{first} - this", "over the last")
    columns = ("method", "answers", "retrainings", "LDS", "95%", *gap_names, "slope", "chosen")
    rows = []
    for row in result.retrainings:
        gaps = (g and _gap(g.value, g.interval) for g in (row.against_first, row.over_last))
        beside = {f"{k} of checkpoints": v for k, v in (row.checkpoint_options or {}).items()}
        chosen = {**row.options, **beside, **({"normalize": row.normalize} if row.normalize else {})}
        lds = (_figure(row.lds.value), _interval(row.lds.interval))
        what = ", ".join(f"{k}={v}" for k, v in chosen.items())
        slope = "" if row.calibration is None else _figure(row.calibration.slope, 2)
        rows.append((row.name, row.source, f"{row.trainings:g}", *lds, *(g or "" for g in gaps), slope, what))
    _print("LDS against the retraining budget, in trainings on the whole training set", columns, rows)


def _show_counterfactual(result: Comparison) -> None:
    for opponents in (False, True):
        rows = [row for row in result.counterfactual if row.result.opponents is opponents]
        if not rows:
            continue
        counts = rows[0].result.counts
        arm = "opponents" if opponents else "proponents"
        _print(
            f"Drop of the true class's probability when the top {arm} are removed "
            "[95%] (share of the class that is removed with them)",
            ("method", *(f"k={k}" for k in counts)),
            [
                (
                    row.name,
                    *(
                        f"{drop:+.3f} {_interval(spread)} ({share:.0%})"
                        for drop, spread, share in zip(
                            row.result.drop,
                            row.result.intervals or [None] * len(counts),
                            row.result.depletion,
                            strict=True,
                        )
                    ),
                )
                for row in rows
            ],
        )


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """A table of text cells, in several pieces if the terminal is too narrow.

    Args:
        title: Title.
        columns: Titles of the columns; every piece has the first one.
        rows: Cells of each row.
    """
    rows = list(rows)
    widths = [
        max(min(len(column), _WRAPPED), *(len(row[i]) for row in rows), 1) + 3
        for i, column in enumerate(columns)
    ]
    pieces: list[list[int]] = [[]]
    for i in range(1, len(columns)):
        if pieces[-1] and sum(widths[j] for j in (0, *pieces[-1], i)) + 1 > console.width:
            pieces.append([])
        pieces[-1].append(i)
    tables = []
    for n, piece in enumerate(pieces):
        table = Table(title=title if n == 0 else None)
        for i in (0, *piece):
            table.add_column(columns[i], overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in (0, *piece)))
        tables.append(table)
    return Group(*tables)


def show_measured(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], environment: dict[str, Any]
) -> None:
    """Print a table, and the machine that it was measured on."""
    _print(title, columns, rows)
    console.print(one_line(environment))


def _print(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    console.print(table_of(title, columns, rows))


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The single values of a row of a measure that was added to `MEASURES`."""
    return {
        name: _figure(value) if isinstance(value, float) else str(value)
        for name, value in row.items()
        if isinstance(value, str | int | float)
    }


def _ceiling(value: float | None) -> str:
    if value is None:
        return "needs two retrainings"
    return f"{value:.3f}" if value > 0 else "none: retrainings of one half with two seeds do not agree"


def _settings(training: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in training.items())


def _figure(value: float, digits: int = 3) -> str:
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None or not interval.defined else str(interval)


def _gap(value: float, interval: Interval | None) -> str:
    if math.isnan(value):
        return "undefined"
    defined = interval is not None and interval.defined
    spread = f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval is not None and defined else ""
    return f"{value:+.3f}{spread}"
