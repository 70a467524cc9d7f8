"""Scores split over positions: those of the test points, or those of one training example."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.places import places
from ..errors import bad_value
from .query import Query

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
        `(n_test, P, n_train)`, or `(n_test, P)` for an example, P its last position with a label;
        0 at positions without a label.
    """
    if example is not None:
        check_plain("positions_of", method.normalize)
    response, target = response or method.response, method.target if target is None else target

    def of_batch(model: nn.Module, batch: Any, query: Query) -> Tensor:
        one = None if example is None else int(places([example], method.n_train_, "train_index")[0])
        parts = (
            method.position_scores(part.state, part.prepared, one) * part.weight
            for part in method._prepared(model, batch, query)
        )
        return reduce(torch.add, parts)

    found = method._for_each_query(inputs, response, target, of_batch)
    most = max(part.shape[1] for part in found)
    behind = (0, 0) * (found[0].ndim - 2)
    return torch.cat([F.pad(part, (*behind, 0, most - part.shape[1])) for part in found])


def check_plain(name: str, normalize: str | None) -> None:
    """Refuse a default normalization for a call whose results are parts of plain scores.

    Args:
        name: Of the call.
        normalize: Of the constructor.

    Raises:
        ValueError: It is not None.
    """
    if normalize is not None:
        must = f"be None in the constructor for {name}, whose results are parts of plain scores"
        raise bad_value("normalize", must, repr(normalize), "Build a method without it.")


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
