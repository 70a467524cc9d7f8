"""Features of a training set, written where they stay."""

from __future__ import annotations

import pytest
import torch

from stride_captum.features.reader import _Growing


@pytest.mark.parametrize("expected", [None, 6, 2, 50])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [0, 5, 1], [1, 9, 9, 0, 20], [12, 1]])
def test_rows_stand_in_their_order_whatever_was_expected(lengths, expected):
    features, wanted = _Growing(expected), []
    for step, n in enumerate(lengths):
        rows = torch.arange(n * 3.0).reshape(n, 3) + 100 * step
        features.append([rows[:, :1], rows[:, 1:]], n_examples=2)
        wanted.append(rows)
    whole = features.whole()
    assert torch.equal(whole, torch.cat(wanted))
    held = whole.untyped_storage().nbytes() // (3 * 4)
    assert held <= 8 / 7 * len(whole)


def test_memory_is_taken_once_where_examples_are_alike(monkeypatch):
    features, taken = _Growing(6), []
    longer = _Growing._longer

    def counted(self, rows):
        taken.append(longer(self, rows))
        return taken[-1]

    monkeypatch.setattr(_Growing, "_longer", counted)
    for _ in range(3):
        features.append([torch.ones(8, 2)], n_examples=2)
    assert [len(rows) for rows in taken] == [24]
