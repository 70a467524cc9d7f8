"""Scores split over positions: those of the test points, or those of one training example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import inputs as data
from ..data.places import places
from ..errors import bad_value
from ..system.locks import exclusive
from .query import check_query, checked_target

if TYPE_CHECKING:
    from .method import InfluenceMethod


def position_scores(
    method: InfluenceMethod, inputs: Any, example: int | None, response: str | None, target: Any
) -> Tensor:
    """Terms of the sum over positions that a score is; their sum is `influence(inputs)`.

    Args:
        method: Fitted here, if it is not.
        inputs: As for `InfluenceMethod.influence`.
        example: None for the positions of the test points; a training example for its own.
        response: The scalar that is attributed; None for the default.
        target: Its class; None for the default.

    Returns:
        `(n_test, P, n_train)`, or `(n_test, P)` for an example; 0 at positions without a label.
    """
    response, target = response or method.response, method.target if target is None else target
    check_query(method.loss, response, None)
    wanted = checked_target(target)
    data.check_source(inputs, "inputs")
    found: list[Tensor] = []
    with exclusive(method):
        if method._states is None:
            method.fit()
        if example is not None:
            example = int(places([example], method.n_train_, "train_index")[0])
        with method._session() as model:
            method._check_unchanged()
            for batch, query in method._queries(inputs, response, wanted):
                total: Tensor | None = None
                for checkpoint, state, weight in method._fitted():
                    method._load(model, checkpoint)
                    prepared = method.prepare_query(state, model, batch, query)
                    part = method.position_scores(state, prepared, example) * weight
                    total = part if total is None else total + part
                assert total is not None, "there is at least one checkpoint"
                found.append(total)
    most = max(part.shape[1] for part in found)
    behind = (0, 0) * (found[0].ndim - 2)
    return torch.cat([F.pad(part, (*behind, 0, most - part.shape[1])) for part in found])


def check_whole(k: int | None, aggregate: bool, normalize: Any) -> None:
    """Refuse what has no meaning for scores of positions.

    Raises:
        ValueError: Top-k, a sum over test points, or the cosine, whose parts do not add up.
    """
    for name, value, other in (
        ("k", k, None),
        ("aggregate", aggregate, False),
        ("normalize", normalize, None),
    ):
        if value != other:
            raise bad_value(name, f"be {other} with per_position=True", repr(value))
