"""Damped inverses in float64, and the precision that a small damping requires.

Lambda is `damping` times the mean diagonal of A, u the rounding unit of a dtype. Errors, relative to the
largest score, are bounded by

    u / damping              for products in u; times n_features / n_train for few examples
    u / sqrt(damping)        for features rounded to u, however exact the products are
    u n_features / damping   for the inverse, where u is that of float64

Below a damping of a few hundredths, products of float32 features are therefore taken in float64. Below a much
smaller one, the features themselves do not determine the scores, and it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import bad_value

#: From these dampings on, products in float32 leave errors below 5e-5 of a row's largest score, and of the
#: norm of a leave-one-out residual, if there are at least as many examples as features.
LEAST_OF_SCORES, LEAST_OF_HEAD = 0.05, 0.01
#: Where u / sqrt(damping) is 2e-4 (float32) or 5e-2 (half precision, for ranks). A third was measured.
_LEAST_FOR = {torch.float32: 1e-7, torch.float16: 3e-5, torch.bfloat16: 2e-3}
#: Where u / damping is 1e-5 in float64; times n_features. A tenth of the bound was measured.
_LEAST_IN_FLOAT64 = 2e-11


def needs_float64(damping: float, n_train: int, n_features: int, least: float = LEAST_OF_SCORES) -> bool:
    """Whether rounding of float32 products would change the results at this damping.

    >>> needs_float64(0.3, 1000, 500), needs_float64(1e-3, 1000, 500), needs_float64(0.3, 20, 500)
    (False, True, True)
    """
    return damping < least * max(1.0, n_features / max(n_train, 1))


def head_dtype(damping: float, n_train: int, n_features: int, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products of a ridge head: float64 at a small damping, else `dtype`."""
    return torch.float64 if needs_float64(damping, n_train, n_features, LEAST_OF_HEAD) else dtype


def check_damping(damping: float, features: Tensor, name: str = "damping") -> None:
    """Refuse a damping so small that rounding of the features, or of float64, would change the results.

    Args:
        damping: Relative to the mean diagonal.
        features: As they are stored, `(n_train, n_features)`.
        name: What an error calls the damping.

    Raises:
        ValueError: It is too small.

    >>> check_damping(1e-6, torch.ones(3, 2))
    """
    least = max(_LEAST_FOR.get(features.dtype, 0.0), _LEAST_IN_FLOAT64 * features.shape[1])
    if damping < least:
        kind = str(features.dtype).removeprefix("torch.")
        remedy = "" if kind == "float64" else ", or give the model and its data in float64"
        must = f"be large enough for {kind} features, at least {least:.1g}"
        raise bad_value(name, must, damping, f"Raise it{remedy}.")


def damped_inverse(matrix: Tensor, damping: float, mean_diagonal: Tensor | None = None) -> Tensor:
    """`(matrix + damping * mean_diagonal * I)^-1`, in float64; see `damped_factor`."""
    return torch.cholesky_inverse(damped_factor(matrix, damping, mean_diagonal))


def damped_factor(
    matrix: Tensor, damping: float, mean_diagonal: Tensor | None = None, name: str = "damping"
) -> Tensor:
    """The Cholesky factor L of `matrix + damping * mean_diagonal * I = L L^T`, in float64.

    Args:
        matrix: Symmetric positive semi-definite, `(..., d, d)`.
        damping: Relative to `mean_diagonal`.
        mean_diagonal: `(...)`; the matrix's own by default.
        name: What an error calls the damping.

    Raises:
        ValueError: The damping is below the rounding errors of a singular matrix.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1) if mean_diagonal is None else mean_diagonal
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_((damping * mean)[..., None])
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise bad_value(
            name,
            "be large enough to make the curvature positive definite in its precision",
            damping,
            "Raise it (the default is 0.3), or give the model and its data in float64.",
        )
    return factor
