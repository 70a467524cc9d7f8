"""Gradient methods that several threads ask at once."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from captum.influence import TracInCP
from planted import MLP, expect_untouched, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, CaptumInfluence, DiagonalEKFAC, TracIn
from stride_captum.adapters.captum_influence import ResidualLoss, keep_weights

pytest.importorskip("kronfluence")

N_THREADS = 4


def tracincp(model: nn.Module, train: Any) -> TracInCP:
    loss = ResidualLoss("sum")
    return TracInCP(
        model, train, [""], keep_weights, loss_fn=loss, batch_size=8, sample_wise_grads_per_batch=True
    )


#: Each with the queries that a thread makes of it.
METHODS: dict[str, tuple[Callable[..., Any], int]] = {
    "TracIn": (TracIn, 12),
    "TracIn one by one": (partial(TracIn, layers=["fc2"]), 3),
    "TracIn fast": (partial(TracIn, fast=True), 12),
    "TRAK": (partial(TRAK, projection_dim=16), 25),
    "DiagonalEKFAC": (DiagonalEKFAC, 12),
    "EKFAC": (EKFAC, 5),
    "CaptumInfluence": (partial(CaptumInfluence, build=tracincp), 10),
}


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads that take turns every few steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def problem() -> tuple[nn.Module, TensorDataset, list[tuple[Tensor, Tensor]]]:
    """A trained network, its training set and two test points a thread."""
    model, train, test = trained(MLP, n_train=16)
    parts = [tuple(t[i : i + 2] for t in test.tensors) for i in range(N_THREADS)]
    return model.train(), train, parts


def asked(make: Callable[[], Any], parts: list[Any], rounds: int) -> list[str]:
    """Let threads ask at once; what each of them found wrong."""
    right = [make().influence(part).detach() for part in parts]
    start, wrong = threading.Barrier(len(parts)), []
    methods = [make() for _ in parts]

    def ask(i: int) -> None:
        start.wait()
        for _ in range(rounds):
            try:
                found = methods[i].influence(parts[i]).detach()
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            else:
                if float((found - right[i]).abs().max()) > 1e-4 * float(right[i].abs().max()):
                    wrong.append("other scores")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one method", "a method a thread"])
@pytest.mark.parametrize("name", METHODS)
def test_every_thread_gets_its_own_answer(problem, name, shared) -> None:
    model, train, parts = problem
    build, rounds = METHODS[name]
    if name == "TracIn one by one":
        model.fc2.bias.requires_grad_(False)
    method = build(model, train)
    method.influence(parts[0])  # imports what it needs, which may change the filters
    filters, frozen = list(warnings.filters), gc.get_freeze_count()
    with expect_untouched(model):
        assert asked(lambda: method if shared else build(model, train), parts, rounds) == []
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any("sample_grad" in vars(parameter) for parameter in model.parameters())
    assert list(warnings.filters) == filters
    assert gc.get_freeze_count() == frozen


@pytest.mark.slow
def test_methods_on_networks_of_their_own_change_one_process(problem) -> None:
    """Filters of warnings and frozen garbage are put back in the order in which they were changed."""
    _, train, parts = problem
    kinds = ["TracIn", "EKFAC", "CaptumInfluence", "TRAK"]
    methods = [METHODS[kind][0](trained(MLP, n_train=16)[0], train).fit() for kind in kinds]
    right = [method.influence(part) for method, part in zip(methods, parts, strict=True)]
    filters, wrong = list(warnings.filters), []

    def ask(i: int) -> None:
        for _ in range(5):
            found = methods[i].influence(parts[i])
            if not torch.allclose(found, right[i], rtol=1e-4, atol=1e-5 * float(right[i].abs().max())):
                wrong.append(kinds[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert wrong == []
    assert list(warnings.filters) == filters
    assert gc.get_freeze_count() == 0
