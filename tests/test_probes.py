from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from small_nets import noise
from torch import nn

from stride_captum.agreement import are_alike, rounding
from stride_captum.layouts import Layout, batch_layout
from stride_captum.probes import copied, spread, tensors_in

N = 6


class TestAlike:
    def test_infinities_and_nan_in_the_same_places(self):
        a = torch.tensor([1.0, float("inf"), float("nan"), float("-inf")])
        assert are_alike(a, a.clone(), 1e-7)
        for i, other in ((0, 1.1), (1, float("-inf")), (2, 0.0), (0, float("nan")), (3, 5.0)):
            b = a.clone()
            b[i] = other
            assert not are_alike(a, b, 1e-7)

    def test_shapes_complex_numbers_and_zeros(self):
        assert not are_alike(torch.ones(3), torch.ones(3, 1), 1e-7)
        assert are_alike(torch.zeros(3), torch.zeros(3), 1e-7)
        assert not are_alike(torch.zeros(3), torch.full((3,), 1e-30), 1e-7)
        z = torch.tensor([1 + 1j])
        assert are_alike(z, z * (1 + 1e-6), 1e-7)
        assert not are_alike(z, z.conj().resolve_conj(), 1e-7)

    def test_the_scale_may_be_that_of_others(self):
        a, b = torch.tensor([1e-6]), torch.tensor([2e-6])
        assert not are_alike(a, b, 1e-7)
        assert are_alike(a, b, 1e-7, torch.ones(1))

    def test_rounding_is_that_of_the_coarsest_format(self):
        model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
        assert rounding(model) == torch.finfo(torch.float32).eps
        assert rounding(model, torch.ones(1).bfloat16()) == torch.finfo(torch.bfloat16).eps
        assert rounding(nn.Identity(), torch.ones(1).double()) == torch.finfo(torch.float64).eps


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


class TestLayouts:
    def test_by_the_dimension_that_follows(self):
        x = noise(3, 3, 4)
        assert batch_layout(x, x[[1, 0]], [1, 0], 1e-7, "fc") == Layout(0, "one")
        assert batch_layout(x, x[:, [0, 1]], [0, 1], 1e-7, "fc") == Layout(1, "one")
        y = x.flatten(0, 1)
        assert batch_layout(y, x[[1, 0]].flatten(0, 1), [1, 0], 1e-7, "fc") == Layout(0, "examples first")
        assert batch_layout(y, x[:, [1, 0]].flatten(0, 1), [1, 0], 1e-7, "fc") == Layout(0, "positions first")

    def test_in_the_wrong_order(self):
        x = noise(3, 4)
        with pytest.raises(
            ValueError, match="must give an example the same row in every batch; got others from 'fc'"
        ):
            batch_layout(x, x[:2], [1, 0], 1e-7, "fc")

    def test_spread(self):
        assert [spread(n) for n in (1, 2, 3, 4, 9)] == [[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 2, 3], [0, 4, 8]]

    def test_copies_keep_the_kind_of_a_batch(self):
        x = noise(2, 2)
        given = {"a": [x, 3], "b": (x, "words"), "c": Pair(x, 1)}
        new = copied(given)
        assert new["a"][0].data_ptr() != x.data_ptr()
        assert torch.equal(new["b"][0], x)
        assert isinstance(new["c"], Pair)
        assert new["c"].x.data_ptr() != x.data_ptr()
        assert len(tensors_in(given)) == 3
        assert (type(new["a"]), type(new["b"]), new["a"][1], new["b"][1]) == (list, tuple, 3, "words")
