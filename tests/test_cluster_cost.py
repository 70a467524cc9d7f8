"""The arithmetic counts what a fit and a query really do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stride_captum import STRIDEConfig
from stride_captum.closed_form.operators import fit_closed_form
from stride_captum.evaluation.cluster_cost import ClusterCost, main

N, D, C = 3000, 512, 4


@pytest.fixture(scope="module")
def counted():
    """A fit of one layer, so that the ridge head reads all features, and the operations it makes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, D, generator=generator)
    logits = torch.randn(N, C, generator=generator)
    with FlopCounterMode(display=False) as counter:
        form = fit_closed_form(features, logits, logits.argmax(1), [D], STRIDEConfig(), 2.0)
    return form, counter.get_total_flops()


def test_operations_of_a_fit(counted):
    cost = ClusterCost(n_train=N, gpus=1, n_features=D, n_classes=C)
    kept = 2 * N * D * C  # fitted values again, for residuals that fit the memory budget
    # Class covariance, products with the right-hand side of factors: all that does not grow with n d.
    assert cost.gemm_operations() + kept == pytest.approx(counted[1], rel=0.005)


def test_operations_of_a_query(counted):
    """Of a share that is too large for its residuals to be kept."""
    form, q = replace(counted[0], residual_bytes=0), 20
    terms, _, _ = form.prepare(torch.ones(q, D), torch.ones(q, C))
    with FlopCounterMode(display=False) as counter:
        form.scores(terms, slice(0, N))
    cost = ClusterCost(n_train=N, gpus=1, n_features=D, n_classes=C, n_test=q, gemm=1.0)
    assert cost.query()["products"] == counter.get_total_flops()


def test_bytes(counted):
    form = counted[0]
    cost = ClusterCost(n_train=N, gpus=1, n_features=D, n_classes=C, feature_bytes=4)
    assert cost.disk_bytes() == form.features.nbytes + form.logits.nbytes
    head = form.head
    vectors = (form.labels, head.slack, head.shifts, head.norms, head.delicate)
    assert cost.vector_bytes() == sum(part.nbytes for part in vectors)


def test_more_test_points_than_are_taken_at_a_time_read_the_share_again():
    one, two = (ClusterCost(n_test=q).query() for q in (1024, 1025))
    assert two["read"] == 2 * one["read"]


def test_network_of_a_ring():
    cost = ClusterCost(n_train=8, gpus=4, n_features=9, n_classes=2)
    assert cost.network_bytes() == 2 * 3 / 4 * 8 * (100 + 20 + 4)
    assert ClusterCost(gpus=1).network_bytes() == 0


def test_parts_by_hand():
    rates = {"forward": 10.0, "gemm": 100.0, "gemm64": 10.0, "network": 8.0, "disk": 4.0}
    cost = ClusterCost(n_train=40, gpus=2, n_features=4, n_classes=2, n_test=3, k=5, feature_bytes=2, **rates)
    assert cost.fit() == pytest.approx(
        {
            "forward": 2.0,
            "products": (4 * 5 / 8 * 20 * 16 + 4 * 20 * 8) / 100,
            "factors": (2 * 125 + 2 * 20 * 4) / 10,
            "all-reduce": 8 * (25 + 10 + 4) / 8,
            "write": 20 * (8 + 8) / 4,
        }
    )
    assert cost.query() == pytest.approx(
        {
            "read": 20 * 16 / 4,
            "products": 2 * 20 * (3 * 6 + 4 * 2) / 100,
            "broadcast": 9.0,
            "gather": 12 * 3 * 5 * 2 / 8,
        }
    )


def test_what_is_printed(capsys):
    main(["--n-train", "1e6", "--gpus", "8", "--gemm", "1e12"])
    said = capsys.readouterr().out
    assert "1e+06 examples, d = 4,096, C = 1,000, 8 GPUs: 1.25e+05 examples each" in said
    assert "fit: " in said
    assert "top-100 of 1,000 test points: " in said
    assert "Arithmetic, not a measurement." in said
