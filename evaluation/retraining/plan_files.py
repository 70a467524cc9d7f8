"""Which files a plan of retrainings has, and which engine writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...subsets import members
from ..tasks.new_network import built
from . import files as retraining_files
from . import store as run_store
from .engines import STACK_RECIPE, largest_stack, takes_stacks
from .files import Run, RunFile
from .store import Fingerprints
from .training import logits_of

if TYPE_CHECKING:
    from .plan import RetrainingPlan


def files_for(plan: RetrainingPlan, engine: str, device: torch.device | str) -> list[RunFile]:
    """All files of a plan for an engine; "auto" is resolved here."""
    device = torch.device(device)

    def n_stored(stacked: bool) -> int:
        return sum(len(f.runs) for f in files_of(plan, stacked, device) if f.read()[0] is not None)

    _, counts = np.unique(np.diff(plan.membership.indptr), return_counts=True)
    n_alike = int(counts.max()) * plan.n_seeds
    return files_of(plan, takes_stacks(engine, plan.task, n_stored, n_alike, device), device)


def files_of(plan: RetrainingPlan, stacked: bool, device: torch.device) -> list[RunFile]:
    """All files of a plan for one engine."""
    names, n_classes = Fingerprints(plan.task), _n_classes(plan)
    folder = Path(plan.store).absolute()
    there = retraining_files.stored(folder)
    n_evaluated = min(len(plan.task.test), max(plan.n_test, retraining_files.EVALUATED))
    limit = largest_stack(device)

    def stem(runs: Sequence[Run]) -> str:
        found = [_fingerprint(plan, names, run, device, stacked) for run in runs]
        return f"stack-{run_store.of_all(found)}" if stacked else f"run-{found[0]}"

    def enough(name: str) -> list[int]:
        return [n for n in there.get(name, ()) if plan.n_test <= n <= len(plan.task.test)]

    every = (
        retraining_files.stacks(plan.membership, plan.n_seeds, limit, lambda runs: bool(enough(stem(runs))))
        if stacked
        else retraining_files.single_runs(plan.membership.shape[0], plan.n_seeds)
    )
    files = []
    for runs in every:
        name = stem(runs)
        n_test = min(enough(name), default=n_evaluated)
        files.append(RunFile(folder / f"{name}-{n_test}.npy", runs, n_test, n_classes, stacked))
    return files


def _fingerprint(
    plan: RetrainingPlan, names: Fingerprints, run: Run, device: torch.device, stacked: bool
) -> str:
    extra = f"stacked={STACK_RECIPE}" if stacked else ""
    if device.type != "cpu":
        extra += f" device={device.type}"
    return names.of(plan._seed(*run), members(plan.membership, run[0]), extra)


def _n_classes(plan: RetrainingPlan) -> int:
    few = plan.task.test.tensors[0][:1]
    return logits_of(built(plan.task).eval(), few, loss=plan.task.loss).shape[1]
