"""The membership matrix X, which says which training examples belong to which subset, and its sketch.

X is `(n_subsets, n_train)` with entries 0 and 1 (section 3 of the paper). It is always stored as
`scipy.sparse.csr_matrix`; row k holds the sorted indices of S_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from .errors import bad_type, bad_value

Membership = Any  # scipy.sparse.csr_matrix of shape (n_subsets, n_train); scipy ships no types


def membership_from_indices(subsets: Sequence[Any], n_train: int) -> Membership:
    """Turn lists of training indices into the membership matrix X.

    Args:
        subsets: n_subsets sequences of distinct integers in `[0, n_train)`.
        n_train: Number of training examples.

    Returns:
        CSR matrix `(n_subsets, n_train)` of float64 ones.

    Raises:
        ValueError: An index is out of range or appears twice in one subset.
        TypeError: Indices that are no integers.

    >>> membership_from_indices([[0, 2], [1]], 3).toarray().tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    """
    rows = [np.sort(_indices(subset, f"subsets[{k}]")) for k, subset in enumerate(subsets)]
    for k, row in enumerate(rows):
        if row.size and (row[0] < 0 or row[-1] >= n_train):
            wrong = row[0] if row[0] < 0 else row[-1]
            raise bad_value(f"subsets[{k}]", f"hold training indices in [0, {n_train})", wrong)
        if np.any(row[1:] == row[:-1]):
            twice = row[1:][row[1:] == row[:-1]][0]
            raise bad_value(f"subsets[{k}]", "hold every index once", f"{twice} twice")
    pointers = np.cumsum([0, *(row.size for row in rows)])
    indices = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return sparse.csr_matrix((np.ones(indices.size), indices, pointers), shape=(len(rows), n_train))


def _indices(subset: Any, name: str) -> NDArray[np.int64]:
    given = np.asarray(subset).reshape(-1)
    if given.size and given.dtype.kind not in "iu":
        what = "a boolean mask" if given.dtype.kind == "b" else f"an array of {given.dtype}"
        remedy = "Write numpy.flatnonzero(mask)." if given.dtype.kind == "b" else None
        raise TypeError(str(bad_value(name, "hold training indices, which are integers", what, remedy)))
    return given.astype(np.int64)


def checked_membership(membership: Any, name: str = "membership") -> Membership:
    """A membership matrix as everything here expects it: CSR, float64, each member stored once as a 1.

    Args:
        membership: A scipy sparse matrix `(n_subsets, n_train)` of zeros (stored or not) and ones.
        name: What an error calls it.

    Returns:
        The matrix itself where it has that form, a copy in it elsewhere.

    Raises:
        TypeError: Not a scipy sparse matrix.
        ValueError: An entry other than 0 and 1, as counts of draws with replacement.

    >>> stored_zero = sparse.csr_matrix(([1.0, 0.0], ([0, 0], [1, 2])), shape=(1, 3))
    >>> checked_membership(stored_zero).nnz
    1
    """
    if not sparse.issparse(membership):
        raise bad_type(
            name,
            "be a scipy CSR matrix (n_subsets, n_train)",
            membership,
            "Use `stride_captum.subsets.membership_from_indices`.",
        )
    usual = membership.format == "csr" and membership.dtype == np.float64
    if usual and membership.has_canonical_format and np.all(membership.data == 1):
        return membership
    matrix = sparse.csr_matrix(membership, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if not np.all(matrix.data == 1):
        wrong = matrix.data[matrix.data != 1][0]
        raise bad_value(name, "hold zeros and ones: an example is in a subset or not", f"an entry {wrong:g}")
    return matrix


def members(membership: Membership, k: int) -> NDArray[np.int64]:
    """The sorted indices of S_k, `(|S_k|,)`."""
    start, stop = membership.indptr[k], membership.indptr[k + 1]
    return np.asarray(membership.indices[start:stop], dtype=np.int64)


def random_subsets(n_train: int, n_subsets: int, size: int, seed: int = 0) -> Membership:
    """Draw `n_subsets` subsets independently, each uniform without replacement.

    Args:
        n_train: Number of training examples N.
        n_subsets: K.
        size: |S_k|, the same for all k.
        seed: Seed of the draw. The global random state is not used.

    Returns:
        CSR membership `(n_subsets, n_train)`.

    >>> random_subsets(10, 3, 4, seed=1).sum(axis=1).ravel().tolist()
    [[4.0, 4.0, 4.0]]

    """
    _check_sizes(n_train, n_subsets, size)
    generator = np.random.default_rng(seed)
    return membership_from_indices(
        [generator.choice(n_train, size=size, replace=False) for _ in range(n_subsets)], n_train
    )


def partition(n_train: int, n_subsets: int, size: int | None = None, seed: int = 0) -> Membership:
    """Split a random permutation of the training set into `n_subsets` disjoint subsets (section 3).

    Args:
        n_train: N.
        n_subsets: K.
        size: |S_k|. None covers every example, with sizes that differ by at most one. A number is
            the paper's setting (B.2: K = 50, |S_k| = 100): the first `n_subsets * size` examples of
            the permutation are covered and the others belong to no subset.
        seed: Seed of the permutation.

    >>> partition(7, 3).sum(axis=1).ravel().tolist()
    [[3.0, 2.0, 2.0]]

    """
    _check_sizes(n_train, n_subsets, 1 if size is None else size)
    if n_subsets > n_train:
        raise bad_value("n_subsets", f"be at most n_train = {n_train}", n_subsets, "Subsets are disjoint.")
    if size is not None and n_subsets * size > n_train:
        raise bad_value(
            "size", f"be at most n_train / n_subsets = {n_train // n_subsets}", size, "Subsets are disjoint."
        )
    order = np.random.default_rng(seed).permutation(n_train)
    covered = order if size is None else order[: n_subsets * size]
    return membership_from_indices(np.array_split(covered, n_subsets), n_train)


def singletons(n_train: int) -> Membership:
    """One subset per training example: X = I, which the closed form uses."""
    return sparse.identity(n_train, format="csr")


def at_columns(membership: Membership, columns: NDArray[np.int64], n_train: int) -> Membership:
    """The same subsets of a longer training set, in which example j stands at `columns[j]`, ascending.

    >>> at_columns(membership_from_indices([[0, 1]], 2), np.array([1, 2]), 4).toarray().tolist()
    [[0.0, 1.0, 1.0, 0.0]]
    """
    shape = (membership.shape[0], n_train)
    return sparse.csr_matrix((membership.data, columns[membership.indices], membership.indptr), shape=shape)


def coverage(membership: Membership) -> NDArray[np.bool_]:
    """Which training examples belong to at least one subset, `(n_train,)`."""
    return np.asarray(membership.sum(axis=0)).reshape(-1) > 0


def _check_sizes(n_train: int, n_subsets: int, size: int) -> None:
    if n_train < 1:
        raise bad_value("n_train", "be at least 1", n_train)
    if not 1 <= size <= n_train:
        raise bad_value("size", f"be between 1 and n_train = {n_train}", size)
    if n_subsets < 1:
        raise bad_value("n_subsets", "be at least 1", n_subsets)


def sketch(
    membership: Membership | Iterable[Sequence[int]], n_train: int, width: int = 64, seed: int = 0
) -> Tensor:
    """The Johnson-Lindenstrauss sketch X R of the membership matrix, streamed (F.3, equation 13).

    `sketch_k = sum_{i in S_k} R_i`, where R is `(n_train, width)` with independent Gaussian entries
    of variance 1/width. Row R_i depends on `seed` and i alone.

    Args:
        membership: CSR membership, or any iterable of index lists (nothing is materialized but
            R and the result).
        n_train: N.
        width: r of F.3, 64 in the paper.
        seed: Seed of R.

    Returns:
        `(n_subsets, width)` float64.

    """
    projection = sketch_projection(n_train, width, seed)
    return torch.stack([projection[torch.from_numpy(row)].sum(0) for row in _rows(membership)])


def sketch_projection(n_train: int, width: int = 64, seed: int = 0) -> Tensor:
    """R of A.3, `(n_train, width)` float64 with entries of variance 1/width."""
    generator = torch.Generator().manual_seed(seed)
    whole = -(-width // 16) * 16  # torch fills blocks of 16: only whole ones do not depend on n_train
    entries = torch.randn(n_train, whole, generator=generator, dtype=torch.float64, device="cpu")
    return entries[:, :width] / math.sqrt(width)


def _rows(membership: Any) -> Iterator[NDArray[np.int64]]:
    if sparse.issparse(membership):
        for k in range(membership.shape[0]):
            yield members(membership, k)
    else:
        for row in membership:
            yield _indices(row, "membership")
