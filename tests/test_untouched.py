from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from planted import METHODS, BatchNormCNN, Fails, TwoInputs, built, expect_untouched, planted_classes, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, InfluenceMethod
from stride_captum.restoring import same_random_state, untouched, weights_fingerprint, weights_version


def unusual(model: nn.Module) -> nn.Module:
    """A model in the middle of its training: mixed modes, a frozen layer, gradients, hooks."""
    model.train()
    children = list(model.children())
    children[1].eval()
    for parameter in children[0].parameters():
        parameter.requires_grad_(False)
    for i, parameter in enumerate(children[-1].parameters()):
        parameter.grad = torch.full_like(parameter, 0.5 + i)
    children[0].register_forward_hook(lambda module, args, output: None)
    children[0].register_forward_pre_hook(lambda module, args: None)
    return model


@pytest.fixture
def cnn() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    return unusual(model), train, test


@pytest.mark.parametrize("method", METHODS)
class TestTheModelComesBack:
    @pytest.mark.parametrize("checkpoints", [False, True])
    def test_after_everything_a_method_can_do(self, cnn, method, checkpoints):
        model, train, test = cnn
        with expect_untouched(model):
            states = [built(BatchNormCNN, seed).state_dict() for seed in (1, 2)] if checkpoints else None
            found = method(model, Fails(train), batch_size=6, checkpoints=states)
            found.fit()
            found.influence(test.tensors)
            found.influence(DataLoader(Fails(test), batch_size=3), 4, False)
            found.self_influence()
            found.mislabel_scores()
            found.subset_influence(test.tensors, [[0, 1], [2]])

    @pytest.mark.parametrize("checkpoints", [False, True])
    def test_after_an_exception_in_the_middle_of_fit(self, cnn, method, checkpoints):
        model, train, _ = cnn
        with expect_untouched(model):
            states = [built(BatchNormCNN, 1).state_dict()] if checkpoints else None
            found = method(model, Fails(train, at=13), batch_size=4, checkpoints=states)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="a broken example"):
                    found.fit()

    @pytest.mark.parametrize("checkpoints", [False, True])
    def test_after_an_exception_in_the_middle_of_influence(self, cnn, method, checkpoints):
        model, train, test = cnn
        with expect_untouched(model):
            states = [built(BatchNormCNN, 1).state_dict()] if checkpoints else None
            found = method(model, train, checkpoints=states).fit()
            for call in (found.influence, found.self_influence):
                if call == found.self_influence and method is not STRIDE:
                    continue
                with pytest.raises(RuntimeError, match="a broken example"):
                    call(DataLoader(Fails(test, at=5), batch_size=2))

    def test_the_scores_do_not_depend_on_the_state_of_the_model(self, cnn, method):
        model, train, test = cnn
        during = method(model, train).influence(test.tensors)
        assert torch.equal(method(model.eval(), train).influence(test.tensors), during)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert torch.equal(method(model, train).influence(test.tensors), during)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    def test_the_scores_do_not_depend_on_the_grad_mode_and_carry_no_graph(self, cnn, method, context):
        model, train, test = cnn
        wanted = method(model, train).influence(test.tensors)
        with context():
            mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            x, y = (t.clone() for t in test.tensors)
            found = method(model, train).influence((x, y))
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted)

    def test_the_callers_tensors_are_not_written_to(self, cnn, method):
        model, train, test = cnn
        before = [t.clone() for t in (*train.tensors, *test.tensors)]
        found = method(model, train)
        found.influence(test.tensors, 3)
        found.influence(list(test.tensors))
        found.self_influence()
        after = (*train.tensors, *test.tensors)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_writing_to_the_scores_does_not_change_the_method(planted):
    model, train, test = planted
    for method in (cls(model, train) for cls in METHODS):
        first = method.influence(test.tensors)
        kept, own = first.clone(), method.self_influence()
        kept_own = own.clone()
        first.zero_(), own.zero_()
        assert torch.equal(method.influence(test.tensors), kept)
        assert torch.equal(method.self_influence(), kept_own)


def test_a_fit_that_fails_leaves_the_method_unfitted(planted):
    train = Fails(planted[1])
    method = STRIDE(planted[0], train).fit()
    train.at = 3
    with pytest.raises(RuntimeError, match="a broken example"):
        method.fit()
    train.at = None
    assert method._states is None
    assert method.influence(planted[2].tensors).shape == (7, 48)


def test_another_device_gets_a_copy_of_the_model(planted):
    model, train, _ = planted
    with expect_untouched(model):
        method = STRIDE(model, train, device="meta")
        with method._session() as copy:
            assert {p.device.type for p in copy.parameters()} == {"meta"}
            assert copy is not model


