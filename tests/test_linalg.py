"""Products that skip what symmetry repeats: equal to the plain ones, with five eighths of the work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stride_captum.linalg import add_gram_matrix, inverse_forms

WIDTHS = [1, 127, 128, 129, 300, 600]


def _rows(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))


def _factor(d: int) -> torch.Tensor:
    x = _rows(2 * d + 3, d + 1)
    return torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(d + 1, dtype=x.dtype))


@pytest.mark.parametrize("d", WIDTHS)
def test_the_gram_matrix_of_all_rows_is_added(d: int) -> None:
    first, rows = _rows(40, d), _rows(41, d)
    total = first.T @ first
    add_gram_matrix(total, rows)
    torch.testing.assert_close(total, first.T @ first + rows.T @ rows)
    torch.testing.assert_close(total, total.T, rtol=1e-13, atol=1e-13)


def test_no_rows_add_nothing() -> None:
    total = torch.eye(3, dtype=torch.float64)
    add_gram_matrix(total, torch.zeros(0, 3))
    assert torch.equal(total, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("d", WIDTHS)
def test_forms_are_those_of_the_inverse(d: int) -> None:
    rows, factor = _rows(30, d), _factor(d)
    extended = torch.cat([rows, rows.new_ones(30, 1)], 1)
    expected = (extended @ torch.linalg.inv(factor @ factor.T) * extended).sum(1)
    torch.testing.assert_close(inverse_forms(rows, factor), expected)


def test_both_do_five_eighths_of_the_plain_product() -> None:
    n, d = 2000, 1024
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    factor = torch.eye(d + 1)
    plain = 2 * n * d * d
    total = torch.zeros(d, d, dtype=torch.float64)
    for product in (lambda: add_gram_matrix(total, rows), lambda: inverse_forms(rows, factor)):
        with FlopCounterMode(display=False) as counter:
            product()
        assert counter.get_total_flops() <= 0.64 * plain
