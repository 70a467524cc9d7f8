"""Digests of training examples."""

import numpy as np
import pytest
import torch

from stride_captum.digests import Digests, row_digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16])
def test_a_row_has_the_same_digest_in_any_batch(dtype):
    x = (torch.arange(60).reshape(10, 2, 3) * 7 % 31).to(dtype)
    whole = row_digests(10, [x])
    assert torch.equal(torch.cat([row_digests(4, [x[:4]]), row_digests(6, [x[4:]])]), whole)
    assert whole.unique().numel() == 10


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_changed_bit_changes_the_digest_of_its_row_alone(bit):
    x = torch.arange(20, dtype=torch.int32).reshape(4, 5)
    other = x.clone()
    other[2, 3] ^= -(2**31) if bit == 31 else 1 << bit
    changed = row_digests(4, [x]) != row_digests(4, [other])
    assert changed.tolist() == [False, False, True, False]


def test_swapped_values_of_a_row_change_its_digest():
    assert row_digests(1, [torch.tensor([[1.0, 2.0]])]) != row_digests(1, [torch.tensor([[2.0, 1.0]])])


def test_layout_does_not_matter_and_arrays_count_as_tensors():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    want = row_digests(6, [x])
    assert torch.equal(row_digests(6, [x.T.contiguous().T]), want)
    assert torch.equal(row_digests(6, [x.numpy()]), want)


def test_texts_and_several_parts():
    texts = ["a", "b", "a"]
    one = row_digests(3, [texts])
    assert one[0] == one[2] != one[1]
    both = row_digests(3, [texts, np.array([1, 2, 3])])
    assert both.unique().numel() == 3


def test_joined_digests_are_those_of_the_whole():
    x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), torch.arange(7)
    parts = [Digests.of(len(y[s]), y[s], [x[s]]) for s in (slice(0, 3), slice(3, 7))]
    whole, joined = Digests.of(7, y, [x]), Digests.joined(parts)
    assert len(joined) == 7
    assert torch.equal(joined.labels, whole.labels)
    assert torch.equal(joined.inputs, whole.inputs)


def test_no_labels_have_the_digest_zero():
    assert Digests.of(2, None, [torch.ones(2, 1)]).labels.tolist() == [0, 0]
