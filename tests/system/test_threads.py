"""Several threads: right answers, a model that comes back, random numbers of others that stay theirs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from planted import expect_untouched, planted_classes
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import KNNShapley, Similarity
from stride_captum.system.locks import exclusive
from stride_captum.system.preserve_state import preserve_state
from stride_captum.system.random_states import draws_put_back, user_code

THREADS, ROUNDS = 4, 60


def in_threads(*work: Callable[[], Any]) -> None:
    """Run functions at once; the first error of any is raised here."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Slow(nn.Module):
    """Gives other threads a chance in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        time.sleep(0)
        return self.last(h)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (STRIDE, "one method"),
        (STRIDE, "one model"),
        (STRIDE, "one submodule"),
        (Similarity, "one method"),
        (KNNShapley, "one model"),
    ],
)
def test_no_answer_of_240_is_wrong(method, shared):
    model, train = Slow().train(), planted_classes(40)
    tests = [planted_classes(5, seed=10 + i).tensors for i in range(THREADS)]
    right = [method(model, train).influence(test) for test in tests]
    one = method(model, train)
    wrong: list[int] = []

    def ask(i: int) -> None:
        network = nn.Sequential(model) if shared == "one submodule" else model
        layers = ["0.last:input"] if shared == "one submodule" else ["last:input"]
        own = one if shared == "one method" else method(network, train, layers=layers)
        wanted = right[i] if shared == "one method" else own.influence(tests[i])
        for _ in range(ROUNDS):
            found = own.influence(tests[i])
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
                wrong.append(i)

    with expect_untouched(model):
        in_threads(*(lambda i=i: ask(i) for i in range(THREADS)))
    assert wrong == []
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_a_model_in_use_makes_others_wait_that_share_a_part_of_it():
    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = shared.weight

    def found_order(other: nn.Module, wait: float) -> list[str]:
        order: list[str] = []
        inside, done = threading.Event(), threading.Event()

        def hold() -> None:
            with preserve_state(nn.Sequential(shared)):
                order.append("in")
                inside.set()
                done.wait(wait)
                order.append("out")

        def meanwhile() -> None:
            assert inside.wait(60)
            hold_other(other, order)
            done.set()

        in_threads(hold, meanwhile)
        return order

    for other in (nn.Sequential(nn.ReLU(), shared), shared, nn.Sequential(tied)):
        assert found_order(other, wait=0.1) == ["in", "out", "other"]
    assert found_order(nn.Linear(2, 2), wait=60) == ["in", "other", "out"]


def hold_other(model: nn.Module, order: list[str]) -> None:
    with exclusive(model), exclusive(model):  # it may be held twice by one thread
        order.append("other")


def test_a_lock_is_let_go_after_an_exception():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="broken"), preserve_state(model):
        raise RuntimeError("broken")
    in_threads(lambda: hold_other(model, []))


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


class TestRandomNumbersOfOthers:
    @pytest.mark.slow
    @pytest.mark.parametrize("library", ["torch", "numpy"])
    def test_draws_of_another_thread_are_not_rewound(self, planted, library):
        model, train, test = planted
        method, stop, draws = STRIDE(model, train), threading.Event(), []

        def draw() -> None:
            while not stop.is_set():
                drawn = torch.rand(4) if library == "torch" else np.random.random_sample(2)
                draws.append(tuple(drawn.tolist()))

        def ask() -> None:
            try:
                for _ in range(30):
                    method.fit().influence(test.tensors)
            finally:
                stop.set()

        before = torch.get_rng_state(), np.random.get_state()
        try:
            in_threads(draw, ask)
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
        assert len(draws) > 100
        assert len(set(draws)) == len(draws)

    @pytest.mark.parametrize("where", ["data", "forward"])
    def test_draws_of_the_user_are_put_back_while_other_threads_live(self, planted, where):
        model, train, test = planted

        class Noisy(Dataset):
            def __len__(self) -> int:
                return len(train)

            def __getitem__(self, i: int) -> Any:
                torch.rand(1)
                np.random.random_sample()
                random.random()
                return train[i]

        class Draws(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = model

            def forward(self, x: Tensor) -> Tensor:
                torch.rand(1)
                return self.net(x)

        stop = threading.Event()
        method = STRIDE(model, Noisy()) if where == "data" else STRIDE(Draws(), train)

        def ask() -> None:
            before = states()
            try:
                method.fit().influence(test.tensors)
                assert states() == before
            finally:
                stop.set()

        in_threads(stop.wait, ask)

    def test_user_code_outside_of_a_session_is_left_alone(self):
        before = torch.get_rng_state()
        with user_code("a test"):
            torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(before)
        with draws_put_back(), user_code("a test"):
            torch.rand(1)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_data_set_that_asks_another_method_does_not_wait_for_itself(planted):
    """Sessions may be nested in one thread, also on the same model."""
    model, train, test = planted
    inner = STRIDE(model, train)

    class Asks(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            inner.influence(test.tensors)
            return super().__getitem__(i)

    found = STRIDE(model, Asks(*train.tensors)).influence(test.tensors)
    torch.testing.assert_close(found, inner.influence(test.tensors), rtol=1e-4, atol=1e-5)
