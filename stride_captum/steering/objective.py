"""Objective of stage 1 (Appendix A): equations (1) to (5), one pure function each.

Leading dimensions are subsets: a batch of `n` examples for each of K subsets has logits z(x)
`(K, n, n_classes)` and shifts a_k^T phi(h(x)) of the same shape, and every loss is `(K,)`. Where
subsets have fewer than `n` examples, `mask` `(K, n)` says which entries are examples.

Where examples have P positions, logits, shifts and labels have a dimension P behind `n`, and `weights`
`(K, n, P)` holds omega, 0 where there is no label: losses and responses of an example are sums over its
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fidelity(
    logits: Tensor,
    shift: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Equation (1): `1/|S_k| sum_{(x, y) in S_k} H(y, softmax(z(x) + a_k^T phi(h(x))))`.

    H is the cross-entropy. At a = 0 its gradient is `-1/|S_k| sum_i phi_i (e_{y_i} - p_i)^T`.

    Args:
        logits: z of the members, `(..., n, n_classes)`.
        shift: Their shifts, `(..., n, n_classes)`.
        labels: Their classes, `(..., n)` int64.
        mask: Which entries are examples, `(..., n)` bool; None means all.
        weights: omega of their positions, `(..., n, P)`; None for one position of weight 1.

    Returns:
        `(...)`; 0 if the mask is all False.
    """
    log_p = (logits + shift).log_softmax(-1)
    return _mean(_of_examples(-log_p.gather(-1, labels[..., None]).squeeze(-1), weights), mask)


def stability(
    logits: Tensor, shift: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    r"""Equation (2): `1/|R_k| sum_{x in R_k} KL(softmax(z(x)) || softmax(z(x) + a_k^T phi(h(x))))`.

    R_k holds examples outside S_k. At a = 0 the value and the gradient are 0 and the Hessian is the
    Fisher `E[phi phi^T (x) (diag p - p p^T)]`.

    Args:
        logits: z of R_k, `(..., n, n_classes)`.
        shift: Their shifts, `(..., n, n_classes)`.
        mask: Which entries are examples, `(..., n)` bool; None means all.
        weights: omega of their positions, `(..., n, P)`; None for one position of weight 1.

    Returns:
        `(...)`, at least 0 up to rounding.
    """
    log_p = logits.log_softmax(-1)
    log_q = (logits + shift).log_softmax(-1)
    return _mean(_of_examples((log_p.exp() * (log_p - log_q)).sum(-1), weights), mask)


def example_responses(shift: Tensor, weights: Tensor | None = None) -> Tensor:
    """`(a_k^T phi(h(x)))_max` of equation (3): each example's largest shift, `(..., n)`.

    "The response for the most-activated class" is read as the largest entry of the shift.
    """
    return _of_examples(shift.amax(-1), weights)


def subset_responses(shift: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Equation (3): `y_k = 1/|S_k| sum_{x in S_k} (a_k^T phi(h(x)))_max`, `(...)`.

    Args:
        shift: Shifts of the members, `(..., n, n_classes)`.
        mask: Which entries are examples, `(..., n)` bool; None means all.
        weights: omega of their positions, `(..., n, P)`; None for one position of weight 1.
    """
    return _mean(example_responses(shift, weights), mask)


def linearity(responses: Tensor, sketch: Tensor, ridge: float) -> Tensor:
    r"""Equation (4): `|| X~ (X~^T X~ + gamma I)^-1 X~^T y - y ||^2` with `X~ = X R`.

    As printed, (3) makes y_k one number while X_k of A.3 has |S_k| rows. Two readings fit:

    - "example": y_k holds the `example_responses` of the members, X_k in {0, 1}^{|S_k| x N} has the
      indicator of the i-th member as row i, so X~_k holds the members' rows of R; one loss a subset.
      Rows of R are nearly orthonormal. The loss shrinks the responses of the members, most where
      they agree with no direction of the sketch.
    - "subset": y in R^K holds the `subset_responses` and X~ = X R is F.3's sketch of the membership;
      one loss for all subsets. It pulls y towards what a linear function of the sketch can give.

    The loss is quadratic in y and zero for y = 0. A row of zeros in both `responses` and `sketch`
    changes nothing. Solved by Cholesky of the smaller Gram matrix (NaN where it
    holds NaN); with m <= r rows the residual is
    `gamma (X~ X~^T + gamma I)^-1 y`, which subtracts nothing.

    Args:
        responses: y, `(..., m)`.
        sketch: X~, `(..., m, r)`.
        ridge: gamma > 0.

    Returns:
        `(...)`.
    """
    y = responses.unsqueeze(-1)
    n_rows, width = sketch.shape[-2:]
    if n_rows <= width:
        residual = ridge * torch.cholesky_solve(y, _regularised_cholesky(sketch @ sketch.mT, ridge))
    else:
        factor = _regularised_cholesky(sketch.mT @ sketch, ridge)
        residual = y - sketch @ torch.cholesky_solve(sketch.mT @ y, factor)
    return residual.squeeze(-1).square().sum(-1)


def combined(
    fidelity_losses: Tensor,
    stability_losses: Tensor,
    linearity_losses: Tensor | None = None,
    *,
    fidelity_weight: float = 1.0,
    stability_weight: float = 1.0,
    linearity_weight: float = 0.0,
) -> Tensor:
    """Equation (5): `sum_k (L_fid^(k) + lambda_stab L_stab^(k) + lambda_lin L_lin^(k))`, a scalar.

    Args:
        fidelity_losses: `(K,)`.
        stability_losses: `(K,)`.
        linearity_losses: `(K,)` in the reading "example", one number in "subset"; None leaves it out.
        fidelity_weight: 1 in the paper. As it falls, the minimizer divided by it tends to the closed
            form's first-order operator.
        stability_weight: lambda_stab.
        linearity_weight: lambda_lin.
    """
    total = fidelity_weight * fidelity_losses.sum() + stability_weight * stability_losses.sum()
    return total if linearity_losses is None else total + linearity_weight * linearity_losses.sum()


def _of_examples(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sums over positions."""
    return values if weights is None else (values * weights).sum(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(-1)
    return torch.where(mask, values, values.new_zeros(())).sum(-1) / mask.sum(-1).clamp(min=1)


def _regularised_cholesky(gram: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)  # no GPU synchronization
    return torch.where((failed == 0)[..., None, None], factor, torch.nan)
