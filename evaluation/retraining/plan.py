"""Plans of retrainings, subsets x seeds, whose results are kept on disk.

A `RetrainingPlan` is the ground truth of every measure that asks what the model would have predicted without
some examples. A plan that was interrupted resumes, with the same results bit for bit.

There are two engines. "processes" trains one model after the other in each joblib worker, and writes a file
for each run. "stacked" trains subsets of equal size together (`train_stacked`), and writes a file for each
stack; which runs share a stack follows from the plan, and from the stacks that an earlier plan with fewer
seeds has left. Results of the engines differ by rounding, which training amplifies, so neither reads the
files of the other.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...errors import bad_value
from ...subsets import Membership, checked_membership, members
from ..tasks.checks import check_task
from ..tasks.task import Task
from . import files as retraining_files
from . import store as run_store
from . import workers as retraining_workers
from .estimate import RetrainingEstimate
from .files import RunFile
from .plan_files import files_for, files_of

#: Advice if retrainings diverge.
SMALLER_STEPS = "Train with smaller steps (`learning_rate` of the training settings)."


@dataclass(frozen=True)
class RetrainingPlan:
    """Retrain a task from scratch on every subset with every seed.

    Attributes:
        task: What is retrained.
        membership: Which examples each subset keeps, CSR `(n_subsets, n_train)`.
        n_seeds: Independent retrainings of each subset.
        store: Folder of the results. Workers on other machines must see it under the same path.
        n_test: Number of test points that are evaluated, the first ones.
        common_seeds: Whether all subsets share the seed of a retraining, so that they start from the same
            weights (and subsets of one size see their examples in the same order), and differences between
            subsets are paired. By default every run has its own seed.

    Raises:
        ValueError: The membership does not have n_train columns, has an empty subset, or has an entry other
            than 0 and 1; or a count is out of range.

    >>> import tempfile
    >>> from stride_captum.subsets import random_subsets
    >>> from stride_captum.evaluation import load_task
    >>> from stride_captum.evaluation.tasks.networks import TrainingSettings
    >>> training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2)
    >>> task = load_task("synthetic", preset="smoke", training=training)
    >>> subsets = random_subsets(task.n_train, 3, 150)
    >>> with tempfile.TemporaryDirectory() as store:
    ...     plan = RetrainingPlan(task, subsets, n_seeds=2, store=store, n_test=10)
    ...     plan.execute(n_jobs=1, show_progress=False).shape
    (2, 3, 10, 4)
    """

    task: Task
    membership: Membership
    n_seeds: int
    store: Path
    n_test: int
    common_seeds: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "membership", checked_membership(self.membership))
        if self.membership.shape[1] != self.task.n_train:
            raise bad_value(
                "membership", f"have n_train = {self.task.n_train} columns", self.membership.shape[1]
            )
        sizes = np.diff(self.membership.indptr)
        if not sizes.all():
            raise bad_value("membership", "keep an example in every subset", f"none in {int(sizes.argmin())}")
        if self.n_seeds < 1:
            raise bad_value("n_seeds", "be at least 1", self.n_seeds)
        if not 1 <= self.n_test <= len(self.task.test):
            raise bad_value("n_test", f"be between 1 and the {len(self.task.test)} test points", self.n_test)

    def missing(
        self, *, engine: str = "processes", device: torch.device | str = "cpu"
    ) -> list[tuple[int, int]]:
        """Runs `(subset, seed)` that are not in the store, or whose file is damaged."""
        return [
            run for file in files_for(self, engine, device) if file.read()[0] is None for run in file.runs
        ]

    def execute(
        self,
        n_jobs: int = -1,
        show_progress: bool = True,
        *,
        engine: str = "processes",
        device: torch.device | str = "cpu",
    ) -> NDArray[np.float32]:
        """Do the missing runs with joblib, and read all results.

        Another joblib backend is chosen by `joblib.parallel_config` around the call, for instance dask:

            with distributed.Client(address), joblib.parallel_config(backend="dask"):
                plan.execute()

        and in the same way ray, after `ray.util.joblib.register_ray()`. Each run uses one thread, and its
        result does not depend on the backend or the number of workers.

        If a file is damaged (cut off, of another shape, not finite), its runs are done again, with a warning.
        A run that diverges has logits that are not finite, and gives a warning.

        Args:
            n_jobs: Workers; -1 takes all cores on the CPU, and one worker on another device.
            show_progress: Whether to show a bar with the remaining time.
            engine: "processes" trains one model at a time in each worker. "stacked" trains up to 16 subsets
                of equal size (256 on a GPU) at once in each worker; its results differ by rounding and have
                files of their own, and a plan with other subsets has other stacks (more seeds only add some).
                "auto" takes the engine that did most of the plan before. For a new plan it takes "stacked" if
                that is faster (on a GPU, or for fully connected networks up to 250,000 parameters) and at
                least 8 runs have subsets of equal size.
            device: Where models are trained.

        Returns:
            Logits `(n_seeds, n_subsets, n_test, n_classes)`.

        Raises:
            ValueError: The engine does not exist, `torch.func.vmap` cannot map the network ("stacked"), or
                the network cannot read the inputs or labels.
            RuntimeError: A run failed.
        """
        files = files_for(self, engine, device)
        found: dict[tuple[int, int], NDArray[np.float32]] = {}
        todo = []
        for file in files:
            logits, damage = file.read()
            if logits is None:
                run_store.say_damaged(file.path, damage)
                todo.append(file)
            else:
                found.update(file.by_run(logits, self.n_test))
        if todo:
            check_task(self.task)
        with tqdm(
            total=self.n_seeds * self.membership.shape[0],
            initial=len(found),
            desc="retraining",
            unit="run",
            smoothing=0,  # the mean over all runs so far, since workers finish in bursts
            disable=not (show_progress and todo),
        ) as bar:
            tasks = [(file, self._arguments(file, device)) for file in todo]
            for n_runs in retraining_workers.run_all(tasks, retraining_workers.count(n_jobs, device)):
                bar.update(n_runs)
        for file in todo:
            found.update(file.by_run(np.load(file.path), self.n_test))
        diverged = sorted(run for run, logits in found.items() if not np.isfinite(logits).all())
        if diverged:
            warnings.warn(
                f"{len(diverged)} of {len(found)} retrainings of {self.task.name} diverged: the logits of "
                f"{retraining_files.named_few(diverged)} are not finite. {SMALLER_STEPS}",
                stacklevel=2,
            )
        n_subsets = self.membership.shape[0]
        return np.stack(
            [np.stack([found[k, seed] for k in range(n_subsets)]) for seed in range(self.n_seeds)]
        )

    def estimate(
        self, n_jobs: int = -1, *, engine: str = "processes", device: torch.device | str = "cpu"
    ) -> RetrainingEstimate:
        """Cost of `execute` with the same arguments; does not change the store.

        At most 20 batches are timed twice; the faster time is multiplied by the examples and epochs of the
        missing runs.
        """
        files = files_for(self, engine, device)
        damages = {file: file.read() for file in files}
        todo = [file for file, (logits, _) in damages.items() if logits is None]
        n_stored = sum(len(file.runs) for file in files) - sum(len(file.runs) for file in todo)
        workers = min(retraining_workers.count(n_jobs, device), len(todo))
        seconds = 0.0
        if todo:
            size = [len(members(self.membership, file.runs[0][0])) for file in todo]
            examples = [
                n * len(file.runs) * self.task.training.epochs for n, file in zip(size, todo, strict=True)
            ]
            largest = max(range(len(todo)), key=lambda i: examples[i])
            per_example = self._seconds_per_example(todo[largest], device)
            seconds = per_example * max(sum(examples) / workers, examples[largest])
        return RetrainingEstimate(
            task=self.task.name,
            n_subsets=self.membership.shape[0],
            n_seeds=self.n_seeds,
            engine="stacked" if files[0].stacked else "processes",
            n_stored=n_stored,
            n_damaged=sum(len(file.runs) for file, (_, damage) in damages.items() if damage is not None),
            n_workers=workers,
            seconds=seconds,
            n_bytes=sum(file.n_bytes for file in todo),
        )

    def _seed(self, k: int, seed: int) -> int:
        return 1_000_003 * (seed + 1) + (0 if self.common_seeds else k)

    def _path(self, k: int, seed: int) -> Path:
        """File of a run by the engine "processes" on the CPU."""
        files = files_of(self, False, torch.device("cpu"))
        return next(file.path for file in files if file.runs == ((k, seed),))

    def _arguments(self, file: RunFile, device: torch.device | str) -> dict[str, Any]:
        """Arguments of `train_and_evaluate` for the runs of a file."""
        of_task = retraining_workers.arguments_of(self.task)
        return {
            **of_task,
            "subsets": [members(self.membership, k) for k, _ in file.runs],
            "seeds": [self._seed(*run) for run in file.runs],
            "x_test": of_task["x_test"][: file.n_test],
            "device": str(device),
            "stacked": file.stacked,
        }

    def _seconds_per_example(self, file: RunFile, device: torch.device | str) -> float:
        return retraining_workers.seconds_per_example(**self._arguments(file, device))


def without_diverged(
    plan: RetrainingPlan, logits: NDArray[np.float32], at_most: float = 0.1
) -> tuple[Membership, NDArray[np.float32], list[int]]:
    """Leave out the subsets of a plan with a retraining that diverged.

    Args:
        plan: The plan.
        logits: Its result, `(n_seeds, n_subsets, n_test, n_classes)`.
        at_most: Largest share of the subsets that may be left out.

    Returns:
        The membership and the logits of the other subsets, and the indices of those that were left out.

    Raises:
        ValueError: A larger share diverged.
    """
    finite = np.asarray(np.isfinite(logits).all((2, 3)))
    whole = np.asarray(finite.all(0))
    left_out = np.flatnonzero(~whole).tolist()
    if len(left_out) > at_most * len(whole):
        runs = [(int(k), int(seed)) for seed, k in np.argwhere(~finite)]
        share = f"at least {1 - at_most:.0%}" if at_most else "all"
        raise bad_value(
            "training",
            f"let {share} of the {len(whole)} subsets of {plan.task.name} converge",
            f"{len(left_out)} that diverged, {retraining_files.named_few(runs)}",
            SMALLER_STEPS,
        )
    return plan.membership[whole], logits[:, whole], left_out
