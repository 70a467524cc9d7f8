from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planted import MLP, BatchNormCNN, built, examples, expect_untouched, scripted, trace, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, LossDetector, Random, TracIn
from stride_captum.adapters.gradients.working_copies import (
    check_copy,
    independent_copy,
    needs_copy,
    wide_copy,
    widened,
)
from stride_captum.system.fingerprints import weights_fingerprint

METHODS: list[Callable[..., Any]] = [
    TracIn,
    partial(TracIn, fast=True),
    partial(TRAK, projection_dim=16),
    DiagonalEKFAC,
    partial(EKFAC, fisher="empirical"),
]
NARROW = [torch.bfloat16, torch.float16]


def name_of(method: Any) -> str:
    return getattr(method, "__name__", f"{getattr(method, 'func', method).__name__} {method!r}"[:30])


def narrowed(dtype: torch.dtype, build: Any = MLP) -> tuple[nn.Module, nn.Module, Any, Any, Any, Any]:
    """A model and its data in half precision, and a float32 copy of the same numbers."""
    model, *data = trained(build, n_train=16, steps=5)
    model = model.to(dtype)
    train, test = (TensorDataset(d.tensors[0].to(dtype), d.tensors[1]) for d in data)
    wide = [TensorDataset(d.tensors[0].float(), d.tensors[1]) for d in (train, test)]
    return model, copy.deepcopy(model).float(), train, test, *wide


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("build", [MLP, BatchNormCNN])
def test_scores_of_half_precision_are_those_of_the_same_weights_in_float32(method, dtype, build) -> None:
    model, twin, train, test, wide_train, wide_test = narrowed(dtype, build)
    wanted = method(twin, wide_train)
    found = method(model, train)
    before = trace(model)
    for ask in ({}, {"normalize": "cosine"}):
        scores, exact = (m.influence(t.tensors, **ask) for m, t in ((found, test), (wanted, wide_test)))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    torch.testing.assert_close(found.self_influence(), wanted.self_influence(), rtol=1e-4, atol=1e-9)
    assert trace(model) == before


@pytest.mark.parametrize("residuals", ["temperature", "both"])
def test_residuals_of_half_precision_are_those_of_float32(residuals) -> None:
    model, twin, train, test, wide_train, wide_test = narrowed(torch.bfloat16)
    found = TRAK(model, train, residuals=residuals).influence(test.tensors)
    wanted = TRAK(twin, wide_train, residuals=residuals).influence(wide_test.tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_controls_and_detectors_give_float32_too() -> None:
    model, twin, train, test, wide_train, _ = narrowed(torch.bfloat16)
    assert Random(model, train).influence(test.tensors).dtype == torch.float32
    losses = LossDetector(model, train).mislabel_scores()
    assert losses.dtype == torch.float32
    wanted = LossDetector(twin, wide_train).mislabel_scores()
    torch.testing.assert_close(losses, wanted, rtol=0.1, atol=0.05)  # the logits are those of the model


class CastsInside(MLP):
    """Casts to half precision on its way, and runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.bfloat16())


@pytest.mark.parametrize("method", METHODS[2:], ids=name_of)
def test_a_model_that_casts_inside_gives_float32(method) -> None:
    model, train, test = trained(CastsInside, n_train=12, steps=2)
    scores = method(model, train).influence(test.tensors)
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())


class Pairs(nn.Module):
    """Half precision in a tuple and by name, a recurrent layer and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.scale = nn.GRU(6, 4, batch_first=True), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, state: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        start, more = state
        out = self.cells(x[:, None], start.transpose(0, 1).contiguous())[0][:, 0]
        return self.head(out * self.scale * more["factor"])


def test_every_input_is_cast_however_it_comes() -> None:
    model = built(Pairs)
    x = torch.randn(5, 6)
    state = (torch.zeros(5, 1, 4), {"factor": torch.ones(5, 1)})
    wanted = copy.deepcopy(model).bfloat16().float()(x.bfloat16().float(), state=state)
    narrow = (state[0].bfloat16(), {"factor": state[1]["factor"].bfloat16()})
    found = wide_copy(model.bfloat16())(x.bfloat16(), state=narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_a_change_of_the_weights_is_seen_and_a_mere_move_is_none() -> None:
    model, _, train, test, *_ = narrowed(torch.bfloat16)
    method = TRAK(model, train)
    scores = method.influence(test.tensors)
    model.fc1.weight.data = model.fc1.weight.data.clone()
    assert torch.equal(method.influence(test.tensors), scores)
    model.fc1.weight.data.mul_(2)
    with pytest.raises(ValueError, match="`model` must have the weights that the method was fitted on"):
        method.influence(test.tensors)
    assert not torch.equal(method.fit().influence(test.tensors), scores)


def test_a_saved_method_of_half_precision_needs_no_fit(tmp_path) -> None:
    model, _, train, test, *_ = narrowed(torch.bfloat16)
    method = TRAK(model, train).fit()
    method.save(tmp_path / "trak")
    loaded = TRAK.load(tmp_path / "trak", model, train)
    assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))


def test_checkpoints_of_half_precision_are_averaged() -> None:
    model, _, train, test, *_ = narrowed(torch.bfloat16)
    states = [built(MLP, seed).bfloat16().state_dict() for seed in (1, 2)]
    parts = []
    for state in states:
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        parts.append(TRAK(other, train).influence(test.tensors))
    with expect_untouched(model):
        found = TRAK(model, train, checkpoints=states).influence(test.tensors)
    torch.testing.assert_close(found, sum(parts) / 2)


# Models made under torch.inference_mode.


