"""The interface of a measure: its options, what it trains, and how it is run."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...retraining.estimate import RetrainingEstimate
from ...retraining.task_parts import Split
from ...tasks.task import Task
from .question import Question
from .shared import Shared

#: What `compare` itself gives the functions behind measures.
_GIVEN = frozenset({"store", "options", "n_resamples", "show_progress", "opponents", "device"})


class Measure(ABC):
    """Something that `compare` measures of every method; `MEASURES` holds those that it knows by name.

    A measure has a name and a `run`. One that trains models counts them in `trainings`. Its rows have a
    `to_dict` that gives plain values; those of a measure of your own are in `Comparison.others`.

    Attributes:
        name: What it is called in `compare(measures=...)`.
        defaults: The options that it takes, with the values that they have where none are given.
        on_halves: Whether it reads retrained halves: they are retrained then, and a method with a grid
            chooses its options by LDS on them.
        fewest_subsets: Halves that it needs at least.

    >>> from types import SimpleNamespace
    >>> class Accuracy(Measure):
    ...     name = "accuracy"
    ...
    ...     def trainings(self, shared):
    ...         return shared.model_estimates
    ...
    ...     def run(self, shared):
    ...         x, y = shared.question.task.test.tensors
    ...         found = [float((m(x).argmax(1) == y).float().mean()) for m in shared.models.values()]
    ...         return [SimpleNamespace(to_dict=lambda: {"accuracy": found})]
    >>> from stride_captum.evaluation import MEASURES
    >>> MEASURES["accuracy"] = Accuracy()
    >>> list(MEASURES)[-2:]
    ['leakage', 'accuracy']
    >>> del MEASURES["accuracy"]
    """

    name: str
    defaults: Mapping[str, Any] = {}
    on_halves: bool = False
    fewest_subsets: int = 1

    @property
    def part(self) -> str:
        """Field of `Comparison` that has the rows."""
        return self.name

    def settings(self, question: Question) -> dict[str, Any]:
        """Its options: what the question gives, and defaults."""
        return {**self.defaults, **question.measures[self.name]}

    def takes(self, task: Task) -> bool:
        """Whether it can be measured on a task: one without classes has what is read off retrained halves."""
        return task.has_classes or self.on_halves

    def check(self, question: Question) -> None:
        """Refuse what cannot work, before anything is trained.

        Raises:
            ValueError: An option, what it must be, and what it is.
        """
        return

    def partitions(self, question: Question) -> Mapping[Split, int]:
        """Partitions on whose parts models are wanted (`Shared.cross_fitted`), by way of cross-fitting."""
        return {}

    def wants_checkpoints(self, question: Question) -> bool:
        """Whether it wants checkpoints along the training of every attributed model (`Shared.along`)."""
        return False

    def trainings(self, shared: Shared) -> Sequence[RetrainingEstimate]:
        """Every training that `run` would start, before any is done; those that are shared are one object."""
        return ()

    @abstractmethod
    def run(self, shared: Shared) -> Sequence[Any]:
        """Measure; the result is a row for each method, or several."""


def defaults_of(run: Callable[..., Any]) -> dict[str, Any]:
    """The options of the function behind a measure with their defaults, less what `compare` gives it.

    >>> def run(task, *, store, rate=0.1, seed=0): ...
    >>> defaults_of(run)
    {'rate': 0.1, 'seed': 0}
    """
    parameters = inspect.signature(run).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN}
