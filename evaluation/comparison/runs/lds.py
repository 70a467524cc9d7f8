"""Runs behind LDS, calibration and C.1: every method on the attributed models, against retrained halves.

The first half of the test points chooses among the grid of a method by LDS, the second half is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from tqdm.auto import tqdm

from ....subsets import Membership
from ...measures.calibration import CalibrationResult, calibration
from ...measures.cost import Cost, forward_seconds, median_cost
from ...measures.linear_datamodeling import LDSResult, difference, lds, margins
from ...measures.linearized_influence import LinearizedInfluenceResult, linearized_influence_correlation
from ...measures.statistics import Interval
from ...retraining.estimate import RetrainingEstimate
from ...retraining.plan import without_diverged
from ...tasks.task_loss import is_plain, responses
from ..shared.measure import Measure
from ..shared.methods import MethodSpec
from ..shared.score_cache import Answer, CachedMethod
from ..shared.shared import Shared


@dataclass(frozen=True)
class Row:
    """One method's figures on the reporting half of the test points.

    Attributes:
        name: The method.
        options: The grid point that the tuning half chose.
        lds: Linear datamodeling score.
        models: Names of the attributed models, in the order of `lds.per_model`.
        against_first: LDS of the first row less this one's, with its paired interval; None for the first.
        cost: Medians over models; queries are the reported test points.
        calibration: Whether effects are right in size.
        linearized: C.1 of the paper.
    """

    name: str
    options: dict[str, Any]
    lds: LDSResult
    models: list[str]
    against_first: tuple[float, Interval | None] | None
    cost: Cost
    calibration: CalibrationResult | None = None
    linearized: LinearizedInfluenceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        against = None
        if self.against_first is not None:
            value, interval = self.against_first
            spread = None if interval is None else [interval.low, interval.high]
            against = {"value": value, "interval": spread}
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
            **parts,
            "first_row_less_this": against,
        }


@dataclass(frozen=True)
class Retrained:
    """What the retrained halves say of the test points, tuning and reported.

    Attributes:
        membership: Of the halves that converged, CSR `(n_subsets, n_train)`.
        margins: Of the true class, `(n_seeds, n_subsets, n_test)`; of another loss its first response.
        left_out: Halves of which a retraining diverged.
        n_tuning: Test points that options are chosen on, the first ones.
    """

    membership: Membership
    margins: NDArray[Any]
    left_out: list[int]
    n_tuning: int


@dataclass(frozen=True)
class Reading(Measure):
    """A figure that is read off retrained halves; all of them make one row of a method, with its LDS.

    Attributes:
        name: Its field of `Row`.
        fewest_subsets: Halves that it needs at least.
    """

    name: str
    fewest_subsets: int
    on_halves = True

    @property
    def part(self) -> str:
        """All are in the same rows."""
        return "rows"

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The halves, the attributed models, and their checkpoints where a method wants them."""
        return [shared.once(_halves_estimate), *shared.model_estimates]

    def run(self, shared: Shared) -> list[Row]:
        """A row for each method; they are the same for all readings."""
        return shared.once(_rows)


READINGS = (Reading("lds", 3), Reading("calibration", 3), Reading("linearized", 6))


def retrained(shared: Shared) -> Retrained:
    """The halves, retrained where the store does not have them."""
    return shared.once(_retrained)


def chosen_options(shared: Shared) -> dict[str, Mapping[str, Any]]:
    """Options by method: what the tuning half chose, or what the question has."""
    rows = shared.once(_rows) if shared.question.on_halves else []
    return {s.name: s.grid[0] for s in shared.question.specs} | {row.name: row.options for row in rows}


def given(shared: Shared) -> dict[str, Any]:
    """What every measure that trains its own models is run with."""
    question = shared.question
    return {
        "store": question.store,
        "options": chosen_options(shared),
        "n_resamples": question.n_resamples,
        "device": question.device,
    }


def _halves_estimate(shared: Shared) -> RetrainingEstimate:
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
    question, models, _ = shared.question, shared.models, shared.checkpoints
    halves = retrained(shared)
    forward = forward_seconds(next(iter(models.values())), question.task.train)
    rows: list[Row] = []
    bar = tqdm(question.specs, desc="methods", disable=not question.show_progress)
    for spec in bar:
        bar.set_postfix_str(spec.name)
        rows.append(_row(_OneMethod(spec, shared, forward), halves, rows[0] if rows else None))
    return rows


