"""Owns how good the paper's form is: LDS of trained operators as the number of subsets K grows.

For each K the same trained operators are read by Lasso and by ridge, and the encoder phi that they share
gives the features of a closed form: what sparse regression recovers is judged against the same features
with K = N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import STRIDEConfig
from ..steering import TrainedSteering
from ..stride import STRIDE
from ..subsets import random_subsets
from . import environment
from .linear_datamodeling import LDSResult, lds, margins
from .retraining import RetrainingPlan, train_attributed
from .tasks import Task


@dataclass(frozen=True)
class CurvePoint:
    """LDS at one number of subsets.

    Attributes:
        n_subsets: K.
        subset_size: |S_k|.
        lasso: Trained operators and Lasso.
        ridge: The same operators and ridge recovery at the same fraction.
        closed_form: The closed form on phi of the same operators.
        fit_seconds: Stage 1, mean over models.
    """

    n_subsets: int
    subset_size: int
    lasso: LDSResult
    ridge: LDSResult
    closed_form: LDSResult
    fit_seconds: float


@dataclass(frozen=True)
class RecoveryCurve:
    """What `recovery_curve` found.

    Attributes:
        task: Name of the task.
        points: One per K.
        paper: The paper's preset as it is.
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
    """Measure the curve; the second half of the test points is reported, the first has set the defaults.

    Args:
        task: The task.
        store: Folder of the retrainings.
        ks: Numbers of subsets.
        preset: Which `STRIDEConfig.paper`.
        n_seeds: Retrainings of each of 100 random halves.
        n_models: Attributed models.
        n_test: Test points, both halves together.
        n_jobs: Processes for the retrainings.
        show_progress: Whether to show bars.

    Raises:
        ValueError: A number of subsets or a preset that does not exist, before anything is retrained.
    """
    configs = {k: STRIDEConfig(operators="trained", n_subsets=k) for k in ks}
    paper = STRIDEConfig.paper(preset, **_fitting(task.n_train))
    n_test = min(n_test, len(task.test))
    membership = random_subsets(task.n_train, 100, task.n_train // 2, seed=0)
    plan = RetrainingPlan(task, membership, n_seeds, Path(store), n_test)
    x_test, y_test = (t[:n_test] for t in task.test.tensors)
    reported = slice(n_test // 2, n_test)
    responses = margins(plan.execute(n_jobs, show_progress), y_test.numpy())[..., reported]
    batch = x_test[reported], y_test[reported]
    models = [train_attributed(task, seed, store) for seed in range(n_models)]

    def score(results: list[NDArray[Any]]) -> LDSResult:
        return lds(results, membership, responses)

    points = []
    for k, config in configs.items():
        found: dict[str, list[NDArray[Any]]] = {"lasso": [], "ridge": [], "closed form": []}
        seconds, size = 0.0, 0
        for model in models:
            method = STRIDE(model, task.train, config=config).fit(show_progress)
            seconds += method.fit_seconds_ / n_models
            found["lasso"].append(np.asarray(method.influence(batch)))
            method.config = dataclasses.replace(config, recovery="ridge")
            found["ridge"].append(np.asarray(method.influence(batch)))
            steering = method._states[0].operators if method._states else None
            assert isinstance(steering, TrainedSteering)
            size = int(steering.membership[0].nnz)
            found["closed form"].append(_closed_form_on_phi(method, steering, model, task, batch))
        points.append(
            CurvePoint(
                k, size, score(found["lasso"]), score(found["ridge"]), score(found["closed form"]), seconds
            )
        )
    preset_scores = [np.asarray(STRIDE(model, task.train, config=paper).influence(batch)) for model in models]
    protocol = {
        "n_train": task.n_train,
        "n_models": n_models,
        "n_seeds": n_seeds,
        "n_halves": 100,
        "n_test_reported": len(y_test[reported]),
        "paper": paper.to_dict(),
    }
    return RecoveryCurve(task.name, points, score(preset_scores), protocol, environment.describe())


def _fitting(n_train: int) -> dict[str, Any]:
    """B.2's 50 subsets of 100 need 5,000 examples: smaller training sets are split into 50 parts."""
    return {} if n_train >= 5_000 else {"coverage": "partition", "subset_size": None}


def _closed_form_on_phi(
    method: STRIDE, steering: TrainedSteering, model: nn.Module, task: Task, batch: tuple[Tensor, Tensor]
) -> NDArray[Any]:
    """Scores of the closed form whose features are phi of the trained operators."""
    with torch.no_grad():
        taps = method._states[0].taps if method._states else []

        def encode(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            batch = method._example_batch((inputs, labels), "inputs")
            features, logits, _ = method._read_batch(model, taps, batch)
            return steering.operators.encode(features * steering.scale), logits

        codes, logits = encode(*task.train.tensors)
        closed = STRIDE.from_features(codes, logits, task.train.tensors[1])
        return np.asarray(closed.influence((*encode(*batch), batch[1])))
