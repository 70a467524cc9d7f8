"""Weights of checkpoints of the model and of models of parts, in the mean of their scores."""

from __future__ import annotations

import math

import pytest
import torch
from planted import MLP, trained

from stride_captum import STRIDE, Checkpoint, ClosedForm
from stride_captum.influence.checkpoints.averages import checkpoint_weights, weight_of_parts

N = 48


def partition(i: int) -> list[Checkpoint]:
    """Two halves: every other example, by the i-th binary digit of its place."""
    sides = [[row for row in range(N) if (row >> i) % 2 == side] for side in (0, 1)]
    return [Checkpoint("half.pt", seen=rows) for rows in sides]


def test_one_kind_has_equal_weights():
    assert checkpoint_weights(["a.pt", "b.pt"], N) == [0.5, 0.5]
    assert checkpoint_weights([*partition(0), *partition(1)], N) == [0.25] * 4
    assert checkpoint_weights([Checkpoint("a.pt", seen=range(N)), "b.pt"], N) == [0.5, 0.5]


def test_parts_weigh_the_root_of_the_number_of_partitions():
    for n_partitions in (1, 2, 3):
        parts = [part for i in range(n_partitions) for part in partition(i)]
        weights = checkpoint_weights(["a.pt", *parts, "b.pt"], N)
        assert sum(weights) == pytest.approx(1, rel=1e-12)
        assert sum(weights[1:-1]) / (weights[0] + weights[-1]) == pytest.approx(math.sqrt(n_partitions))
        assert weights[0] == weights[-1]
        assert len(set(weights[1:-1])) == 1


def test_checkpoints_along_the_training_of_a_part_are_one_model_of_it():
    along = [part for part in partition(0) for _ in range(3)]
    assert checkpoint_weights([*along, "a.pt"], N) == pytest.approx([1 / 12] * 6 + [1 / 2], rel=1e-12)


def test_a_part_alone_counts_as_its_share():
    weights = checkpoint_weights([partition(0)[0], "a.pt"], N)
    assert weights[0] == pytest.approx(math.sqrt(0.5) / (1 + math.sqrt(0.5)), rel=1e-12)


def test_a_model_that_has_seen_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`seen` must hold at least one place.*Leave this checkpoint out"):
        checkpoint_weights([Checkpoint("a.pt", seen=[]), "b.pt"], N)


def test_a_removal_that_leaves_nothing_of_a_part_is_refused():
    model, train, test = trained(MLP)
    states = [model.state_dict(), {name: v + 0.01 for name, v in model.state_dict().items()}]
    halves = [Checkpoint(states[1], seen=range(3)), Checkpoint(states[0], seen=range(3, N))]
    operators = ClosedForm(residuals="temperature", temperature=2.0)
    method = STRIDE(model, train, operators=operators, checkpoints=halves).fit()
    before = method.influence(test.tensors)
    with pytest.raises(ValueError, match="`indices` must leave at least one example that each checkpoint"):
        method.remove_examples([0, 1, 2])
    assert torch.equal(method.influence(test.tensors), before)


def test_scores_are_the_weighted_mean():
    model, train, test = trained(MLP)
    draw = torch.Generator().manual_seed(0)

    def near() -> dict[str, torch.Tensor]:
        return {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in model.state_dict().items()}

    parts = [Checkpoint(near(), seen=part.seen) for i in range(3) for part in partition(i)]
    kept = [near(), *parts]

    def scores(checkpoints: list) -> torch.Tensor:
        operators = ClosedForm(residuals="temperature", temperature=2.0)
        return STRIDE(model, train, operators=operators, checkpoints=checkpoints).influence(test.tensors)

    weight = weight_of_parts(3)
    alone = [scores([checkpoint]) for checkpoint in kept]
    wanted = (1 - weight) * alone[0] + weight * torch.stack(alone[1:]).mean(0)
    assert weight > 0.6
    assert torch.linalg.norm(scores(kept) - wanted) < 1e-5 * torch.linalg.norm(wanted)
