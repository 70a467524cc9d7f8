"""Vectors whose products are scores: one for each test point, and one for each training example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.places import places_in_order
from ..errors import bad_value
from ..system.devices import as_float64
from ..system.locks import exclusive
from .query import Query

if TYPE_CHECKING:
    from .method import InfluenceMethod


def test_vectors(method: InfluenceMethod, inputs: Any, aggregate: bool, response: str, target: Any) -> Tensor:
    """Vectors of test points, `(n_test, width)`, or their sum `(1, width)`; checkpoints side by side.

    Args:
        method: Fitted here, if it is not.
        inputs: As for `InfluenceMethod.influence`.
        aggregate: Whether to add up all test points.
        response: The scalar that is attributed.
        target: Its class.
    """
    total: Tensor | None = None

    def of_batch(model: nn.Module, batch: Any, query: Query) -> Tensor:
        nonlocal total
        parts = [
            _checked(method, method.query_vectors(part.state, part.prepared)) * part.weight
            for part in method._prepared(model, batch, query)
        ]
        whole = torch.cat(parts, 1)
        if not aggregate:
            return whole
        own = as_float64(whole).sum(0, keepdim=True)
        total = own if total is None else total + own
        return whole[:0]

    rows = torch.cat(method._for_each_query(inputs, response, target, of_batch))
    return rows if total is None else total.to(rows)


def train_vectors(method: InfluenceMethod, indices: Any, aggregate: bool) -> Tensor:
    """Vectors of training examples, `(n, width)`, in the order of `indices`, or their sum.

    Args:
        method: Fitted here, if it is not.
        indices: Places in the training set.
        aggregate: Whether to add them up.
    """
    with exclusive(method):
        if method._states is None:
            method.fit()
        given = torch.from_numpy(places_in_order(indices, method.n_train_, "inputs").copy())
        order = given.sort().values
        with method._session() as model:
            method._check_unchanged()
            parts = []
            for checkpoint, state, _ in method._fitted():
                method._load_fitted(model, checkpoint)
                parts.append(_of_rows(method, state, model, order))
    whole = torch.cat(parts, 1)[torch.searchsorted(order, given).to(parts[0].device)]
    return as_float64(whole).sum(0, keepdim=True).to(whole) if aggregate else whole


def _of_rows(method: InfluenceMethod, state: Any, model: Any, rows: Tensor) -> Tensor:
    if not method.reads_training_data:
        own = range(method.n_train_)[method._own_columns()]
        mine = rows[(rows >= own.start) & (rows < own.stop)] - own.start
        own_rows = _checked(method, method.train_vectors(state, mine))
        return method.ranks.all_gather(own_rows, "vectors of training examples")
    found = []
    for columns, batch in method.train_blocks(method.n_train_, False):
        chosen = rows[(rows >= columns.start) & (rows < columns.stop)] - columns.start
        if len(chosen):
            few = batch[chosen]
            vectors = method.train_vectors_of(state, model, few, chosen + columns.start)
            found.append(_checked(method, vectors))
    return torch.cat(found)


def _checked(method: InfluenceMethod, vectors: Tensor | None) -> Tensor:
    """The vectors, if there are any and one of them fits the budget.

    Raises:
        ValueError: There are none, or they are too long.
    """
    name = type(method).__name__
    if vectors is None:
        must = f"be called on a method whose scores are products of vectors; those of {name} are not"
        raise bad_value("compute_intermediate_quantities", must, repr(method), "Use influence().")
    size = vectors.shape[1] * vectors.element_size()
    if size > method.memory_budget:
        must = f"hold a vector of {vectors.shape[1]:,} numbers, which is {size:,} bytes"
        raise bad_value("memory_budget", must, method.memory_budget, "Raise it, or project the features.")
    return vectors
