"""`bench gpu` at toy sizes: its parts, what it keeps, and what it does when the time is over."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_device import DEVICE, strict_device
from typer.testing import CliRunner

from stride_captum.evaluation.benchmarks import gpu as gpu
from stride_captum.evaluation.benchmarks.gpu import PARTS, Results, bench_gpu, measure, tables, within
from stride_captum.evaluation.benchmarks.gpu_jobs import Clock, Job, side_by_side
from stride_captum.evaluation.benchmarks.gpu_parts import FULL, JOBS, TOY
from stride_captum.evaluation.cli.app import app

CPU = torch.device("cpu")


@pytest.fixture
def started(tmp_path: Path) -> Results:
    file = Results(tmp_path / "gpu.json")
    file.start(CPU, PARTS, 1.0)
    return file


class TestParts:
    @pytest.mark.slow
    @pytest.mark.parametrize("part", [part for part in PARTS if part != "scaling"])
    def test_every_row_is_measured_beside_something(self, part: str, started: Results) -> None:
        measure(part, "cpu", 60.0, started.path)
        found = started.read()["parts"][part]
        assert (found["status"], found["detail"]) == ("ok", "")
        assert found["rows"]
        for row in found["rows"]:
            assert row["what"]
            assert row["other"]
            assert "skipped" not in row
            figures = [value for name, value in row.items() if "ratio" in name or "speedup" in name]
            assert figures
            assert all(math.isfinite(figure) and figure > 0 for figure in figures)

    @pytest.mark.slow
    def test_precisions_stay_near_float32(self, started: Results) -> None:
        measure("training", "cpu", 60.0, started.path)
        rows = started.read()["parts"]["training"]["rows"]
        gaps = {row["what"]: row["difference"] for row in rows if "difference" in row}
        assert gaps["tf32"] < 1e-6  # which the processor does not have
        assert gaps["float32, fused Adam"] < 1e-4
        assert 1e-5 < gaps["bfloat16"] < 0.2

    def test_a_group_of_one_gives_the_scores_of_none(self, started: Results) -> None:
        measure("nccl", "cpu", 60.0, started.path)
        rows = started.read()["parts"]["nccl"]["rows"]
        assert rows[-1]["difference"] < 1e-5
        assert not torch.distributed.is_initialized()

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["training", "queries", "transfers"])
    def test_parts_run_on_a_device_of_their_own(self, part: str) -> None:
        sizes = {**TOY[part], **({"iterations": 1} if part == "training" else {})}
        with strict_device():
            rows = list(within(Clock(300), JOBS[part](DEVICE, Clock(300), **sizes)))
        assert rows
        for row in rows:
            assert "skipped" not in row or "fused" in row["skipped"], row

    def test_both_sizes_have_every_part(self) -> None:
        assert set(FULL) == set(TOY) == set(JOBS) == set(PARTS)
        for part in PARTS:
            assert set(FULL[part]) == set(TOY[part])

    def test_turns_are_compared_with_one_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0

        def let_pass(seconds: float) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr(time, "perf_counter", lambda: now)
        own, other = iter([9.0, 2.0, 4.0, 3.0]), iter([1.0, 1.0, 1.0, 1.5])
        found = side_by_side(lambda: let_pass(next(own)), lambda: let_pass(next(other)), CPU)
        assert (found["seconds"], found["other_seconds"]) == (3.0, 1.0)
        assert (found["smallest_ratio"], found["ratio"], found["largest_ratio"]) == (2.0, 2.0, 4.0)


class TestTime:
    def test_what_does_not_fit_or_fails_says_why(self) -> None:
        def fail(error: Exception) -> dict[str, Any]:
            raise error

        jobs = [
            Job({"what": "quick"}, lambda: time.sleep(0.02) or {"ratio": 1.0}),  # type: ignore[func-returns-value]
            Job({"what": "wrong"}, lambda: fail(ValueError("no such thing"))),
            Job({"what": "large"}, lambda: fail(torch.OutOfMemoryError("CUDA out of memory"))),
            Job({"what": "slow"}, lambda: {"ratio": 2.0}, work=1e9),
            Job({"what": "quick again"}, lambda: {"ratio": 3.0}),
        ]
        rows = {row["what"]: row for row in within(Clock(60), iter(jobs))}
        assert rows["quick"]["ratio"] == 1.0
        assert rows["wrong"]["skipped"] == "failed: ValueError: no such thing"
        assert rows["large"]["skipped"].startswith("out of memory: ")
        assert rows["slow"]["skipped"].startswith("60 s are left, and it takes about ")
        assert "ratio" not in rows["slow"]
        assert rows["quick again"]["ratio"] == 3.0

    def test_no_time_measures_nothing(self) -> None:
        jobs = iter([Job({"what": "anything"}, lambda: pytest.fail("it was run"))])
        (row,) = within(Clock(0), jobs)
        assert row["skipped"].startswith("0 s are left")

    def test_a_row_is_kept_as_soon_as_it_is_there(
        self, started: Results, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def jobs(device: torch.device, clock: Clock) -> Iterator[Job]:
            yield Job({"what": "first"}, lambda: {"ratio": 1.0})
            seen.extend(started.read()["parts"]["nccl"]["rows"])
            raise RuntimeError("the driver is gone")

        monkeypatch.setitem(gpu.JOBS, "nccl", jobs)
        monkeypatch.setitem(gpu.TOY, "nccl", {})
        measure("nccl", "cpu", 60.0, started.path)
        found = started.read()["parts"]["nccl"]
        assert seen == [{"what": "first", "ratio": 1.0}] == found["rows"]
        assert (found["status"], found["detail"]) == ("failed", "RuntimeError: the driver is gone")
        assert found["seconds"] > 0

    def test_a_process_that_takes_too_long_is_ended(
        self, started: Results, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu, "_GRACE", 0.2)
        started.add("training", {"what": "measured before"})
        gpu._in_a_process("training", "cpu", 0.3, started.path)  # it takes longer than that to begin
        found = started.read()["parts"]["training"]
        assert found["status"] == "over time"
        assert found["rows"] == [{"what": "measured before"}]

    def test_the_time_of_a_part_that_is_done_goes_to_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, float] = {}

        def instant(part: str, device: str, seconds: float, path: Path) -> None:
            given[part] = seconds
            Results(path).end(part, "ok", 0.0)

        monkeypatch.setattr(gpu, "measure", instant)
        monkeypatch.setattr(gpu, "_in_a_process", instant)
        lines: list[str] = []
        found = bench_gpu(tmp_path / "gpu.json", device="cpu", minutes=8.0, say=lines.append)
        assert list(given) == list(PARTS)
        assert given["training"] == pytest.approx(8 * 60 * gpu.SHARES["training"], rel=0.01)
        assert given["scaling"] == pytest.approx(8 * 60, rel=0.01)
        assert sum(gpu.SHARES.values()) == pytest.approx(1)
        assert len(lines) == len(PARTS)
        assert list(found["parts"]) == list(PARTS)


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["bench", "gpu", *arguments])

    @pytest.mark.slow
    def test_one_command_writes_one_file(self, tmp_path: Path) -> None:
        result = self.run(
            "--part", "transfers", "--part", "scaling", "--device", "cpu", "--out", str(tmp_path)
        )
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert {part: f["status"] for part, f in found["parts"].items()} == {
            "transfers": "ok",
            "scaling": "ok",
        }
        assert found["settings"] == {"device": "cpu", "minutes": 8.0, "parts": ["transfers", "scaling"]}
        assert torch.__version__.startswith(found["environment"]["versions"]["torch"])
        rows = found["parts"]["scaling"]["rows"]
        assert [row["n_params"] for row in rows] == [310]
        for row in rows:
            assert "skipped" not in row
            floor = row["forward_seconds"] + 2 * row["product_seconds"]
            assert row["ratio"] == pytest.approx(row["setup_seconds"] / floor)
        for _, columns, cells in tables(found):
            assert "ratio" in columns
            assert all(len(line) == len(columns) for line in cells)

    def test_other_parts_and_devices_and_no_time_are_refused(self, tmp_path: Path) -> None:
        for arguments, said in (
            (("--part", "training2"), "`part` must be one of 'training', 'queries'"),
            (("--device", "cuda:99"), "`device` must be a device that torch can use here"),
            (("--minutes", "0"), "`minutes` must be a positive number; got 0"),
        ):
            result = self.run(*arguments, "--out", str(tmp_path))
            assert result.exit_code == 2
            assert said in " ".join(result.output.split())
            assert not list(tmp_path.iterdir())
