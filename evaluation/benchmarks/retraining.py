"""Speed of stacked training, relative to training one model at a time on the same device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from ...errors import bad_choice
from ..retraining.workers import train_and_evaluate
from ..tasks import networks as models
from ..tasks.networks import TrainingSettings


@dataclass(frozen=True)
class Case:
    """One network and training set size.

    Attributes:
        build_model: The network.
        shape: Shape of one input.
        n_train: N; a subset is half of it.
        training: Settings of Table 3, except the epochs.
    """

    build_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n_train: int
    training: TrainingSettings


CASES = {
    "digits": Case(models.digits_mlp, (1, 8, 8), 1_397, models.DIGITS_TRAINING),
    "mnist": Case(models.mnist_mlp, (1, 28, 28), 5_000, models.MNIST_TRAINING),
    "cifar10": Case(models.cifar10_cnn, (3, 32, 32), 2_000, models.CIFAR10_TRAINING),
}


def bench_retraining(
    cases: Sequence[str] = ("digits", "mnist"),
    *,
    device: torch.device | str = "cpu",
    stack_sizes: Sequence[int] | None = None,
    n_single: int = 8,
    epochs: int = 1,
    n_jobs: int | None = None,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Time stacks of models, in turns with the same models trained one by one.

    Inputs are random, since the time of a step does not depend on them. Every run uses one thread, trains on
    half of the training set and is evaluated on 300 points.

    Args:
        cases: Names from `CASES`.
        device: Where both are trained.
        stack_sizes: Models in a stack; None takes 4, 16 and 64 on the CPU and 64, 256 and 512 on a GPU.
        n_single: Models that are trained one by one in each worker.
        epochs: Epochs of a training.
        n_jobs: Joblib processes, which all do the same; None takes 2 on the CPU and 1 on a GPU.
        repeats: Timed turns, after an untimed one.

    Returns:
        A row for each case and stack size: median seconds for each model with all workers busy, the median
        and the extremes of "ratio" (one by one / stacked: above 1 the stack is faster), and the sizes.

    Raises:
        ValueError: There is no such case.
    """
    for name in cases:
        if name not in CASES:
            raise bad_choice("cases", name, list(CASES))
    on_cpu = torch.device(device).type == "cpu"
    if stack_sizes is None:
        stack_sizes = (4, 16, 64) if on_cpu else (64, 256, 512)
    if n_jobs is None:
        n_jobs = 2 if on_cpu else 1
    rows = []
    with joblib.Parallel(n_jobs=n_jobs) as parallel:
        for name in cases:
            for size in stack_sizes:
                single = _arguments(CASES[name], min(n_single, size), epochs, device)
                stack = _arguments(CASES[name], size, epochs, device)
                times = np.array(
                    [
                        (
                            _seconds(parallel, n_jobs, _one_by_one, single),
                            _seconds(parallel, n_jobs, _stack, stack),
                        )
                        for _ in range(repeats + 1)
                    ][1:]
                ) / (n_jobs * np.array([min(n_single, size), size]))
                ratios = (times[:, 0] / times[:, 1]).tolist()
                rows.append(
                    {
                        "case": name,
                        "device": _device_name(device),
                        "n_parameters": sum(p.numel() for p in CASES[name].build_model().parameters()),
                        "subset_size": CASES[name].n_train // 2,
                        "epochs": epochs,
                        "n_jobs": n_jobs,
                        "stack_size": size,
                        "seconds_one_by_one": float(np.median(times[:, 0])),
                        "seconds_stacked": float(np.median(times[:, 1])),
                        "ratio": statistics.median(ratios),
                        "smallest_ratio": min(ratios),
                        "largest_ratio": max(ratios),
                    }
                )
    return rows


def _arguments(case: Case, n_models: int, epochs: int, device: torch.device | str) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    half = case.n_train // 2
    return {
        "build_model": case.build_model,
        "training": replace(case.training, epochs=epochs),
        "x": generator.standard_normal((case.n_train, *case.shape), dtype=np.float32),
        "y": generator.integers(0, 10, case.n_train),
        "subsets": [np.sort(generator.permutation(case.n_train)[:half]) for _ in range(n_models)],
        "seeds": list(range(n_models)),
        "x_test": generator.standard_normal((300, *case.shape), dtype=np.float32),
        "device": str(device),
    }


def _one_by_one(subsets: Sequence[Any], seeds: Sequence[int], **arguments: Any) -> None:
    for rows, seed in zip(subsets, seeds, strict=True):
        train_and_evaluate(subsets=[rows], seeds=[seed], stacked=False, **arguments)


def _stack(**arguments: Any) -> None:
    train_and_evaluate(stacked=True, **arguments)


def _seconds(
    parallel: joblib.Parallel, n_jobs: int, run: Callable[..., None], arguments: dict[str, Any]
) -> float:
    started = time.perf_counter()
    parallel(joblib.delayed(run)(**arguments) for _ in range(n_jobs))
    return time.perf_counter() - started


def _device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
