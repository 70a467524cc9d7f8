"""Laws about scores: shapes and dtypes, order, and meaning.

Each is one function whose name states it; `stride_captum.conformance` runs them all on planted data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from captum.influence import DataInfluence
from captum.influence._core.tracincp import KMostInfluentialResults
from torch import Tensor
from torch.utils.data import TensorDataset

from ..influence.checkpoints.averages import weighted_sum
from .registry import ROUNDING, Build, close, law, loader, require, same_bits
from .toy_problems import MLP, N_TEST, N_TRAIN, built, classes_of, planted_classes, trained


@law
def arguments_by_position_are_those_of_captum(build: Build) -> None:
    """`influence(inputs, k, proponents, show_progress)` of a `DataInfluence`, as in TracInCP."""
    model, train, test = trained(MLP)
    method = build(model, train)
    require(isinstance(method, DataInfluence), "the method is no captum.influence.DataInfluence")
    named = method.influence(inputs=test.tensors, k=3, proponents=False, show_progress=False)
    top = method.influence(test.tensors, 3, False, False)
    same_bits(top.indices, named.indices, "indices by position and by name")
    scores = method.influence(test.tensors, None, True, False)
    require(isinstance(scores, Tensor), "k=None gives no tensor")
    own = method.self_influence(None, False, False)
    same_bits(own, method.self_influence(), "self-influence by position")


@law
def scores_have_the_shapes_and_dtypes_of_captum(build: Build) -> None:
    """`(n_test, n_train)` in the model's dtype; with k, indices are int64 and `(n_test, min(k, n_train))`."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores = method.influence(test.tensors)
    require(scores.shape == (N_TEST, N_TRAIN), f"scores have the shape {tuple(scores.shape)}")
    require(scores.dtype == torch.float32, f"scores of a float32 model are {scores.dtype}")
    require(not scores.requires_grad, "scores carry a graph")
    for k in (1, 5, N_TRAIN, 10 * N_TRAIN):
        top, shape = method.influence(test.tensors, k), (N_TEST, min(k, N_TRAIN))
        require(isinstance(top, KMostInfluentialResults), f"k={k} gives {type(top).__name__}")
        require(top.indices.dtype == torch.int64, f"indices are {top.indices.dtype}")
        require(top.indices.shape == shape, f"k={k}: indices have the shape {tuple(top.indices.shape)}")
        require(top.influence_scores.shape == shape, f"k={k}: scores and indices differ in shape")
        require(top.influence_scores.dtype == torch.float32, f"top scores are {top.influence_scores.dtype}")
    own = method.self_influence()
    require(own.shape == (N_TRAIN,), f"self-influence has the shape {tuple(own.shape)}")


@law
def float64_models_give_float64_scores(build: Build) -> None:
    """Nothing is rounded to float32 on the way out."""
    model, *data = trained(MLP)
    train, test = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in data)
    method = build(model.double(), train)
    found = {
        "scores": method.influence(test.tensors),
        "top scores": method.influence(test.tensors, 3).influence_scores,
        "self-influence": method.self_influence(),
    }
    for what, values in found.items():
        require(values.dtype == torch.float64, f"{what} are {values.dtype}")


