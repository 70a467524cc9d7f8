"""Mislabel detection: train on flipped labels, rank the examples by every method (C.2, Tables 10 and 11).

A method ranks suspect labels in up to three ways: by self-influence; by minus its mean influence on clean
held-out points (the paper's "high negative influence", D.4); and by `mislabel_scores`, if its class has its
own. Detectors of label noise that use no influence are measured too, under their own names.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ....errors import bad_choice, bad_value
from ....influence.method import InfluenceMethod
from ....system.stable_digest import stable_digest
from ...measures.cost import Build, forward_seconds
from ...measures.linear_datamodeling import finite_array
from ...measures.mislabel_precision import MislabelResult, flip_labels, mislabel
from ...measures.statistics import Array
from ...retraining.estimate import RetrainingEstimate
from ...tasks.checks import check_task
from ...tasks.task import Task
from ..shared.answers import Answer
from ..shared.detectors import DETECTORS, Detector, partitions_of
from ..shared.measure import Measure, defaults_of
from ..shared.one_training import OneTraining, estimates, with_checkpoints
from ..shared.question import Question
from ..shared.score_cache import CachedMethod
from ..shared.shared import Shared
from ..shared.suspects import Suspect, most_suspect
from .lds import given

_HELD_OUT_BATCH = 100


@dataclass(frozen=True)
class MislabelRow:
    """One ranking's figures.

    Attributes:
        name: The method or detector.
        ranking: "self-influence", "held-out influence", "mislabel scores" or "detector".
        uses_influence: Whether it is a ranking of an attribution method.
        result: Its precision and the other figures.
        fit_seconds: Setup, median over models; 0 for a detector, whose setup is part of `ranking_seconds`.
        ranking_seconds: The ranking, median over models.
        suspects: The most suspect examples of the first model, for the gallery.
    """

    name: str
    ranking: str
    uses_influence: bool
    result: MislabelResult
    fit_seconds: float
    ranking_seconds: float
    suspects: tuple[Suspect, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON; `suspects` is left out."""
        figures = {k: v for k, v in vars(self).items() if k != "suspects"}
        return {**figures, "result": self.result.to_dict()}


def flipped_task(
    task: Task, rate: float = 0.1, *, kind: str = "symmetric", seed: int = 0
) -> tuple[Task, Any]:
    """A task with flipped training labels; its test set stays clean.

    Args:
        task: The clean task.
        rate: As for `flip_labels`, as are `kind` and `seed`.
        kind: See there.
        seed: See there.

    Returns:
        The task, and which labels were flipped, `(n_train,)` bool.
    """
    x, y = task.train.tensors
    noisy, flipped = flip_labels(y.numpy(), rate, task.n_classes, kind=kind, seed=seed)
    train = TensorDataset(x, y.new_tensor(noisy))
    return replace(task, name=f"{task.name}, {rate:.0%} {kind} flips", train=train), flipped


def held_out_influence(method: InfluenceMethod, test: tuple[Any, Any]) -> Array:
    """Mean influence of each training example on the margins of labelled test points, `(n_train,)`."""
    x, y = test
    total: Any = 0.0
    for start in range(0, len(x), _HELD_OUT_BATCH):
        rows = slice(start, start + _HELD_OUT_BATCH)
        scores = method.influence((x[rows], y[rows]), response="margin", target="label")
        total = total + finite_array("scores", scores).sum(0)
    return np.asarray(total / len(x))


def rankings(method: CachedMethod, held_out: tuple[Any, Any]) -> Iterator[tuple[str, Answer]]:
    """Every way in which a method ranks suspect labels: name and scores `(n_train,)`, high = suspect."""
    yield "self-influence", method.ask("self-influence", (), lambda m: m.self_influence())
    what = f"minus held-out influence {stable_digest(held_out_influence)}"
    yield (
        "held-out influence",
        method.ask(what, held_out, lambda m: -held_out_influence(m, held_out)),
    )
    if method.has_own_mislabel_scores:
        yield "mislabel scores", method.ask("mislabel scores", (), lambda m: m.mislabel_scores())


