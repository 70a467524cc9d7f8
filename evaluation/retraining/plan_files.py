"""Which files a plan of retrainings has, and which engine writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import bad_choice, bad_value
from ...subsets import members
from ..tasks.new_network import built
from . import files as retraining_files
from . import store as run_store
from .files import Run, RunFile
from .stacked import why_not_stacked
from .store import Fingerprints
from .training import logits_of

if TYPE_CHECKING:
    from .plan import RetrainingPlan

ENGINES = ("auto", "processes", "stacked")
#: Limits of the engine "auto", as measured by `benchmarks.retraining`. On the CPU a stack is faster than
#: joblib's processes if the overhead of a step exceeds its arithmetic: for fully connected networks up to
#: about 250,000 parameters. Mapped convolutions are slower than single ones.
_CPU_PARAMETERS = 250_000
_CPU_STACK, _DEVICE_STACK = 16, 256
_SMALLEST_STACK = 8
#: Part of the name of a stack; increased whenever `train_stacked` changes what it computes.
_STACK_RECIPE = 1


def files_for(plan: RetrainingPlan, engine: str, device: torch.device | str) -> list[RunFile]:
    """All files of a plan for an engine; "auto" is resolved here."""
    device = torch.device(device)
    if engine not in ENGINES:
        raise bad_choice("engine", engine, ENGINES)
    if engine == "auto":
        stored = {}
        for name in ("processes", "stacked"):
            files = files_of(plan, name == "stacked", device)
            stored[name] = sum(len(file.runs) for file in files if file.read()[0] is not None)
        engine = max(stored, key=lambda name: stored[name])
        if not stored[engine] and _stacks_are_faster(plan, device):
            engine = "stacked"
    elif engine == "stacked":
        reason = _why_not_stacked(plan)
        if reason is not None:
            raise bad_value("engine", "be 'processes' for this network", "'stacked'", reason)
    return files_of(plan, engine == "stacked", device)


def files_of(plan: RetrainingPlan, stacked: bool, device: torch.device) -> list[RunFile]:
    """All files of a plan for one engine."""
    names, n_classes = Fingerprints(plan.task), _n_classes(plan)
    folder = Path(plan.store).absolute()
    there = retraining_files.stored(folder)
    n_evaluated = min(len(plan.task.test), max(plan.n_test, retraining_files.EVALUATED))
    limit = _CPU_STACK if device.type == "cpu" else _DEVICE_STACK

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
    extra = f"stacked={_STACK_RECIPE}" if stacked else ""
    if device.type != "cpu":
        extra += f" device={device.type}"
    return names.of(plan._seed(*run), members(plan.membership, run[0]), extra)


def _n_classes(plan: RetrainingPlan) -> int:
    few = plan.task.test.tensors[0][:1]
    return logits_of(built(plan.task).eval(), few, loss=plan.task.loss).shape[1]


def _stacks_are_faster(plan: RetrainingPlan, device: torch.device) -> bool:
    _, counts = np.unique(np.diff(plan.membership.indptr), return_counts=True)
    if counts.max() * plan.n_seeds < _SMALLEST_STACK:
        return False
    if device.type == "cpu":
        weights = list(built(plan.task).parameters())
        if sum(w.numel() for w in weights) > _CPU_PARAMETERS or any(w.dim() > 2 for w in weights):
            return False
    return _why_not_stacked(plan) is None


def _why_not_stacked(plan: RetrainingPlan) -> str | None:
    if not plan.task.has_classes:
        return f"Stacks are trained with cross-entropy, and this task with {plan.task.loss.name!r}."
    return why_not_stacked(plan.task.build_model, plan.task.train.tensors[0][:2])
