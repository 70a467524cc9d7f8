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
from ...measures.calibration import calibration
from ...measures.cost import Cost, median_cost
from ...measures.linear_datamodeling import lds
from ...retraining.attributed_models import log_epochs
from ...retraining.task_parts import Split
from ..shared.answers import Answer
from ..shared.methods import MethodSpec
from ..shared.shared import Shared
from .budget_row import BudgetRow
from .contenders import grid_for
from .lds import forward_pass, retrained
from .on_models import OnModels, choose

#: Smallest number of models that `refine` takes.
_FEWEST_MEASURED = 3


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
