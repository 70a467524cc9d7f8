"""Results of a comparison: rows, a summary in sentences, JSON and pandas frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import bad_choice
from ..measures.plain_values import plain
from ..report.html import FORMAT, comparison_table
from .runs.budget_row import BudgetRow
from .runs.counterfactual import CounterfactualRow
from .runs.lds import Row
from .runs.leakage import LeakageRow
from .runs.mislabel import MislabelRow

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        task: Name of the task.
        note: Warnings that must be read with the figures.
        rows: One per method: LDS, cost, calibration and C.1; empty if no halves were retrained.
        protocol: Subsets, seeds, test points and models.
        environment: Versions and hardware.
        counterfactual: One per method and arm, if measured.
        mislabel: One per method and way of ranking, if measured.
        leakage: One per method and planted set, if measured.
        skipped: By name of a method that was left out, the reason.
        gallery: The top training examples of each method for a few test points, with pictures.
        others: Rows of measures that were added to `MEASURES`, by name of the measure.
        retrainings: One per method and retraining budget, if measured.

    >>> Comparison("digits-300", "", rows=[], protocol={}, environment={}).frame("leakage").shape
    (0, 0)
    """

    task: str
    note: str
    rows: list[Row]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    counterfactual: list[CounterfactualRow] = field(default_factory=list)
    mislabel: list[MislabelRow] = field(default_factory=list)
    leakage: list[LeakageRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    gallery: dict[str, Any] | None = None
    others: dict[str, list[Any]] = field(default_factory=dict)
    retrainings: list[BudgetRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as `results.schema.json` describes them."""
        parts = {name: [row.to_dict() for row in rows] for name, rows in self._parts().items()}
        others = {name: parts.pop(name) for name in self.others}
        return plain(
            {
                "format": FORMAT,
                "task": self.task,
                "note": self.note,
                "summary": self.summary(),
                "protocol": self.protocol,
                "environment": self.environment,
                "skipped": self.skipped,
                "rows": parts.pop("lds"),
                **parts,
                "gallery": self.gallery,
                **({"others": others} if others else {}),
            }
        )

    def _parts(self) -> dict[str, Sequence[Any]]:
        """Rows by measure."""
        return {
            "lds": self.rows,
            "counterfactual": self.counterfactual,
            "mislabel": self.mislabel,
            "leakage": self.leakage,
            **({"retrainings": self.retrainings} if self.retrainings else {}),
            **self.others,
        }

    def summary(self) -> list[str]:
        """Sentences that sum up; a method is called better only if the paired interval excludes zero."""
        if not self.rows and self.retrainings:
            best = max(self.retrainings, key=lambda row: row.lds.undefined_as_zero)
            return [
                "LDS was measured against the retraining budget alone: "
                f"it is highest, {best.lds.undefined_as_zero:.3f}, for {best.name} with "
                f"{_SOURCES[best.source]} at a budget of {best.trainings:g}."
            ]
        if not self.rows:
            return ["No halves were retrained: LDS was not measured, and no options were chosen."]
        first = self.rows[0]
        silent = [row.name for row in self.rows if row.lds.ranks_nothing]
        sentences = []
        if not first.lds.ranks_nothing:
            ceiling = first.lds.ceiling
            share = f", {first.lds.value / ceiling:.0%} of the ceiling" if ceiling else ""
            sentences = [f"{first.name} has an LDS of {first.lds.value:.3f}{share}."]
            sentences += _against_first([row for row in self.rows[1:] if row.name not in silent])
        if silent:
            verb, whose = ("ranks", "its") if len(silent) == 1 else ("rank", "their")
            sentences.append(
                f"{_names(silent)} {verb} nothing: {whose} LDS is undefined for all "
                f"{first.lds.per_test.shape[1]} test points."
            )
        partly = [row.name for row in self.rows if row.lds.undefined and row.name not in silent]
        if partly:
            sentences.append(
                f"LDS is undefined for some test points of {_names(partly)}: these count as 0 against other "
                "methods."
            )
        left_out = self.protocol.get("left_out")
        if left_out:
            n = len(left_out) + self.protocol["n_subsets"]
            sentences.append(f"{len(left_out)} of {n} halves are left out: a retraining of each diverged.")
        return sentences

    def frame(self, measure: str = "lds") -> pandas.DataFrame:
        """The figures of one measure as a pandas frame.

        Args:
            measure: "lds" (with cost, and calibration and C.1 if measured), "retrainings", "counterfactual",
                "mislabel", "leakage" or one of `others`.

        Raises:
            ValueError: There is no such measure.
        """
        import pandas

        parts = self._parts()
        if measure not in parts:
            raise bad_choice("measure", measure, list(parts))
        return pandas.json_normalize([row.to_dict() for row in parts[measure]])

    def __repr__(self) -> str:
        lines = [f"{row.name}: {row.lds!r}" for row in self.rows]
        return "\n".join([f"{self.task}. {' '.join(self.summary())}", *lines])

    def _repr_html_(self) -> str:
        return comparison_table(self.to_dict())


#: What the scores of a row at a retraining budget are averaged over.
_SOURCES = {
    "last checkpoint": "the attributed model",
    "checkpoints": "checkpoints",
    "cross-fitted": "models of parts",
    "checkpoints and parts": "checkpoints and models of parts",
    "refined": "models of parts (refined)",
}


def _against_first(others: Sequence[Row]) -> list[str]:
    ahead, behind, open_ = [], [], []
    intervals = [row.against_first[1] for row in others if row.against_first is not None]
    if intervals and all(interval is None for interval in intervals):
        return ["No intervals were asked for: no method is called better."]
    for row, interval in zip(others, intervals, strict=True):
        if interval is not None and interval.low > 0:
            ahead.append(row.name)
        elif interval is not None and interval.high < 0:
            behind.append(row.name)
        else:
            open_.append(row.name)
    sentences = []
    if ahead:
        sentences.append(f"It predicts retrainings better than {_names(ahead)}.")
    if behind:
        sentences.append(f"It predicts them worse than {_names(behind)}.")
    if open_:
        sentences.append(f"Between it and {_names(open_)} these data do not decide.")
    return sentences


def _names(names: Sequence[str]) -> str:
    comma = "; " if any("," in name for name in names) else ", "
    return names[0] if len(names) == 1 else f"{comma.join(names[:-1])} and {names[-1]}"