class Restless(nn.Module):
    """Replaces and writes to its buffers in the forward pass, in eval mode too, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("missing", None)

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.hidden.mul_(2)
        self.missing = x[0]
        torch.rand(1), np.random.rand(), random.random()
        return self.head(self.fc(x).relu())


def change_and_fail(change: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        change()
        raise KeyError

    return run


class TestUntouched:
    def test_buffers_that_are_replaced_come_back_as_the_same_objects(self):
        model, train = built(Restless), planted_classes(12)
        with expect_untouched(model):
            STRIDE(model, train, batch_size=5).influence(train.tensors)
        assert model.missing is None

    @pytest.mark.parametrize("weights", [False, True])
    def test_what_is_changed_inside_is_undone(self, weights):
        model = unusual(built(BatchNormCNN))

        def change():
            assert not any(module.training for module in model.modules())
            assert all(p.grad is None for p in model.parameters())
            model.train()
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            model(torch.randn(5, 2, 6, 6)).sum().backward()
            if weights:
                model.load_state_dict(built(BatchNormCNN, 3).state_dict())
                model.fc.weight = nn.Parameter(torch.zeros(3, 48))
                model.conv1.weight.data = torch.zeros(4, 2, 1, 1)
                model.fc.bias.data = model.fc.bias.data.double()

        for change_more in (change, change_and_fail(change)):
            with expect_untouched(model), suppress(KeyError), untouched(model, weights=weights):
                change_more()

    def test_nan_buffers_stay_nan(self):
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(float("nan"))
        with expect_untouched(model), untouched(model):
            model.running_mean.zero_()

    def test_random_states_come_back(self):
        def seed():
            torch.manual_seed(1), np.random.seed(1), random.seed(1)

        for change in (seed, change_and_fail(seed)):
            with expect_untouched(nn.Identity()), suppress(KeyError), same_random_state():
                change()


class TestWeightsVersion:
    @pytest.fixture
    def model(self) -> nn.Module:
        return built(BatchNormCNN)

    def test_every_kind_of_write_is_seen(self, model):
        def negate(model):
            model.fc.weight.data.neg_()

        def through_numpy(model):
            model.conv1.weight.detach().numpy()[0, 0, 0, 0] += 1

        def new_data(model):
            model.fc.bias.data = model.fc.bias.data + 1

        def replace(model):
            model.fc = nn.Linear(48, 3)

        def write_buffer(model):
            model.bn1.num_batches_tracked += 1

        def write(model):
            with torch.no_grad():
                model.fc.bias.add_(1)

        for change in (negate, through_numpy, new_data, replace, write_buffer, write):
            before, fingerprint = weights_version(model), weights_fingerprint(model)
            assert weights_version(model) == before
            change(model)
            assert weights_version(model) != before, change
            assert weights_fingerprint(model) != fingerprint, change

    def test_fingerprints_follow_names_shapes_dtypes_and_bits(self, model):
        prints = {
            weights_fingerprint(m)
            for m in (
                nn.Linear(1, 2, bias=False),
                nn.Linear(2, 1, bias=False),
                nn.Linear(2, 1, bias=False).double(),
                nn.Sequential(nn.Linear(2, 1, bias=False)),
                model,
                built(BatchNormCNN, 1),
            )
        }
        assert len(prints) == 6
        assert weights_fingerprint(model) == weights_fingerprint(built(BatchNormCNN))

    def test_models_with_odd_tensors_have_a_version(self):
        model = nn.Module()
        odd = [torch.zeros(()), torch.zeros(0), torch.ones(3, dtype=torch.bool), torch.zeros(2).half()]
        odd += [
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(2).double(),
        ]
        odd += [torch.zeros(4, 3).T, torch.zeros(2).bfloat16()]
        for i, tensor in enumerate(odd):
            model.register_buffer(f"b{i}", tensor)
        assert weights_version(model) == weights_version(model)
        assert weights_version(nn.Identity()) == ((),)
        with torch.inference_mode():
            frozen = nn.Linear(2, 2)
        assert weights_version(frozen) == weights_version(frozen)


def same_scores(method: InfluenceMethod, x: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(method.influence(x), wanted)


@pytest.mark.parametrize("method", METHODS)
class TestAModelThatHasChanged:
    def test_is_refused_and_accepted_again_with_the_old_weights(self, method):
        model, train, test = trained(TwoInputsOfOne, n_train=12, steps=1)
        found = method(model, train)
        wanted = found.influence(test.tensors)
        old = {name: value.clone() for name, value in model.state_dict().items()}
        model.head.weight.data.mul_(2)
        for call in (
            lambda: found.influence(test.tensors),
            lambda: found.influence(test.tensors, 3),
            found.self_influence,
            lambda: found.subset_influence(test.tensors, [[0]]),
        ):
            with pytest.raises(
                ValueError, match=r"`model` must have the weights that .* fitted on; .* fit\(\) again"
            ):
                call()
        model.load_state_dict(old)
        same_scores(found, test.tensors, wanted)
        model.head.weight = nn.Parameter(old["head.weight"].clone())
        same_scores(found, test.tensors, wanted)

    def test_can_be_fitted_again(self, method):
        model, train, test = trained(TwoInputsOfOne, n_train=12, steps=1)
        found = method(model, train).fit()
        with torch.no_grad():
            model.head.weight.mul_(2)
        wanted = method(model, train).influence(test.tensors)
        assert torch.equal(found.fit().influence(test.tensors), wanted)


class TwoInputsOfOne(TwoInputs):
    def forward(self, x):
        return super().forward(x, x.flip(1))
