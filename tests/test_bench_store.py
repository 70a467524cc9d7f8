"""Benchmarks of the feature store and of estimates, on small sizes."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from stride_captum.evaluation.benchmark_estimate import QUANTITIES, Case, bench_estimate
from stride_captum.evaluation.benchmark_store import PARTS, bench_store
from stride_captum.evaluation.cli import app


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="reads /proc and the page cache")
def test_the_store_is_measured_in_three_parts(tmp_path):
    arguments = [
        "bench",
        "store",
        "--n-train",
        "3000",
        "--n-features",
        "16",
        "--test-points",
        "5",
        "--k",
        "3",
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "store.json").read_text())["rows"]
    found = {(row["part"], row["figure"]): row["value"] for row in rows}
    assert {part for part, _ in found} == set(PARTS)
    assert found["large", "n_train"] == 3000
    assert found["large", "n_features"] == 16
    assert 0 < max(v for (part, name), v in found.items() if part == "large" and "anon" in name) < 2 * 2**30
    assert found["build", "n_train"] == 300
    ratio = found["build", "build_seconds"] / (
        found["build", "forward_seconds"] + found["build", "write_seconds"]
    )
    assert found["build", "build_ratio"] == pytest.approx(ratio)
    assert found["query", "1 points, cached ratio"] > 0


def test_what_is_no_part_is_refused():
    with pytest.raises(ValueError, match="`part` must be one of 'large', 'build', 'query'; got 'larg'"):
        bench_store(["larg"])


def test_estimates_stand_beside_measurements():
    (row,) = bench_estimate([Case("width 512", 300, k=5)], n_test=4)
    assert (row["model"], row["n_train"], row["k"], row["n_test"]) == ("width 512", 300, 5, 4)
    for name in QUANTITIES:
        estimated, measured = row[f"{name}_estimated"], row[f"{name}_measured"]
        assert row[f"{name}_ratio"] == pytest.approx(estimated / measured)
