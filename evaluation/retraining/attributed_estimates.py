"""Cost of training attributed models, their checkpoints and cross-fitted models, before it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tasks.new_network import checked_network
from ..tasks.task import Task
from . import store as run_store
from .attributed_models import FIRST_SPIKED, TRIES, attributed_path, checkpoint_paths
from .engines import largest_stack
from .estimate import RetrainingEstimate
from .spikes import SPIKE, read_spike
from .task_parts import HALVES, Split, cross_fit_training
from .workers import arguments_of, count, seconds_per_example


def estimate_attributed(
    runs: Iterable[tuple[Task, int]], store: str | Path, *, purpose: str, device: torch.device | str = "cpu"
) -> RetrainingEstimate:
    """What `train_attributed` would train, and how long that takes.

    Args:
        runs: Task and seed of each training, at least one.
        store: Folder of the weights; it is only read.
        purpose: What the models are for, for the printed estimate.
        device: Where they are trained.
    """
    files = (
        (task, [[attributed_path(run_store.Fingerprints(task), seed, store, False, device)]])
        for task, seed in runs
    )
    return _estimate(files, purpose, device)


def estimate_checkpoints(
    runs: Iterable[tuple[Task, int, Sequence[int]]],
    store: str | Path,
    *,
    device: torch.device | str = "cpu",
) -> RetrainingEstimate:
    """What `train_checkpoints` would train; `runs` have task, seed and epochs of each attributed model."""
    files = (
        (task, [checkpoint_paths(run_store.Fingerprints(task), kept, seed, store, device)])
        for task, seed, kept in runs
        if kept
    )
    return _estimate(files, "checkpoints of attributed models", device)


def estimate_cross_fitted(
    runs: Iterable[tuple[Task, int]],
    repeats: int,
    store: str | Path,
    split: Split = HALVES,
    *,
    engine: str = "auto",
    n_jobs: int = 1,
    device: torch.device | str = "cpu",
) -> RetrainingEstimate:
    """What `cross_fit` would train for the tasks and numbers of some attributed models."""
    files, stacked = [], False
    for task, number in runs:
        how: dict[str, Any] = {"engine": engine, "device": device}
        function, _, paths = cross_fit_training(task, number, repeats, store, split, **how)
        files.append((task, [[path] for path in paths if path is not None]))
        stacked |= function.stacked
    purpose = "cross-fitted halves" if split.parts == 2 else f"cross-fitted parts, {split.parts} of each"
    return _estimate(files, purpose, device, split, n_jobs, stacked=stacked)


def estimate_spiked(
    task: Task, store: str | Path, n_models: int, *, device: torch.device | str = "cpu"
) -> tuple[RetrainingEstimate, list[int]]:
    """What `train_spiked` would train for several models; each tries the seeds after that of the last one.

    Returns:
        The estimate, and the seed of each model: if the store does not tell it, the first that is tried.
    """
    names = run_store.Fingerprints(task)
    network = checked_network(task.build_model, task.train.tensors[0][:2])
    paths: list[Path] = []
    chosen, first, at_most = [], FIRST_SPIKED, ""
    for _ in range(n_models):
        for seed in range(first, first + TRIES):
            paths.append(attributed_path(names, seed, store, True, device))
            spike, told = read_spike(paths[-1])
            if told and spike is None:
                paths.pop()  # trained before, without a spike
            high = spike is not None and spike.residual > SPIKE
            if high and run_store.read_state(paths[-1], network)[0] is not None:
                break
        else:
            seed, at_most = first, "each search ends at the first model with a spike of its loss"
        chosen.append(seed)
        first = seed + 1 if not at_most else first + TRIES
    found = _estimate([(task, [[path] for path in paths])], "models stopped on a spike", device)
    return replace(found, task=task.name, at_most=at_most), chosen


def _estimate(
    runs: Iterable[tuple[Task, Sequence[Sequence[Path]]]],
    purpose: str,
    device: torch.device | str,
    split: Split | None = None,
    n_jobs: int = 1,
    *,
    stacked: bool = False,
) -> RetrainingEstimate:
    """Estimate for trainings of tasks; some batches of the first missing one, or of its stack, are timed.

    Args:
        runs: Each task, with the files of each of its trainings.
        purpose: What the models are for.
        device: Where they are trained.
        split: How the parts are made that models are trained on; None for the whole training set.
        n_jobs: Workers.
        stacked: Whether the parts are trained in stacks.
    """
    n_runs = n_missing = n_damaged = n_bytes = 0
    name, per_example, n_examples = "", 0.0, 0.0
    for task, trainings in runs:
        network = checked_network(task.build_model, task.train.tensors[0][:2])
        size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        part = split or Split(parts=1)
        examples = (part.epochs or task.training.epochs) * task.n_train / part.parts
        n_runs, name = n_runs + len(trainings), name or task.name
        for paths in trainings:
            found: list[tuple[Any, str | None]] = [
                run_store.read_state(path, network) if split is None else run_store.read_states(path)
                for path in paths
            ]
            if all(state is not None for state, _ in found):
                continue
            n_missing += 1
            n_damaged += any(damage is not None for _, damage in found)
            n_examples += examples
            n_bytes += len(paths) * size
            n_alike = min(len(trainings), largest_stack(device)) if stacked else 1
            per_example = per_example or _seconds_per_example(task, device, n_alike, part.parts)
    n_workers = count(n_jobs, device)
    workers = min(n_workers, -(-n_missing // largest_stack(device)) if stacked else n_missing)
    return RetrainingEstimate(
        task=name,
        n_subsets=1,
        n_seeds=n_runs,
        engine="stacked" if stacked else "processes",
        n_stored=n_runs - n_missing,
        n_damaged=n_damaged,
        n_workers=workers,
        seconds=per_example * n_examples / max(workers, 1),
        n_bytes=n_bytes,
        purpose=purpose,
    )


def _seconds_per_example(task: Task, device: torch.device | str, n_alike: int, parts: int) -> float:
    """Seconds for each example and model; above one model, of a stack of so many."""
    rows, stacked = np.arange(task.n_train // parts), n_alike > 1
    return seconds_per_example(
        **arguments_of(task),
        subsets=[rows] * n_alike,
        seeds=list(range(n_alike)),
        device=str(device),
        stacked=stacked,
    )