@law
def the_top_k_are_the_best_of_all(build: Build) -> None:
    """Top-k equals a sort of all scores; proponents descend, opponents ascend."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores = method.influence(test.tensors)
    for proponents, who in ((True, "proponents"), (False, "opponents")):
        best = scores.sort(dim=1, descending=proponents, stable=True).values
        for k in (1, 6, N_TRAIN, 10 * N_TRAIN):
            top = method.influence(test.tensors, k, proponents)
            same_bits(top.influence_scores, best[:, :k], f"{k} {who}: the best of a sort")
            same_bits(scores.gather(1, top.indices), best[:, :k], f"{k} {who}: scores of their indices")


@law
def ties_go_to_the_lower_index(build: Build) -> None:
    """Duplicates in the training set: among equal scores the lower index comes first, and is kept."""
    model, train, test = trained(MLP, n_train=12)
    twice = TensorDataset(*(t.repeat(2, *[1] * (t.ndim - 1)) for t in train.tensors))
    method = build(model, twice)
    scores = method.influence(test.tensors)
    for proponents in (True, False):
        for k in (3, len(twice)):
            top = method.influence(test.tensors, k, proponents)
            values, indices = top.influence_scores, top.indices
            falls = (values[:, 1:] == values[:, :-1]) & (indices[:, 1:] <= indices[:, :-1])
            require(not falls.any(), f"k={k}: a tie is not in the order of the indices")
            last = scores == values[:, -1:]
            kept = torch.zeros_like(last).scatter(1, indices, True) & last
            lowest = last & (last.cumsum(1) <= kept.sum(1, keepdim=True))
            require(
                torch.equal(kept, lowest),
                f"k={k}: a tie for the last place is not kept by the lowest index",
            )


# What a score means.


def _require_a_gap(build: Build, response: str, sign: int) -> None:
    """For three test points in four, the examples of their class score higher on average than all others.

    Args:
        build: The method.
        response: What is attributed.
        sign: -1 for lower instead of higher.
    """
    model, train, _ = trained(MLP)
    x, y = planted_classes(40, seed=2).tensors
    scores = sign * build(model, train).influence((x, y), response=response, target="label")
    same = (classes_of(40, seed=2)[:, None] == classes_of(N_TRAIN, seed=1)).to(scores)
    gaps = (scores * same).sum(1) / same.sum(1) - (scores * (1 - same)).sum(1) / (1 - same).sum(1)
    n = int((gaps > 0).sum())
    require(4 * n >= 3 * len(x), f"they do for {n} of {len(x)} test points")


@law
def examples_of_the_class_raise_its_margin(build: Build) -> None:
    """Positive means that the training example raises the response: so do those of the planted class.

    On average over the class, for three test points in four; the others may be atypical.
    """
    _require_a_gap(build, "margin", 1)


@law
def examples_of_the_class_lower_its_loss(build: Build) -> None:
    """The sign of "loss" is the other one."""
    _require_a_gap(build, "loss", -1)


@law
def self_influence_is_not_negative(build: Build) -> None:
    """No example raises its own loss by being in the training set."""
    model, train, _ = trained(MLP)
    own = build(model, train).self_influence()
    require((own >= -ROUNDING * own.abs().max()).all(), f"the least is {float(own.min()):.1e}")


@law
def self_influence_is_minus_the_effect_on_the_own_loss(build: Build) -> None:
    """The diagonal of `-influence(train, response="loss")`."""
    model, train, _ = trained(MLP)
    method = build(model, train)
    effect = method.influence(train, response="loss", target="label", normalize=None)
    close(method.self_influence(), -effect.diagonal(), "the diagonal")


@law
def groups_score_the_sum_of_their_members(build: Build) -> None:
    """`subset_influence` is additive, whatever the kind of the index lists."""
    model, train, test = trained(MLP)
    method = build(model, train)
    groups: list[Any] = [[0], range(N_TRAIN), [5, 3, 40], torch.arange(20), np.array([47, 0]), []]
    asks: list[dict[str, Any]] = [{}, {"response": "loss", "target": 0}]
    for ask in asks:
        scores = method.influence(test.tensors, normalize=None, **ask)
        wanted = torch.stack([scores[:, list(group)].sum(1) for group in groups], 1)
        found = method.subset_influence(test.tensors, groups, **ask)
        close(found, wanted, f"the sums with {ask or 'the default response'}", scores)


@law
def the_aggregate_is_the_sum_of_the_rows(build: Build) -> None:
    """`aggregate=True` gives one row, the sum over all test points whatever their batches, or its top k."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores = method.influence(test.tensors)
    wanted, scale = scores.sum(0, keepdim=True), scores.reshape(1, -1)
    for what, inputs in (("a batch", test.tensors), ("a loader", loader(test, 3))):
        close(method.influence(inputs, aggregate=True), wanted, f"the sum over {what}", scale)
        top = method.influence(inputs, 5, aggregate=True)
        close(top.influence_scores, wanted.topk(5).values, f"the top 5 of the sum over {what}", scale)


@law
def products_of_vectors_are_scores(build: Build) -> None:
    """`compute_intermediate_quantities` of test points times that of training examples.

    A method whose scores are no such products refuses one of both with a ValueError.
    """
    model, *data = trained(MLP)
    train, test = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in data)
    method = build(model.double(), train)
    with suppress(ValueError):
        right = method.compute_intermediate_quantities(range(N_TRAIN), side="train")
        left = method.compute_intermediate_quantities(test.tensors)
        close(left @ right.T, method.influence(test.tensors, normalize=None), "the products")


@law
def checkpoints_are_averaged(build: Build) -> None:
    """The score over two checkpoints is the mean of the scores at each."""
    model, train, test = trained(MLP)
    models = [built(MLP, seed) for seed in (1, 2)]
    # Twice the same checkpoint: what a method does about several of them, it does here, too.
    alone = [build(one, train, checkpoints=[one.state_dict()] * 2) for one in models]
    both = build(model, train, checkpoints=[one.state_dict() for one in models])
    asks: dict[str, Callable[[Any], Tensor]] = {
        "scores": lambda method: method.influence(test.tensors),
        "effects on the loss": lambda method: method.influence(test.tensors, response="loss"),
        "self-influence": lambda method: method.self_influence(),
        "mislabel scores": lambda method: method.mislabel_scores(),
    }
    for what, ask in asks.items():
        close(ask(both), (ask(alone[0]) + ask(alone[1])) / 2, what)
    wanted = both.influence(test.tensors).topk(5).values
    close(both.influence(test.tensors, 5).influence_scores, wanted, "the top 5")
    thrice = build(models[0], train, checkpoints=[models[0].state_dict()] * 3)
    close(thrice.influence(test.tensors), alone[0].influence(test.tensors), "one checkpoint three times")
    own = build(model, train, checkpoints=[model.state_dict()]).influence(test.tensors)
    close(own, build(model, train).influence(test.tensors), "the model's own weights as a checkpoint")


@law
def scores_of_checkpoints_add_up(build: Build) -> None:
    """Weighted scores of each checkpoint add up to the score, also where they have unit deviation."""
    model, train, test = trained(MLP)
    states = [built(MLP, seed).state_dict() for seed in (1, 2)]
    method = build(model, train, checkpoints=states)
    alone = method.checkpoint_scores(test.tensors)
    for normalize in (None, "deviation"):
        wanted = weighted_sum(alone, method.checkpoint_weights_, normalize)
        close(method.influence(test.tensors, normalize=normalize), wanted, f"normalize={normalize}")
    of_first = build(model, train, checkpoints=states[:1] * 2).checkpoint_scores(test.tensors)
    close(alone[0], of_first[0], "the first checkpoint")
