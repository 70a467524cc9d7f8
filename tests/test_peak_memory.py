"""Peak memory: what is added is seen, what was there is not, and nothing is left running."""

from __future__ import annotations

import threading

import pytest
import torch

from stride_captum import peak_memory
from stride_captum.adapters import Random
from stride_captum.conformance.planted import MLP, planted_classes
from stride_captum.peak_memory import PeakMemory, release_free_memory, resident_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_memory_that_is_freed_again_counts_and_earlier_memory_does_not() -> None:
    before = torch.ones(32 * MIB, dtype=torch.uint8)
    with PeakMemory(CPU) as memory:
        block = torch.ones(96 * MIB, dtype=torch.uint8)
        threading.Event().wait(0.05)
        del block
    assert memory.bytes is not None
    assert 90 * MIB <= memory.bytes <= 120 * MIB
    assert before.sum() == 32 * MIB


def test_no_thread_is_left_even_after_an_exception() -> None:
    threads = threading.active_count()
    with pytest.raises(KeyError), PeakMemory(CPU):
        raise KeyError
    assert threading.active_count() == threads


def test_a_system_that_does_not_tell_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "resident_bytes", lambda: None)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes is None


def test_a_method_reports_the_most_of_fit_and_of_its_last_query() -> None:
    dataset = planted_classes(40)
    method = Random(MLP(), dataset).fit()
    fit_bytes = method.peak_bytes_
    assert (fit_bytes is None) == (resident_bytes() is None)
    method.influence(dataset[:3])
    if fit_bytes is not None:
        assert method.peak_bytes_ is not None
        assert method.peak_bytes_ >= fit_bytes


def test_memory_that_was_freed_before_counts_after_its_release() -> None:
    pieces = [torch.ones(2**15) for _ in range(600)]  # 75 MiB that the allocator keeps when they are freed
    del pieces
    release_free_memory()
    with PeakMemory(CPU) as memory:
        again = [torch.ones(2**15) for _ in range(600)]
    assert len(again) == 600
    assert memory.bytes is None or memory.bytes >= 70 * MIB
