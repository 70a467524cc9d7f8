"""One method at all retraining budgets, with the checkpoints and models that all methods share.

A method that has out-of-sample residuals uses those of `ClosedForm`. Its damping, and whether the scores of
each checkpoint are divided by their standard deviation, are chosen by LDS on the first half of the test
points: once for the model alone, once for checkpoints along the training, and once for models of parts, with
those of the first partition. Where both stand side by side each kind keeps its damping, and whether scores
are divided is chosen once more, for both together. Options that were given are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....influence.checkpoints.averages import SUMMED, weight_of_parts
from ....recovery import refine
from ...measures.calibration import CalibrationResult, calibration
from ...measures.cost import Cost, median_cost
from ...measures.linear_datamodeling import LDSDifference, LDSResult, lds
from ...retraining.attributed_models import log_epochs
from ...retraining.task_parts import Split
from ...tasks.task_loss import loss_of_methods
from ..shared.grids import for_loss, plain_numbers
from ..shared.methods import METHODS, MethodSpec
from ..shared.question import Question
from ..shared.score_cache import Answer
from ..shared.shared import Shared
from .lds import forward_pass, plain_gap, retrained
from .on_models import OnModels, choose

#: Suffix of the rows with out-of-sample residuals.
OUT_OF_SAMPLE = ", out-of-sample residuals"
#: Smallest number of models that `refine` takes.
_FEWEST_MEASURED = 3
#: Attributes of a row that are not plain values.
_NESTED = ("lds", "calibration", "cost", "against_first", "over_last")


@dataclass(frozen=True)
class BudgetRow:
    """One method at one budget.

    Attributes:
        name: The method; with its suffix if it has out-of-sample residuals in place of the published ones.
        source: What its scores are averaged over: "last checkpoint", "checkpoints", "cross-fitted" (models of
            parts), "checkpoints and parts" (the parts with `weight_of_parts`) or "refined" (the latter, or
            cross-fitted scores where there are no checkpoints, corrected by the responses of the models of
            parts).
        trainings: The budget: cost of the further models, in trainings on the whole training set.
        n_models: Models or checkpoints whose scores are averaged.
        options: The options that were chosen; those of the parts, if there are checkpoints beside them.
        checkpoint_options: Options of the checkpoints beside models of parts; None without both.
        normalize: As for `influence`, chosen likewise; of parts and checkpoints together if there are both.
        lds: Linear datamodeling score.
        calibration: Whether predicted effects have the right size on the same halves; None for scores
            without a unit (`normalize="deviation"`).
        against_first: LDS of the first method with the same models minus this one's; None for the first.
        over_last: This LDS minus that of the same method on the last checkpoint; None for the last
            checkpoint.
        cost: Medians over the attributed models.
    """

    name: str
    source: str
    trainings: float
    n_models: int
    options: Mapping[str, Any]
    checkpoint_options: Mapping[str, Any] | None
    normalize: str | None
    lds: LDSResult
    calibration: CalibrationResult | None
    against_first: LDSDifference | None
    over_last: LDSDifference | None
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{k: v for k, v in vars(self).items() if k not in _NESTED},
            "lds": self.lds.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "cost": self.cost.to_dict(),
            "first_method_less_this": _plain(self.against_first),
            "this_less_last_checkpoint": _plain(self.over_last),
        }


def _plain(gap: LDSDifference | None) -> dict[str, Any] | None:
    return None if gap is None else plain_gap(gap.value, gap.interval)


def contender(name: str, question: Question) -> MethodSpec:
    """The method that is measured for a name, with its grid for one model.

    A spec of your own is measured as it is. A known method has out-of-sample residuals if it can have them,
    and a grid over its damping alone. Options that were given, for the method that is measured or for
    `name`, are its only grid.
    """
    own = question.methods.get(name)
    if own is not None and own.uses_model_alone and _is_of_the_user(own, question):
        return own
    tuned = {"STRIDE": "STRIDE (tuned)"}.get(name, name + OUT_OF_SAMPLE)
    spec = METHODS.get(tuned, METHODS[name])
    given = question.options.get(tuned, question.options.get(name))
    dampings = list(dict.fromkeys(point["damping"] for point in spec.grid if "damping" in point))
    own_grid = [{}] if tuned in METHODS else spec.grid
    grid = [{"damping": d} for d in dampings] or own_grid if given is None else [given]
    return replace(
        spec,
        name=spec.name if spec.name.endswith(OUT_OF_SAMPLE) else name,
        grid=for_loss([dict(point) for point in grid], question.task.loss),
    )


def _is_of_the_user(spec: MethodSpec, question: Question) -> bool:
    """Whether a spec differs from the known one of its name, other than by options that were given."""
    known = METHODS.get(spec.name)
    if known is None or replace(spec, grid=()) != replace(known, grid=()):
        return True
    grid = for_loss([plain_numbers(point) for point in known.grid], question.task.loss)
    return spec.name not in question.options and list(spec.grid) != grid


def grid_for(spec: MethodSpec, question: Question, *, averages: bool) -> list[dict[str, Any]]:
    """The grid of a contender with the residuals of one model, or of averages over models.

    Args:
        spec: From `contender`.
        question: Residuals are those that the loss of its task has.
        averages: Whether the method is given checkpoints.
    """
    known = METHODS.get(spec.name)
    if known is None or known.build is not spec.build or not spec.name.endswith(OUT_OF_SAMPLE):
        return [dict(point) for point in spec.grid]
    tempered = loss_of_methods(question.task.loss).tempered
    residuals = "temperature" if averages and tempered else "both"
    return [{"residuals": residuals, **point} for point in spec.grid]


def repeats_for(budget: float, split: Split, epochs: int) -> int:
    """Number of partitions that cost `budget` trainings of `epochs` epochs on the whole training set."""
    return round(budget / split.trainings(1, epochs))


@dataclass(frozen=True)
class _Source:
    """A method with its best options on one kind of models, for each attributed model.

    Attributes:
        options: The options.
        normalize: The best normalization with them.
        tried: Scores of the test points that options are chosen on, by normalization.
        answers: Scores of the reported test points, by normalization.
    """

    options: Mapping[str, Any]
    normalize: str | None
    tried: Mapping[str | None, Sequence[NDArray[Any]]]
    answers: Mapping[str | None, Sequence[Answer]]


@dataclass(frozen=True)
class Ladder:
    """One method at all budgets."""

    spec: MethodSpec
    shared: Shared
    split: Split
    budgets: Sequence[float]
    refined: bool

    def rows(self) -> Iterator[BudgetRow]:
        """From the cheapest budget to the most expensive."""
        epochs, along = self.shared.question.task.training.epochs, None
        if 0 in self.budgets:
            last = self._source(self._on(lambda name: None, [None], averages=False))
            yield self._row("last checkpoint", 0.0, 1, last, [last.answers[last.normalize]])
            if log_epochs(epochs):
                along = self._source(self._on(self._along))
                yield self._row("checkpoints", 0.0, self._n_along, along, [along.answers[along.normalize]])
        paid = [repeats_for(b, self.split, epochs) for b in self.budgets if b]
        if not paid:
            return
        parts = self._source(self._on(partial(self._partition, 0)))
        together = parts.normalize if along is None else self._normalize_together(along, parts)
        hows = list(dict.fromkeys((parts.normalize, together)))
        answers = [parts.answers]
        for repeats in paid:
            for i in range(len(answers), repeats):
                answers.append(self._answers(self._on(partial(self._partition, i), hows), parts.options))
            yield from self._cross_fitted(repeats, parts, answers[:repeats], along, together)

    @property
    def _names(self) -> list[str]:
        return list(self.shared.models)

    @property
    def _n_along(self) -> int:
        return len(log_epochs(self.shared.question.task.training.epochs)) + 1

    def _along(self, name: str) -> list[Any]:
        return self.shared.along(name, log_epochs(self.shared.question.task.training.epochs))

    def _partition(self, i: int, name: str) -> list[Any]:
        models = self.shared.cross_fitted[self.split][name]
        return models.checkpoints[i * self.split.parts : (i + 1) * self.split.parts]

    def _on(
        self,
        checkpoints: Callable[[str], Any],
        normalizations: Sequence[str | None] = SUMMED,
        *,
        averages: bool = True,
    ) -> OnModels:
        """The method with these checkpoints, and the grid for them."""
        spec = replace(self.spec, grid=grid_for(self.spec, self.shared.question, averages=averages))
        return OnModels(spec, self.shared, forward_pass(self.shared), checkpoints, normalizations)

    def _source(self, on: OnModels) -> _Source:
        """With the best options; the fits, which take memory, are not kept."""
        best = choose(on, retrained(self.shared))
        return _Source(best.options, best.normalize, best.tried, self._answers(on, best.options))

    def _answers(self, on: OnModels, options: Mapping[str, Any]) -> dict[str | None, list[Answer]]:
        return on.answers(on.at(options), self.shared.question.reported, on.normalizations)

    def _normalize_together(self, along: _Source, parts: _Source) -> str | None:
        """The best normalization of checkpoints and models of one partition side by side."""
        halves = retrained(self.shared)
        return max(
            parts.tried, key=lambda how: halves.value(_side_by_side(1, parts.tried[how], along.tried[how]))
        )

    def _cross_fitted(
        self,
        repeats: int,
        parts: _Source,
        answers: Sequence[Mapping[str | None, Sequence[Answer]]],
        along: _Source | None,
        together: str | None,
    ) -> Iterator[BudgetRow]:
        """Rows of one budget, from the answers of its partitions and of the checkpoints beside them."""
        epochs = self.shared.question.task.training.epochs
        trainings, n_models = self.split.trainings(repeats, epochs), repeats * self.split.parts
        own = [answer[parts.normalize] for answer in answers]
        row, scores = self._row("cross-fitted", trainings, n_models, parts, own), _means(own)
        yield row
        if along is not None:
            beside, own = along.answers[together], [answer[together] for answer in answers]
            scores = _side_by_side(repeats, _means(own), _means([beside]))
            row = replace(
                row,
                source="checkpoints and parts",
                n_models=n_models + self._n_along,
                checkpoint_options=dict(along.options),
                normalize=together,
                **self._judged(scores, together),
                cost=self._cost([*own, beside]),
            )
            yield row
        if self.refined and n_models >= _FEWEST_MEASURED:
            better = [self._refined(*pair, n_models) for pair in zip(self._names, scores, strict=True)]
            yield replace(row, source="refined", **self._judged(better, None))

    def _refined(self, name: str, scores: NDArray[Any], n_models: int) -> NDArray[Any]:
        question, models = self.shared.question, self.shared.cross_fitted[self.split][name]
        x, y = (t[question.reported.start : question.reported.stop] for t in question.task.test.tensors)
        measured = models.measured(self.shared.models[name], (x, y), loss=question.task.loss)
        return refine(scores, models.membership[:n_models], measured[:, :n_models]).scores.numpy()

    def _row(
        self,
        source: str,
        trainings: float,
        n_models: int,
        of: _Source,
        answers: Sequence[Sequence[Answer]],
    ) -> BudgetRow:
        """A row from the answers for each partition (or for one source), one per attributed model."""
        return BudgetRow(
            name=self.spec.name,
            source=source,
            trainings=trainings,
            n_models=n_models,
            options=dict(of.options),
            checkpoint_options=None,
            normalize=of.normalize,
            **self._judged(_means(answers), of.normalize),
            against_first=None,
            over_last=None,
            cost=self._cost(answers),
        )

    def _cost(self, answers: Sequence[Sequence[Answer]]) -> Cost:
        """Of all answers together, the median over the attributed models."""
        n = len(self.shared.question.reported)
        return median_cost([_total([a.cost(n) for a in of_one]) for of_one in zip(*answers, strict=True)])

    def _judged(self, scores: Sequence[NDArray[Any]], normalize: str | None) -> dict[str, Any]:
        """`lds` and `calibration` of the scores of each attributed model."""
        halves = retrained(self.shared)
        on = (list(scores), halves.membership, halves.reported)
        n_resamples = self.shared.question.n_resamples
        slope = calibration(*on, n_resamples=n_resamples) if normalize is None else None
        return {"lds": lds(*on, n_resamples=n_resamples), "calibration": slope}


def _means(answers: Sequence[Sequence[Answer]]) -> list[NDArray[Any]]:
    """Scores of each attributed model, averaged over partitions."""
    return [np.mean([answer.values for answer in of_one], axis=0) for of_one in zip(*answers, strict=True)]


def _side_by_side(
    repeats: int, parts: Sequence[NDArray[Any]], along: Sequence[NDArray[Any]]
) -> list[NDArray[Any]]:
    """Scores of each attributed model, from those of models of parts and of checkpoints."""
    weight = weight_of_parts(repeats)
    return [weight * p + (1 - weight) * a for p, a in zip(parts, along, strict=True)]


def _total(costs: Sequence[Cost]) -> Cost:
    """Total cost of methods that are fitted and queried one after the other."""
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return replace(
        costs[0],
        fit_seconds=sum(cost.fit_seconds for cost in costs),
        query_seconds=sum(cost.query_seconds for cost in costs),
        peak_bytes=max(peaks, default=None),
    )
