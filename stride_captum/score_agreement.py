"""Reliability of the scores of each test point: how far independent estimates of them agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .closed_form.fit import fit_closed_form
from .closed_form.operators import ClosedFormOperators
from .closed_form.options import ClosedForm
from .closed_form.position_scores import PositionOperators
from .errors import bad_value, whole_number
from .features.precomputed import Precomputed
from .influence.method import InfluenceMethod
from .influence.query import Query, check_query
from .operators import FittedOperators, STRIDEState, TestPoints
from .stride import STRIDE
from .system.devices import as_float64
from .system.locks import exclusive
from .system.memory import rows_that_fit

#: Scores of one block, at most.
_BLOCK_SCORES = 2**22

#: Scores of each estimate for a slice of the training set, `(n_estimates, n_test, n_columns)`.
_Scores = Callable[[slice, Any], Tensor]


def reliability(
    method: InfluenceMethod,
    inputs: Any,
    *,
    response: str | None = None,
    target: Any = None,
    n_splits: int = 3,
    seed: int = 0,
) -> Tensor:
    """How reliable the scores of each test point are, from 0 to 1.

    With several checkpoints, these are the estimates that are compared; with one, closed-form operators are
    fitted to random halves of the features of every layer (where they keep a matrix of each example, another
    pass reads the features). With r the mean correlation over training examples between two of k estimates,
    the reliability of their mean is (Spearman and Brown)

        k r / (1 + (k - 1) r),  0 where r is negative

    With weights w of the checkpoints that are not equal, r is a mean weighted by w_i w_j, and
    k = 1 / sum w^2. It is the share of the variance of the scores that the estimates have in common. Below
    .5, nothing stands out: the examples at the top are more a matter of the estimate than of the test point.
    A high value says that the estimates agree, not that they are right.

    On digits (1,397 examples, 300 test points, three trainings) the rank correlation of reliability with the
    LDS of each test point against 100 halves is .30, .33 and .41 for nine checkpoints along a training (95%
    intervals over test points within .20 to .50), .27 to .28 for eight models of halves (.16 to .39) and .16
    to .24 for two (.04 to .34). For halves of the features of one model it is -.07 to -.08 (-.20 to .05):
    they share its outputs, and their agreement says nothing of fidelity, only whether the scores depend on
    which features are read.

    On MNIST (5,000 examples, 300 test points, three trainings) it is .21 for seven checkpoints, -.09 for two
    models of halves. There the limit of .5 does not separate test points by fidelity: with
    two halves the LDS of those below it is .59 in the mean, and of the others .60. Checkpoints of one
    training always agree by more (.79 and up).

    Args:
        method: Fitted here, if it is not.
        inputs: Test points, as for `influence`.
        response: As for `influence`.
        target: As for `influence`.
        n_splits: Random splits of the features, which are averaged over.
        seed: Of the splits.

    Returns:
        `(n_test,)` float64; NaN where the scores of an estimate are all the same.

    Raises:
        ValueError: One checkpoint of a method without closed-form operators, or a process group.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> reliability(STRIDE(model, train), test.tensors).shape
    torch.Size([7])
    """
    n_splits = whole_number("n_splits", n_splits)
    response = method.response if response is None else response
    check_query(method.loss, response, None)
    target = method.target if target is None else target
    method._check_single_process()
    with exclusive(method):
        if method._states is None:
            method.fit()
        n_checkpoints = len(method._checkpoints())
        several = n_checkpoints > 1
        halves = [] if several else _fitted_halves(method, n_splits, seed)

        def of_batch(model: nn.Module, batch: Any, query: Query) -> Tensor:
            if several:
                estimates = [_of_checkpoints(method, model, batch, query)]
            else:
                points = method._points(method._states[0], model, batch, query)  # type: ignore
                estimates = [_of_halves(pair, points) for pair in halves]
            parts = method.checkpoint_weights_ if several else [1.0, 1.0]
            weights = torch.tensor(parts, dtype=torch.float64, device="cpu") / sum(parts)
            agreements = [_agreement(method, scores, len(batch), weights) for scores in estimates]
            k = 1 / float(weights.square().sum())
            r = torch.stack(agreements).mean(0).clamp(min=0)
            return k * r / (1 + (k - 1) * r)

        return torch.cat(method._for_each_query(inputs, response, target, of_batch)).cpu()


def feature_halves(widths: Sequence[int], seed: int) -> tuple[list[Tensor], list[list[int]]]:
    """A random split of the features of every layer into two halves.

    Returns:
        Columns of each half in order, and its widths. A layer with one feature is in both.

    >>> columns, widths = feature_halves([4, 2], seed=0)
    >>> widths, sorted(torch.cat(columns).tolist())
    ([[2, 1], [2, 1]], [0, 1, 2, 3, 4, 5])
    """
    generator = torch.Generator().manual_seed(seed)
    columns: list[list[Tensor]] = [[], []]
    start = 0
    for width in widths:
        order = torch.randperm(width, generator=generator, device="cpu") + start
        parts = (order, order) if width == 1 else (order[: width // 2], order[width // 2 :])
        for own, part in zip(columns, parts, strict=True):
            own.append(part.sort().values)
        start += width
    return [torch.cat(own) for own in columns], [[len(part) for part in own] for own in columns]


_Half = tuple[Tensor, FittedOperators]


def _fitted_halves(method: InfluenceMethod, n_splits: int, seed: int) -> list[list[_Half]]:
    """For each split, closed-form operators on both halves of the features, with their columns."""
    states: list[Any] = method._states or []
    kind, known = (method.operators, states[0].operators) if isinstance(method, STRIDE) else (None, None)
    rows = known.rows if isinstance(known, PositionOperators) else known
    if not isinstance(rows, ClosedFormOperators) or not isinstance(kind, ClosedForm):
        raise bad_value(
            "method",
            "have several checkpoints, or closed-form operators",
            repr(method),
            "Agreement is between checkpoints, or between halves of the features of STRIDE's closed form.",
        )
    options = replace(kind, residuals=rows.kind)  # type: ignore[arg-type]
    read = Precomputed(rows.features, rows.logits, rows.labels, rows.widths, rows.weights, rows.positions)
    if not states[0].operators.keeps_rows:
        read = _read_again(method, states[0])
    found = []
    for split in range(n_splits):
        pair: list[_Half] = []
        for columns, widths in zip(*feature_halves(rows.widths, seed + split), strict=True):
            operators = fit_closed_form(
                read.features[:, columns.to(read.features.device)],
                read.logits,
                read.labels,
                widths,
                options,
                rows.temperature,
                memory_budget=method.memory_budget,
                loss=rows.loss,
                weights=read.weights,
                positions=read.positions,
            )
            if read.positions is None:
                pair.append((columns, operators))
            else:
                pair.append((columns, PositionOperators.of(operators, method.memory_budget)))
        found.append(pair)
    return found


def _read_again(method: STRIDE, state: STRIDEState) -> Precomputed:
    """The training set of operators that have let go of its rows."""
    with method._session() as model:
        method._check_unchanged()
        ((checkpoint, _, _),) = method._fitted()
        method._load_fitted(model, checkpoint)
        return method._read_as_fitted(state, model)


def _of_halves(pair: Sequence[_Half], points: TestPoints) -> _Scores:
    prepared = []
    for columns, operators in pair:
        own = replace(points, features=points.features[:, columns.to(points.features.device)])
        prepared.append((operators, operators.prepare(own)))
    return lambda rows, batch: torch.stack([ops.scores(query, rows) for ops, query in prepared])


def _of_checkpoints(method: InfluenceMethod, model: nn.Module, batch: Any, query: Query) -> _Scores:
    parts = list(method._prepared(model, batch, query))
    return lambda columns, train_batch: method._scores_of_parts(model, parts, columns, train_batch)


def _agreement(method: InfluenceMethod, scores: _Scores, n_test: int, weights: Tensor) -> Tensor:
    """Mean correlation over training examples between two estimates, weighted, `(n_test,)`."""
    sums: Any = 0.0
    products: Any = 0.0
    count = 0
    size = rows_that_fit(method.memory_budget, 8 * 8 * n_test, _BLOCK_SCORES)
    for columns, train_batch in method._column_blocks(size):
        block = as_float64(scores(columns, train_batch))
        count += block.shape[2]
        sums = sums + block.sum(2)
        products = products + torch.einsum("anc,bnc->nab", block, block)
    means = sums.T / count
    covariance = products / count - means[:, :, None] * means[:, None, :]
    variance = covariance.diagonal(dim1=1, dim2=2)
    constant = (variance <= 1e-12 * products.diagonal(dim1=1, dim2=2) / count).any(1)
    deviation = variance.clamp(min=0).sqrt()
    correlation = covariance / (deviation[:, :, None] * deviation[:, None, :])
    w = weights.to(correlation)
    alone = w.square().sum()
    mean = (torch.einsum("nab,a,b->n", correlation, w, w) - alone) / (1 - alone)
    return torch.where(constant, torch.nan, mean)
