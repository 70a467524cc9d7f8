"""Laws about examples with several positions, tokens or pixels, of which some have no label.

Each is one function whose name states it; they are run on problems that are posed with "positions".
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ..data.reading import Batch
from ..losses import CrossEntropy
from .registry import Build, close, position_law, require
from .toy_problems import IGNORED, MLP, N_POSITIONS, trained


def _tokens() -> tuple[Any, TensorDataset, TensorDataset]:
    """A network, tokens `(n, P, 6)` and labels `(n, P)`, in float64."""
    model, *data = trained(MLP)
    train, test = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in data)
    return model.double(), train, test


def _relabeled(data: TensorDataset, labels: Tensor) -> TensorDataset:
    return TensorDataset(data.tensors[0], labels)


@position_law
def padded_positions_change_no_score(build: Build) -> None:
    """Positions without a label behind all others, in the training set and in the test points."""
    model, train, test = _tokens()
    method, longer = build(model, train), []
    for data in (train, test):
        x, y = data.tensors
        longer.append(TensorDataset(F.pad(x, (0, 0, 0, 3), value=0.5), F.pad(y, (0, 3), value=IGNORED)))
    padded = build(model, longer[0])
    close(padded.influence(longer[1].tensors), method.influence(test.tensors), "scores")
    close(padded.self_influence(), method.self_influence(), "self-influence")


@position_law
def an_ignored_position_has_weight_0(build: Build) -> None:
    """`Batch(sample_weight=...)`, one for each position; a method without such weights refuses them.

    Positions are ignored in some examples, and in one all of them.
    """
    model, train, test = _tokens()
    ignored = train.tensors[1].clone()
    weights = torch.ones(ignored.shape)
    for rows in ((slice(0, 20), 1), 5):
        ignored[rows], weights[rows] = IGNORED, 0
    try:
        weighted = build(model, train, batch=Batch(sample_weight=weights)).fit()
    except ValueError:
        return
    _same_answers(weighted, build(model, _relabeled(train, ignored)), test.tensors, test.tensors)


@position_law
def one_weight_of_all_positions_is_that_of_the_example(build: Build) -> None:
    """`Batch(sample_weight=...)` of examples, and of their positions; a method without these refuses them."""
    model, train, test = _tokens()
    own = 1 + torch.arange(len(train)) % 3
    try:
        of_positions = Batch(sample_weight=own[:, None].expand(-1, N_POSITIONS))
        found = build(model, train, batch=of_positions).fit()
        wanted = build(model, train, batch=Batch(sample_weight=own)).fit()
    except ValueError:
        return
    _same_answers(found, wanted, test.tensors, test.tensors)


@position_law
def a_class_of_weight_0_is_ignored(build: Build) -> None:
    """As in `torch.nn.CrossEntropyLoss`, on both sides; a method without weights of classes refuses them."""
    model, train, test = _tokens()
    others = []
    for data in (train, test):
        labels = data.tensors[1]
        others.append(_relabeled(data, labels.masked_fill(labels == 2, IGNORED)))
    try:
        weighted = build(model, train, loss=CrossEntropy(weight=[1.0, 1.0, 0.0])).fit()
    except ValueError:
        return
    _same_answers(weighted, build(model, others[0]), test.tensors, others[1].tensors)


def _same_answers(method: Any, wanted: Any, test: Any, other_test: Any) -> None:
    """The same answers of two methods, the second one asked about its own test points."""
    close(method.influence(test), wanted.influence(other_test), "scores")
    close(method.self_influence(), wanted.self_influence(), "self-influence")
    found, expected = _self_influence_of(method, test), _self_influence_of(wanted, other_test)
    if found is not None or expected is not None:
        close(found, expected, "self-influence of others")
    close(method.mislabel_scores(), wanted.mislabel_scores(), "mislabel scores")
    with suppress(ValueError):
        split = method.influence(test, per_position=True)
        close(split, wanted.influence(other_test, per_position=True), "scores of positions")


def _self_influence_of(method: Any, points: Any) -> Any:
    """Of examples outside the training set; None of a method that refuses them."""
    try:
        return method.self_influence(points)
    except (NotImplementedError, ValueError):
        return None


@position_law
def the_positions_of_one_example_over_two_add_up(build: Build) -> None:
    """An example whose first positions alone have labels, and one whose others have, are the whole."""
    model, train, test = _tokens()
    x, y = train.tensors
    first, second = y.clone(), y[:1].clone()
    first[0, 1:], second[0, :1] = IGNORED, IGNORED
    split = TensorDataset(torch.cat([x, x[:1]]), torch.cat([first, second]))
    scores, wanted = build(model, split).influence(test.tensors), build(model, train).influence(test.tensors)
    close(scores[:, 0] + scores[:, -1], wanted[:, 0], "the sum of both halves", wanted)
    close(scores[:, 1:-1], wanted[:, 1:], "the other examples")


@position_law
def an_example_without_labels_scores_0(build: Build) -> None:
    """As a training example, and as a test point."""
    model, train, test = _tokens()
    without = train.tensors[1].clone()
    without[3] = IGNORED
    method = build(model, _relabeled(train, without))
    scores = method.influence(test.tensors)
    require((scores[:, 3] == 0).all(), "its column is not 0")
    require((scores[:, :3] != 0).any(), "nor has any other example a score")
    require(method.self_influence()[3] == 0, "its self-influence is not 0")
    x, y = (part.clone() for part in test.tensors)
    y[2] = IGNORED
    found = method.influence((x, y))
    require((found[2] == 0).all(), "its row is not 0")
    close(found[:2], scores[:2], "the other test points")


@position_law
def a_response_is_the_sum_over_positions(build: Build) -> None:
    """Scores of test points with one label each add up to those of the test point with all of them."""
    model, train, test = _tokens()
    x, y = test.tensors
    method = build(model, train)
    for response in ("margin", "loss"):
        parts = []
        for t in range(N_POSITIONS):
            alone = torch.full_like(y, IGNORED)
            alone[:, t] = y[:, t]
            parts.append(method.influence((x, alone), response=response))
        wanted = method.influence((x, y), response=response)
        close(torch.stack(parts).sum(0), wanted, f"the sum over positions, {response}")


@position_law
def scores_of_positions_add_up(build: Build) -> None:
    """`influence(per_position=True)` over the positions of test points, `positions_of` over an example's.

    Positions without a label have 0. A method that does not know them refuses with a ValueError.
    """
    model, train, test = _tokens()
    method = build(model, train)
    wanted = method.influence(test.tensors)
    with suppress(ValueError):
        split = method.influence(test.tensors, per_position=True)
        close(split.sum(1), wanted, "those of test points")
        require((split[test.tensors[1] == IGNORED] == 0).all(), "a position without a label has a score")
    with suppress(ValueError):
        split = method.positions_of(test.tensors, 5)
        close(split.sum(1), wanted[:, 5], "those of a training example", wanted)
