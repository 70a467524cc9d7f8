from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from captum.influence import TracInCP
from planted import BatchNormCNN, built, expect_untouched, planted_classes, trained, unusual
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, CaptumInfluence, DiagonalEKFAC, TracIn
from stride_captum.adapters.captum_influence import ResidualLoss, keep_weights
from stride_captum.adapters.gradients.traces import attributes_put_back, hooked, requiring_gradients

pytest.importorskip("kronfluence")


def tracincp(model: nn.Module, train: Any) -> TracInCP:
    options = {"loss_fn": ResidualLoss("sum"), "batch_size": 4, "sample_wise_grads_per_batch": True}
    return TracInCP(model, train, [""], keep_weights, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "TracIn": partial(TracIn, layers=["fc"]),
    "TracIn one by one": TracIn,
    "TracIn fast": partial(TracIn, fast=True),
    "TRAK": partial(TRAK, projection_dim=8),
    "DiagonalEKFAC": partial(DiagonalEKFAC, n_fisher=4),
    "EKFAC": EKFAC,
    "CaptumInfluence": partial(CaptumInfluence, build=tracincp),
}


class Injected(Exception):
    """What is raised in the middle."""


class Countdown:
    """Raises at the n-th call of a function, before or after what the function does."""

    def __init__(self, function: Callable[..., Any], at: int, after: bool) -> None:
        self.function, self.at, self.after, self.calls = function, at, after, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Injected
        found = self.function(*args, **kwargs)
        if self.calls == self.at:
            raise Injected
        return found


#: What is made to fail: functions of torch, by where they are and what they are called.
PLACES: dict[str, tuple[Any, str]] = {
    "a layer": (nn.functional, "linear"),
    "a hook": (nn.Module, "register_forward_hook"),
    "a removal of a hook": (torch.utils.hooks.RemovableHandle, "remove"),
    "autograd.grad": (torch.autograd, "grad"),
    "backward": (Tensor, "backward"),
    "einsum": (torch, "einsum"),
    "requires_grad_": (Tensor, "requires_grad_"),
}


@contextmanager
def failing(place: str, at: int, after: bool) -> Iterator[Countdown]:
    owner, name = PLACES[place]
    original = getattr(owner, name)
    countdown = Countdown(original, at, after)
    setattr(owner, name, lambda *args, **kwargs: countdown(*args, **kwargs))
    try:
        yield countdown
    finally:
        setattr(owner, name, original)


class Keeps(BatchNormCNN):
    """Keeps what it has seen, as networks do that show their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.history = None, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        self.history.append(self.seen)
        return self.seen


def raised_by(ask: Callable[[], None]) -> BaseException | None:
    """What a call raises, or the first cause of it."""
    try:
        ask()
    except Exception as error:
        found: BaseException = error
        while found.__cause__ is not None:
            found = found.__cause__
        return found
    return None


def attributes(model: nn.Module) -> Any:
    return (
        [sorted(vars(parameter)) for parameter in model.parameters()],
        model.seen,
        model.history,
        [list(module._forward_hooks.values()) for module in model.modules()],
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_wherever_an_exception_comes(name, place) -> None:
    _, train, test = trained(BatchNormCNN, n_train=5, steps=0)
    model = unusual(built(Keeps))

    def ask() -> None:
        method = METHODS[name](model, train, batch_size=3)
        method.influence(test[:2], normalize="cosine")
        method.self_influence()

    ask()  # imports what it needs, which may change the filters
    before = attributes(model), list(warnings.filters), gc.get_freeze_count()
    with failing(place, 0, after=False) as counted:
        ask()
    step = max(counted.calls // 5, 1)
    for at in [*range(1, counted.calls + 1, step), counted.calls]:
        for after in (False, True):
            with expect_untouched(model), failing(place, at, after), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a hook that was not removed is said to be garbage
                assert isinstance(raised_by(ask), Injected | None)
            assert (attributes(model), list(warnings.filters), gc.get_freeze_count()) == before
    assert torch.equal(vmap(torch.sin)(torch.ones(2)), torch.ones(2).sin())  # no transform is open


class WritesToItsInput(nn.Module):
    """Normalizes in place, as networks do that save memory."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.fc, self.relu, self.head, self.in_place = (
            nn.Linear(6, 5),
            nn.ReLU(True),
            nn.Linear(5, 3),
            in_place,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5).div_(2) if self.in_place else (x - 0.5) / 2
        h = self.fc(x)
        h += 1
        return self.head(self.relu(h))


@pytest.mark.parametrize("batch_size", [4, 100])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "TracIn"])
@pytest.mark.slow
def test_data_stay_as_they_are_under_a_network_that_writes_to_them(name, batch_size) -> None:
    x, y = planted_classes(9).tensors
    u, v = planted_classes(3, seed=1).tensors
    before = x.clone(), u.clone()
    scores = []
    for in_place in (False, True):
        model = built(partial(WritesToItsInput, in_place)).eval()
        options = {"layers": ["fc", "head"]} if name == "TracIn one by one" else {}
        method = METHODS[name](model, TensorDataset(x, y), batch_size=batch_size, **options)
        scores.append(
            [method.influence((u, v)), method.influence((u, v), normalize="cosine"), method.self_influence()]
        )
        assert torch.equal(x, before[0])
        assert torch.equal(u, before[1])
    for found, wanted in zip(*scores, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_hooks_are_gone_also_where_one_cannot_be_put_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(Injected), failing("a hook", 2, after=False), hooked((m, print) for m in model):
        pass
    assert not any(layer._forward_hooks for layer in model)


def test_attributes_come_back_as_the_same_objects() -> None:
    model = built(BatchNormCNN)
    model.names, model.kept = ["a"], torch.ones(2)
    names, kept, hooks = model.names, model.kept, dict(model.conv1._forward_hooks)
    weight = model.fc.weight

    def change() -> None:
        with attributes_put_back(model):
            model.names.append("b")
            model.kept, model.more, weight.sample_grad = None, 1, torch.ones(1)
            model.conv1.register_forward_hook(lambda *_: None)
            model.fc = nn.Linear(1, 1)
            raise Injected

    with pytest.raises(Injected):
        change()
    assert model.names is names == ["a"]
    assert model.kept is kept
    assert not hasattr(model, "more")
    assert not hasattr(weight, "sample_grad")
    assert dict(model.conv1._forward_hooks) == hooks
    assert model.fc.weight is weight


def test_parameters_require_gradients_for_a_while() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)

    def use() -> None:
        with requiring_gradients(model.parameters()) as parameters:
            assert all(p.requires_grad for p in parameters)
            raise Injected

    with pytest.raises(Injected):
        use()
    assert [p.requires_grad for p in model.parameters()] == [True, False]
