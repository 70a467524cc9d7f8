"""LDS of trained operators as the number of subsets K grows, with Lasso, with ridge, and in closed form.

For each K scores are recovered from the same trained operators by Lasso and by ridge. The closed form on
their shared encoder phi shows what the features give when recovery is not the limit (K = N). Both penalties
are relative to the problem (`recovery.alpha_max`, `recovery.ridge_scale`); each is chosen among six values on
the first half of the test points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...designs import RandomSubsets
from ...recovery.estimators import Lasso, Recovery, Ridge
from ...steering.options import Trained
from ...steering.trained import TrainedOperators
from ...stride import STRIDE
from ..measures.linear_datamodeling import LDSResult, lds, margins
from ..retraining.attributed_models import train_attributed
from ..retraining.plan import without_diverged
from ..system import environment
from ..tasks.checks import check_task
from ..tasks.task import Task
from .shared.methods import fitting
from .shared.question import halves

#: Relative penalties that are tried, by recovery.
ALPHAS: dict[str, tuple[float, ...]] = {
    "lasso": (0.003, 0.01, 0.03, 0.1, 0.3, 0.5),
    "ridge": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}


@dataclass(frozen=True)
class CurvePoint:
    """LDS at one number of subsets.

    Attributes:
        n_subsets: K.
        subset_size: |S_k|.
        lasso: Trained operators with Lasso recovery.
        ridge: The same operators with ridge recovery.
        closed_form: The closed form on phi of the same operators.
        fit_seconds: Seconds of stage 1, mean over models.
        alphas: The chosen penalties, by recovery.
    """

    n_subsets: int
    subset_size: int
    lasso: LDSResult
    ridge: LDSResult
    closed_form: LDSResult
    fit_seconds: float
    alphas: dict[str, float]


@dataclass(frozen=True)
class RecoveryCurve:
    """What `recovery_curve` found.

    Attributes:
        task: Name of the task.
        points: One per K.
        paper: LDS of the paper's preset.
        protocol: Models, subsets and test points.
        environment: Versions and hardware.
    """

    task: str
    points: list[CurvePoint]
    paper: LDSResult
    protocol: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {
                "n_subsets": p.n_subsets,
                "subset_size": p.subset_size,
                "lasso": p.lasso.to_dict(),
                "ridge": p.ridge.to_dict(),
                "closed_form_on_phi": p.closed_form.to_dict(),
                "fit_seconds": p.fit_seconds,
                "alphas": p.alphas,
            }
            for p in self.points
        ]
        return {
            "task": self.task,
            "points": rows,
            "paper": self.paper.to_dict(),
            "protocol": self.protocol,
            "environment": self.environment,
        }


def recovery_curve(
    task: Task,
    *,
    store: str | Path,
    ks: Sequence[int] = (50, 500, 2000),
    preset: str = "mnist",
    n_seeds: int = 3,
    n_models: int = 3,
    n_test: int = 400,
    n_jobs: int = -1,
    show_progress: bool = False,
) -> RecoveryCurve:
    """Measure the curve; the first half of the test points chooses the penalties, the second is reported.

    Args:
        task: The task.
        store: Folder of the retrainings.
        ks: Numbers of subsets.
        preset: Argument of `Trained.paper`.
        n_seeds: Retrainings of each of 100 random halves.
        n_models: Attributed models.
        n_test: Test points, both halves together.
        n_jobs: Processes for the retrainings.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A number of subsets is out of range, the preset does not exist, the network cannot read
            the inputs or labels, or more than a tenth of the halves diverge.
    """
    kinds = {k: Trained(subsets=RandomSubsets(k)) for k in ks}
    paper = Trained.paper(preset, **fitting(task.n_train))
    task.need_classes("the recovery curve")
    check_task(task)
    plan = halves(task, store, 100, n_seeds, n_test)
    x_test, y_test = (t[: plan.n_test] for t in task.test.tensors)
    membership, logits, left_out = without_diverged(plan, plan.execute(n_jobs, show_progress))
    responses, half = margins(logits, y_test.numpy()), plan.n_test // 2
    batches = [(x_test[rows], y_test[rows]) for rows in (slice(0, half), slice(half, None))]
    tuning, reported = responses[..., :half], responses[..., half:]
    models = [train_attributed(task, seed, store) for seed in range(n_models)]

    def scored(methods: Sequence[STRIDE], batch: tuple[Tensor, Tensor]) -> list[NDArray[Any]]:
        return [np.asarray(method.influence(batch)) for method in methods]

    points = []
    for k, kind in kinds.items():
        methods = [STRIDE(model, task.train, operators=kind).fit(show_progress) for model in models]
        found, alphas = {}, {}
        for recovery in ALPHAS:
            alphas[recovery] = _chosen(
                methods, recovery, lambda m: lds(scored(m, batches[0]), membership, tuning, n_resamples=0)
            )
            _set(methods, recovery, alphas[recovery])
            found[recovery] = lds(scored(methods, batches[1]), membership, reported)
        closed = [
            _closed_form_on_phi(method, model, task, batches[1])
            for method, model in zip(methods, models, strict=True)
        ]
        points.append(
            CurvePoint(
                n_subsets=k,
                subset_size=int(_trained(methods[0]).membership[0].nnz),
                lasso=found["lasso"],
                ridge=found["ridge"],
                closed_form=lds(closed, membership, reported),
                fit_seconds=float(np.mean([method.fit_seconds_ for method in methods])),
                alphas=alphas,
            )
        )
    of_paper = [STRIDE(model, task.train, operators=paper) for model in models]
    protocol = {
        "n_train": task.n_train,
        "n_models": n_models,
        "n_seeds": n_seeds,
        "n_halves": membership.shape[0],
        "left_out": left_out,
        "n_test_tuning": half,
        "n_test_reported": plan.n_test - half,
        "alphas": {recovery: list(values) for recovery, values in ALPHAS.items()},
        "paper": paper.to_dict(),
    }
    result = lds(scored(of_paper, batches[1]), membership, reported)
    return RecoveryCurve(task.name, points, result, protocol, environment.describe())


def _chosen(
    methods: Sequence[STRIDE], recovery: str, measure: Callable[[Sequence[STRIDE]], LDSResult]
) -> float:
    """The penalty with the highest LDS; undefined correlations count as 0, as in `compare`."""
    values = []
    for alpha in ALPHAS[recovery]:
        _set(methods, recovery, alpha)
        result = measure(methods)
        values.append((not result.ranks_nothing, result.undefined_as_zero))
    return ALPHAS[recovery][max(range(len(values)), key=lambda i: values[i])]


def _set(methods: Sequence[STRIDE], recovery: str, alpha: float) -> None:
    """Set the recovery of fitted operators, which needs no new fit."""
    wanted: Recovery = Lasso(alpha=alpha) if recovery == "lasso" else Ridge(alpha=alpha)
    for method in methods:
        _trained(method).recovery = wanted


def _trained(method: STRIDE) -> TrainedOperators:
    return cast(TrainedOperators, method.operators_)


def _closed_form_on_phi(
    method: STRIDE, model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]
) -> NDArray[Any]:
    """Scores of the closed form whose features are phi of the trained operators."""
    trained = _trained(method)
    with torch.no_grad():
        taps = method._states[0].taps if method._states else []

        def encode(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            batch = method._example_batch((inputs, labels), "inputs")
            rows = method._read_batch(model, taps, batch)
            return trained.steering.encode(rows.side_by_side * trained.scale), rows.logits

        codes, logits = encode(*task.train.tensors)
        closed = STRIDE.from_features(codes, logits, task.train.tensors[1])
        return np.asarray(closed.influence((*encode(*batch), batch[1])))
