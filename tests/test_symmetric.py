"""Products that skip what symmetry repeats: equal to the plain ones, with five eighths of the work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stride_captum.symmetric import gram_matrix, inverse_forms

WIDTHS = [1, 127, 128, 129, 300, 600]


def _rows(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))


def _factor(d: int) -> torch.Tensor:
    x = _rows(2 * d + 3, d + 1)
    return torch.linalg.cholesky(x.T @ x / len(x) + 0.1 * torch.eye(d + 1, dtype=x.dtype))


@pytest.mark.parametrize("d", WIDTHS)
def test_gram_matrix_is_the_product(d: int) -> None:
    rows = _rows(40, d)
    torch.testing.assert_close(gram_matrix(rows), rows.T @ rows)


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
    for product in (lambda: gram_matrix(rows), lambda: inverse_forms(rows, factor)):
        with FlopCounterMode(display=False) as counter:
            product()
        assert counter.get_total_flops() <= 0.64 * plain
