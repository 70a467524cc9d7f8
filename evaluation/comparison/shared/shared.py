"""What the measures of one comparison share: the question, the attributed models and the gallery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from ...retraining.attributed_estimates import (
    estimate_attributed,
    estimate_checkpoints,
    estimate_cross_fitted,
    estimate_spiked,
)
from ...retraining.attributed_models import (
    FIRST_SPIKED,
    spiked_epoch,
    train_attributed,
    train_checkpoints,
    train_spiked,
)
from ...retraining.cross_fitting import CrossFitted, check_apart
from ...retraining.estimate import RetrainingEstimate
from ...retraining.task_parts import HALVES, Split, cross_fit
from .gallery import Gallery
from .one_training import further_models
from .question import Question

T = TypeVar("T")


class Shared:
    """Values that several measures need; each is computed once, when a measure first asks for it.

    Attributes:
        question: What is compared.
        skipped: By name of a method that is left out, the reason; a measure may add to it.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.skipped = dict(question.skipped)
        self._made: dict[Callable[[Shared], Any], Any] = {}

    def once(self, make: Callable[[Shared], T]) -> T:
        """`make(self)`, computed at the first call."""
        if make not in self._made:
            self._made[make] = make(self)
        found: T = self._made[make]
        return found

    def so_far(self, make: Callable[[Shared], T]) -> T | None:
        """What `once(make)` has given before; None if nothing has asked for it."""
        return self._made.get(make)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The attributed models by name, trained on all of the task's training set."""
        return {name: model for name, (model, _) in self.once(_attributed).items()}

    @property
    def models_so_far(self) -> dict[str, nn.Module]:
        """`models` if a measure has asked for them, else none; trains nothing."""
        return {} if self.so_far(_attributed) is None else self.models

    @property
    def checkpoints(self) -> dict[str, dict[int, Any]]:
        """State dicts along the training of every attributed model, by epoch: all that any method needs."""
        return self.once(_checkpoints)

    def along(self, name: str, epochs: Sequence[int]) -> list[Any]:
        """State dicts of an attributed model after some epochs, its final one last.

        A model that was stopped on a spike has none of later epochs.
        """
        kept = self.checkpoints[name]
        return [*(kept[epoch] for epoch in epochs if epoch in kept), self.models[name].state_dict()]

    @property
    def cross_fitted(self) -> dict[Split, dict[str, CrossFitted]]:
        """Models of parts of the training set, by `Split` and name of an attributed model."""
        return self.once(_cross_fitted)

    def checkpoints_of(self, method: Any, name: str) -> Sequence[Any] | None:
        """The `checkpoints` of a method for an attributed model: those along its training, models of halves,
        both or None.

        Args:
            method: A `MethodSpec`; other builders get None.
            name: Name of the attributed model.
        """
        return further_models(
            method,
            self.question.task.training.epochs,
            lambda n: self.cross_fitted[HALVES][name].checkpoints[: HALVES.parts * n],
            lambda epochs: self.along(name, epochs),
        )

    @property
    def gallery(self) -> Gallery:
        """The gallery, for a few of the reported test points."""
        return self.once(_gallery)

    @property
    def model_estimates(self) -> list[RetrainingEstimate]:
        """Cost of `models`, `checkpoints` and `cross_fitted`; trains nothing."""
        return self.once(_estimates)


def _attributed(shared: Shared) -> dict[str, tuple[nn.Module, int]]:
    """The attributed models, and the seeds of their trainings."""
    question, first_seed = shared.question, FIRST_SPIKED
    task, store, device = question.task, question.store, question.device
    found = {
        f"seed {seed}": (train_attributed(task, seed, store, device=device), seed)
        for seed in range(question.n_models)
    }
    for _ in range(question.n_spiked):
        model, seed = train_spiked(task, store, first_seed=first_seed, device=device)
        found[f"seed {seed}, stopped on a spike"] = (model, seed)
        first_seed = seed + 1
    return found


def _checkpoints(shared: Shared) -> dict[str, dict[int, Any]]:
    question = shared.question
    found: dict[str, dict[int, Any]] = {}
    for name, (_, seed) in shared.once(_attributed).items():
        epochs = _epochs_before(question, seed)
        states = (
            train_checkpoints(question.task, seed, question.store, epochs, device=question.device)
            if epochs
            else []
        )
        found[name] = dict(zip(epochs, states, strict=True))
    return found


def _epochs_before(question: Question, seed: int) -> list[int]:
    """Epochs after which checkpoints of an attributed model are needed: those before it was stopped."""
    if seed < question.n_models:
        return question.epochs
    last = spiked_epoch(question.task, seed, question.store, question.device)
    return [epoch for epoch in question.epochs if last is None or epoch < last]


def _cross_fitted(shared: Shared) -> dict[Split, dict[str, CrossFitted]]:
    question = shared.question
    how: dict[str, Any] = {
        "n_jobs": question.n_jobs,
        "device": question.device,
        "engine": question.engine,
    }
    found: dict[Split, dict[str, CrossFitted]] = {}
    for split, repeats in question.partitions.items():
        found[split] = {}
        for number, name in enumerate(shared.once(_attributed)):
            models = cross_fit(question.task, number, repeats, question.store, split, **how)
            check_apart(question.halves.membership, models.membership)
            found[split][name] = models
    return found


def _estimates(shared: Shared) -> list[RetrainingEstimate]:
    question, seeds = shared.question, list(range(shared.question.n_models))
    task, store, device = question.task, question.store, question.device
    runs = [(task, seed) for seed in seeds]
    found = [estimate_attributed(runs, store, purpose="attributed models", device=device)]
    if question.n_spiked:
        spiked, chosen = estimate_spiked(task, store, question.n_spiked, device=device)
        found.append(spiked)
        seeds += chosen
    for split, repeats in question.partitions.items():
        numbers = range(question.n_models + question.n_spiked)
        how: dict[str, Any] = {"n_jobs": question.n_jobs, "device": device, "engine": question.engine}
        found.append(estimate_cross_fitted([(task, n) for n in numbers], repeats, store, split, **how))
    if question.epochs:
        of_each = [(task, seed, _epochs_before(question, seed)) for seed in seeds]
        found.append(estimate_checkpoints(of_each, store, device=device))
    return found


def _gallery(shared: Shared) -> Gallery:
    question = shared.question
    return Gallery(
        question.task,
        shared.models if question.on_halves else {},
        question.reported,
        rank_suspects="mislabel" not in question.measures,
    )
