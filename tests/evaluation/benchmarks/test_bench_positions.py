"""The benchmark of positions: its command, at sizes that take no time."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stride_captum.evaluation.cli.app import app


@pytest.mark.slow
def test_the_command_measures_both_forms(tmp_path):
    sizes = ["--n-train", "6", "--n-positions", "4", "--test-points", "2", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "positions", *sizes, "--out", str(tmp_path), "--quiet"])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "positions.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["rows", "rows", "matrix", "matrix"]
    assert [row["residuals"] for row in rows] == ["temperature", "both"] * 2
    for row in rows:
        assert (row["n_train"], row["n_positions"], row["n_test"]) == (6, 4, 2)
        assert min(row[name] for name in ("forward", "product", "fit", "pairs", "matrices", "query")) > 0
        assert row["fit_ratio"] == pytest.approx(row["fit"] / (row["forward"] + 2 * row["product"]))
        floor = min(row["pairs"], row["matrices"])
        assert row["query_ratio"] == pytest.approx(row["query"] / floor)
