"""Places in the training set, in the ways in which people name them."""

import numpy as np
import pytest
import torch
from flat_options import arguments

from stride_captum import STRIDE
from stride_captum.data.places import groups_of_places, places

MASK = torch.zeros(48, dtype=torch.bool)
MASK[10:20] = True
WAYS = {
    "a list": list(range(10, 20)),
    "a range": range(10, 20),
    "a set": set(range(10, 20)),
    "an array": np.arange(10, 20, dtype=np.int16),
    "a tensor": torch.arange(19, 9, -1),
    "a mask": MASK,
    "an array mask": MASK.numpy(),
    "a list of bools": MASK.tolist(),
    "a slice": slice(10, 20),
    "numbers of numpy": [np.int64(i) for i in range(10, 20)],
}
WRONG = [
    ([1.0, 2.0], ValueError, "must hold places in the training set: integers.*float64"),
    (torch.tensor([1.0]), ValueError, "must hold places in the training set: integers.*float32"),
    (["a"], ValueError, "must hold places in the training set: integers"),
    (3, TypeError, r"must hold places.*got int. Write \[3\]"),
    (torch.tensor(3), TypeError, "must hold places.*Put it in a list"),
    ("abc", TypeError, "must hold places.*got str"),
    ([-1], ValueError, r"must hold places in \[0, 48\); got -1"),
    ([48], ValueError, r"must hold places in \[0, 48\); got 48"),
    ([3, 3], ValueError, "must hold every place once; got 3 twice"),
    (MASK[:47], ValueError, r"must be a mask of length 48; got shape \(47,\)"),
    ([[1, 2]], ValueError, r"must hold places.*in shape \(1, 2\)"),
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_names_the_same_places(planted, way):
    model, train, test = planted
    method = STRIDE(model, train).fit()
    wanted = method.influence(test.tensors)[:, 10:20].sum(1, keepdim=True)
    found = method.subset_influence(test.tensors, [WAYS[way]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    removed = STRIDE(model, train).fit().remove_examples(WAYS[way])
    assert removed.n_train_ == 38
    assert places(WAYS[way], 48, "indices").tolist() == list(range(10, 20))


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_what_names_no_places_is_refused(planted, wrong, error, message):
    method = STRIDE(*planted[:2]).fit()
    with pytest.raises(error, match=rf"`groups\[1\]` {message}"):
        method.subset_influence(planted[2].tensors, [[0], wrong])
    with pytest.raises(error, match=f"`indices` {message}"):
        method.remove_examples(wrong)


def test_rows_of_a_boolean_matrix_are_groups_and_a_group_may_be_empty():
    found = groups_of_places(torch.stack([MASK, ~MASK]), 48)
    assert [len(group) for group in found] == [10, 38]
    assert groups_of_places([[], [5]], 48)[0].size == 0


def test_groups_by_name_and_flat_lists_are_refused():
    with pytest.raises(TypeError, match=r"`groups` must be a list of groups.*got dict.*values"):
        groups_of_places({"a": [1]}, 3)
    with pytest.raises(TypeError, match=r"`groups\[0\]` must hold places.*got int. Write \[1\]"):
        groups_of_places([1, 2], 3)
    with pytest.raises(TypeError, match="`groups` must be a list of groups"):
        groups_of_places(3, 3)


def test_a_lasso_without_a_penalty_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"`alpha` must be a fraction of alpha_max above 0.*Ridge with"):
        arguments(operators="trained", alpha=0.0)