def in_inference_mode(what: str) -> tuple[nn.Module, nn.Module]:
    """A model with tensors that autograd does not know, and an ordinary one with the same weights."""
    plain = built(BatchNormCNN).eval()
    with torch.inference_mode():
        odd = built(BatchNormCNN).eval()
    if what == "head":
        model = copy.deepcopy(plain)
        model.fc = odd.fc
        return model, plain
    return odd, plain


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("what", ["model", "head"])
@pytest.mark.slow
def test_a_model_made_under_inference_mode_has_the_scores_of_an_ordinary_one(method, what) -> None:
    model, plain = in_inference_mode(what)
    assert any(p.is_inference() for p in model.parameters())
    _, train, test = trained(BatchNormCNN, n_train=12, steps=0)
    before = weights_fingerprint(model)
    found = method(model, train).influence(test.tensors)
    wanted = method(plain, train).influence(test.tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert weights_fingerprint(model) == before


# Hooks on parameters.


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_change_neither_scores_nor_weights(method, kind) -> None:
    model, train, test = trained(MLP, n_train=12, steps=2)
    wanted = method(model, train).influence(test.tensors)

    def clip(gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.01, 0.01)

    def step(parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad)

    for parameter in model.parameters():
        getattr(parameter, kind)(clip if kind == "register_hook" else step)
    before = weights_fingerprint(model)
    found = method(model, train)
    torch.testing.assert_close(found.influence(test.tensors), wanted)
    found.self_influence()
    assert weights_fingerprint(model) == before


# Copies.


def test_only_what_is_odd_is_copied() -> None:
    assert not needs_copy(built(BatchNormCNN))
    assert not needs_copy(built(MLP).double())
    assert needs_copy(built(MLP).half())
    mixed = built(MLP)
    mixed.fc3.bfloat16()
    assert needs_copy(mixed)
    values = torch.ones(2)
    assert widened(values) is values
    assert widened(values.half()).dtype == torch.float32
    assert widened(values.double()).dtype == torch.float64


def test_a_copy_shares_nothing_and_keeps_ties_modes_and_flags() -> None:
    model = built(MLP)
    model.tied = nn.Linear(6, 5)
    model.tied.weight = model.fc1.weight
    model.fc2.requires_grad_(False)
    model.kept = model.fc1(torch.ones(1, 6))  # has a graph, which deepcopy refuses
    model.eval()
    copied = independent_copy(model)
    assert copied.tied.weight is copied.fc1.weight
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not copied.training
    theirs = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), model.kept]}
    assert theirs.isdisjoint(t.data_ptr() for t in [*copied.parameters(), *copied.buffers(), copied.kept])
    assert copied.kept.grad_fn is None


def test_a_model_that_cannot_be_copied_is_refused_where_a_copy_is_needed() -> None:
    model, _, train, *_ = narrowed(torch.bfloat16)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"`model` must be copyable .* cannot pickle .* model.float\(\)"):
        TRAK(model, train).fit()
    wide, wide_train, _ = trained(MLP, n_train=12, steps=1)
    wide.lock = threading.Lock()
    TRAK(wide, wide_train).fit()  # needs none


class HoldsItself(MLP):
    """Calls its first layer through a function that a copy does not replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lambda x: self.fc1(x.to(self.fc1.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.first(x).relu().to(self.fc2.weight.dtype)).relu())


def test_a_copy_that_calls_the_original_is_refused() -> None:
    model, (_, _, train, *_) = built(HoldsItself).bfloat16(), narrowed(torch.bfloat16)
    with expect_untouched(model), pytest.raises(ValueError, match="a copy that calls 'fc1' of the original"):
        TRAK(model, train).fit()
    check_copy(built(MLP), built(MLP), examples((torch.ones(1, 6), torch.zeros(1))))


def test_a_model_that_does_not_run_in_float32_is_refused() -> None:
    class Hard(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x.bfloat16() @ torch.eye(6).bfloat16()).float() @ torch.eye(6).half())

    model = built(Hard).bfloat16()
    x = torch.randn(8, 6).bfloat16()
    with pytest.raises(ValueError, match=r"`model` must run in float32, .*; got RuntimeError: expected m"):
        TRAK(model, TensorDataset(x, torch.zeros(8).long())).fit()


# TorchScript.


@pytest.mark.parametrize("method", [TracIn, partial(TRAK, projection_dim=16), DiagonalEKFAC], ids=name_of)
def test_a_scripted_model_or_part_has_the_scores_of_an_ordinary_one(method) -> None:
    _, train, test = trained(MLP, n_train=12, steps=0)

    def network() -> nn.Sequential:
        return built(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))).eval()

    class Backbone(nn.Module):
        def __init__(self, first: nn.Module, last: nn.Module) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    options = {"dense": "diagonal"} if method is DiagonalEKFAC else {}
    plain = network()
    wanted = method(plain, train, **options).influence(test.tensors)
    for model in (scripted(network()), Backbone(scripted(network()[0]), network()[2])):
        model.train()
        before = [p.requires_grad for p in model.parameters()], weights_fingerprint(model)
        found = method(model, train, **options).influence(test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        assert ([p.requires_grad for p in model.parameters()], weights_fingerprint(model)) == before
        assert model.training


def test_what_a_scripted_model_lacks_is_said() -> None:
    _, train, _ = trained(MLP, n_train=12, steps=0)
    model = scripted(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=r"`model` must have Linear or Conv2d layers .* for EKFAC; got none"):
        EKFAC(model, train).fit()
    with pytest.raises(
        ValueError, match=r"`model` must be in float32 or float64 as TorchScript; got torch.half|float16"
    ):
        TRAK(model.half(), TensorDataset(train.tensors[0].half(), train.tensors[1])).fit()
