"""Workers of a plan of retrainings: joblib jobs that train, evaluate and write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...losses import Loss
from ..tasks.networks import TrainingSettings
from ..tasks.task import Task
from . import store as run_store
from .files import RunFile, named_few
from .stacked import train_stacked
from .training import logits_of, single_thread, train_model

#: Threads share the random state.
ONE_AT_A_TIME = threading.Lock()


def count(n_jobs: int, device: torch.device | str) -> int:
    """Number of workers for `n_jobs`: -1 means all cores on the CPU, and one worker on a GPU."""
    if n_jobs == -1 and torch.device(device).type != "cpu":
        return 1
    return int(joblib.effective_n_jobs(n_jobs))


def run_all(files: Sequence[tuple[RunFile, dict[str, Any]]], n_jobs: int) -> Iterable[int]:
    """Write files; yields the number of runs of each file when it is written.

    Args:
        files: Files, and the arguments of `train_and_evaluate` for each.
        n_jobs: Workers of the active joblib backend. A backend without a generator of results (as ray's)
            yields all of them at the end.

    Raises:
        RuntimeError: A run failed; the message names it. Files that were written before stay.
    """
    backend, _ = joblib.parallel.get_active_backend()
    lazy = getattr(backend, "supports_return_generator", False)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered" if lazy else "list")
    done: Iterable[int] = parallel(joblib.delayed(_done)(file, arguments) for file, arguments in files)
    return done


def _done(file: RunFile, arguments: dict[str, Any]) -> int:
    try:
        write_runs(file.path, **arguments)
    except Exception as error:
        said = str(error).rstrip(".")
        raise RuntimeError(
            f"Retraining {named_few(file.runs)} failed with {type(error).__name__}: {said}. Those that "
            f"were done before are in {file.path.parent}: the same call continues from there."
        ) from error
    return len(file.runs)


def write_runs(path: Path, **arguments: Any) -> None:
    """Train and evaluate the runs of one file, and write it."""
    run_store.write_array(path, train_and_evaluate(**arguments))


def arguments_of(task: Task) -> dict[str, Any]:
    """Those arguments of `train_and_evaluate` that the task decides."""
    return {
        "build_model": task.build_model,
        "training": task.training,
        "x": task.train.tensors[0].numpy(),
        "y": task.train.tensors[1].numpy(),
        "x_test": task.test.tensors[0].numpy(),
        "loss": task.loss,
    }


def train_and_evaluate(
    build_model: Callable[[], nn.Module],
    training: TrainingSettings,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    subsets: Sequence[NDArray[np.int64]],
    seeds: Sequence[int],
    x_test: NDArray[np.float32],
    device: str,
    stacked: bool,
    loss: Loss | None = None,
) -> NDArray[np.float32]:
    """Logits of a stack `(S, n_test, n_classes)`, or of a single run `(n_test, n_classes)`.

    It uses one thread, so that results do not depend on the machine, bit for bit. Only one call runs at a
    time in a process, since threads share the random state.

    Args:
        build_model: Gives an untrained network.
        training: Settings of Table 3.
        x: Inputs of the whole training set.
        y: Labels of the whole training set.
        subsets: Training indices of each run; one array for a single run.
        seeds: Seed of each run.
        x_test: Inputs `(n_test, ...)` to evaluate.
        device: Where it is done.
        stacked: Whether `train_stacked` does it.
        loss: What it is trained with; None for cross-entropy.
    """
    with ONE_AT_A_TIME, single_thread():
        points = torch.tensor(x_test).to(device)
        if stacked:
            data = torch.tensor(x), torch.tensor(y)
            models = train_stacked(build_model, *data, subsets, training, seeds, device=device)
            logits = models.logits(points)
        else:
            data = torch.tensor(x[subsets[0]]), torch.tensor(y[subsets[0]])
            model = train_model(build_model, *data, training, seeds[0], loss=loss, device=device)
            logits = logits_of(model, points, loss=loss)
        found: NDArray[np.float32] = logits.cpu().numpy()
    return found


def seconds_per_example(**arguments: Any) -> float:
    """Seconds of training for each example: the faster of two short trainings.

    Args:
        **arguments: As for `train_and_evaluate`.
    """
    subsets, training = arguments["subsets"], replace(arguments["training"], epochs=1)
    arguments |= {"training": training, "x_test": arguments["x_test"][:1]}
    seconds = []
    for n_batches in (2, 20, 20):  # the first warms up
        arguments["subsets"] = [rows[: n_batches * training.batch_size] for rows in subsets]
        started = time.perf_counter()
        train_and_evaluate(**arguments)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / sum(len(rows) for rows in arguments["subsets"])
