"""`Measure`: the interface of what `compare` measures, with its options, its trainings and its run."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...retraining.estimate import RetrainingEstimate
from ...retraining.task_parts import Split
from ...tasks.task import Task
from .methods import MethodSpec
from .question import Question
from .shared import Shared

#: Arguments that `compare` itself passes to the functions behind measures.
_GIVEN = frozenset({"store", "options", "n_resamples", "show_progress", "opponents", "device", "checkpoints"})


class Measure(ABC):
    """Something that `compare` measures for every method; `MEASURES` holds the known ones by name.

    A measure has a `name` and a `run`; one that trains models lists them in `trainings`. Its rows have a
    method `to_dict` that returns plain values. The rows of a measure of your own are in `Comparison.others`.

    Attributes:
        name: Name in `compare(measures=...)`.
        defaults: Its options, with their default values.
        on_halves: Whether it needs the retrained halves. If a measure does, the options of every method with
            a grid are chosen by LDS on them.
        fewest_subsets: Smallest number of halves.

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
        """Name of the rows in `Comparison`: a field, or a key of `others`."""
        return self.name

    def settings(self, question: Question) -> dict[str, Any]:
        """Its options: those of the question, and defaults for the rest; `n_jobs` is that of the question."""
        jobs = {"n_jobs": question.n_jobs} if "n_jobs" in self.defaults else {}
        return {**self.defaults, **jobs, **question.measures[self.name]}

    def takes(self, task: Task) -> bool:
        """Whether it can be measured on a task. By default a task without classes needs `on_halves`."""
        return task.has_classes or self.on_halves

    def check(self, question: Question) -> None:
        """Refuse options that cannot work, before anything is trained.

        Raises:
            ValueError: An option is out of range.
        """
        return

    def on_models(self, question: Question) -> Sequence[MethodSpec]:
        """The methods that it builds on the attributed models, with `Shared.checkpoints_of`.

        By default all of them if it is measured on the retrained halves, and otherwise none.
        """
        return question.specs if self.on_halves else ()

    def partitions(self, question: Question) -> Mapping[Split, int]:
        """How many partitions it needs of each `Split`, whose models are then in `Shared.cross_fitted`."""
        return {}

    def wants_checkpoints(self, question: Question) -> bool:
        """Whether it needs checkpoints along the training of every attributed model (`Shared.along`)."""
        return False

    def trainings(self, shared: Shared) -> Sequence[RetrainingEstimate]:
        """Every training that `run` would start. Measures that share trainings return the same object."""
        return ()

    @abstractmethod
    def run(self, shared: Shared) -> Sequence[Any]:
        """Measure every method.

        Returns:
            One or several rows for each method.
        """


def defaults_of(run: Callable[..., Any]) -> dict[str, Any]:
    """The options of the function behind a measure with their defaults, without those that `compare` passes.

    >>> def run(task, *, store, rate=0.1, seed=0): ...
    >>> defaults_of(run)
    {'rate': 0.1, 'seed': 0}
    """
    parameters = inspect.signature(run).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN}
