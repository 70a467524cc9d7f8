"""Leakage: train on leaked test examples, and look how high every method ranks them (C.3, Tables 12, 13)."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from ....errors import bad_value, whole_number
from ...measures.cost import Build, Cost, forward_seconds, median_cost
from ...measures.leakage_rank import LeakageResult, leakage, near_duplicate
from ...measures.linear_datamodeling import finite_array
from ...measures.statistics import Array
from ...retraining.estimate import RetrainingEstimate
from ...tasks.checks import check_task
from ...tasks.task import Task
from ..shared.answers import Answer
from ..shared.measure import Measure, defaults_of
from ..shared.one_training import OneTraining, estimates, with_checkpoints
from ..shared.question import Question
from ..shared.score_cache import CachedMethod
from ..shared.shared import Shared
from .lds import given


@dataclass(frozen=True, eq=False)
class Planted:
    """A task with leaked test examples.

    Attributes:
        task: Its training set ends with the planted duplicates, in the order of `test_points`.
        test_points: Indices of the leaked examples in the test set, `(n_planted,)`.
        positions: Indices of their duplicates in the training set, `(n_planted,)`.
        copies: For each, indices of other copies: training examples with the same label whose input equals
            the test example or its duplicate.
    """

    task: Task
    test_points: NDArray[np.int64]
    positions: NDArray[np.int64]
    copies: tuple[NDArray[np.int64], ...] = ()


@dataclass(frozen=True)
class LeakageRow:
    """One method's figures on one planted set.

    Attributes:
        name: The method.
        kind: How duplicates differ from the test examples.
        n_planted: Number of duplicates.
        normalize: Of the scores: None or "cosine".
        result: Ranks and rates.
        cost: Median over models.
    """

    name: str
    kind: str
    n_planted: int
    normalize: str | None
    result: LeakageResult
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "result": self.result.to_dict(), "cost": self.cost.to_dict()}


def plant(task: Task, n_planted: int, *, kind: str = "exact", seed: int = 0) -> Planted:
    """Append duplicates of random test examples, with their labels, to the training set.

    Args:
        task: The task.
        n_planted: How many test examples leak.
        kind: How duplicates differ, as for `near_duplicate`.
        seed: Seed of the choice. With one seed, fewer examples are the first of more.

    Raises:
        ValueError: There are fewer test examples, or the kind does not exist or is for images.
    """
    x_test, y_test = task.test.tensors
    check_planting(task, (n_planted,), (kind,), "n_planted")
    chosen = np.random.default_rng(seed).permutation(len(y_test))[:n_planted]
    x, y = task.train.tensors
    spread = x.std() if x.is_floating_point() else x.float().std()
    copies = near_duplicate(x_test[chosen], kind, scale=float(spread), seed=seed)
    train = TensorDataset(torch.cat([x, copies]), torch.cat([y, y_test[chosen]]))
    ids = None if task.ids is None else (*task.ids, *(f"copy of test point {i}" for i in chosen))
    leaked = replace(task, name=f"{task.name} with {n_planted} leaked ({kind})", train=train, ids=ids)
    positions = np.arange(len(y), len(y) + n_planted)
    places = defaultdict(set)
    for i, key in enumerate(_row_keys(*train.tensors)):
        places[key].add(i)
    keys = [_row_keys(t, y_test[chosen]) for t in (x_test[chosen], copies)]
    others = (
        (places[one] | places[other]) - {int(own)} for one, other, own in zip(*keys, positions, strict=True)
    )
    return Planted(leaked, chosen, positions, tuple(np.array(sorted(o), dtype=np.int64) for o in others))


def check_planting(task: Task, counts: Sequence[int], kinds: Sequence[str], name: str = "counts") -> None:
    """Refuse counts and kinds of duplicates that a task does not have.

    Args:
        task: The task.
        counts: Numbers of planted examples.
        kinds: As for `near_duplicate`.
        name: Name of the counts, for errors.

    Raises:
        ValueError: There are fewer test examples, or a kind does not exist or is for images.
    """
    n_test = len(task.test)
    for count in counts:
        if whole_number(name, count) > n_test:
            raise bad_value(name, f"be between 1 and the {n_test} test examples", repr(count))
    for kind in kinds:
        near_duplicate(task.test.tensors[0][:1], kind, scale=1.0)


def _row_keys(x: Tensor, y: Tensor) -> list[bytes]:
    """A digest of input and label for each example."""
    rows = x.reshape(len(x), -1).numpy()
    return [
        hashlib.blake2b(row.tobytes() + str(label).encode(), digest_size=16).digest()
        for row, label in zip(rows, y.tolist(), strict=True)
    ]


def measure_leakage(
    task: Task,
    methods: Mapping[str, Build],
    *,
    store: str | Path | None = None,
    counts: Sequence[int] = (1, 10, 100),
    kinds: Sequence[str] = ("exact",),
    n_models: int = 1,
    device: torch.device | str = "cpu",
    n_jobs: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[LeakageRow]:
    """Train on leaked test examples, and measure how high every method ranks them.

    Args:
        task: The clean task.
        methods: Builders by name. A method with norms is also measured with cosine normalization.
        store: Folder of trained models and scores; None keeps nothing.
        counts: Numbers of planted examples; each is a training set of its own.
        kinds: As for `near_duplicate`; each is a training set of its own.
        n_models: Models for each training set, trained with the seeds 0, 1, ...
        device: Where models are trained and methods are run.
        n_jobs: Workers for models of halves, which cross-fitted methods need.
        options: By name of a method, the options that its builder is given.
        n_resamples: Bootstrap draws; 0 leaves the intervals out.
        seed: Seed of the choice of test examples and of the bootstrap.

    Returns:
        A row for each kind, count, method and normalization.

    Raises:
        ValueError: An argument is out of range.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> from stride_captum.adapters import Similarity
    >>> from stride_captum.evaluation.comparison.shared.methods import adapter
    >>> rows = measure_leakage(task, {"Similarity": adapter(Similarity)}, counts=(5,), n_resamples=0)
    >>> [(row.normalize, row.n_planted) for row in rows]
    [(None, 5), ('cosine', 5)]
    """
    if n_models < 1:
        raise bad_value("n_models", "be at least 1", n_models)
    check_planting(task, counts, kinds)
    check_task(task)
    rows = []
    for kind in kinds:
        for n_planted in counts:
            planted = plant(task, n_planted, kind=kind, seed=seed)
            _say_copies(task, planted)
            x, y = (t[planted.test_points] for t in task.test.tensors)
            scores: dict[tuple[str, str | None], list[Array]] = defaultdict(list)
            costs: dict[tuple[str, str | None], list[Cost]] = defaultdict(list)
            for i in range(n_models):
                how: dict[str, Any] = {"device": device, "n_jobs": n_jobs}
                trained = OneTraining(planted.task, i, store, methods.values(), **how)
                model = trained.model
                forward = forward_seconds(model, planted.task.train)
                for name, build in methods.items():
                    given = with_checkpoints((options or {}).get(name, {}), trained.checkpoints(build))
                    method = CachedMethod(build, model, planted.task, given, store, forward)
                    for way in (None, "cosine"):
                        answer = answer_if_defined(method, (x, y), way)
                        if answer is not None:
                            scores[name, way].append(finite_array("scores", answer.values))
                            costs[name, way].append(answer.cost(n_planted))
            for (name, way), found in scores.items():
                result = leakage(
                    found,
                    planted.positions,
                    copies=planted.copies,
                    ks=(1, n_planted),
                    n_resamples=n_resamples,
                    seed=seed,
                )
                rows.append(LeakageRow(name, kind, n_planted, way, result, median_cost(costs[name, way])))
    return rows


def _say_copies(task: Task, planted: Planted) -> None:
    there = sum(bool((copies < task.n_train).any()) for copies in planted.copies)
    if there:
        warnings.warn(
            f"{there} of the {len(planted.positions)} test examples that leak were in the training set of "
            f"{task.name} before: finding such a copy counts as finding the leak.",
            stacklevel=3,
        )


def answer_if_defined(
    method: CachedMethod, batch: tuple[Tensor, Tensor], normalize: str | None
) -> Answer | None:
    """The scores of a batch; None if the method has no norms to normalize them with."""
    try:
        return method.support(batch, normalize)
    except ValueError as error:
        if str(error).startswith("`normalize`"):
            return None
        raise


class Leakage(Measure):
    """`measure_leakage`."""

    name = "leakage"
    defaults = defaults_of(measure_leakage)

    def takes(self, task: Task) -> bool:
        """Yes: a duplicate has the label of its test example, whatever a label is."""
        return True

    def check(self, question: Question) -> None:
        """Refuse more examples than the test set has, and kinds of duplicates that do not exist."""
        settings = self.settings(question)
        check_planting(question.task, settings["counts"], settings["kinds"])

    def trainings(self, shared: Shared) -> list[RetrainingEstimate]:
        """The models of each planted set."""
        question, settings = shared.question, self.settings(shared.question)

        def runs() -> Iterator[tuple[Task, int]]:
            for kind in settings["kinds"]:
                for n_planted in settings["counts"]:
                    planted = plant(question.task, n_planted, kind=kind, seed=settings["seed"])
                    yield from ((planted.task, seed) for seed in range(settings["n_models"]))

        how: dict[str, Any] = {"device": question.device, "n_jobs": settings["n_jobs"]}
        return estimates(runs, question.specs, question.store, self.name, **how)

    def run(self, shared: Shared) -> list[LeakageRow]:
        """A row for each kind, count, method and normalization."""
        question = shared.question
        return measure_leakage(question.task, question.methods, **given(shared), **self.settings(question))
