"""LDS, calibration and C.1: every method on the attributed models, against models of retrained halves.

The options of a method are chosen by LDS on the first half of the test points; the second half is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from ....system.garbage import cheap_collections
from ....system.peak_memory import release_free_memory
from ...measures.calibration import CalibrationResult, calibration
from ...measures.cost import Cost, forward_seconds, median_cost
from ...measures.linear_datamodeling import LDSResult, difference, lds, margins
from ...measures.linearized_influence import LinearizedInfluenceResult, linearized_influence_correlation
from ...measures.statistics import Interval
from ...retraining.estimate import RetrainingEstimate
from ...retraining.plan import without_diverged
from ...retraining.task_parts import HALVES
from ...tasks.task_loss import is_plain, responses
from ..shared.measure import Measure
from ..shared.shared import Shared
from .on_models import OnModels, Retrained, choose


@dataclass(frozen=True)
class Row:
    """One method's figures on the reporting half of the test points.

    Attributes:
        name: The method.
        options: The grid point that was chosen.
        lds: Linear datamodeling score.
        models: Names of the attributed models, in the order of `lds.per_model`.
        against_first: LDS of the first row minus this one's, with its paired interval; None for the first.
        cost: Medians over models; queries are the reported test points.
        trainings: Cost of further models for this row, in trainings on the whole training set.
        calibration: Whether predicted effects have the right size; None if not measured.
        linearized: C.1 of the paper; None if not measured.
    """

    name: str
    options: dict[str, Any]
    lds: LDSResult
    models: list[str]
    against_first: tuple[float, Interval | None] | None
    cost: Cost
    trainings: float = 0.0
    calibration: CalibrationResult | None = None
    linearized: LinearizedInfluenceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {
            name: None if part is None else part.to_dict()
            for name, part in (
                ("lds", self.lds),
                ("cost", self.cost),
                ("calibration", self.calibration),
                ("linearized", self.linearized),
            )
        }
        return {
            "name": self.name,
            "options": self.options,
            "models": self.models,
            "trainings": self.trainings,
            **parts,
            "first_row_less_this": None if self.against_first is None else plain_gap(*self.against_first),
        }


def plain_gap(value: float, interval: Interval | None) -> dict[str, Any]:
    """A difference and the ends of its interval, as plain values for JSON."""
    return {"value": value, "interval": None if interval is None else [interval.low, interval.high]}


@dataclass(frozen=True)
class Reading(Measure):
    """A measure on the retrained halves. All of these share one row for each method.

    Attributes:
        name: Its field of `Row`.
        fewest_subsets: Smallest number of halves.
    """

    name: str
    fewest_subsets: int
    on_halves = True

    @property
    def part(self) -> str:
        """The rows that all of these measures share."""
        return "rows"

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The halves, the attributed models, and their checkpoints if a method needs them."""
        return [shared.once(halves_estimate), *shared.model_estimates]

    def run(self, shared: Shared) -> list[Row]:
        """A row for each method, computed once for all of these measures."""
        return shared.once(_rows)


READINGS = (Reading("lds", 3), Reading("calibration", 3), Reading("linearized", 6))


def retrained(shared: Shared) -> Retrained:
    """The retrained halves; those that the store does not hold are trained."""
    return shared.once(_retrained)


def forward_pass(shared: Shared) -> float:
    """Seconds of one forward pass over the training set."""
    return shared.once(_forward)


def _forward(shared: Shared) -> float:
    return forward_seconds(next(iter(shared.models.values())), shared.question.task.train)


def chosen_options(shared: Shared) -> dict[str, Mapping[str, Any]]:
    """Options by method: those that were chosen by LDS, or those of the question."""
    rows = shared.once(_rows) if shared.question.on_halves else []
    return {s.name: s.grid[0] for s in shared.question.specs} | {row.name: row.options for row in rows}


def options_so_far(shared: Shared) -> dict[str, Mapping[str, Any]]:
    """`chosen_options`, without those of a grid from which no measure has had to choose."""
    if shared.so_far(_rows) is not None or not shared.question.on_halves:
        return chosen_options(shared)
    return {spec.name: spec.grid[0] for spec in shared.question.specs if len(spec.grid) == 1}


def given(shared: Shared) -> dict[str, Any]:
    """Arguments that every measure gets that trains its own models."""
    question = shared.question
    return {
        "store": question.store,
        "options": chosen_options(shared),
        "n_resamples": question.n_resamples,
        "device": question.device,
    }


def halves_estimate(shared: Shared) -> RetrainingEstimate:
    """Cost of retraining the halves."""
    question = shared.question
    found = question.halves.estimate(question.n_jobs, engine=question.engine, device=question.device)
    return replace(found, purpose="LDS")


def _retrained(shared: Shared) -> Retrained:
    question, plan = shared.question, shared.question.halves
    logits = plan.execute(
        question.n_jobs, question.show_progress, engine=question.engine, device=question.device
    )
    membership, logits, left_out = without_diverged(plan, logits)
    labels = question.task.test.tensors[1][: plan.n_test]
    loss = question.task.loss
    measured = margins(logits, labels.numpy()) if is_plain(loss) else responses(loss, logits, labels)
    return Retrained(membership, measured, left_out, question.reported.start)


def _rows(shared: Shared) -> list[Row]:
    question, halves, forward = shared.question, retrained(shared), forward_pass(shared)
    rows: list[Row] = []
    bar = tqdm(question.specs, desc="methods", disable=not question.show_progress)
    for spec in bar:
        bar.set_postfix_str(spec.name)
        method = OnModels(spec, shared, forward, partial(shared.checkpoints_of, spec))
        release_free_memory()  # of the row before
        with cheap_collections():  # one before each fit
            rows.append(_row(method, halves, rows[0] if rows else None))
    return rows


def _row(method: OnModels, halves: Retrained, first: Row | None) -> Row:
    shared, question = method.shared, method.shared.question
    chosen = choose(method, halves)
    [answers] = method.answers(chosen.methods, question.reported).values()
    scores = [a.values for a in answers]
    measured = (scores, halves.membership, halves.reported)
    result = lds(*measured, n_resamples=question.n_resamples)
    shared.gallery.add(method.spec.name, chosen.methods[0], scores[0])
    calibrated = linearized = gap = None
    if "calibration" in question.measures:
        calibrated = calibration(*measured, n_resamples=question.n_resamples)
    if "linearized" in question.measures:
        linearized = linearized_influence_correlation(*measured)
    if first is not None:
        gap = difference(first.lds, result)
    return Row(
        name=method.spec.name,
        options=dict(chosen.options),
        trainings=HALVES.trainings(method.spec.partitions, question.task.training.epochs),
        lds=result,
        models=list(shared.models),
        against_first=None if gap is None else (gap.value, gap.interval),
        cost=median_cost([answer.cost(len(question.reported)) for answer in answers]),
        calibration=calibrated,
        linearized=linearized,
    )
