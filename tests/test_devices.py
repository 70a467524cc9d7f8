"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from stride_captum.evaluation import devices
from stride_captum.evaluation.devices import found_device


@pytest.fixture
def here(monkeypatch):
    """Replaces the accelerators that torch sees."""

    def replace(*names):
        monkeypatch.setattr(devices, "accelerators", lambda: list(names))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    return replace


def test_what_is_here(here):
    here("cuda:0", "cuda:1", "mps")
    assert found_device("cpu") == torch.device("cpu")
    assert found_device("cuda:1") == torch.device("cuda:1")
    assert found_device(torch.device("cuda:0")) == torch.device("cuda:0")
    assert found_device("cuda") == torch.device("cuda:1")  # the current one
    assert found_device("mps") == torch.device("mps")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "xpu"])
def test_what_is_not(here, name):
    here()
    with pytest.raises(ValueError, match=f"`device` must be one that is here: cpu; got '{name}'. This build"):
        found_device(name)


def test_another_number(here):
    here("cuda:0", "cuda:1")
    with pytest.raises(
        ValueError, match="`device` must be one that is here: cpu, cuda:0, cuda:1; got 'cuda:2'"
    ):
        found_device("cuda:2")


def test_no_device():
    with pytest.raises(ValueError, match="`device` must be 'cpu', 'cuda', 'cuda:1' or 'mps'; got 'gpu'"):
        found_device("gpu")
