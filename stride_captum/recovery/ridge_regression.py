"""Ridge regression of responses on the membership, in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .design import read_membership
from .problem import Problem


def ridge(Y: Any, membership: Any, penalty: float | Tensor, *, center: bool = False) -> Tensor:
    """Minimize `1/2 ||y - X w||^2 + penalty / 2 ||w||^2` for every row y of Y.

    The solution is `w = X^T (X X^T + penalty I)^-1 y`: one n_subsets x n_subsets system for all rows
    (an eigendecomposition of it if rows have different penalties).

    Args:
        Y: `(n_test, n_subsets)`.
        membership: X `(n_subsets, n_train)`.
        penalty: Positive, for all rows or `(n_test,)`. Absolute; see `ridge_scale`.
        center: As in `lasso`.

    Returns:
        Weights `(n_test, n_train)`, in the dtype of Y.

    Raises:
        TypeError: As in `lasso`.
        ValueError: As in `lasso`; the penalty is not positive.

    >>> ridge(torch.tensor([[4.0, 2.0]]), torch.eye(2), 1.0)
    tensor([[2., 1.]])

    """
    problem = Problem(Y, membership, center)
    strength = problem.per_row("penalty", penalty, None)
    gram, y = problem.columns.outer(), problem.y
    used = y.abs().amax(1) > 0
    if bool((strength[used] == strength[used][:1]).all()):
        shift = strength[used][0] if bool(used.any()) else 1.0
        factor = torch.linalg.cholesky(
            gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        dual = torch.cholesky_solve(y.T, factor).T
    else:
        values, vectors = torch.linalg.eigh(gram)
        strength = torch.where(used, strength, 1.0)
        dual = ((y @ vectors) / (values.clamp(min=0) + strength[:, None])) @ vectors.T
    if center:
        dual = dual - dual.mean(1, keepdim=True)
    return problem.columns.expand(problem.columns.adjoint(dual)).to(problem.home)


def ridge_scale(membership: Any, *, center: bool = False) -> float:
    """Mean of the `min(n_subsets, n_train)` eigenvalues of `X X^T` that can be nonzero.

    The scale of ridge penalties, as `alpha_max` is for the Lasso: a penalty of this size shrinks the solution
    by half on average. Independent of the responses, since ridge is linear in them.

    Args:
        membership: X `(n_subsets, n_train)`.
        center: As in `lasso`; removes one eigenvalue.

    Raises:
        TypeError: As in `lasso`.
        ValueError: As in `lasso`.

    >>> ridge_scale(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))  # eigenvalues 2 and 1
    1.5
    """
    matrix = read_membership(membership).astype(np.float64)
    n_subsets, n_train = matrix.shape
    total = float(matrix.multiply(matrix).sum())
    if center:
        total -= n_subsets * float(np.square(np.asarray(matrix.mean(axis=0))).sum())
    return total / float(max(min(n_subsets - center, n_train), 1))
