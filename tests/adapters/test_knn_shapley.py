from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from planted import MLP, N_TRAIN, planted_classes, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum.adapters import KNNShapley, Similarity
from stride_captum.adapters.knn_shapley import knn_shapley


def utility(members: tuple[int, ...], matches: list[bool], k: int) -> float:
    """v(S) by the definition, for examples numbered by distance."""
    return sum(matches[j] for j in sorted(members)[:k]) / k


def brute_force(matches: list[bool], k: int) -> Tensor:
    """The mean gain of each example over all sizes of the set that it joins and all sets of that size."""
    n, values = len(matches), []
    for i in range(n):
        others, value = [j for j in range(n) if j != i], 0.0
        for size in range(n):
            for members in combinations(others, size):
                gain = utility((*members, i), matches, k) - utility(members, matches, k)
                value += gain / (n * comb(n - 1, size))
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


class TestClosedForm:
    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    @pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 11])
    def test_it_is_the_shapley_value_of_all_subsets(self, n, k):
        generator = torch.Generator().manual_seed(10 * n + k)
        for _ in range(3):
            matches = torch.rand(n, generator=generator) < 0.5
            wanted = brute_force(matches.tolist(), k)
            torch.testing.assert_close(knn_shapley(matches, k), wanted, rtol=0, atol=1e-12)

    def test_rows_are_independent_and_add_up_to_the_utility_of_all(self):
        matches = torch.rand(4, 500, generator=torch.Generator().manual_seed(0)) < 0.3
        values = knn_shapley(matches, 7)
        assert values.dtype == torch.float64
        assert torch.equal(values, torch.stack([knn_shapley(row, 7) for row in matches]))
        torch.testing.assert_close(values.sum(1), matches[:, :7].double().mean(1), rtol=0, atol=1e-12)

    def test_who_has_the_class_never_harms_and_who_has_not_never_helps(self):
        matches = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.5
        values = knn_shapley(matches, 5)
        assert bool((values[matches] >= 0).all())
        assert bool((values[~matches] <= 0).all())


class TestKNNShapley:
    @pytest.mark.parametrize("k", [1, 3, 9])
    def test_scores_are_brute_force_on_the_order_of_similarity(self, k):
        model, train, test = trained(MLP, n_train=7)
        y = train.tensors[1]
        order = Similarity(model, train).influence(test).argsort(1, descending=True)
        scores = KNNShapley(model, train, k=k).influence(test)
        for row, near, label in zip(scores, order, test.tensors[1], strict=True):
            wanted = brute_force((y[near] == label).tolist(), k)
            torch.testing.assert_close(row[near].double(), wanted, rtol=0, atol=1e-6)

    def test_the_class_of_the_response_decides_and_the_loss_has_the_other_sign(self, planted):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        method = KNNShapley(model, train)
        scores = method.influence((x, y))
        assert torch.equal(method.influence((x, y), response="loss"), -scores)
        assert torch.equal(method.influence((x,), target=y), scores)
        predicted = model(x).argmax(1)
        assert torch.equal(
            method.influence((x, y), target="predicted"), method.influence((x,), target=predicted)
        )
        same = y[:, None] == train.tensors[1]
        assert bool((scores[same] >= 0).all())
        assert bool((scores[~same] <= 0).all())

    def test_equal_distances_go_by_the_lower_index(self):
        x, y = torch.ones(4, 6), torch.tensor([1, 0, 0, 0])
        method = KNNShapley(nn.Linear(6, 3), TensorDataset(x, y), k=1)
        scores = method.influence((x[:1], y[:1]))
        torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))

    def test_a_wrong_label_stands_out_by_its_self_influence(self):
        x, y = planted_classes(N_TRAIN, seed=1, noise=0.1).tensors
        wrong = y.clone()
        wrong[5] = (y[5] + 1) % 3
        suspect = KNNShapley(nn.Linear(6, 3), TensorDataset(x, wrong)).mislabel_scores()
        assert int(suspect.argmax()) == 5

    def test_k_is_saved(self, planted, tmp_path):
        model, train, test = planted
        saved = KNNShapley(model, train, k=2).fit()
        saved.save(tmp_path / "method")
        loaded = KNNShapley.load(tmp_path / "method", model, train)
        assert loaded.k == 2
        assert torch.equal(loaded.influence(test), saved.influence(test))

    @pytest.mark.parametrize("k", [0, -1, 2.0, True, "3"])
    def test_k_is_a_positive_integer(self, planted, k):
        with pytest.raises(ValueError, match="`k` must be an integer of at least 1; got"):
            KNNShapley(*planted[:2], k=k)

    def test_it_has_no_norms(self, planted):
        with pytest.raises(ValueError, match="`normalize` must be None for KNNShapley, which has no norms"):
            KNNShapley(*planted[:2]).influence(planted[2], normalize="cosine")

    def test_layers_are_read_as_by_similarity(self, planted):
        model, train, test = planted
        order = Similarity(model, train, layers=["fc1"]).influence(test).argsort(1, descending=True)
        scores = KNNShapley(model, train, layers=["fc1"], k=1).influence(test)
        nearest = train.tensors[1][order[:, 0]] == test.tensors[1]
        torch.testing.assert_close(scores.sum(1), nearest.float(), rtol=0, atol=1e-5)
