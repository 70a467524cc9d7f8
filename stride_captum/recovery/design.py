"""Distinct columns of the membership matrix X, as a linear operator.

Training examples in the same subsets have identical columns, and examples in no subset have a zero column.
The responses cannot distinguish them, so the recovery is solved over the distinct nonzero columns, whose
weights are then split equally.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from ..errors import bad_type, bad_value
from ..subsets import Membership
from ..system.devices import as_float64

_DENSE_ABOVE = 0.25  # share of nonzeros from which a dense array is faster, and of comparable size


class Operator(Protocol):
    """A matrix per test point, `A_t` of shape (n_subsets, m), applied to all test points at once."""

    norms: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`A_t x_t`: (n, m) to (n, n_subsets)."""

    def adjoint(self, residual: Tensor) -> Tensor:
        """`A_t^T r_t`: (n, n_subsets) to (n, m)."""

    def gram(self, rows: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """`A_J^T A_J` of the columns `index` (len(rows), a) of test points `rows`; 0 where not `valid`."""


class Design:
    """The distinct nonzero columns of X, shared by all test points.

    Attributes:
        n_columns: Number p of distinct nonzero columns.
        group: `(n_train,)` int64, the distinct column of each training example; p for a zero column.
        counts: `(n_columns,)` how many training examples share the column.
        norms: `(n_columns,)` Euclidean norms (after centering).
        means: `(n_columns,)` means over the subsets (before centering).
        dense: Whether products use a dense array, because X is not sparse.

    Args:
        membership: SciPy sparse matrix `(n_subsets, n_train)`.
        center: Remove from every column its mean over the subsets. The mean is subtracted in the
            products, so X stays sparse. Constant columns become zero columns.
        device: Compute device; products are in float64.
    """

    def __init__(self, membership: Membership, center: bool, device: torch.device) -> None:
        matrix = sparse.csc_matrix(membership, dtype=np.float64, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        n_subsets = matrix.shape[0]
        first, group = _distinct(matrix, center)
        self.center = center
        self.n_subsets, self.n_columns = n_subsets, len(first)
        self._matrix = matrix[:, first]
        self.means = _column_sums(self._matrix).to(device) / n_subsets
        squares = _column_sums(self._matrix.multiply(self._matrix)).to(device)
        self.norms = (squares - n_subsets * self.means**2 if center else squares).sqrt()
        self.group = torch.from_numpy(group).to(device)
        self.counts = torch.bincount(self.group, minlength=self.n_columns + 1)[: self.n_columns].double()
        cells = max(n_subsets * self.n_columns, 1)
        self.dense = self._matrix.nnz >= _DENSE_ABOVE * cells
        if self.dense:
            self._array = torch.from_numpy(self._matrix.toarray()).to(device)
        else:
            self._by_row = SparseMatrix(self._matrix.tocsr(), device)
            self._by_column = SparseMatrix(self._matrix.T.tocsr(), device)

    def forward(self, x: Tensor) -> Tensor:
        """`X w`: (n, n_columns) to (n, n_subsets)."""
        y = x @ self._array.T if self.dense else self._by_row.times(x.T).T
        return y - y.mean(1, keepdim=True) if self.center else y

    def adjoint(self, residual: Tensor) -> Tensor:
        """`X^T r`: (n, n_subsets) to (n, n_columns); `r` has mean 0 if the columns are centered."""
        return residual @ self._array if self.dense else self._by_column.times(residual.T).T.contiguous()

    def gram(self, rows: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """`X_J^T X_J` of dense columns, `(len(rows), a, a)`."""
        block = self._array.T[index]
        if self.center:
            block = block - block.mean(2, keepdim=True)
        block = block * valid[:, :, None]
        return block @ block.mT

    def outer(self) -> Tensor:
        """`X X^T` over all training examples, `(n_subsets, n_subsets)`."""
        if self.dense:
            product = (self._array * self.counts) @ self._array.T
        else:
            weighted = self._matrix.multiply(self.counts.cpu().numpy()).tocsr()
            product = torch.from_numpy((weighted @ self._matrix.T).toarray()).to(self.counts.device)
        if not self.center:
            return product
        product = product - product.mean(0, keepdim=True)
        return product - product.mean(1, keepdim=True)

    def blocks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Dense blocks of distinct columns, `(n_subsets, size)`, centered if requested."""
        for begin in range(0, self.n_columns, size):
            columns = slice(begin, begin + size)
            if self.dense:
                block = self._array[:, columns]
            else:
                block = torch.from_numpy(self._matrix[:, columns].toarray()).to(self.means.device)
            yield columns, block - self.means[columns] if self.center else block

    def expand(self, x: Tensor) -> Tensor:
        """Value of each training example's column, 0 for zero columns: (n, p) to (n, n_train)."""
        return torch.cat([x, x.new_zeros(len(x), 1)], 1)[:, self.group]

    @cached_property
    def squares(self) -> Tensor:
        """Sum of squares of each training example's column, `(n_train,)`."""
        return self.expand(self.norms.square()[None])[0]

    def collect(self, w: Tensor) -> Tensor:
        """Sum of the weights of examples that share a column: (n, n_train) to (n, p)."""
        total = w.new_zeros(len(w), self.n_columns + 1).index_add_(1, self.group, w)
        return total[:, : self.n_columns]

    def applied_to(self, other: Membership) -> SparseMatrix:
        """Operator of another membership of the same examples, acting on weights of distinct columns.

        The weight of a distinct column is shared equally by the examples that have it.
        """
        group = self.group.cpu().numpy()
        covered = np.flatnonzero(group < self.n_columns)
        share = 1 / self.counts.cpu().numpy()[group[covered]]
        shape = (len(group), self.n_columns)
        sharing = sparse.csr_matrix((share, (covered, group[covered])), shape=shape)
        return SparseMatrix((other @ sharing).tocsr(), self.group.device)

    def restrict(self, index: Tensor) -> WorkingSet:
        """The sparse columns `index` (n, m), selected per test point."""
        return WorkingSet(self._matrix, index, self.norms, self.means if self.center else None)


class WorkingSet:
    """Selected columns per test point, as one block-diagonal sparse matrix.

    One product of the `(n * n_subsets, n * m)` matrix with a vector serves all test points, at a cost
    that is independent of the number of columns left out.
    """

    def __init__(self, matrix: Membership, index: Tensor, norms: Tensor, means: Tensor | None) -> None:
        self.norms = norms[index]
        self._means = None if means is None else means[index]
        self._shape = (index.shape[0], index.shape[1], matrix.shape[0])
        n, m, n_subsets = self._shape
        columns = index.cpu().numpy().reshape(-1)
        lengths = np.diff(matrix.indptr)[columns]
        pointers = np.concatenate([[0], np.cumsum(lengths)])
        cells = np.arange(pointers[-1]) + np.repeat(matrix.indptr[columns] - pointers[:-1], lengths)
        shift = np.repeat(np.repeat(np.arange(n) * n_subsets, m), lengths)
        self._transposed = sparse.csr_matrix(
            (matrix.data[cells], matrix.indices[cells] + shift, pointers), shape=(n * m, n * n_subsets)
        )
        self._by_column = SparseMatrix(self._transposed, index.device)
        self._by_row = SparseMatrix(self._transposed.T.tocsr(), index.device)

    def forward(self, x: Tensor) -> Tensor:
        """`A_t x_t`: (n, m) to (n, n_subsets)."""
        n, _, n_subsets = self._shape
        y = self._by_row.times(x.reshape(-1)).view(n, n_subsets)
        return y if self._means is None else y - y.mean(1, keepdim=True)

    def adjoint(self, residual: Tensor) -> Tensor:
        """`A_t^T r_t`: (n, n_subsets) to (n, m)."""
        n, m, _ = self._shape
        return self._by_column.times(residual.reshape(-1)).view(n, m)

    def gram(self, rows: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """`A_J^T A_J` of the columns `index` of test points `rows`, `(len(rows), a, a)`."""
        count, a = index.shape
        _, m, n_subsets = self._shape
        slots = torch.nonzero(valid.reshape(-1)).reshape(-1)
        picked = (rows[:, None] * m + index).reshape(-1)[slots]
        block = self._transposed[picked.cpu().numpy()]
        product = (block @ block.T).tocoo()
        slot = slots.cpu().numpy()
        cell = slot[product.row] * a + slot[product.col] % a
        flat = index.new_zeros(count * a * a, dtype=torch.float64)
        values = torch.from_numpy(product.data).to(index.device)
        flat[torch.from_numpy(cell.astype(np.int64)).to(index.device)] = values
        result = flat.view(count, a, a)
        if self._means is not None:
            means = self._means[rows].gather(1, index) * valid
            result = result - n_subsets * means[:, :, None] * means[:, None, :]
        return result


class SparseMatrix:
    """CSR matrix for products with dense tensors, on the CPU or a GPU."""

    def __init__(self, matrix: Membership, device: torch.device) -> None:
        self._matrix = matrix
        self._on_device = None if device.type == "cpu" else _to_torch(matrix).to(device)

    def times(self, x: Tensor) -> Tensor:
        """The product with a vector or a matrix."""
        if self._on_device is None:
            return torch.from_numpy(self._matrix @ x.numpy())
        return self._on_device @ x


def read_membership(membership: Any) -> Membership:
    """X as a finite SciPy sparse matrix `(n_subsets, n_train)`, from SciPy, NumPy or torch.

    Raises:
        TypeError: It is none of these.
        ValueError: It is not a matrix with rows, or holds NaN or infinity.
    """
    if isinstance(membership, Tensor):
        coordinates = membership.detach().cpu().to_sparse_coo().coalesce()
        row_column = coordinates.indices().numpy()
        shape = tuple(coordinates.shape)
        values = coordinates.values().numpy()
        matrix = sparse.coo_matrix((values, row_column), shape=shape) if len(shape) == 2 else None
    elif sparse.issparse(membership):
        matrix, shape = membership, membership.shape
    elif isinstance(membership, np.ndarray):
        matrix, shape = sparse.csr_matrix(membership) if membership.ndim == 2 else None, membership.shape
    else:
        raise bad_type("membership", "be a SciPy sparse matrix or a torch tensor", membership)
    if matrix is None or shape[0] == 0:
        raise bad_value("membership", "be of shape (n_subsets, n_train) with a row per subset", shape)
    if not np.all(np.isfinite(matrix.data)):
        raise bad_value("membership", "hold finite numbers", "NaN or infinity")
    return matrix


def read_responses(Y: Any, n_subsets: int) -> Tensor:
    """Y as a finite float64 tensor `(n_test, n_subsets)`, on a device with float64.

    Raises:
        TypeError: It is neither a tensor nor an array.
        ValueError: Its shape is wrong, or it holds NaN or infinity.
    """
    if isinstance(Y, np.ndarray):
        Y = torch.from_numpy(Y)
    if not isinstance(Y, Tensor):
        raise bad_type("Y", "be a torch tensor or a NumPy array", Y)
    if Y.ndim != 2 or Y.shape[1] != n_subsets:
        must = f"be of shape (n_test, n_subsets) with n_subsets = {n_subsets}, as `membership` has rows"
        raise bad_value("Y", must, tuple(Y.shape), "One test point is Y[None]." if Y.ndim == 1 else None)
    if not bool(torch.isfinite(Y).all()):
        raise bad_value("Y", "hold finite numbers", "NaN or infinity")
    detached = Y.detach()
    return as_float64(detached)


def _column_sums(matrix: Membership) -> Tensor:
    return torch.from_numpy(np.asarray(matrix.sum(axis=0), dtype=np.float64).reshape(-1))


def _to_torch(matrix: Membership) -> Tensor:
    cells = matrix.tocoo()
    index = torch.from_numpy(np.stack([cells.row, cells.col]).astype(np.int64))
    values = torch.from_numpy(cells.data)
    return torch.sparse_coo_tensor(
        index, values, matrix.shape, device="cpu", check_invariants=True
    ).coalesce()


def _distinct(matrix: Membership, center: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First example of each distinct column, and the index of every example's column (p for zeros)."""
    n_subsets, n_train = matrix.shape
    pointers, indices, data = matrix.indptr, matrix.indices, matrix.data
    kinds: dict[tuple[bytes, bytes], int] = {}
    first: list[int] = []
    group = np.full(n_train, -1, dtype=np.int64)
    for j in range(n_train):
        cells = slice(pointers[j], pointers[j + 1])
        values = data[cells]
        constant = center and len(values) == n_subsets and bool(np.all(values == values[0]))
        if len(values) == 0 or constant:
            continue
        kind = kinds.setdefault((indices[cells].tobytes(), values.tobytes()), len(kinds))
        if kind == len(first):
            first.append(j)
        group[j] = kind
    group[group < 0] = len(first)
    return np.asarray(first, dtype=np.int64), group
