"""Owns the comparison of methods on one task: the same models, subsets, test points and response for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .. import adapters
from ..config import STRIDEConfig
from ..errors import bad_choice, bad_value
from ..influence import InfluenceMethod
from ..stride import STRIDE
from ..subsets import random_subsets
from . import environment
from .linear_datamodeling import LDSResult, difference, lds, margins
from .retraining import RetrainingPlan, mean_residual, train_attributed, train_spiked
from .statistics import Interval
from .tasks import Task

Build = Callable[[nn.Module, Any, Mapping[str, Any]], InfluenceMethod]


@dataclass(frozen=True)
class Contender:
    """A method in a comparison.

    Attributes:
        name: Its row.
        build: Called with the model, the training set and the options of a grid point.
        grid: Option sets among which the tuning half of the test points chooses; one means untuned.
    """

    name: str
    build: Build
    grid: Sequence[Mapping[str, Any]] = field(default=({},))


def _stride(**fixed: Any) -> Build:
    return lambda model, data, options: STRIDE(model, data, config=STRIDEConfig(**{**fixed, **options}))


def _stride_paper(preset: str) -> Build:
    return lambda model, data, options: STRIDE(model, data, config=STRIDEConfig.paper(preset, **options))


def _adapter(cls: type[InfluenceMethod]) -> Build:
    return lambda model, data, options: cls(model, data, **options)


_TUNED = [
    {"temperature": t, "damping": d, "residuals": r}
    for t in (2.0, 3.0, 4.0)
    for d in (0.1, 0.3, 1.0)
    for r in ("both", "temperature")
]

#: The rows that `compare` knows by name.
CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("STRIDE", _stride()),
        Contender("STRIDE (tuned)", _stride(), _TUNED),
        Contender("STRIDE T=1", _stride(residuals="training")),
        Contender("STRIDE trained, random subsets", _stride(operators="trained")),
        Contender("STRIDE paper (mnist)", _stride_paper("mnist")),
        Contender("STRIDE paper (cifar10)", _stride_paper("cifar10")),
        Contender("Similarity", _adapter(adapters.Similarity)),
        Contender("ClassSimilarity", _adapter(adapters.ClassSimilarity)),
        Contender("ClassRandom", _adapter(adapters.ClassRandom)),
        Contender("Random", _adapter(adapters.Random)),
    )
}
DEFAULT_METHODS = (
    "STRIDE",
    "STRIDE (tuned)",
    "STRIDE T=1",
    "Similarity",
    "ClassSimilarity",
    "ClassRandom",
    "Random",
)


@dataclass(frozen=True)
class Row:
    """One method's figures.

    Attributes:
        name: The method.
        options: The grid point that the tuning half chose.
        lds: On the reporting half.
        per_model_names: Names of the attributed models, in the order of `lds.per_model`.
        against_first: LDS of the first row less this one's, with its paired interval; None for the first.
        fit_seconds: Median over models.
        query_seconds: Median over models, for all test points.
    """

    name: str
    options: dict[str, Any]
    lds: LDSResult
    per_model_names: list[str]
    against_first: tuple[float, Interval | None] | None
    fit_seconds: float
    query_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        against = None
        if self.against_first is not None:
            value, interval = self.against_first
            against = {
                "value": value,
                "interval": None if interval is None else [interval.low, interval.high],
            }
        per_test = self.lds.to_dict()
        return {
            "name": self.name,
            "options": self.options,
            "lds": per_test,
            "models": self.per_model_names,
            "first_row_less_this": against,
            "fit_seconds": self.fit_seconds,
            "query_seconds": self.query_seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        task: Name of the task.
        note: What must be read beside the figures.
        rows: One per method.
        protocol: Subsets, seeds, test points and models.
        environment: Versions and hardware.
    """

    task: str
    note: str
    rows: list[Row]
    protocol: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "note": self.note,
            "protocol": self.protocol,
            "environment": self.environment,
            "rows": [row.to_dict() for row in self.rows],
        }