@dataclass(frozen=True)
class _OneMethod:
    """A method on every attributed model."""

    spec: MethodSpec
    shared: Shared
    forward: float

    def build(self, options: Mapping[str, Any]) -> list[CachedMethod]:
        """With these options."""
        question, found = self.shared.question, []
        for name, model in self.shared.models.items():
            extra: dict[str, Any] = {}
            if self.spec.n_checkpoints != 1:
                kept = self.spec.epochs(question.task.training.epochs)
                states = [self.shared.checkpoints[name][epoch] for epoch in kept]
                extra["checkpoints"] = [*states, model.state_dict()]
            if self.spec.partitions:
                models = 2 * self.spec.partitions
                extra["checkpoints"] = self.shared.cross_fitted[name].checkpoints[:models]
            every = {**options, **extra}
            found.append(CachedMethod(self.spec, model, question.task, every, question.store, self.forward))
        return found

    def set(self, methods: Sequence[CachedMethod], options: Mapping[str, Any]) -> None:
        """Set what needs no new fit."""
        for kept in methods:
            for name in self.spec.settable & options.keys():
                setattr(kept.method, name, options[name])

    def answers(self, methods: Sequence[CachedMethod], points: range) -> list[Answer]:
        """`(n_test, n_train)` of each model for some test points."""
        x, y = (t[points.start : points.stop] for t in self.shared.question.task.test.tensors)
        return [method.margins((x, y)) for method in methods]


def _row(method: _OneMethod, halves: Retrained, first: Row | None) -> Row:
    shared, question = method.shared, method.shared.question
    options, methods = _chosen(method, halves)
    answers = method.answers(methods, question.reported)
    scores, reported = [a.values for a in answers], halves.margins[..., halves.n_tuning :]
    measured = (scores, halves.membership, reported)
    result = lds(*measured, n_resamples=question.n_resamples)
    shared.gallery.add(method.spec.name, methods[0], scores[0])
    calibrated = linearized = gap = None
    if "calibration" in question.measures:
        calibrated = calibration(*measured, n_resamples=question.n_resamples)
    if "linearized" in question.measures:
        linearized = linearized_influence_correlation(*measured)
    if first is not None:
        gap = difference(first.lds, result)
    return Row(
        name=method.spec.name,
        options=dict(options),
        lds=result,
        models=list(shared.models),
        against_first=None if gap is None else (gap.value, gap.interval),
        cost=median_cost([answer.cost(len(question.reported)) for answer in answers]),
        calibration=calibrated,
        linearized=linearized,
    )


def _chosen(method: _OneMethod, halves: Retrained) -> tuple[Mapping[str, Any], list[CachedMethod]]:
    """The grid point with the highest LDS on the tuning half, and the method with it on every model.

    Undefined correlations count as 0, so that silence is not the best answer; a point that ranks nothing at
    all is below every other one. A point that a method refuses, such as a damping that leaves nothing but
    rounding errors, is skipped.

    Raises:
        ValueError: The method refuses every point.
    """
    spec, tuning = method.spec, halves.margins[..., : halves.n_tuning]
    best: tuple[tuple[bool, float], Mapping[str, Any], list[CachedMethod]] | None = None
    methods: list[CachedMethod] = []
    built: Mapping[str, Any] | None = None
    refused: ValueError | None = None
    for options in spec.grid:
        fixed = {name: value for name, value in options.items() if name not in spec.settable}
        value = (False, 0.0)
        if len(spec.grid) == 1:
            methods = method.build(options)
        else:
            try:
                if fixed != built:
                    methods, built = method.build(options), fixed
                method.set(methods, options)
                scores = [a.values for a in method.answers(methods, range(halves.n_tuning))]
            except ValueError as error:
                refused, built = error, None
                continue
            found = lds(scores, halves.membership, tuning, n_resamples=0)
            value = (not found.ranks_nothing, found.undefined_as_zero)
        if best is None or value > best[0]:
            best = (value, options, methods)
    if best is None:
        assert refused is not None, "a grid has at least one point"
        raise refused
    method.set(best[2], best[1])
    return best[1], best[2]
