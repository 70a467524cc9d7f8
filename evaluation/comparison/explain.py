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
from ...losses import Loss
from ...operators import Operators
from ...stride import STRIDE
from ...system.devices import existing_device
from ...system.preserve_state import preserve_state
from ...system.processes import first_rank_first, in_group
from ..retraining.parts import TrainFunction
from ..system import environment
from ..tasks.class_logits import check_logits
from ..tasks.task import Task
from ..tasks.task_loss import is_plain, loss_of_methods, objective, response_of
from .explained_models import learned_nothing, models_to_explain, reliabilities
from .in_words import label_in_words, output_in_words


@dataclass(frozen=True)
class Neighbor:
    """A training example and its score.

    Attributes:
        index: Index in the training set.
        label: Its class; in words if the loss has none (`in_words`).
        score: Predicted change of the response when it is in the training set.
        id: Its name (`Task.ids`); None if examples have none.
    """

    index: int
    label: int | str
    score: float
    id: str | None = None


@dataclass(frozen=True)
class ExplainedPoint:
    """One test point.

    Attributes:
        index: Index in the test set.
        label: True class; in words if the loss has none, or if there are several positions.
        predicted: Predicted class, or what the model says in the unit of the label, in words.
        probability: Probability of the true class; None if the loss is not plain cross-entropy.
        response: Value of the response, by default the first of the loss: the margin of the true class.
        proponents: The highest scores, descending.
        opponents: The lowest scores, ascending.
        reliability: From 0 to 1, how well independent estimates of the scores agree
            (`stride_captum.reliability`); None if it is not known. Below 0.5 no example stands out.
    """

    index: int
    label: int | str
    predicted: int | str
    probability: float | None
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
        accuracy: On the sets "train" and "test"; empty if the loss is not plain cross-entropy.
        mean_loss: Mean over examples, and over positions if there are several, on "train" and "test".
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
    mean_loss: dict[str, float] = field(default_factory=dict)

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
        ValueError: `k` is below 1, the device does not exist, inputs are not finite, or the model does not
            return finite outputs that the loss takes.

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
        test_outputs = _checked(task.loss, models.outputs(x_test), y_test, "test")
        started = time.perf_counter()
        train_outputs = models.outputs(x)
        forward_seconds = time.perf_counter() - started
    _checked(task.loss, train_outputs, y, "train")
    if indices is None:
        hardest = response_of(task.loss, test_outputs, y_test, "loss").argsort(descending=True)[:3].tolist()
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
        loss=loss_of_methods(task.loss),
        ids=None if in_group() else task.ids,  # a rank has a share of the examples
    )
    method.fit(show_progress)
    rows = torch.as_tensor(indices)
    batch = (x_test[rows], y_test[rows])
    best = [part.cpu() for part in method.influence(batch, k, True, show_progress)]
    seconds = {"forward": forward_seconds, "fit": method.fit_seconds_, "query": method.query_seconds_}
    worst = [part.cpu() for part in method.influence(batch, k, False, show_progress)]
    asked, width = (task.loss, test_outputs[rows], y_test[rows]), test_outputs.shape[1]
    response = response_of(*asked, method.response)
    probabilities = response_of(*asked, "probability").tolist() if task.has_classes else None
    agreement = reliabilities(method, batch, task.loss)
    points = [
        ExplainedPoint(
            index=index,
            label=label_in_words(task.loss, y_test[index], width),
            predicted=output_in_words(task.loss, test_outputs[index], y_test[index]),
            probability=None if probabilities is None else probabilities[i],
            response=float(response[i]),
            proponents=_neighbors(task, width, best[0][i], best[1][i]),
            opponents=_neighbors(task, width, worst[0][i], worst[1][i]),
            reliability=agreement[i],
        )
        for i, index in enumerate(indices)
    ]
    flags = method.mislabel_scores().cpu()
    suspects = flags.argsort(descending=True, stable=True)[:n_suspects]
    sets = {"train": (train_outputs, y), "test": (test_outputs, y_test)}
    explanation = Explanation(
        task=task.name,
        note=" ".join(s for s in (task.note, models.note(), learned_nothing(task, train_outputs)) if s),
        points=points,
        suspects=_neighbors(task, width, suspects, flags[suspects]),
        accuracy={k: _accuracy(*v) for k, v in sets.items()} if task.has_classes else {},
        mean_loss={k: float(objective(task.loss, *v)) for k, v in sets.items()},
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


def _neighbors(task: Task, width: int, indices: Tensor, scores: Tensor) -> list[Neighbor]:
    labels, ids = task.train.tensors[1], task.ids
    return [
        Neighbor(i, label_in_words(task.loss, labels[i], width), s, None if ids is None else ids[i])
        for i, s in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def _checked(loss: Loss, outputs: Tensor, labels: Tensor, argument: str) -> Tensor:
    """Output rows `(n, width)` that can be explained."""
    loss.labels(labels, outputs.shape[1], argument)
    if is_plain(loss):
        check_logits(outputs, len(labels), 0, "model")
    if not bool(torch.isfinite(outputs).all()):
        raise bad_value("model", "give finite logits", f"NaN or infinity for `{argument}`")
    return outputs


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())
