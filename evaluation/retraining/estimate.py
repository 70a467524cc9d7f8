"""Estimated cost of a plan of retrainings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetrainingEstimate:
    """Estimated cost of a plan (`RetrainingPlan.estimate`); its `str` is a sentence.

    Attributes:
        task: Name of the task.
        n_subsets: Number of subsets.
        n_seeds: Retrainings of each subset.
        engine: "processes" or "stacked".
        n_stored: Runs that are in the store.
        n_damaged: Runs whose file is damaged; they are done again.
        n_workers: Workers that have runs to do.
        seconds: Wall time of the runs to do, if each worker has a free core.
        n_bytes: Disk space of the runs to do.
        purpose: What the runs are for.
        at_most: Why there may be fewer runs; empty if the number is exact.
    """

    task: str
    n_subsets: int
    n_seeds: int
    engine: str
    n_stored: int
    n_damaged: int
    n_workers: int
    seconds: float
    n_bytes: int
    purpose: str = ""
    at_most: str = ""

    @property
    def n_runs(self) -> int:
        """Runs of the whole plan."""
        return self.n_subsets * self.n_seeds

    @property
    def n_missing(self) -> int:
        """Runs to do, including damaged ones."""
        return self.n_runs - self.n_stored

    def __str__(self) -> str:
        what = (
            f"{self.n_runs} retrainings of {self.task} ({self.n_subsets} subsets x {self.n_seeds} seeds)"
            if self.n_subsets > 1
            else f"{self.n_runs} training{'s' * (self.n_runs > 1)} of {self.task}"
        )
        what = f"{self.purpose}: {what}" if self.purpose else what
        if not self.n_missing:
            return f"{what}: all are in the store."
        damaged = f" ({self.n_damaged} damaged)" if self.n_damaged else ""
        workers = "1 worker" if self.n_workers == 1 else f"{self.n_workers} workers"
        how = "one by one" if self.engine == "processes" else "in stacks"
        if self.at_most:
            return (
                f"{what} at most, which would take about {_duration(self.seconds)} with {workers}: "
                f"{self.at_most}."
            )
        return (
            f"{what}: {self.n_stored} are in the store, {self.n_missing}{damaged} are to do {how}, which "
            f"takes about {_duration(self.seconds)} with {workers} and {self.n_bytes / 1e6:.2f} MB of disk."
        )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
