"""Digests of training examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from planted import Items, ListOfDicts
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stride_captum.data.batch import ExampleBatch
from stride_captum.data.digests import STREAM, Digests, ExampleDigest, data_fingerprint, row_digests
from stride_captum.data.reading import Batch, Reading


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


class Picture:
    """As PIL's: an address in its repr, its pixels in the array interface."""

    def __init__(self, value: int) -> None:
        self.pixels = np.full(3, value)
        self.__array_interface__ = self.pixels.__array_interface__


READING = Reading(Batch(per_example=["x", "names", ("inner", "array")]))
MAKERS = {
    "tensors": lambda i: (torch.tensor(i), 0),
    "dicts": lambda i: {"x": torch.tensor([i]), "labels": 1},
    "arrays": lambda i: (np.array([i]), [0]),
    "arrays of objects": lambda i: (np.array(["text", i], dtype=object), 0),
    "pictures": lambda i: (Picture(i), 0),
    "texts": lambda i: ("text", i),
    "numbers": lambda i: (None, float(i)),
    "split numbers": lambda i: (10**i, 10 ** (3 - i)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_example_counts(kind):
    def prints() -> set[str]:
        return {data_fingerprint(Items([MAKERS[kind](i), MAKERS[kind](0)])) for i in range(3)}

    assert len(prints()) == 3
    assert prints() == prints()


def test_read_only_arrays_and_arrays_of_objects_have_digests():
    x = np.arange(6.0).reshape(3, 2)
    want = row_digests(3, [x])
    x.flags.writeable = False
    assert torch.equal(row_digests(3, [x]), want)
    texts = np.array(["a", "b", "a"], dtype=object)
    assert torch.equal(row_digests(3, [texts]), row_digests(3, [["a", "b", "a"]]))


def test_64_examples_and_the_length_are_in_the_fingerprint():
    x = torch.zeros(1000)
    prints = set()
    for i in (None, 0, 1, 999):
        changed = x.clone()
        if i is not None:
            changed[i] = 1
        prints.add(data_fingerprint(TensorDataset(changed)))
    assert len(prints) == 3  # example 1 is not one of them
    assert data_fingerprint(ListOfDicts(100)) != data_fingerprint(ListOfDicts(101))
    assert data_fingerprint(ListOfDicts(100)) == data_fingerprint(ListOfDicts(100))
    backwards = DataLoader(TensorDataset(x), sampler=range(999, -1, -1))
    assert data_fingerprint(backwards) != data_fingerprint(DataLoader(TensorDataset(x)))


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_streams_have_no_fingerprint():
    assert data_fingerprint(Stream()) == data_fingerprint(DataLoader(Stream())) == STREAM


def test_examples_that_differ_from_one_reading_to_the_next_have_no_fingerprint():
    class Noisy(Items):
        def __getitem__(self, i: int) -> Any:
            return self.source[i] + torch.randn(1)

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="`train_dataset` must give the same example each time it is read"):
        data_fingerprint(Noisy(torch.zeros(10, 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digest_of_examples_does_not_depend_on_batches_but_on_every_value():
    x, y = torch.randn(12, 3), torch.arange(12)
    names = [f"text {i}" for i in range(12)]

    def digest(sizes, x=x, y=y, names=names):
        taken, start = ExampleDigest(), 0
        for size in sizes:
            rows = slice(start, start + size)
            inner = {"array": y[rows].numpy(), "same for all": torch.ones(2, 2)}
            content = {"x": x[rows], "names": names[rows], "inner": inner, "labels": y[rows]}
            taken.update(ExampleBatch(content, READING))
            start += size
        return taken.finish()

    whole = digest([12])
    assert digest([5, 5, 2]) == whole == digest([1] * 12)
    other = x.clone()
    other[11, 2] += 1e-6
    assert digest([12], x=other) != whole
    assert digest([12], x=x.double()) != whole
    assert digest([12], names=[*names[:-1], "other"]) != whole
    assert digest([12], y=y.flip(0)) != whole


class TestRowDigests:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int8, torch.bfloat16])
    @pytest.mark.parametrize("places", [[0], [3, 4], [0, 2, 4, 6], list(range(7))])
    def test_signs_show(self, dtype, places):
        rows = torch.arange(1, 36).view(5, 7).to(dtype)
        other = rows.clone()
        other[:, places] *= -1
        assert not (row_digests(5, [rows]) == row_digests(5, [other])).any()

    @pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 70_000])
    def test_a_row_has_the_same_digest_alone_and_in_any_batch(self, width):
        rows = (torch.arange(6 * width) % 251).to(torch.uint8).view(6, width)
        whole = row_digests(6, [rows])
        assert torch.equal(torch.cat([row_digests(2, [part]) for part in rows.split(2)]), whole)
        assert torch.equal(row_digests(6, [list(rows)]), whole)
        assert torch.equal(row_digests(6, [rows.numpy()]), whole)
        assert whole.unique().numel() == 6 if width > 1 else True

    def test_one_byte_shows_wherever_it_is(self):
        rows = torch.zeros(1, 403, dtype=torch.uint8).repeat(403, 1)
        rows[torch.arange(403), torch.arange(403)] = 1
        assert row_digests(403, [rows]).unique().numel() == 403

    def test_parts_are_told_apart_by_their_order(self):
        a, b = torch.arange(8.0).view(2, 4), torch.arange(8.0, 16.0).view(2, 4)
        assert not (row_digests(2, [a, b]) == row_digests(2, [b, a])).any()
        assert not (row_digests(2, [a]) == row_digests(2, [a, torch.zeros(2, 0)])).any()
