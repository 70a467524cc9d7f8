"""Owns the main job: explain chosen test points of a task by their training examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import STRIDEConfig
from ..distributed import DistributedSTRIDE
from ..errors import bad_value
from ..process_group import first_rank_first, in_group
from ..responses import multiclass_logits, response_value
from ..stride import STRIDE
from . import environment
from .retraining import logits_of, train_attributed
from .tasks import Task


@dataclass(frozen=True)
class Neighbour:
    """A training example and its score.

    Attributes:
        index: Place in the training set.
        label: Its class.
        score: Predicted change of the response when it is among the training examples.
    """

    index: int
    label: int
    score: float


@dataclass(frozen=True)
class ExplainedPoint:
    """One test point.

    Attributes:
        index: Place in the test set.
        label: True class.
        predicted: Predicted class.
        probability: Probability of the true class.
        response: Value of the response.
        proponents: The highest scores, descending.
        opponents: The lowest scores, ascending.
    """

    index: int
    label: int
    predicted: int
    probability: float
    response: float
    proponents: list[Neighbour]
    opponents: list[Neighbour]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        task: Name of the task.
        note: What must be read beside the figures.
        points: The explained test points.
        suspects: Training examples whose label is most suspect, most suspect first; `score` is the
            norm of the leave-one-out residual.
        accuracy: "train" and "test".
        seconds: "forward" (bare forward pass over the training set), "fit" and "query".
        settings: Options of the method.
        layers: Where features were read.
        environment: Versions and hardware.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.models import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> explanation, _ = explain(task, indices=[0], k=2, n_suspects=3)
    >>> len(explanation.suspects)
    3
    """

    task: str
    note: str
    points: list[ExplainedPoint]
    suspects: list[Neighbour]
    accuracy: dict[str, float]
    seconds: dict[str, float]
    settings: dict[str, Any]
    layers: list[str]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def explain(
    task: Task,
    *,
    indices: Sequence[int] | None = None,
    k: int = 8,
    n_suspects: int = 16,
    model: nn.Module | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    config: STRIDEConfig | None = None,
    show_progress: bool = False,
) -> tuple[Explanation, STRIDE]:
    """Explain test points of a task; in a process group, every rank gets the same explanation.

    Args:
        task: Data, network and training settings.
        indices: Test points; None takes the three with the highest loss and the first three.
        k: Proponents and opponents of each.
        n_suspects: Most suspect training labels that are listed.
        model: A trained model; None trains one.
        seed: Of the training.
        store: Folder where a trained model is kept.
        config: Options of STRIDE.
        show_progress: Whether to show bars.

    Returns:
        The explanation and the fitted method.

    Raises:
        IndexError: A test point that does not exist.
        ValueError: `k` is below 1.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.models import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> explanation, method = explain(task, indices=[5], k=2)
    >>> (point,) = explanation.points
    >>> point.index, len(point.proponents), len(point.opponents)
    (5, 2, 2)
    """
    if k < 1:
        raise bad_value("k", "be at least 1", k)
    if model is None:
        with first_rank_first():
            model = train_attributed(task, seed, store)
    model.eval()
    x, y = task.train.tensors
    x_test, y_test = task.test.tensors
    test_logits = multiclass_logits(logits_of(model, x_test))
    if indices is None:
        hardest = response_value(test_logits, y_test, "loss").argsort(descending=True)[:3].tolist()
        indices = list(dict.fromkeys([*hardest, *range(min(3, len(y_test)))]))
    for index in indices:
        if not 0 <= index < len(y_test):
            raise IndexError(f"The test set of {task.name} has points 0 to {len(y_test) - 1}; got {index}.")
    started = time.perf_counter()
    train_logits = multiclass_logits(logits_of(model, x))
    forward_seconds = time.perf_counter() - started
    method = (DistributedSTRIDE if in_group() else STRIDE)(model, task.train, config=config)
    method.fit(show_progress)
    rows = torch.as_tensor(indices)
    batch = (x_test[rows], y_test[rows])
    best = method.influence(batch, k, True, show_progress)
    seconds = {"forward": forward_seconds, "fit": method.fit_seconds_, "query": method.query_seconds_}
    worst = method.influence(batch, k, False, show_progress)
    response = response_value(test_logits[rows], y_test[rows], method.response)
    points = [
        ExplainedPoint(
            index=index,
            label=int(y_test[index]),
            predicted=int(test_logits[index].argmax()),
            probability=float(test_logits[index].softmax(0)[y_test[index]]),
            response=float(response[i]),
            proponents=_neighbours(best[0][i], best[1][i], y),
            opponents=_neighbours(worst[0][i], worst[1][i], y),
        )
        for i, index in enumerate(indices)
    ]
    flags = method.mislabel_scores()
    suspects = flags.argsort(descending=True, stable=True)[:n_suspects]
    explanation = Explanation(
        task=task.name,
        note=task.note,
        points=points,
        suspects=_neighbours(suspects, flags[suspects], y),
        accuracy={"train": _accuracy(train_logits, y), "test": _accuracy(test_logits, y_test)},
        seconds=seconds,
        settings=method.config.to_dict(),
        layers=method.layers_,
        environment=environment.describe(),
    )
    return explanation, method


def _neighbours(indices: Tensor, scores: Tensor, labels: Tensor) -> list[Neighbour]:
    return [
        Neighbour(int(i), int(labels[i]), float(s))
        for i, s in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())
