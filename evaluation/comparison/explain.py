"""`explain`: test points of a task, explained by their most influential training examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed import DistributedSTRIDE
from ...errors import bad_value
from ...features.options import Features
from ...influence.chance import at_chance
from ...operators import Operators
from ...responses import class_labels, response_value
from ...stride import STRIDE
from ...system.devices import existing_device
from ...system.preserve_state import preserve_state
from ...system.processes import first_rank_first, in_group
from ..retraining.parts import TrainFunction
from ..system import environment
from ..tasks.class_logits import check_logits
from ..tasks.task import Task
from .explained_models import models_to_explain, reliabilities


@dataclass(frozen=True)
class Neighbor:
    """A training example and its score.

    Attributes:
        index: Index in the training set.
        label: Its class.
        score: Predicted change of the response when it is in the training set.
        id: Its name (`Task.ids`); None if examples have none.
    """

    index: int
    label: int
    score: float
    id: str | None = None


@dataclass(frozen=True)
class ExplainedPoint:
    """One test point.

    Attributes:
        index: Index in the test set.
        label: True class.
        predicted: Predicted class.
        probability: Probability of the true class.
        response: Value of the response, by default the margin of the true class.
        proponents: The highest scores, descending.
        opponents: The lowest scores, ascending.
        reliability: From 0 to 1, how well independent estimates of the scores agree
            (`stride_captum.reliability`); None if it is not known. Below 0.5 no example stands out.
    """

    index: int
    label: int
    predicted: int
    probability: float
    response: float
    proponents: list[Neighbor]
    opponents: list[Neighbor]
    reliability: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        task: Name of the task.
        note: Warnings that must be read with the figures.
        points: The explained test points.
        suspects: Training examples with the most suspect labels, most suspect first; their `score` is that
            of `STRIDE.mislabel_scores`.
        accuracy: On the sets "train" and "test".
        seconds: "forward" (a forward pass over the training set), "fit" and "query".
        settings: Options of the method.
        layers: Where features were read.
        environment: Versions and hardware.
        models: Which models were explained, and their cost in trainings on the whole training set.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> explanation, _ = explain(task, indices=[0], k=2, n_suspects=3)
    >>> len(explanation.suspects)
    3
    """

    task: str
    note: str
    points: list[ExplainedPoint]
    suspects: list[Neighbor]
    accuracy: dict[str, float]
    seconds: dict[str, float]
    settings: dict[str, Any]
    layers: list[str]
    environment: dict[str, Any]
    models: dict[str, Any] = field(default_factory=dict)

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
    retrainings: int = 0,
    parts: int = 2,
    train_function: TrainFunction | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    n_jobs: int = 1,
    operators: Operators | str | None = None,
    features: Features | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> tuple[Explanation, STRIDE]:
    """Explain test points of a task; in a process group, every rank gets the same explanation.

    Args:
        task: Data, network and training settings.
        indices: Test points; None takes the three with the highest loss and the first three.
        k: Number of proponents and of opponents for each.
        n_suspects: Number of suspect training labels.
        model: A trained model; None trains one, unless there are retrainings.
        retrainings: Number of random partitions of the training set. A model is trained on each part, which
            costs one training for each partition, and scores are averaged over these models. Such scores are
            more faithful, and explain the training procedure instead of one file of weights. Without
            `model`, predictions are the mean of these models, too.
        parts: Parts of each partition.
        train_function: `f(indices, seed)` trains one of these models (see `retrain`); None uses the training
            of the task.
        seed: Seed of the training and of the partitions.
        store: Folder where trained models are kept.
        n_jobs: Workers for the retrainings.
        operators: As for `STRIDE`.
        features: As for `STRIDE`.
        device: Where the model is trained and attributed; None takes the device of `model`, or the CPU.
        show_progress: Whether to show bars.

    Returns:
        The explanation and the fitted method.

    Raises:
        IndexError: A test point that does not exist.
        ValueError: `k` is below 1, the device does not exist, the task has no classes, inputs are not
            finite, or the model does not return finite logits for all classes.

    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> explanation, method = explain(task, indices=[5], k=2)
    >>> (point,) = explanation.points
    >>> point.index, len(point.proponents), len(point.opponents)
    (5, 2, 2)
    """
    if k < 1:
        raise bad_value("k", "be at least 1", k)
    task.need_classes("explain")
    device = None if device is None else existing_device(device)
    with first_rank_first():
        models = models_to_explain(
            task,
            model,
            seed=seed,
            store=store,
            retrainings=retrainings,
            parts=parts,
            train_function=train_function,
            device=device or "cpu",
            n_jobs=n_jobs,
        )
    task.check_inputs()
    x, y = task.train.tensors
    x_test, y_test = task.test.tensors
    with preserve_state(models.model):
        test_logits = _checked(models.logits(x_test), y_test, "test")
        started = time.perf_counter()
        train_logits = models.logits(x)
        forward_seconds = time.perf_counter() - started
    _checked(train_logits, y, "train")
    if indices is None:
        hardest = response_value(test_logits, y_test, "loss").argsort(descending=True)[:3].tolist()
        indices = list(dict.fromkeys([*hardest, *range(min(3, len(y_test)))]))
    for index in indices:
        if not 0 <= index < len(y_test):
            raise IndexError(f"The test set of {task.name} has points 0 to {len(y_test) - 1}; got {index}.")
    kind = DistributedSTRIDE if in_group() else STRIDE
    method = kind(
        models.model,
        task.train,
        checkpoints=models.checkpoints,
        operators=operators,
        features=features,
        device=device,
        ids=None if in_group() else task.ids,  # a rank has a share of the examples
    )
    method.fit(show_progress)
    rows = torch.as_tensor(indices)
    batch = (x_test[rows], y_test[rows])
    best = [part.cpu() for part in method.influence(batch, k, True, show_progress)]
    seconds = {"forward": forward_seconds, "fit": method.fit_seconds_, "query": method.query_seconds_}
    worst = [part.cpu() for part in method.influence(batch, k, False, show_progress)]
    response = response_value(test_logits[rows], y_test[rows], method.response)
    agreement = reliabilities(method, batch)
    points = [
        ExplainedPoint(
            index=index,
            label=int(y_test[index]),
            predicted=int(test_logits[index].argmax()),
            probability=float(test_logits[index].softmax(0)[y_test[index]]),
            response=float(response[i]),
            proponents=_neighbors(task, best[0][i], best[1][i]),
            opponents=_neighbors(task, worst[0][i], worst[1][i]),
            reliability=agreement[i],
        )
        for i, index in enumerate(indices)
    ]
    flags = method.mislabel_scores().cpu()
    suspects = flags.argsort(descending=True, stable=True)[:n_suspects]
    explanation = Explanation(
        task=task.name,
        note=" ".join(s for s in (task.note, models.note(), _learned_nothing(train_logits, y)) if s),
        points=points,
        suspects=_neighbors(task, suspects, flags[suspects]),
        accuracy={"train": _accuracy(train_logits, y), "test": _accuracy(test_logits, y_test)},
        seconds=seconds,
        settings={
            "response": method.response,
            "target": method.target,
            "operators": method.operators.to_dict(),
            "features": method.features.to_dict(),
        },
        layers=method.layers_,
        environment=environment.describe(device or "cpu"),
        models=models.to_dict(),
    )
    return explanation, method


def _neighbors(task: Task, indices: Tensor, scores: Tensor) -> list[Neighbor]:
    labels, ids = task.train.tensors[1], task.ids
    return [
        Neighbor(i, int(labels[i]), s, None if ids is None else ids[i])
        for i, s in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def _checked(logits: Tensor, labels: Tensor, argument: str) -> Tensor:
    """Logits `(n, n_classes)` that can be explained."""
    class_labels(labels, logits.shape[1], argument)
    check_logits(logits, len(labels), 0, "model")
    if not bool(torch.isfinite(logits).all()):
        raise bad_value("model", "give finite logits", f"NaN or infinity for `{argument}`")
    return logits


def _learned_nothing(logits: Tensor, labels: Tensor) -> str:
    why = at_chance(logits.argmax(1), labels)
    if why is None:
        return ""
    return (
        f"The model has learned nothing: {why}. Its scores mean nothing: train it longer or with other "
        "settings, and check its data."
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())
