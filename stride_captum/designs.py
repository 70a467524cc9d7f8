"""Designs: which subsets of the training set operators are trained on, and so the membership matrix X."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .errors import bad_value
from .options import Options, check_count
from .subsets import Membership, coverage, membership_from_indices, partition, random_subsets
from .system.memory import blocks
from .system.saved_values import saved_as

#: Examples whose subsets are drawn at a time.
_ROWS = 8192


class Subsets(Options):
    """A design, `n_subsets` subsets of the training set."""

    def draw(self, n_train: int, seed: int) -> Membership:
        """X, CSR `(n_subsets, n_train)`; warns if it leaves examples uncovered, as B.2's setting does."""
        membership = self.memberships(n_train, seed)
        left_out = int((~coverage(membership)).sum())
        if left_out:
            warnings.warn(
                f"{left_out} of {n_train} training examples are in no subset and get score 0 "
                "(see `coverage_`).",
                stacklevel=2,
            )
        return membership

    @abstractmethod
    def memberships(self, n_train: int, seed: int) -> Membership:
        """`draw` without the warning."""


@saved_as("options.random-subsets")
@dataclass(frozen=True)
class RandomSubsets(Subsets):
    """Independent draws without replacement.

    Attributes:
        n_subsets: K.
        size: |S_k|; None means 10 n_train / K, so that each example is in about ten subsets, and at most
            n_train / 2.

    >>> RandomSubsets(50).draw(1000, seed=0).sum(axis=1).ravel()[0, :3]
    matrix([[200., 200., 200.]])
    """

    name: ClassVar[str] = "random"

    n_subsets: int = 500
    size: int | None = None

    def check(self) -> None:
        """Refuse values out of their range."""
        _check(self.n_subsets, self.size)

    def memberships(self, n_train: int, seed: int) -> Membership:
        """Draw them."""
        size = self.size or min(-(-10 * n_train // self.n_subsets), max(n_train // 2, 1))
        return random_subsets(n_train, self.n_subsets, size, seed)


@saved_as("options.partition")
@dataclass(frozen=True)
class Partition(Subsets):
    """Disjoint subsets (section 3 of the paper).

    Attributes:
        n_subsets: K.
        size: |S_k|; None covers every example, with sizes that differ by at most one. A number is the paper's
            setting (B.2: K = 50, |S_k| = 100), and leaves the examples that are not covered with score 0.

    >>> Partition(4).draw(100, seed=0).sum(axis=1).ravel()
    matrix([[25., 25., 25., 25.]])
    """

    name: ClassVar[str] = "partition"

    n_subsets: int = 50
    size: int | None = None

    def check(self) -> None:
        """Refuse values out of their range."""
        _check(self.n_subsets, self.size)

    def memberships(self, n_train: int, seed: int) -> Membership:
        """Cut a random permutation of the training set."""
        return partition(n_train, self.n_subsets, self.size, seed)


@saved_as("options.left-regular")
@dataclass(frozen=True)
class LeftRegular(Subsets):
    """Every example in exactly `degree` subsets, drawn without replacement: a left-regular bipartite graph.

    Such a graph is an expander with high probability, for which l1 recovery of sparse weights is exact with
    K of the order of `k log(n_train / k)` for k nonzero weights (Berinde et al., 2008; arXiv 2606.05165 uses
    it with K = 1,000 and degree 10).

    Attributes:
        n_subsets: K.
        degree: Subsets that each example is in.

    >>> set(LeftRegular(20, degree=3).draw(50, seed=0).sum(axis=0).A1.tolist())
    {3.0}
    """

    name: ClassVar[str] = "left-regular"

    n_subsets: int = 500
    degree: int = 10

    def check(self) -> None:
        """Refuse values out of their range."""
        check_count("n_subsets", self.n_subsets)
        check_count("degree", self.degree)
        if self.degree >= self.n_subsets:
            must = f"be less than n_subsets = {self.n_subsets}"
            raise bad_value(
                "degree", must, self.degree, "In all subsets, an example moves all responses alike."
            )

    def memberships(self, n_train: int, seed: int) -> Membership:
        """Draw the subsets of each example."""
        generator, parts = np.random.default_rng(seed), []
        for rows in blocks(n_train, _ROWS):
            draws = generator.random((rows.stop - rows.start, self.n_subsets))
            parts.append(draws.argpartition(self.degree, axis=1)[:, : self.degree])
        chosen = np.concatenate(parts).reshape(-1)  # subsets of example 0, of example 1, ...
        ordered = np.argsort(chosen, kind="stable") // self.degree
        ends = np.bincount(chosen, minlength=self.n_subsets).cumsum()
        return membership_from_indices(np.split(ordered, ends[:-1]), n_train)


def _check(n_subsets: int, size: int | None) -> None:
    check_count("n_subsets", n_subsets)
    if size is not None:
        check_count("size", size)