def compare(
    methods: Sequence[str | Contender],
    task: Task,
    *,
    store: str | Path,
    measures: Sequence[str] = ("lds",),
    n_subsets: int = 100,
    n_seeds: int = 2,
    n_models: int = 3,
    n_spiked: int = 0,
    n_test: int = 300,
    n_jobs: int = -1,
    n_resamples: int = 1000,
    show_progress: bool = False,
) -> Comparison:
    """Compare methods on a task by the linear datamodeling score.

    The protocol: `n_subsets` random halves of the training set, `n_seeds` retrainings each from
    scratch; the response is the margin of the true class; every attributed model is scored alone. The
    first half of the test points chooses among the grid of a method, the second half is reported.

    Args:
        methods: Names from `CONTENDERS`, or contenders of your own.
        task: The task.
        store: Folder of the retrainings and the trained models: what is there is not done again.
        measures: ("lds",).
        n_subsets: m.
        n_seeds: s; at least 2 give a ceiling.
        n_models: Attributed models, trained with seeds 0, 1, ...
        n_spiked: Further attributed models that were stopped on a spike of their training loss.
        n_test: Test points, both halves together.
        n_jobs: Processes for the retrainings.
        n_resamples: Of the crossed bootstrap.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A method or measure that does not exist, or too few test points.
    """
    for measure in measures:
        if measure != "lds":
            raise bad_choice("measures", measure, ["lds"])
    contenders = [_contender(m) for m in methods]
    n_test = min(n_test, len(task.test))
    if n_test < 2:
        raise bad_value("n_test", "be at least 2: one half tunes, the other reports", n_test)
    x_test, y_test = (t[:n_test] for t in task.test.tensors)
    membership = random_subsets(task.n_train, n_subsets, task.n_train // 2, seed=0)
    plan = RetrainingPlan(task, membership, n_seeds, Path(store), n_test)
    responses = margins(plan.execute(n_jobs, show_progress), y_test.numpy())
    models = {f"seed {seed}": train_attributed(task, seed, store) for seed in range(n_models)}
    first_seed = 100
    for _ in range(n_spiked):
        model, seed = train_spiked(task, store, first_seed=first_seed)
        models[f"seed {seed}, stopped on a spike"] = model
        first_seed = seed + 1
    half = n_test // 2
    rows: list[Row] = []
    for contender in contenders:
        rows.append(
            _row(
                contender,
                task,
                models,
                (x_test, y_test),
                half,
                membership,
                responses,
                n_resamples,
                rows[0] if rows else None,
            )
        )
    protocol = {
        "n_train": task.n_train,
        "n_subsets": n_subsets,
        "subset_size": task.n_train // 2,
        "n_seeds": n_seeds,
        "n_test_tuning": half,
        "n_test_reported": n_test - half,
        "response": "margin of the true class",
        "models": {name: mean_residual(m, *task.train.tensors) for name, m in models.items()},
        "n_resamples": n_resamples,
    }
    return Comparison(task.name, task.note, rows, protocol, environment.describe())


def _contender(method: str | Contender) -> Contender:
    if isinstance(method, Contender):
        return method
    if method not in CONTENDERS:
        raise bad_choice("methods", method, list(CONTENDERS))
    return CONTENDERS[method]


def _row(
    contender: Contender,
    task: Task,
    models: Mapping[str, nn.Module],
    test: tuple[Any, Any],
    half: int,
    membership: Any,
    responses: NDArray[Any],
    n_resamples: int,
    first: Row | None,
) -> Row:
    best: tuple[float, Mapping[str, Any], list[NDArray[Any]]] | None = None
    fits, queries = [], []
    for options in contender.grid:
        scores = []
        for model in models.values():
            method = contender.build(model, task.train, options).fit()
            started = time.perf_counter()
            scores.append(np.asarray(method.influence(test, response="margin", target="label")))
            queries.append(time.perf_counter() - started)
            fits.append(method.fit_seconds_)
        value = 0.0
        if len(contender.grid) > 1:
            tuning = [s[:half] for s in scores]
            value = lds(tuning, membership, responses[..., :half], n_resamples=0).value
        if best is None or value > best[0]:
            best = (value, options, scores)
    assert best is not None, "a grid has at least one point"
    result = lds([s[half:] for s in best[2]], membership, responses[..., half:], n_resamples=n_resamples)
    against = None
    if first is not None:
        gap = difference(first.lds, result)
        against = (gap.value, gap.interval)
    return Row(
        name=contender.name,
        options=dict(best[1]),
        lds=result,
        per_model_names=list(models),
        against_first=against,
        fit_seconds=float(np.median(fits)),
        query_seconds=float(np.median(queries)),
    )
