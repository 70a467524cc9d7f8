"""The batches of Algorithm 1: inside and outside the subset, distinct, each example equally often."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stride_captum.steering.sampling import SubsetRows, draw_uniforms, stratified_positions
from stride_captum.subsets import members, membership_from_indices, random_subsets

N = 40
UNEVEN = membership_from_indices([[0, 39], list(range(25)), [7], list(range(0, 40, 2)), [38, 3, 20]], N)
ALL = slice(0, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", [1, 3, 8, 50])
def test_batches_are_distinct_members_and_distinct_outsiders(width):
    rows = SubsetRows.from_membership(UNEVEN)
    for seed in range(20):
        uniforms = draw_uniforms(width, generator(seed))
        for draw, outside in ((rows.draw_members, False), (rows.draw_outsiders, True)):
            drawn, mask = draw(ALL, width, uniforms)
            for k in range(5):
                inside = set(members(UNEVEN, k).tolist())
                allowed = set(range(N)) - inside if outside else inside
                found = drawn[k][mask[k]].tolist()
                assert len(found) == min(width, len(allowed))
                assert len(set(found)) == len(found)
                assert set(found) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [(15, 10), (40, 7), (10, 10), (1000, 3)])
def test_every_position_is_equally_likely(size, width):
    counts = torch.zeros(size)
    source, n_draws = generator(), 2000
    for _ in range(n_draws):
        positions, mask = stratified_positions(torch.tensor([size]), width, draw_uniforms(width, source))
        counts[positions[mask]] += 1
    share = width / size
    deviation = (counts / n_draws - share) / (share * (1 - share) / n_draws + 1e-12) ** 0.5
    assert deviation.abs().max() < 5


def test_subsets_of_one_size_take_the_same_positions_however_many_are_drawn_at_once():
    uniforms = draw_uniforms(6, generator())
    together, _ = stratified_positions(torch.tensor([30, 30, 11]), 6, uniforms)
    alone, _ = stratified_positions(torch.tensor([11]), 6, uniforms)
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[2], alone[0])


def test_unsorted_rows_are_sorted_in_a_copy():
    csr = random_subsets(N, 3, 10)
    shuffled = csr.copy()
    shuffled.indices = np.concatenate([members(csr, k)[::-1] for k in range(3)]).astype(csr.indices.dtype)
    shuffled.has_sorted_indices = False
    before = shuffled.indices.copy()
    assert np.array_equal(SubsetRows.from_membership(shuffled).indices.numpy(), csr.indices)
    assert np.array_equal(shuffled.indices, before)