def measure_mislabel(
    task: Task,
    methods: Mapping[str, Build],
    *,
    detectors: Mapping[str, Detector] | None = None,
    store: str | Path | None = None,
    rate: float = 0.1,
    kind: str = "symmetric",
    n_models: int = 1,
    n_held_out: int = 1000,
    device: torch.device | str = "cpu",
    n_jobs: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[MislabelRow]:
    """Train on flipped labels, and measure how well every method and detector finds them.

    Args:
        task: The clean task.
        methods: Builders by name.
        detectors: Detectors by name; None uses none.
        store: Folder of trained models and scores; None keeps nothing.
        rate: Share of labels that are flipped.
        kind: As for `flip_labels`.
        n_models: Models. Model i is trained with seed i on labels flipped with `seed + i`.
        n_held_out: Held-out points: at most so many of the first test points, whose labels are clean.
        device: Where models are trained and methods are run.
        n_jobs: Workers for models of halves, which cross-fitted methods and detectors need.
        options: By name of a method, the options that its builder is given.
        n_resamples: Bootstrap draws; 0 leaves the intervals out.
        seed: Seed of the flips and of the bootstrap.

    Returns:
        A row for each method and ranking in the order of `methods`, then one for each detector.

    Raises:
        ValueError: A name is both a method and a detector, or an argument is out of range.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> from stride_captum.adapters import KNNShapley
    >>> from stride_captum.evaluation.comparison.shared.methods import adapter
    >>> rows = measure_mislabel(task, {"KNNShapley": adapter(KNNShapley)}, n_held_out=50, n_resamples=0)
    >>> [row.ranking for row in rows]
    ['self-influence', 'held-out influence']
    """
    detectors = detectors or {}
    if n_models < 1:
        raise bad_value("n_models", "be at least 1", n_models)
    if n_held_out < 1:
        raise bad_value("n_held_out", "be at least 1", n_held_out)
    check_task(task)
    if set(methods) & set(detectors):
        raise bad_value("detectors", "have names of their own", sorted(set(methods) & set(detectors)))
    held_out = tuple(t[:n_held_out] for t in task.test.tensors)
    partitions = max(map(partitions_of, detectors.values()), default=0)
    flips, noisy_labels = [], []
    scores: dict[tuple[str, str], list[Array]] = defaultdict(list)
    fits: dict[str, list[float]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for i in range(n_models):
        noisy, flipped = flipped_task(task, rate, kind=kind, seed=seed + i)
        flips.append(flipped)
        noisy_labels.append(noisy.train.tensors[1])
        trained = OneTraining(
            noisy, i, store, methods.values(), partitions=partitions, device=device, n_jobs=n_jobs
        )
        model = trained.model
        forward = forward_seconds(model, noisy.train)
        for name, build in methods.items():
            given = with_checkpoints((options or {}).get(name, {}), trained.checkpoints(build))
            method = CachedMethod(build, model, noisy, given, store, forward)
            for ranking, answer in rankings(method, (held_out[0], held_out[1])):
                fits[name].append(answer.fit_seconds)
                scores[name, ranking].append(finite_array("scores", answer.values))
                seconds[name, ranking].append(answer.seconds)
        for name, detector in detectors.items():
            halves = partitions_of(detector)
            more = {"checkpoints": trained.halves(halves)} if halves else {}
            started = time.perf_counter()
            found = detector(model, noisy.train, **more)
            scores[name, "detector"].append(finite_array("scores", found))
            seconds[name, "detector"].append(time.perf_counter() - started)
    return [
        MislabelRow(
            name=name,
            ranking=ranking,
            uses_influence=name in methods,
            result=mislabel(found, np.stack(flips), n_resamples=n_resamples, seed=seed),
            fit_seconds=float(np.median(fits[name])) if name in methods else 0.0,
            ranking_seconds=float(np.median(seconds[name, ranking])),
            suspects=most_suspect(found[0], noisy_labels[0], task.train.tensors[1]),
        )
        for (name, ranking), found in scores.items()
    ]


class Mislabel(Measure):
    """`measure_mislabel`, with detectors by name."""

    name = "mislabel"
    defaults: Mapping[str, Any] = {**defaults_of(measure_mislabel), "detectors": tuple(DETECTORS)}

    def check(self, question: Question) -> None:
        """Refuse detectors that do not exist, methods with the name of one, and a rate that flips nothing."""
        settings, task = self.settings(question), question.task
        for name in settings["detectors"]:
            if name not in DETECTORS:
                raise bad_choice("measures['mislabel']['detectors']", name, list(DETECTORS))
            if name in question.methods:
                raise bad_value("methods", "have names that no detector has", repr(name))
        flip_labels(task.train.tensors[1].numpy(), settings["rate"], task.n_classes, kind=settings["kind"])

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The models of the flipped labels."""
        question, settings = shared.question, self.settings(shared.question)

        def runs() -> Iterator[tuple[Task, int]]:
            rate, kind = settings["rate"], settings["kind"]
            for i in range(settings["n_models"]):
                yield flipped_task(question.task, rate, kind=kind, seed=settings["seed"] + i)[0], i

        partitions = max((DETECTORS[name].partitions for name in self._available(settings)), default=0)
        how: dict[str, Any] = {"device": question.device, "n_jobs": settings["n_jobs"]}
        return estimates(runs, question.specs, question.store, self.name, partitions=partitions, **how)

    @staticmethod
    def _available(settings: Mapping[str, Any]) -> list[str]:
        """The detectors whose extra is installed."""
        return [name for name in settings["detectors"] if DETECTORS[name].available]

    def run(self, shared: Shared) -> list[MislabelRow]:
        """A row for each ranking; the most suspect examples go into the gallery."""
        settings = self.settings(shared.question)
        question, available = shared.question, self._available(settings)
        for name in settings.pop("detectors"):
            if name not in available:
                shared.skipped[name] = f"needs {DETECTORS[name].needs}"
        detectors = {name: DETECTORS[name] for name in available}
        rows = measure_mislabel(
            question.task, question.methods, detectors=detectors, **given(shared), **settings
        )
        for row in rows:
            shared.gallery.add_flips(row.name, row.ranking, row.suspects)
        return rows
