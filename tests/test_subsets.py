from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import sparse

from stride_captum.subsets import (
    checked_membership,
    coverage,
    members,
    membership_from_indices,
    partition,
    random_subsets,
    singletons,
    sketch,
    sketch_projection,
)


class TestMembership:
    def test_rows_hold_the_sorted_members(self):
        lists = [[4, 0], [], np.array([2]), torch.tensor([1, 3, 4])]
        matrix = membership_from_indices(lists, 5)
        assert sparse.isspmatrix_csr(matrix)
        assert matrix.dtype == np.float64
        dense = np.zeros((4, 5))
        for k, row in enumerate(lists):
            dense[k, np.asarray(row, dtype=int)] = 1
            assert members(matrix, k).tolist() == sorted(int(i) for i in row)
        np.testing.assert_array_equal(matrix.toarray(), dense)

    def test_no_subsets_give_an_empty_matrix(self):
        assert membership_from_indices([], 5).shape == (0, 5)

    @pytest.mark.parametrize("wrong", [5, -1])
    def test_indices_out_of_range_are_refused(self, wrong):
        with pytest.raises(
            ValueError, match=rf"`subsets\[1\]` must hold training indices in \[0, 5\); got {wrong}"
        ):
            membership_from_indices([[0], [1, wrong]], 5)

    def test_an_index_twice_is_refused(self):
        with pytest.raises(ValueError, match=r"`subsets\[0\]` must hold every index once; got 3 twice"):
            membership_from_indices([[3, 1, 3]], 5)

    @pytest.mark.parametrize(
        ("indices", "said"),
        [
            ([0.5, 1.0], r"`subsets\[1\]` must hold .* integers; got an array of float64\."),
            ([True, False], r"`subsets\[1\]` .*; got a boolean mask\. Write numpy\.flatnonzero\(mask\)\."),
            (["1"], r"`subsets\[1\]` must hold training indices"),
            (slice(1, 2), r"`subsets\[1\]` must hold .*; got an array of object"),
        ],
    )
    def test_what_are_no_indices_is_refused(self, indices, said):
        with pytest.raises(TypeError, match=said):
            membership_from_indices([[0], indices], 5)
        if isinstance(indices, list):
            with pytest.raises(TypeError, match="`membership` must hold training indices"):
                sketch([[0], indices], 5)

    def test_the_callers_lists_are_not_changed(self):
        rows = np.array([3, 1, 2])
        membership_from_indices([rows], 5)
        assert rows.tolist() == [3, 1, 2]


class TestChecked:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, bool])
    @pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "coo_matrix", "csc_matrix"])
    def test_every_kind_of_matrix_of_zeros_and_ones_is_the_same(self, kind, dtype):
        usual = random_subsets(300, 4, 150)
        found = checked_membership(getattr(sparse, kind)(usual.astype(dtype)))
        assert (found.format, found.dtype, found.nnz) == ("csr", np.float64, 600)
        # of numbers of 8 bits, this sum would overflow
        assert (found @ found.T).diagonal().tolist() == [150.0] * 4
        np.testing.assert_array_equal(found.toarray(), usual.toarray())

    def test_one_that_is_as_expected_is_not_copied(self):
        usual = random_subsets(30, 4, 15)
        assert checked_membership(usual) is usual

    def test_stored_zeros_are_no_members_and_the_callers_matrix_stays(self):
        given = random_subsets(30, 4, 15)
        given.data[3] = 0.0
        found = checked_membership(given)
        assert len(members(found, 0)) == 14
        assert given.nnz == 60

    @pytest.mark.parametrize("entry", [2.0, -1.0, 0.5, np.nan])
    def test_other_entries_are_refused(self, entry):
        given = random_subsets(30, 4, 15)
        given.data[3] = entry
        with pytest.raises(
            ValueError, match=f"`membership` must hold zeros and ones: .*; got an entry {entry:g}"
        ):
            checked_membership(given)

    def test_a_member_that_is_stored_twice_is_refused(self):
        twice = sparse.csr_matrix((np.ones(2), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))
        with pytest.raises(ValueError, match=r"`groups` must hold zeros and ones: .*; got an entry 2"):
            checked_membership(twice, "groups")

    def test_dense_matrices_are_refused(self):
        with pytest.raises(TypeError, match=r"`membership` must be a scipy CSR matrix .*; got ndarray"):
            checked_membership(np.eye(3))


