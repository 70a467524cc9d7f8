"""Accuracy at chance level: named where a model does no better than one answer for all, and only there."""

from __future__ import annotations

import pytest
import torch

from stride_captum.influence.chance import at_chance

N = 200
BALANCED = torch.arange(N) % 4
RARE = (torch.arange(N) % 20 == 0).long()


def wrong_where(labels, which):
    return torch.where(which, (labels + 1) % 4, labels)


@pytest.mark.parametrize(
    "labels", [BALANCED, RARE, torch.zeros(N, dtype=torch.int64)], ids=["4", "rare", "one"]
)
def test_a_constant_answer_is_named_with_both_shares(labels):
    share = f"{float((labels == 0).float().mean()):.1%}"
    sentence = f"it is right for {share} of its training examples, and {share} have the most frequent label"
    assert at_chance(torch.zeros(N, dtype=torch.int64), labels) == sentence


def test_guesses_are_named():
    generator = torch.Generator().manual_seed(0)
    guesses = [at_chance(torch.randint(4, (N,), generator=generator), BALANCED) for _ in range(200)]
    assert sum(guess is None for guess in guesses) < 20


def test_a_model_that_has_learned_something_is_not():
    assert at_chance(BALANCED, BALANCED) is None
    assert at_chance(wrong_where(BALANCED, torch.arange(N) % 3 == 0), BALANCED) is None
    half = torch.where(torch.arange(N) % 40 == 0, RARE, 0)  # finds half of a class of 5%, and nothing else
    assert at_chance(half, RARE) is None
    assert at_chance(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1])) is None


def test_worse_than_a_constant_is_named():
    assert at_chance(1 - RARE, RARE) is not None
