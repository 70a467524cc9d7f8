from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.adapters import TracIn
from stride_captum.closed_form.memory import block_rows
from stride_captum.system import memory as memory_budget
from stride_captum.system.memory import (
    AUTO_SHARE,
    MOST_ROWS,
    auto_bytes,
    free_bytes,
    parse_bytes,
    rows_that_fit,
    spread_rows,
)

CPU = torch.device("cpu")


class TestRule:
    def test_auto_is_an_eighth_of_the_free_memory_rounded_down_to_a_power_of_two(self):
        for free in (1, 7, 8, 2**30, 3 * 2**33, 20 * 2**30 + 1):
            taken = auto_bytes(free)
            assert taken & (taken - 1) == 0
            assert taken <= max(free / AUTO_SHARE, 1) < 2 * taken
        assert AUTO_SHARE == 8

    def test_auto_asks_the_device_for_its_free_memory(self, monkeypatch):
        asked = []

        def free(device):
            asked.append(device)
            return 2**33

        monkeypatch.setattr(memory_budget, "free_bytes", free)
        assert parse_bytes("auto", "cuda:1") == 2**30
        assert asked == [torch.device("cuda:1")]
        model = nn.Linear(3, 2)
        train = TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
        assert STRIDE(model, train, memory_budget="auto").memory_budget == 2**30
        assert TracIn(model, train, memory_budget=" AUTO ").memory_budget == 2**30
        assert STRIDE(model, train, memory_budget="4GiB").memory_budget == 2**32

    def test_the_free_memory_of_this_machine_is_below_its_total(self):
        import os

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 0 < free_bytes(CPU) < total

    def test_the_limit_of_the_control_group_counts(self, monkeypatch):
        monkeypatch.setattr(memory_budget, "_available", lambda: 1000)
        monkeypatch.setattr(memory_budget, "_group_free", lambda: 300)
        assert free_bytes(CPU) == 300
        monkeypatch.setattr(memory_budget, "_group_free", lambda: None)
        assert free_bytes(CPU) == 1000
        monkeypatch.setattr(memory_budget, "_available", lambda: None)
        assert free_bytes(CPU) == 2**31

    def test_a_wrong_amount_names_its_argument(self):
        with pytest.raises(
            ValueError, match=r"`chunk` must be a positive number of bytes .*'512MiB', or 'auto'"
        ):
            parse_bytes("some", name="chunk")

    def test_at_least_one_row_fits(self):
        assert rows_that_fit(1, 10**9) == 1
        assert rows_that_fit(10**12, 1) == MOST_ROWS
        assert rows_that_fit(100, 7, most=None) == 14


@pytest.mark.parametrize("n", [2, 64, 65, 1000, 2**24 + 4])
def test_spread_rows_go_from_the_first_row_to_the_last_in_even_steps(n):
    rows = spread_rows(n, 64)
    assert (rows[0], rows[-1], len(rows)) == (0, n - 1, min(n, 64))
    steps = rows.diff()
    assert steps.max() - steps.min() <= 1


class TestBlocks:
    def test_the_closed_form_takes_as_many_rows_as_the_budget_holds(self):
        for budget in (2**16, 2**20, 2**28):
            rows = block_rows(budget, 100, 10, torch.float32)
            temporary = 4 * 3 * 101 + 8 * 6 * 10
            assert rows == min(budget // temporary, MOST_ROWS)
        wide = block_rows(2**20, 100, 32_000, torch.float64)
        assert wide == 1

    @pytest.mark.parametrize("curvature", ["identity", "kronecker", "eigenvalue-corrected"])
    def test_blocks_change_no_score(self, planted, curvature):
        model, train, test = planted
        one, many = (
            STRIDE(model, train, operators=ClosedForm(curvature=curvature), memory_budget=budget).fit()
            for budget in ("256MiB", "4KiB")
        )
        assert many._states[0].operators.block_rows < len(train) <= one._states[0].operators.block_rows
        for ask in ({}, {"normalize": "cosine"}, {"response": "loss"}):
            wanted = one.influence(test.tensors, **ask)
            found = many.influence(test.tensors, **ask)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(many.self_influence(), one.self_influence(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(many.mislabel_scores(), one.mislabel_scores(), rtol=1e-4, atol=1e-6)
