"""Files of a plan of retrainings: which runs share one, what each holds, and which are there already.

A file is named by its runs and by how many test points they were evaluated on. One with more points than are
asked for serves as well, since the first points of a test set are the same.
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

#: Runs are evaluated on this many test points, at least, so that asking for more keeps what was done.
EVALUATED = 500

Run = tuple[int, int]
_NAME = re.compile(r"(?P<stem>(run|stack)-[0-9a-f]{24})-(?P<n>[0-9]+)\.npy")
_NPY_HEADER = 128  # bytes


@dataclass(frozen=True)
class RunFile:
    """One file of the store.

    Attributes:
        path: Where it is, or will be.
        runs: `(subset, seed)` of each run.
        n_test: Test points that they were, or will be, evaluated on.
        n_classes: Logits of each.
        stacked: Whether `train_stacked` makes it.
    """

    path: Path
    runs: tuple[Run, ...]
    n_test: int
    n_classes: int
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it holds: `(n_test, n_classes)`, of a stack `(n_runs, n_test, n_classes)`."""
        each = (self.n_test, self.n_classes)
        return (len(self.runs), *each) if self.stacked else each

    @property
    def n_bytes(self) -> int:
        """On disk."""
        return _NPY_HEADER + 4 * int(np.prod(self.shape))

    def read(self) -> tuple[NDArray[np.float32] | None, str | None]:
        """What it holds, and what is wrong with it; see `run_store.read_array`."""
        return run_store.read_array(self.path, self.shape)

    def by_run(self, logits: NDArray[np.float32], n_test: int) -> dict[Run, NDArray[np.float32]]:
        """The logits `(n_test, n_classes)` of the first test points, for each run."""
        each = logits if self.stacked else [logits]
        return {run: found[:n_test] for run, found in zip(self.runs, each, strict=True)}


def named_few(runs: Sequence[Run], n: int = 3) -> str:
    """The first runs in words.

    >>> named_few([(4, 0), (5, 1)], 1)
    '(subset 4, seed 0), ...'
    """
    few = [f"(subset {k}, seed {seed})" for k, seed in runs[:n]]
    return ", ".join(few + ["..."] * (len(runs) > n))


def stored(folder: Path) -> dict[str, list[int]]:
    """For each name in a store, without the number of test points, the numbers that there are."""
    found = defaultdict(list)
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found[match["stem"]].append(int(match["n"]))
    return found


def single_runs(n_subsets: int, n_seeds: int) -> Iterator[tuple[Run, ...]]:
    """Every run alone."""
    for seed in range(n_seeds):
        for k in range(n_subsets):
            yield ((k, seed),)


def stacks(
    membership: Membership,
    n_seeds: int,
    limit: int,
    is_stored: Callable[[Sequence[Run]], bool],
) -> Iterator[tuple[Run, ...]]:
    """Runs with subsets of one size, by seed: whole seeds where several fit, parts of one elsewhere.

    Seeds that a plan with fewer of them has stacked by themselves stay together, so that its results serve.

    Args:
        membership: CSR `(n_subsets, n_train)`.
        n_seeds: Retrainings of each subset.
        limit: Runs of a stack, at most.
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
