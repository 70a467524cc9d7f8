from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from planted import (
    METHODS,
    MLP,
    BatchNormCNN,
    Fails,
    built,
    expect_untouched,
    planted_classes,
    trained,
    unusual,
)
from strict_device import DEVICE, strict_device
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE
from stride_captum.system import random_states
from stride_captum.system.fingerprints import weights_fingerprint, weights_version
from stride_captum.system.preserve_state import preserve_state
from stride_captum.system.random_states import same_random_state


@pytest.fixture
def cnn() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    return unusual(model), train, test


@pytest.mark.parametrize("checkpoints", [False, True])
def test_self_influence_of_other_inputs_leaves_no_trace_after_an_exception(cnn, checkpoints):
    model, train, test = cnn
    with expect_untouched(model):
        states = [built(BatchNormCNN, 1).state_dict()] if checkpoints else None
        found = STRIDE(model, train, checkpoints=states).fit()
        with pytest.raises(RuntimeError, match="a broken example"):
            found.self_influence(DataLoader(Fails(test, at=5), batch_size=2))


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
    with expect_untouched(model), strict_device():
        method = STRIDE(model, train, device=DEVICE)
        with method._session() as copy:
            assert {p.device for p in copy.parameters()} == {DEVICE}
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


@pytest.fixture
def alone(monkeypatch):
    """As if no other thread ran: other tests leave some behind, which draw nothing."""
    monkeypatch.setattr(random_states, "_alone", lambda: True)


@pytest.mark.usefixtures("alone")
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
            with expect_untouched(model), suppress(KeyError), preserve_state(model, weights=weights):
                change_more()

    def test_nan_buffers_stay_nan(self):
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(float("nan"))
        with expect_untouched(model), preserve_state(model):
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


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_has_changed_is_refused_with_the_remedy(method):
    model, train, test = trained(MLP, n_train=12, steps=1)
    found = method(model, train).fit()
    model.fc3.weight.data.mul_(2)
    with pytest.raises(
        ValueError, match=r"`model` must have the weights that .* fitted on; .* fit\(\) again"
    ):
        found.influence(test.tensors)
