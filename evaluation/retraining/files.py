"""Files of a plan of retrainings: which runs share a file, what it holds, and which files exist.

A file is named by its runs and by the number of test points that they were evaluated on. A file with more
test points than are needed is used as well, since they are always the first ones of the test set.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...subsets import Membership
from . import store as run_store

#: Runs are evaluated on at least this many test points, so that a later call can ask for more of them.
EVALUATED = 500

Run = tuple[int, int]
_NAME = re.compile(r"(?P<stem>(run|stack)-[0-9a-f]{24})-(?P<n>[0-9]+)\.npy")
_NPY_HEADER = 128  # bytes


@dataclass(frozen=True)
class RunFile:
    """One file of the store.

    Attributes:
        path: Its path; the file may not exist yet.
        runs: `(subset, seed)` of each run.
        n_test: Number of test points that the runs are evaluated on.
        n_classes: Number of logits for each.
        stacked: Whether its runs are trained together by `train_stacked`.
    """

    path: Path
    runs: tuple[Run, ...]
    n_test: int
    n_classes: int
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its array: `(n_test, n_classes)`, or `(n_runs, n_test, n_classes)` for a stack."""
        each = (self.n_test, self.n_classes)
        return (len(self.runs), *each) if self.stacked else each

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return _NPY_HEADER + 4 * int(np.prod(self.shape))

    def read(self) -> tuple[NDArray[np.float32] | None, str | None]:
        """Its array, and what is wrong with the file (`run_store.read_array`)."""
        return run_store.read_array(self.path, self.shape)

    def by_run(self, logits: NDArray[np.float32], n_test: int) -> dict[Run, NDArray[np.float32]]:
        """The logits `(n_test, n_classes)` of the first test points, for each run."""
        each = logits if self.stacked else [logits]
        return {run: found[:n_test] for run, found in zip(self.runs, each, strict=True)}


def named_few(runs: Sequence[Run], n: int = 3) -> str:
    """The first runs in words, for errors.

    >>> named_few([(4, 0), (5, 1)], 1)
    '(subset 4, seed 0), ...'
    """
    few = [f"(subset {k}, seed {seed})" for k, seed in runs[:n]]
    return ", ".join(few + ["..."] * (len(runs) > n))


def stored(folder: Path) -> dict[str, list[int]]:
    """The numbers of test points for which a store has a file, by the name of its runs."""
    found = defaultdict(list)
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found[match["stem"]].append(int(match["n"]))
    return found


def single_runs(n_subsets: int, n_seeds: int) -> Iterator[tuple[Run, ...]]:
    """Every run in a file of its own."""
    for seed in range(n_seeds):
        for k in range(n_subsets):
            yield ((k, seed),)


def stacks(
    membership: Membership,
    n_seeds: int,
    limit: int,
    is_stored: Callable[[Sequence[Run]], bool],
) -> Iterator[tuple[Run, ...]]:
    """Runs that are trained together: subsets of one size, and as many whole seeds as fit into a stack.

    If not even one seed fits, it is split. Stacks of an earlier plan with fewer seeds are kept, so that its
    results are used.

    Args:
        membership: CSR `(n_subsets, n_train)`.
        n_seeds: Retrainings of each subset.
        limit: Largest number of runs in a stack.
        is_stored: Whether the store holds the stack of these runs.
    """
    sizes = np.diff(membership.indptr)
    for size in np.unique(sizes):
        subsets = np.flatnonzero(sizes == size).tolist()
        step, first = max(1, limit // len(subsets)), 0
        while first < n_seeds:
            end = min(first - first % step + step, n_seeds)
            stored_ends = (n for n in range(end, first, -1) if is_stored(_of_seeds(subsets, first, n)))
            last = next(stored_ends, end)
            runs = _of_seeds(subsets, first, last)
            for start in range(0, len(runs), limit):
                yield tuple(runs[start : start + limit])
            first = last


def _of_seeds(subsets: Sequence[int], first: int, last: int) -> list[Run]:
    return [(k, seed) for seed in range(first, last) for k in subsets]
