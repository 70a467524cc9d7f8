"""Peak memory: what is added is seen, what was there is not, and nothing is left running."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stride_captum.adapters import Random
from stride_captum.conformance.toy_problems import MLP, planted_classes
from stride_captum.system import peak_memory
from stride_captum.system.peak_memory import PeakMemory, release_free_memory

pytestmark = pytest.mark.xdist_group("processes")

CPU = torch.device("cpu")
MIB = 2**20
told = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")


def wait_for_samples(memory: PeakMemory) -> None:
    """Wait until two more samples are taken, however long a busy machine lets the sampling thread wait."""
    samples = threading.Semaphore(0)
    read = memory._read

    def counted() -> int | None:
        found = read()
        samples.release()
        return found

    memory._read = counted
    for _ in range(2):
        assert samples.acquire(timeout=60)
    memory._read = read


@pytest.mark.slow
@told
def test_memory_that_is_freed_again_counts_and_earlier_memory_does_not() -> None:
    before = torch.ones(32 * MIB, dtype=torch.uint8)
    with PeakMemory(CPU) as memory:
        block = torch.ones(96 * MIB, dtype=torch.uint8)
        wait_for_samples(memory)
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


@told
def test_a_method_reports_the_most_of_fit_and_of_its_last_query() -> None:
    dataset = planted_classes(40)
    method = Random(MLP(), dataset).fit()
    fit_bytes = method.peak_bytes_
    assert fit_bytes is not None
    method.influence(dataset[:3])
    assert method.peak_bytes_ is not None
    assert method.peak_bytes_ >= fit_bytes


@pytest.mark.slow
@told
def test_memory_that_was_freed_before_counts_after_its_release() -> None:
    pieces = [torch.ones(2**15) for _ in range(600)]  # 75 MiB that the allocator keeps when they are freed
    del pieces
    release_free_memory()
    with PeakMemory(CPU) as memory:
        again = [torch.ones(2**15) for _ in range(600)]
    assert len(again) == 600
    assert memory.bytes is not None
    assert memory.bytes >= 70 * MIB


class Allocator:
    """Memory of a GPU that is not there, as `torch.cuda` tells of it; its statistics must not be reset."""

    def __init__(self, patch: pytest.MonkeyPatch, allocated: int, peak: int) -> None:
        self.allocated, self.peak = allocated, peak
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        patch.setattr(
            torch.cuda, "reset_peak_memory_stats", lambda device: pytest.fail("they are the user's")
        )

    def use(self, size: int, meanwhile: Callable[[], object] = int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        meanwhile()
        self.allocated -= size


class TestOnAGPU:
    device = torch.device("cuda", 0)

    def test_a_new_peak_is_exact_however_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = Allocator(monkeypatch, allocated=100, peak=150)
        with PeakMemory(self.device) as memory:
            gpu.use(700)
        assert memory.bytes == 700
        assert (gpu.allocated, gpu.peak) == (100, 800)

    def test_below_the_peak_of_the_caller_what_lasts_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = Allocator(monkeypatch, allocated=100, peak=5_000)
        with PeakMemory(self.device) as memory:
            gpu.use(700, lambda: wait_for_samples(memory))
        assert memory.bytes == 700
        assert gpu.peak == 5_000

    def test_the_caller_s_peak_is_not_taken_for_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = Allocator(monkeypatch, allocated=100, peak=5_000)
        with PeakMemory(self.device) as memory:
            gpu.allocated += 30
        assert memory.bytes == 30
