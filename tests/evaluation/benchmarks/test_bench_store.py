"""Benchmarks of the feature store and of estimates, on small sizes."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from stride_captum import STRIDE
from stride_captum.evaluation.benchmarks import feature_store as benchmark_store
from stride_captum.evaluation.benchmarks import peers as peers
from stride_captum.evaluation.benchmarks.estimate import QUANTITIES, Case, bench_estimate
from stride_captum.evaluation.benchmarks.feature_store import PARTS, bench_store
from stride_captum.evaluation.benchmarks.limited_process import fit_and_query
from stride_captum.evaluation.benchmarks.networks import examples, network
from stride_captum.evaluation.benchmarks.peers import bench_peers
from stride_captum.evaluation.cli.app import app


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="reads /proc and the page cache")
def test_the_store_is_measured_in_four_parts(tmp_path):
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
        *(part for name in ("large", "build", "query", "precision") for part in ("--part", name)),
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "store.json").read_text())["rows"]
    found = {(row["part"], row["figure"]): row["value"] for row in rows}
    assert {part for part, _ in found} == set(PARTS) - {"example"}
    assert found["large", "n_train"] == 3000
    assert found["large", "n_features"] == 16
    assert 0 < max(v for (part, name), v in found.items() if part == "large" and "anon" in name) < 2 * 2**30
    assert found["build", "n_train"] == 300
    ratio = found["build", "build_seconds"] / (
        found["build", "forward_seconds"] + found["build", "write_seconds"]
    )
    assert found["build", "build_ratio"] == pytest.approx(ratio)
    assert found["query", "1 points, cached ratio"] > 0
    assert found["precision", "bfloat16 bytes"] == found["precision", "float32 bytes"] / 2 == 300 * 16 * 2
    assert found["precision", "float32 spearman"] == pytest.approx(1)
    assert 0.99 < found["precision", "bfloat16 spearman"] < found["precision", "float16 spearman"] < 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="reads /proc and the page cache")
def test_bytes_of_an_example_are_what_another_example_adds(monkeypatch):
    asked = []

    def in_own_process(options):
        asked.append(options)
        found = fit_and_query(options)
        assert found["result_shape"] == [5, 3]
        each = 7 if options["in_memory"] else 2
        return {**found, "fit_peak_anonymous_bytes": 1000 + each * options["n_train"]}

    monkeypatch.setattr(benchmark_store, "in_own_process", in_own_process)
    found = benchmark_store.example_bytes(30, 16, 40, 5, 3)
    assert [way["fit"] for way in found.values() if isinstance(way, dict)] == [7, 7, 2]
    assert {options["n_train"] for options in asked} == {30, 60}


def test_what_is_no_part_is_refused():
    with pytest.raises(
        ValueError,
        match="`part` must be one of 'large', 'build', 'query', 'precision', 'example'; got 'larg'",
    ):
        bench_store(["larg"])


@pytest.mark.slow
def test_estimates_stand_beside_measurements():
    (row,) = bench_estimate([Case("width 512", 300, k=5)], n_test=4)
    assert (row["model"], row["n_train"], row["k"], row["n_test"]) == ("width 512", 300, 5, 4)
    for name in QUANTITIES:
        estimated, measured = row[f"{name}_estimated"], row[f"{name}_measured"]
        assert row[f"{name}_ratio"] == pytest.approx(estimated / measured)


@pytest.mark.slow
def test_peers_are_measured_on_the_same_network():
    rows = bench_peers([peers.Case("width 512", 200, n_test=3, k=5)], repeats=1)
    assert [row["method"] for row in rows] == [
        "STRIDE",
        "Similarity, the same layers",
        "Similarity, last layer",
        "TracInCPFast (Captum)",
        "EKFAC (kronfluence)",
    ]
    for row in rows:
        assert row["query_ratio"] == pytest.approx(row["query"] / rows[1]["query"])
        assert row["fit_ratio"] == pytest.approx(row["fit"] / row["forward"])
        assert row["n_features"] == 512 + 784


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_the_networks_of_torchvision_can_be_attributed(name):
    pytest.importorskip("torchvision")
    train, test = examples(name, 12, 2)
    assert STRIDE(network(name), train).influence(test).shape == (2, 12)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="`network` must be one of 'MLP of Table 2'"):
        network("mlp")
