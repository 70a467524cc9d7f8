"""The encoder and the steering matrices: shapes, a loop over subsets as reference, initial values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stride_captum.steering.operators import SteeringOperators

K, N, D, N_CLASSES, RANK = 4, 6, 5, 3, 2
EVERY_FORM = [(e, s) for e in ("shared", "per-subset") for s in ("logits", "representation")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(encoder: Any, steering: Any, seed: int = 0) -> SteeringOperators:
    operators = SteeringOperators(
        D,
        N_CLASSES,
        K,
        RANK,
        encoder=encoder,
        steering=steering,
        head_weight=normal(N_CLASSES, D) if steering == "representation" else None,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    with torch.no_grad():
        for i, parameter in enumerate(operators.parameters()):
            if not parameter.any():
                parameter.copy_(normal(*parameter.shape, seed=i + 10))
    return operators


def shift_one_by_one(operators: SteeringOperators, features: Tensor) -> Tensor:
    """`a_k^T phi(h)` for one subset and one example at a time; features `(K, n, d)`."""
    own = operators.encoder == "per-subset"
    p = dict(operators.named_parameters())
    out = torch.zeros(K, features.shape[1], N_CLASSES, dtype=torch.float64)
    for k in range(K):
        w1, b1, w2, b2 = (
            p[name][k] if own else p[name]
            for name in ("hidden_weight", "hidden_bias", "output_weight", "output_bias")
        )
        a = p["steering_matrices"][k]
        for i, h in enumerate(features[k]):
            phi = w2 @ (w1 @ h + b1).clamp(min=0) + b2
            if operators.steering == "logits":
                out[k, i] = a.T @ phi
            else:
                assert operators.head_weight is not None
                moved = h + phi.reshape(RANK, D).T @ a
                out[k, i] = operators.head_weight @ moved - operators.head_weight @ h
    return out.detach()


@pytest.mark.parametrize(("encoder", "steering"), EVERY_FORM)
def test_shift_is_each_operator_applied_to_each_example(encoder, steering):
    operators, features = build(encoder, steering), normal(N, D, seed=2)
    slow = shift_one_by_one(operators, features.expand(K, N, D))
    torch.testing.assert_close(operators.shift(features), slow)


@pytest.mark.parametrize(("encoder", "steering"), EVERY_FORM)
def test_examples_of_each_subset_by_tensor_or_by_row_number(encoder, steering):
    operators, features = build(encoder, steering), normal(N, D, seed=2)
    rows = torch.tensor([[0, 1], [5, 1], [3, 3], [2, 4]])
    slow = shift_one_by_one(operators, features[rows])
    torch.testing.assert_close(operators.shift(features[rows]), slow)
    torch.testing.assert_close(operators(features, rows), slow)


@pytest.mark.parametrize(
    ("encoder", "steering", "phi", "a"),
    [
        ("shared", "logits", (N, RANK), (K, RANK, N_CLASSES)),
        ("per-subset", "logits", (K, N, RANK), (K, RANK, N_CLASSES)),
        ("shared", "representation", (N, RANK, D), (K, RANK)),
        ("per-subset", "representation", (K, N, RANK, D), (K, RANK)),
    ],
)
def test_shapes(encoder, steering, phi, a):
    operators = build(encoder, steering)
    assert operators.encode(normal(N, D)).shape == phi
    assert operators.steering_matrices.shape == a
    assert operators.n_subsets == K
    for name in operators.stacked:
        assert operators.get_parameter(name).shape[0] == K


def test_an_untrained_operator_moves_nothing_and_its_matrix_has_a_gradient():
    features = normal(N, D)
    operators = SteeringOperators(D, N_CLASSES, K, RANK, dtype=torch.float64)
    shift = operators.shift(features)
    assert not shift.any()
    (shift * normal(K, N, N_CLASSES)).sum().backward()
    assert operators.steering_matrices.grad is not None
    assert operators.steering_matrices.grad.abs().min() > 0


def test_features_of_unit_mean_square_give_phi_of_unit_mean_square():
    operators = SteeringOperators(200, N_CLASSES, K, 100)
    phi = operators.encode(normal(300, 200).float())
    assert 0.7 < float(phi.detach().square().mean()) < 1.4


def test_the_seed_gives_the_bits_and_the_global_state_is_untouched():
    before = torch.get_rng_state()
    first, second, other = (build("shared", "logits", seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.hidden_weight, second.hidden_weight)
    assert not torch.equal(first.hidden_weight, other.hidden_weight)


@pytest.mark.parametrize(("encoder", "steering"), EVERY_FORM)
def test_a_state_dict_carries_everything_the_shift_needs(encoder, steering):
    operators, other = build(encoder, steering), build(encoder, steering, seed=5)
    other.load_state_dict(operators.state_dict())
    assert torch.equal(other.shift(normal(N, D)), operators.shift(normal(N, D)))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"`encoder` must be one of 'shared', 'per-subset'; got 'share'"):
        SteeringOperators(D, N_CLASSES, K, RANK, encoder="share")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`steering` must be one of 'logits', 'representation'"):
        SteeringOperators(D, N_CLASSES, K, RANK, steering="features")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`head_weight` must be the weight of the Linear behind the"):
        SteeringOperators(D, N_CLASSES, K, RANK, steering="representation")
    with pytest.raises(ValueError, match=r"`head_weight` must have shape .* = \(3, 5\); got \(5, 3\)"):
        SteeringOperators(D, N_CLASSES, K, RANK, steering="representation", head_weight=normal(5, 3))
    with pytest.raises(ValueError, match="`head_weight` must be None with steering='logits'"):
        SteeringOperators(D, N_CLASSES, K, RANK, head_weight=normal(3, 5))
