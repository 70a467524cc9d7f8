"""The models that `explain` explains: one, or models trained on the parts of random partitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...closed_form.options import ClosedForm
from ...errors import bad_value, whole_number
from ...influence.chance import at_chance
from ...influence.checkpoints.checkpoint import load_checkpoint
from ...losses import Loss
from ...losses.summed_positions import SummedPositions
from ...score_agreement import reliability
from ...stride import STRIDE
from ...system.preserve_state import preserve_state
from ...system.processes import in_group
from ..retraining.attributed_estimates import estimate_attributed, estimate_cross_fitted
from ..retraining.attributed_models import train_attributed
from ..retraining.cross_fitting import CrossFitted, retrain
from ..retraining.parts import TrainFunction, part_trainings, stored_trainings
from ..retraining.task_parts import Split, cross_fit
from ..retraining.training import logits_of
from ..tasks.task import Task
from ..tasks.task_loss import is_plain

#: Largest n_train * n_features for which reliability is computed from halves of the features.
_LARGEST_FEATURES = 2**28


@dataclass(frozen=True)
class ExplainedModels:
    """The models that are explained.

    Attributes:
        model: The network. Its own weights are explained if `cross_fitted` is None.
        cross_fitted: Models of parts of the training set, whose scores are averaged.
        own: Whether predictions are those of `model`; otherwise they are the mean of `cross_fitted`.
        parts: Parts of each partition.
        loss: What they were trained with.
    """

    model: nn.Module
    cross_fitted: CrossFitted | None
    own: bool
    parts: int
    loss: Loss

    @property
    def checkpoints(self) -> list[Any] | None:
        """The argument `checkpoints` of a method."""
        return None if self.cross_fitted is None else self.cross_fitted.checkpoints

    def outputs(self, x: Tensor) -> Tensor:
        """Output rows of the model, `(n, width)`; of several models, their mean.

        With plain cross-entropy that is the log of the mean probability, `(n, n_classes)`.
        """
        found = self.cross_fitted
        if self.own or found is None:
            return logits_of(self.model, x, loss=self.loss)
        every = []
        with preserve_state(self.model, weights=True) as network:
            for place in found.last:
                load_checkpoint(network, found.checkpoints[place].weights)
                every.append(logits_of(network.eval(), x, loss=self.loss))
        rows = torch.stack(every)
        if is_plain(self.loss):
            return torch.logsumexp(rows.log_softmax(2), dim=0) - math.log(len(every))
        return rows.mean(0)

    def to_dict(self) -> dict[str, Any]:
        """Which models are explained, as plain values for JSON."""
        found = self.cross_fitted
        if found is None:
            return {"answered": "one model", "n_models": 1, "parts": None, "trainings": 0.0}
        answered = "cross-fitted models"
        n = len(found.last)
        return {"answered": answered, "n_models": n, "parts": self.parts, "trainings": found.trainings}

    def note(self) -> str:
        """Which models are explained, and what their scores mean, for a report; "" for one model."""
        found = self.cross_fitted
        if found is None:
            return ""
        who = "the model that was given" if self.own else "the mean of these models"
        return (
            f"Scores are averaged over {len(found.last)} models, each trained on one of {self.parts} parts "
            f"of the training set ({found.trainings:g} trainings in all): they explain the training "
            f"procedure, not one file of weights. Predictions are those of {who}."
        )


def models_to_explain(
    task: Task,
    model: nn.Module | None,
    *,
    seed: int,
    store: str | Path | None,
    retrainings: int,
    parts: int,
    train_function: TrainFunction | None,
    device: torch.device | str,
    n_jobs: int,
) -> ExplainedModels:
    """Train the models that are missing.

    Args:
        task: Data, network and training settings.
        model: A trained model; None trains one, unless there are retrainings.
        seed: Seed of the training; with retrainings, of the partitions too.
        store: Folder where trained models are kept; None keeps nothing.
        retrainings: Number of partitions; a model is trained on each part.
        parts: Parts of each partition.
        train_function: As for `retrain`; None uses the training of the task.
        device: Where models are trained.
        n_jobs: As for `retrain`.

    Raises:
        ValueError: `retrainings` is negative, or `train_function` without retrainings.
    """
    check_retrainings(retrainings, train_function)
    if not retrainings:
        model = train_attributed(task, seed, store, device=device) if model is None else model
        return ExplainedModels(model, None, True, parts, task.loss)
    if train_function is None:
        found = cross_fit(task, seed, retrainings, store, Split(parts), n_jobs=n_jobs, device=device)
    else:
        n, how = task.n_train, {"parts": parts, "repeats": retrainings, "seed": seed}
        found = retrain(train_function, n, store=store, n_jobs=n_jobs, **how)  # type: ignore[arg-type]
    network = task.build_model().to(device).eval() if model is None else model
    return ExplainedModels(network, found, model is not None, parts, task.loss)


def check_retrainings(retrainings: int, train_function: TrainFunction | None) -> None:
    """Refuse a negative number of retrainings, and a training function that would not be called."""
    whole_number("retrainings", retrainings, 0)
    if train_function is not None and not retrainings:
        raise bad_value("train_function", "be left out without `retrainings`", repr(train_function))


def planned_models(
    task: Task,
    *,
    given: bool,
    seed: int,
    store: str | Path,
    retrainings: int,
    parts: int,
    train_function: TrainFunction | None,
    device: torch.device | str,
    n_jobs: int,
) -> Sequence[str]:
    """What `models_to_explain` would train, in sentences; `given` says that there is a trained model."""
    check_retrainings(retrainings, train_function)
    if not retrainings:
        if given:
            return ["The model is given: nothing is trained."]
        return [str(estimate_attributed([(task, seed)], store, purpose="attributed model", device=device))]
    cost = f"This costs {retrainings} training{'s' * (retrainings > 1)} on the whole training set."
    if train_function is None:
        split = Split(parts)
        found = estimate_cross_fitted([(task, seed)], retrainings, store, split, n_jobs=n_jobs, device=device)
        return [str(found), cost]
    jobs = part_trainings(task.n_train, parts, retrainings, seed)
    n_stored = stored_trainings(train_function, jobs, store)
    return [
        f"{len(jobs)} trainings by your function on {len(jobs[0].rows)} of {task.n_train} examples each: "
        f"{n_stored} are in the store, {len(jobs) - n_stored} are to do.",
        cost,
    ]


def reliabilities(method: STRIDE, batch: tuple[Tensor, Tensor], loss: Loss) -> list[float | None]:
    """Reliability of each test point; None if undefined, or if it is not computed.

    That of one model is computed from halves of its features: for the closed form, one row an example,
    features that are not too large, and outside of process groups.
    """
    n = len(batch[1])
    closed = isinstance(method.operators, ClosedForm) and not isinstance(loss, SummedPositions)
    large = method.n_train_ * method.n_features_ > _LARGEST_FEATURES
    if in_group() or (len(method._checkpoints()) == 1 and (large or not closed)):
        return [None] * n
    return [None if math.isnan(value) else value for value in reliability(method, batch).tolist()]


def learned_nothing(task: Task, logits: Tensor) -> str:
    """A warning where the predictions of classes are at the level of chance, or ""."""
    why = at_chance(logits.argmax(1), task.train.tensors[1]) if task.has_classes else None
    if why is None:
        return ""
    return (
        f"The model has learned nothing: {why}. Its scores mean nothing: train it longer or with other "
        "settings, and check its data."
    )
