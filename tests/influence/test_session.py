"""Whatever is raised in a session, the caller's model, gradients, modes and random state come back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from planted import METHODS, BatchNormCNN, expect_untouched, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import stride_captum
from stride_captum import STRIDE, adapters
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn

#: Calls of one run at which something is raised, evenly spread, the first and the last among them.
POINTS = 40
#: What puts things back is not interrupted itself, nor is the start of a thread.
SPARED = (
    "preserve_state.py",
    "locks.py",
    "random_states.py",
    "fingerprints.py",
    "contextlib.py",
    "threading.py",
    "peak_memory.py",
    "toy_problems.py",
)


PACKAGE = tuple(str(Path(module.__file__).parent) + os.sep for module in (stride_captum, adapters))


class InjectedError(Exception):
    pass


def calls_of(run: Callable[[], Any], stop_at: int | None = None) -> int:
    """Run a function and count the Python calls inside the package, or raise at one of them."""
    count = 0

    def at_call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        name = frame.f_code.co_filename
        generator = frame.f_code.co_name == "<genexpr>"  # an error while one is closed cannot be raised
        if event != "call" or generator or not name.startswith(PACKAGE) or name.endswith(SPARED):
            return
        count += 1
        if count == stop_at:
            raise InjectedError

    sys.setprofile(at_call)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, TRAK, DiagonalEKFAC, TracIn, EKFAC])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_exception_at_any_call_leaves_the_model_as_it_was(method, checkpoints):
    model, train, test = trained(BatchNormCNN)
    model.train()
    model.requires_grad_(True)
    F.cross_entropy(model(train.tensors[0][:8]), train.tensors[1][:8]).backward()
    next(iter(model.parameters())).requires_grad_(False)
    few = TensorDataset(*(tensor[:12] for tensor in train.tensors))
    options = {"checkpoints": [{k: v * 0.9 for k, v in model.state_dict().items()}]} if checkpoints else {}

    def run() -> None:
        asked = method(model, few, batch_size=5, **options)
        asked.influence((test.tensors[0][:3], test.tensors[1][:3]))
        asked.self_influence()

    with expect_untouched(model):
        run()  # what the first run imports, later ones do not
        total = calls_of(run)
    assert total > POINTS
    raised = 0
    for stop_at in sorted({1 + i * (total - 1) // (POINTS - 1) for i in range(POINTS)}):
        with expect_untouched(model):
            try:
                calls_of(run, stop_at)
            except (InjectedError, ValueError):  # or what is made of it
                raised += 1
        assert not any(vars(parameter) for parameter in model.parameters())
    assert raised > 0.5 * POINTS  # a probe may try another way after an error


class TestScripted:
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_gradients_and_modes_of_a_scripted_model_come_back(self):
        x, y = torch.randn(12, 6), torch.arange(12) % 3
        net = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))).train()
        F.cross_entropy(net(x), y).backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        modes = [m.training for m in net.modules()]
        with pytest.raises(ValueError, match="`model` must be one whose submodules take hooks"):
            STRIDE(net, TensorDataset(x, y)).fit()
        assert [m.training for m in net.modules()] == modes
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
