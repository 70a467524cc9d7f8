"""Cross-fitting: models trained on the parts of random partitions, for averaged scores and for `refine`.

In each partition, one model has seen a training example and the others have not; the proportion is the same
for all examples. Training on all parts of one partition costs as much as one training on the whole training
set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import bad_value
from ...influence.checkpoints.checkpoint import Checkpoint, load_checkpoint
from ...losses import Loss, loss_of
from ...losses.whole_examples import loss_of_outputs
from ...subsets import Membership, members, membership_from_indices
from ...system.preserve_state import preserve_state
from ..tasks.task_loss import output_rows, response_of
from . import store as run_store
from .parts import PartTraining, TrainFunction, part_trainings, train_part, training_paths
from .store import State
from .workers import count


@dataclass(frozen=True)
class CrossFitted:
    """Models that were trained on parts of the training set.

    Attributes:
        checkpoints: Checkpoints of all models in order, for the argument `checkpoints` of any method.
        membership: Which examples each model has seen, CSR `(n_models, n_train)`.
        last: Index of the last checkpoint of each model in `checkpoints`.
        trainings: Cost, in trainings on the whole training set with as many epochs.

    >>> halves = retrain(lambda indices, seed: nn.Linear(3, 2), 10)
    >>> halves.membership.shape, halves.last
    ((2, 10), [0, 1])
    """

    checkpoints: list[Checkpoint]
    membership: Membership
    last: list[int]
    trainings: float

    def measured(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        response: str | None = None,
        *,
        loss: Loss | str | None = None,
    ) -> NDArray[np.float64]:
        """Responses of the models at test points, `(n_test, n_models)`, for `refine`.

        Args:
            model: A network of the same architecture; its weights do not change.
            batch: Inputs and labels of the test points.
            response: One of `stride_captum.responses`; None for the first of the loss, "margin" for classes.
            loss: What the models were trained with, or its name; None for cross-entropy.
        """
        found = []
        trained_with = loss_of("cross_entropy" if loss is None else loss)
        x, y = batch
        device = next((p.device for p in model.parameters()), x.device)
        with preserve_state(model, weights=True) as network, torch.no_grad():
            for place in self.last:
                load_checkpoint(network, self.checkpoints[place].weights)
                outputs = network.eval()(x.to(device))
                outputs = getattr(outputs, "logits", outputs)
                own = loss_of_outputs(trained_with, outputs)
                rows = output_rows(own, outputs).cpu()
                found.append(response_of(own, rows, y, response).double().numpy())
        return np.stack(found, axis=1)


def retrain(
    train_function: TrainFunction,
    n_train: int,
    *,
    parts: int = 2,
    repeats: int = 1,
    seed: int = 0,
    store: str | Path | None = None,
    version: str | None = None,
    n_jobs: int = 1,
) -> CrossFitted:
    """Train a model on each part of random partitions of the training set.

    Scores averaged over such models, `STRIDE(model, data, checkpoints=found.checkpoints)`, explain the
    training procedure instead of one file of weights. They are more faithful than those of one model, at the
    cost of `repeats` trainings.

    Args:
        train_function: `f(indices, seed)` trains a network from scratch on these examples and returns it, or
            a sequence of models or state dicts along its training. It is called in other processes if
            `n_jobs` is not 1.
        n_train: Number of training examples.
        parts: Number of parts of a partition; each model is trained on one part.
        repeats: Number of partitions.
        seed: Seed of the partitions, and of torch, NumPy and Python's `random`: those of model i are
            `seed + i`.
        store: Folder for the weights: what is there is not trained again. None keeps nothing.
        version: Name for what `train_function` does: stored trainings with the same version are reused. None
            names them by a digest of the code and of everything that it reads.
        n_jobs: Workers of joblib; -1 takes all cores.

    Returns:
        The models, as checkpoints with the examples that they have seen.

    Raises:
        ValueError: A count is out of range, or trained weights are not finite.
        TypeError: `train_function` returns neither models nor state dicts.
        RuntimeError: `train_function` raised an error; the message names the training. Finished trainings
            stay in the store.

    >>> def train(indices, seed):
    ...     torch.manual_seed(seed)
    ...     return nn.Linear(3, 2)
    >>> found = retrain(train, 10, parts=2, repeats=3)
    >>> len(found.checkpoints), found.trainings, len(found.checkpoints[0].seen)
    (6, 3.0, 5)
    """
    jobs = part_trainings(n_train, parts, repeats, seed)
    paths = training_paths(train_function, jobs, store, version)

    def one_by_one(todo: Sequence[PartTraining]) -> list[list[State]]:
        parallel = joblib.Parallel(n_jobs=count(n_jobs, "cpu"))
        done: list[list[State]] = parallel(
            joblib.delayed(train_part)(train_function, job, paths[job.number]) for job in todo
        )
        return done

    return cross_fitted(jobs, paths, one_by_one, n_train)


def cross_fitted(
    jobs: Sequence[PartTraining],
    paths: Sequence[Path | None],
    train: Callable[[Sequence[PartTraining]], Sequence[list[State]]],
    n_train: int,
) -> CrossFitted:
    """Read the trainings that are in the store, do the others, and put all of them together.

    Args:
        jobs: All trainings.
        paths: The file of each, or None.
        train: Does some of them and writes their files; returns the checkpoints of each.
        n_train: Number of training examples.
    """
    states: dict[int, list[State]] = {}
    for job, path in zip(jobs, paths, strict=True):
        found, damage = (None, None) if path is None else run_store.read_states(path)
        if found is not None:
            states[job.number] = found
        elif path is not None:
            run_store.say_damaged(path, damage)
    todo = [job for job in jobs if job.number not in states]
    states |= {job.number: found for job, found in zip(todo, train(todo), strict=True)}
    checkpoints, last = [], []
    for job in jobs:
        checkpoints += [Checkpoint(state, seen=job.rows.tolist()) for state in states[job.number]]
        last.append(len(checkpoints) - 1)
    membership = membership_from_indices([job.rows for job in jobs], n_train)
    return CrossFitted(checkpoints, membership, last, len(jobs) / jobs[0].parts)


def check_apart(judges: Membership, used: Membership) -> None:
    """Refuse to evaluate scores on subsets whose models were used to compute them.

    Args:
        judges: Subsets that scores are evaluated on, CSR `(n_subsets, n_train)`.
        used: Subsets whose models were used, CSR `(n_models, n_train)`.

    Raises:
        ValueError: A subset is in both.
    """

    def keys(membership: Membership) -> Iterable[bytes]:
        return (members(membership, k).tobytes() for k in range(membership.shape[0]))

    shared = set(keys(judges)) & set(keys(used))
    if shared:
        raise bad_value(
            "membership",
            "hold subsets whose models have not entered the scores",
            f"{len(shared)} that have",
            "Draw the parts with another seed.",
        )