class TestRandomSubsets:
    def test_every_subset_has_its_size_and_distinct_members(self):
        matrix = random_subsets(50, 20, 25, seed=3)
        assert matrix.shape == (20, 50)
        assert set(matrix.data) == {1.0}
        assert (matrix.sum(axis=1) == 25).all()
        assert all(len(set(members(matrix, k))) == 25 for k in range(20))

    def test_subsets_differ_and_every_example_is_as_likely(self):
        matrix = random_subsets(40, 2000, 20, seed=0)
        assert len({tuple(members(matrix, k)) for k in range(2000)}) == 2000
        share = np.asarray(matrix.mean(axis=0)).ravel()
        assert abs(share - 0.5).max() < 5 * 0.5 / 2000**0.5

    def test_more_subsets_begin_with_the_same_ones(self):
        few, many = random_subsets(30, 4, 10, seed=1), random_subsets(30, 9, 10, seed=1)
        np.testing.assert_array_equal(few.toarray(), many[:4].toarray())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 3, 1), "`n_train` must be at least 1; got 0"),
            ((10, 3, 11), "`size` must be between 1 and n_train = 10; got 11"),
            ((10, 3, 0), "`size` must be between 1 and n_train = 10; got 0"),
            ((10, 0, 5), "`n_subsets` must be at least 1; got 0"),
        ],
    )
    def test_bad_sizes_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            random_subsets(*arguments)


class TestPartition:
    @pytest.mark.parametrize(("n_train", "n_subsets"), [(1, 1), (7, 3), (100, 50), (101, 50), (9, 9)])
    def test_is_disjoint_covering_and_balanced(self, n_train, n_subsets):
        matrix = partition(n_train, n_subsets, seed=2)
        assert (matrix.sum(axis=0) == 1).all()
        sizes = np.asarray(matrix.sum(axis=1)).ravel()
        assert sizes.max() - sizes.min() <= 1
        assert coverage(matrix).all()

    def test_the_papers_sizes_leave_examples_uncovered(self):
        matrix = partition(6000, 50, 100)
        assert (matrix.sum(axis=1) == 100).all()
        assert matrix.sum(axis=0).max() == 1
        covered = coverage(matrix)
        assert covered.shape == (6000,)
        assert covered.sum() == 5000
        np.testing.assert_array_equal(np.flatnonzero(covered), np.unique(matrix.indices))

    def test_subsets_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="`size` must be at most n_train / n_subsets = 3; got 4"):
            partition(10, 3, 4)
        with pytest.raises(
            ValueError, match=r"`n_subsets` must be at most n_train = 3; got 5. Subsets are disjoint"
        ):
            partition(3, 5)
        with pytest.raises(ValueError, match="`n_subsets` must be at least 1; got 0"):
            partition(3, 0)


@pytest.mark.parametrize(
    "draw", [lambda s: random_subsets(30, 5, 9, seed=s), lambda s: partition(30, 5, seed=s)]
)
def test_same_seed_same_subsets_and_global_random_state_is_left_alone(draw):
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    one, two, other = draw(0), draw(0), draw(1)
    assert (one != two).nnz == 0
    assert (one != other).nnz > 0
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_singletons_are_the_identity():
    np.testing.assert_array_equal(singletons(4).toarray(), np.eye(4))
    assert members(singletons(4), 2).tolist() == [2]


class TestSketch:
    @pytest.mark.parametrize("width", [64, 5])
    def test_is_the_dense_product(self, width):
        matrix = random_subsets(40, 6, 13, seed=1)
        dense = torch.from_numpy(matrix.toarray()) @ sketch_projection(40, width, seed=9)
        torch.testing.assert_close(sketch(matrix, 40, width, seed=9), dense, atol=1e-12, rtol=0)

    def test_lists_are_streamed_and_agree_with_the_matrix(self):
        matrix = random_subsets(40, 6, 13, seed=1)
        lists = (members(matrix, k).tolist() for k in range(6))
        assert torch.equal(sketch(lists, 40), sketch(matrix, 40))

    @pytest.mark.parametrize("width", [64, 16, 10, 1])
    def test_a_row_of_the_projection_depends_on_the_seed_and_the_example_alone(self, width):
        assert torch.equal(sketch_projection(37, width, 1), sketch_projection(90, width, 1)[:37])
        assert not torch.equal(sketch_projection(37, width, 1), sketch_projection(37, width, 2))

    def test_entries_are_gaussian_of_variance_one_over_width(self):
        entries = sketch_projection(5000, 64)
        assert entries.dtype == torch.float64
        assert entries.mean().item() == pytest.approx(0, abs=5 / 64**0.5 / entries.numel() ** 0.5)
        assert entries.var().item() * 64 == pytest.approx(1, abs=0.02)
        assert entries.mul(8).pow(4).mean().item() == pytest.approx(3, abs=0.1)

    def test_preserves_inner_products(self):
        matrix = random_subsets(300, 10, 150)
        sketched = sketch(matrix, 300, width=4096)
        exact = torch.from_numpy((matrix @ matrix.T).toarray())
        assert ((sketched @ sketched.T - exact).abs().max() / 150).item() < 0.15

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        sketch(partition(10, 2), 10)
        assert torch.equal(before, torch.get_rng_state())
