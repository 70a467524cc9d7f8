"""Solver of the Lasso: working sets, accelerated proximal gradient, Newton on the support.

All test points are solved at once. A round picks for each a small working set of columns (those whose
dual constraint is nearest to being active, as in Blitz and Celer), brings it most of the way with FISTA,
and, once the support has settled, solves exactly for the weights on the support. The rounds end when the
duality gap over *all* columns is small enough, so nothing depends on how well a working set was chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .design import Design, Operator

_FIRST_SIZE = 250  # columns in the first working set; later ones hold twice the support
_INNER_GAIN = 0.1  # share of the gap that a round must leave
_CHECK_EVERY = 10  # FISTA steps between two looks at the gap
_ROUND_STEPS = 500  # FISTA steps after which a round tries Newton whatever the gap
_NEWTON_BELOW = 1e-4  # relative gap below which the support is mostly right
_NEWTON_STEPS = 5
_NEWTON_RIDGE = 1e-10  # relative to the trace: keeps the factorization defined on dependent columns
_BLOCK_CELLS = 2**19  # float64 numbers in one (rows, columns) array: rows of few columns fit the cache
_GPU_BLOCK_FACTOR = 64  # a GPU has no use for small blocks
_NEWTON_CELLS = 2**24  # float64 numbers in one block of Gram matrices


class Certificate(NamedTuple):
    """Objective and duality gap at given weights, both `(n,)`, and the dual point `scale * residual`."""

    objective: Tensor
    gap: Tensor
    scale: Tensor


def certify(y: Tensor, residual: Tensor, peak: Tensor, norm: Tensor, alpha: Tensor) -> Certificate:
    """The duality gap of `1/2 ||y - X w||^2 + alpha ||w||_1`.

    The dual is `max_theta y.theta - 1/2 ||theta||^2` subject to `|X^T theta| <= alpha`; its best
    feasible multiple of the residual is used, so the gap is at least the true suboptimality.

    Args:
        y: `(n, n_subsets)`.
        residual: `y - X w`, `(n, n_subsets)`.
        peak: `max_j |X_j^T residual|`, `(n,)`.
        norm: `||w||_1`, `(n,)`.
        alpha: `(n,)`.
    """
    square = (residual * residual).sum(1)
    along = (y * residual).sum(1)
    bound = alpha / peak
    scale = torch.where(square > 0, along / square, 0.0)
    scale = torch.where(peak > 0, torch.maximum(torch.minimum(scale, bound), -bound), scale)
    objective = square / 2 + alpha * norm
    gap = objective - scale * along + scale**2 * square / 2
    return Certificate(objective, gap.clamp(min=0), scale)


def largest_correlation(columns: Design, residual: Tensor) -> Tensor:
    """`max_j |X_j^T r|`, `(n,)`; 0 where there are no columns."""
    peak = residual.new_zeros(len(residual))
    if columns.n_columns > 0:
        for rows in row_blocks(columns, len(residual)):
            peak[rows] = columns.adjoint(residual[rows]).abs().amax(1)
    return peak


def row_blocks(columns: Design, n_rows: int) -> list[slice]:
    """Slices of the rows that can be solved together within bounded memory."""
    cells = _BLOCK_CELLS * (1 if columns.norms.device.type == "cpu" else _GPU_BLOCK_FACTOR)
    size = max(1, cells // max(columns.n_columns, columns.n_subsets))
    return [slice(begin, begin + size) for begin in range(0, n_rows, size)] or [slice(0, 0)]


def solve(
    columns: Design, y: Tensor, alpha: Tensor, start: Tensor, tolerance: float, max_rounds: int
) -> tuple[Tensor, Tensor]:
    """Minimize `1/2 ||y - X w||^2 + alpha ||w||_1` over the distinct columns, for all rows at once.

    Args:
        columns: X.
        y: `(n, n_subsets)` float64, of mean 0 if the columns are centered.
        alpha: `(n,)`, positive where `X^T y` is not 0.
        start: Initial weights `(n, n_columns)`.
        tolerance: Relative duality gap to reach.
        max_rounds: Safety limit.

    Returns:
        The weights `(n, n_columns)` and which rows reached the tolerance.
    """
    weights = start.clone()
    if columns.n_columns == 0:
        return weights, torch.ones(len(y), dtype=torch.bool, device=y.device)
    live = torch.arange(len(y), device=y.device)
    for done in range(max_rounds + 1):
        w, a = weights[live], alpha[live]
        residual = y[live] - columns.forward(w)
        correlation = columns.adjoint(residual)
        now = certify(y[live], residual, correlation.abs().amax(1), w.abs().sum(1), a)
        open_ = torch.nonzero(now.gap > tolerance * now.objective).reshape(-1)
        live = live[open_]
        if len(live) == 0 or done == max_rounds:
            break
        w, a, correlation = w[open_], a[open_], correlation[open_]
        goal = torch.maximum(_INNER_GAIN * now.gap, 0.1 * tolerance * now.objective)[open_]
        problem: Operator = columns
        index = None
        if not columns.dense:
            index = _nearest_constraints(w, correlation * now.scale[open_, None], a, columns.norms)
            problem, w = columns.restrict(index), w.gather(1, index)
        w, step, gap, objective, exhausted = _fista(problem, y[live], a, w, goal)
        settled = (gap <= _NEWTON_BELOW * objective) | exhausted
        ready = settled & (gap > tolerance * objective / 10)
        w = _newton(problem, y[live], a, w, step, ready, tolerance)
        weights[live] = w if index is None else torch.zeros_like(correlation).scatter(1, index, w)
    settled = torch.ones(len(y), dtype=torch.bool, device=y.device)
    settled[live] = False
    return weights, settled


def _nearest_constraints(w: Tensor, correlation: Tensor, alpha: Tensor, norms: Tensor) -> Tensor:
    """The columns of the support and those whose constraint `|X_j^T theta| <= alpha` is nearest."""
    support = w != 0
    size = min(w.shape[1], max(_FIRST_SIZE, 2 * int(support.sum(1).max())))
    distance = (1 - correlation.abs() / alpha[:, None]) / norms
    distance.masked_fill_(support, -1.0)
    return distance.topk(size, 1, largest=False, sorted=False).indices


def _soft(q: Tensor, threshold: Tensor) -> Tensor:
    return q - torch.minimum(torch.maximum(q, -threshold), threshold)


def _local(problem: Operator, y: Tensor, image: Tensor, w: Tensor, alpha: Tensor) -> Certificate:
    residual = y - image
    return certify(y, residual, problem.adjoint(residual).abs().amax(1), w.abs().sum(1), alpha)


def _fista(
    problem: Operator, y: Tensor, alpha: Tensor, w: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """FISTA with gradient restart, until half of the rows have reached their `goal` for the gap.

    The step 1/L starts from the largest column norm and shrinks when a step shows that L was too small.

    Returns:
        Weights `(n, m)`, L `(n, 1)`, gap and objective `(n,)`, and whether the steps ran out.
    """
    lipschitz = problem.norms.square().amax(-1).expand(len(y)).reshape(-1, 1).clone()
    momentum = torch.ones_like(lipschitz)
    image = problem.forward(w)
    ahead, ahead_image = w, image
    now = _local(problem, y, image, w, alpha)
    asks_nothing = y.device.type != "cpu"  # a GPU would be waited for at every step
    for step in range(1, _ROUND_STEPS + 1):
        gradient_step = ahead + problem.adjoint(y - ahead_image) / lipschitz
        new = _soft(gradient_step, alpha[:, None] / lipschitz)
        new_image = problem.forward(new)
        moved, moved_image = new - ahead, new_image - ahead_image
        square = (moved * moved).sum(1, keepdim=True)
        ratio = (moved_image * moved_image).sum(1, keepdim=True) / square
        too_long = (ratio > lipschitz) & (square > 1e-14 * (new * new).sum(1, keepdim=True))
        change = new - w
        restart = too_long | ((moved * change).sum(1, keepdim=True) < 0)
        if asks_nothing or bool(too_long.any()):
            lipschitz = torch.where(too_long, torch.maximum(ratio, 1.5 * lipschitz), lipschitz)
            new, new_image = torch.where(too_long, w, new), torch.where(too_long, image, new_image)
            change = new - w
        momentum = torch.where(restart, 1.0, momentum)
        following = (1 + torch.sqrt(1 + 4 * momentum * momentum)) / 2
        push = torch.where(restart, 0.0, (momentum - 1) / following)
        ahead, ahead_image = new + push * change, new_image + push * (new_image - image)
        w, image, momentum = new, new_image, following
        if step % _CHECK_EVERY == 0:
            now = _local(problem, y, image, w, alpha)
            if 2 * int((now.gap <= goal).sum()) >= len(y):
                break
    return w, lipschitz, now.gap, now.objective, step == _ROUND_STEPS


def _newton(
    problem: Operator, y: Tensor, alpha: Tensor, w: Tensor, lipschitz: Tensor, rows: Tensor, tolerance: float
) -> Tensor:
    """Proximal gradient steps, each followed by an exact solve on the support, for some `rows`.

    On the support J with signs s the minimizer solves `X_J^T X_J w_J = X_J^T y - alpha s`. The way to it
    is searched exactly through all changes of sign, so no step raises the objective.
    """
    w = w.clone()
    for _ in range(_NEWTON_STEPS):
        residual = y - problem.forward(w)
        proximal = _soft(w + problem.adjoint(residual) / lipschitz, alpha[:, None] / lipschitz)
        w = torch.where(rows[:, None], proximal, w)
        sizes = torch.where(rows, (w != 0).sum(1), -1).tolist()
        chosen = [i for i, size in enumerate(sizes) if size >= 0]
        if not chosen:
            break
        residual = y - problem.forward(w)
        slope = problem.adjoint(residual) - alpha[:, None] * w.sign()
        direction = torch.zeros_like(w)
        largest = max(max(sizes), 1)
        block = max(1, _NEWTON_CELLS // (largest * max(largest, y.shape[1])))
        for part in torch.tensor(chosen, device=y.device).split(block):
            direction[part] = _support_direction(problem, part, w[part], slope[part], largest)
        image = problem.forward(direction)
        reach = _exact_search(w, direction, (residual * image).sum(1), (image * image).sum(1), alpha, largest)
        new = w + reach * direction
        crossing = (w != 0) & (new.abs() <= 1e-14 * w.abs())
        w = torch.where(crossing, 0.0, new)
        now = _local(problem, y, problem.forward(w), w, alpha)
        rows = rows & (now.gap > tolerance * now.objective / 10)
    return w


def _support_direction(problem: Operator, rows: Tensor, w: Tensor, slope: Tensor, most: int) -> Tensor:
    """The Newton direction `(X_J^T X_J)^-1 slope_J` on the support J of each row, 0 elsewhere.

    `most` is a bound on the sizes of the supports.
    """
    support = w != 0
    valid, index = support.to(torch.uint8).topk(most, 1)
    inside = valid.bool()
    gram = problem.gram(rows, index, inside)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = _NEWTON_RIDGE * diagonal.sum(1, keepdim=True)
    diagonal += torch.where(inside, ridge, 1.0)
    factor, failed = torch.linalg.cholesky_ex(gram)
    right = (slope.gather(1, index) * inside)[:, :, None]
    solution = torch.cholesky_solve(right, factor)[:, :, 0]
    solution = torch.where((failed == 0)[:, None] & inside, solution, 0.0)
    return torch.zeros_like(w).scatter(1, index, solution)


def _exact_search(
    w: Tensor, direction: Tensor, along: Tensor, curvature: Tensor, alpha: Tensor, most: int
) -> Tensor:
    """The minimizer over t >= 0 of the objective at `w + t * direction`, `(n, 1)`.

    No row has more than `most` weights.

    The derivative is `t * curvature - along + alpha * sum_j sign(w_j + t d_j) d_j`: it rises linearly and
    jumps by `2 alpha |d_j|` where weight j changes its sign.
    """
    turn = torch.where(w * direction < 0, -w / direction, torch.inf)
    at, order = turn.topk(most, 1, largest=False)
    jump = 2 * alpha[:, None] * direction.gather(1, order).abs() * torch.isfinite(at)
    before = along - alpha * (w.sign() * direction).sum(1)
    root = (before[:, None] - torch.cat([torch.zeros_like(jump[:, :1]), jump.cumsum(1)], 1)) / curvature[
        :, None
    ]
    begin = torch.cat([torch.zeros_like(at[:, :1]), at], 1)
    best = torch.maximum(begin, root).amin(1, keepdim=True)
    return torch.where(curvature[:, None] > 0, best, 0.0)
