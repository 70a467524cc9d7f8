"""How the tests are spread over cores: files, groups and threads of a worker."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STARTS_PROCESSES = re.compile(r"LocalCluster\(|CONTEXT\.Process\(|PeakMemory\(CPU\)|Popen\(")


def test_a_worker_has_one_thread() -> None:
    assert torch.get_num_threads() == int(os.environ.get("STRIDE_CAPTUM_TEST_THREADS", "1"))


def test_a_file_is_a_group(request: pytest.FixtureRequest) -> None:
    marks = [mark.args for mark in request.node.iter_markers("xdist_group")]
    assert marks == [("test_workers",)]


def test_files_that_start_processes_or_measure_memory_are_one_group() -> None:
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if STARTS_PROCESSES.search(text) and path != Path(__file__):
            found[path.name] = 'pytestmark = pytest.mark.xdist_group("processes")\n' in text
    assert len(found) >= 4
    assert all(found.values()), found


def recipe(target: str) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^{target}: .*\n\t(.*)$", makefile, re.MULTILINE)
    return found


@pytest.mark.parametrize("target", ["test", "test-fast", "test-quanda"])
def test_make_uses_all_cores_with_one_thread_each(target: str) -> None:
    assert "PARALLEL := -n auto --dist loadgroup\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert recipe(target).startswith("OMP_NUM_THREADS=1 ")
    assert "$(PARALLEL)" in recipe(target)


def test_slow_tests_are_left_out_by_test_fast_alone(pytestconfig: pytest.Config) -> None:
    assert recipe("test-fast").endswith('-m "not slow and not matrix"')
    assert "slow" not in recipe("test")


def test_matrices_and_benchmarks_have_a_target_that_ci_runs(pytestconfig: pytest.Config) -> None:
    assert '-m "not matrix"' in recipe("test")
    assert recipe("conformance").endswith("-m matrix")
    assert "make conformance" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    (described,) = (line for line in pytestconfig.getini("markers") if line.startswith("matrix:"))
    assert "make conformance" in described


def test_slow_tests_are_described(pytestconfig: pytest.Config) -> None:
    (described,) = (line for line in pytestconfig.getini("markers") if line.startswith("slow:"))
    assert "make test-fast" in described
    (told,) = re.findall(r"^make test-fast .*$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert "without the tests that are marked `slow`" in told
