from __future__ import annotations

import pytest
import torch
from planted import METHODS, planted_classes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import Random, Similarity
from stride_captum.influence.top_k import DenseScores, GroupSums, StreamedTopK, _merged
from stride_captum.subsets import membership_from_indices


def dense_top(scores: torch.Tensor, k: int, largest: bool) -> tuple[list[list[int]], torch.Tensor]:
    """Slow and obvious: sort the columns of each row by (NaN first, score, index)."""
    order = [
        sorted(
            range(len(row)),
            key=lambda j: (0, 0, j) if row[j] != row[j] else (1, -row[j] if largest else row[j], j),
        )[:k]
        for row in scores.tolist()
    ]
    return order, scores.gather(1, torch.tensor(order))


def streamed(scores: torch.Tensor, k: int, largest: bool, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = StreamedTopK(k, largest)
    for start in range(0, scores.shape[1], size):
        top.update(scores[:, start : start + size], start)
    return top.result()


def agree(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[list[list[int]], torch.Tensor]) -> None:
    assert found[0].dtype == torch.int64
    assert found[0].tolist() == wanted[0]
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 40, 200])
class TestStreamedTopK:
    @pytest.mark.parametrize("k", [1, 5, 199, 300])
    def test_agrees_with_the_dense_answer(self, k, size, largest):
        scores = torch.randn(6, 200, generator=torch.Generator().manual_seed(k))
        agree(streamed(scores, k, largest, size), dense_top(scores, k, largest))

    @pytest.mark.parametrize("k", [1, 4, 30])
    def test_ties_go_to_the_lower_index(self, k, size, largest):
        scores = torch.randint(-2, 3, (6, 200), generator=torch.Generator().manual_seed(k)).double()
        scores[0] = 0
        agree(streamed(scores, k, largest, size), dense_top(scores, k, largest))

    @pytest.mark.parametrize("k", [1, 3, 10])
    def test_nan_stands_at_the_front_and_infinities_in_their_places(self, k, size, largest):
        generator = torch.Generator().manual_seed(k)
        scores = torch.randint(-2, 3, (8, 200), generator=generator).float()
        special = torch.tensor([float("nan"), float("inf"), float("-inf")])
        for row, places in enumerate([[3], [50, 150], [199], [0, 1, 2, 3, 4, 100, 101], range(200)]):
            scores[row, list(places)] = special[0]
        scores[5, ::20], scores[6, ::20] = special[1], special[2]
        scores[7] = special[2]
        agree(streamed(scores, k, largest, size), dense_top(scores, k, largest))

    @pytest.mark.parametrize("k", [1, 5, 10])
    def test_one_row_of_ties_beside_rows_without(self, k, size, largest):
        scores = torch.randn(9, 200, generator=torch.Generator().manual_seed(k))
        scores[4] = 1.0
        scores[5, 30:170] = float("-inf") if largest else float("inf")
        agree(streamed(scores, k, largest, size), dense_top(scores, k, largest))

    def test_the_blocks_are_not_written_to(self, size, largest):
        scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
        before = scores.clone()
        streamed(scores, 5, largest, size)
        assert torch.equal(scores, before)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 6, 90])
def test_the_form_for_a_gpu_says_the_same_and_never_waits(k, largest):
    class NeverWaits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.item)
            assert func.overloadpacket not in waits, func
            return func(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(k)
    scores = torch.cat([torch.randn(5, 80, generator=generator), torch.ones(2, 80)])
    scores[0, [3, 50, 79]] = float("nan")
    scores[1, ::7] = float("inf")
    best, indices = None, None
    with NeverWaits():
        for start in range(0, 80, 16):
            block = scores[:, start : start + 16]
            best, indices = _merged(best, indices, block if largest else -block, start, k)
    agree((indices, best if largest else -best), dense_top(scores, k, largest))


def test_of_a_wide_block_little_is_ranked():
    class Ranked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.topk.default:
                widths.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    scores, widths = torch.randn(50, 4000, generator=torch.Generator().manual_seed(0)), []
    with Ranked():
        found = streamed(scores, 40, True, 4000)
    assert max(widths) == 200  # five groups of columns for each of the best
    agree(found, dense_top(scores, 40, True))


@pytest.mark.parametrize("size", [1, 3, 20])
class TestCollectors:
    def test_dense_scores_come_back_whole(self, size):
        scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        collector = DenseScores(20)
        for start in range(0, 20, size):
            collector.update(scores[:, start : start + size], start)
        assert torch.equal(collector.result()[0], scores)

    def test_group_sums_are_sums_of_columns_and_keep_nan(self, size):
        scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
        scores[1, 5] = float("nan")
        groups = [[0, 19], [], [5], list(range(20)), [7, 6]]
        collector = GroupSums(membership_from_indices(groups, 20))
        for start in range(0, 20, size):
            collector.update(scores[:, start : start + size], start)
        (sums,) = collector.result()
        wanted = torch.stack([scores[:, group].sum(1) for group in groups], 1)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, wanted, equal_nan=True)


def with_budget(method: type, model: nn.Module, train: TensorDataset, budget: int):
    if method is STRIDE:
        return STRIDE(model, train, memory_budget=budget)
    return method(model, train, memory_budget=budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("columns", [1, 7, 48])
def test_any_block_size_gives_the_same_top_k(planted, method, columns):
    model, train, test = planted
    whole = method(model, train)
    blocks = with_budget(method, model, train, 16 * len(test) * columns)
    dense = whole.influence(test.tensors)
    torch.testing.assert_close(blocks.influence(test.tensors), dense, rtol=0, atol=1e-6)
    for proponents in (True, False):
        top = blocks.influence(test.tensors, 5, proponents)
        assert top.indices.shape == (len(test), 5)
        torch.testing.assert_close(top.influence_scores, dense.gather(1, top.indices), rtol=0, atol=1e-6)
        best = dense.topk(5, dim=1, largest=proponents).values
        torch.testing.assert_close(top.influence_scores, best, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("method", [STRIDE, Similarity, Random])
@pytest.mark.parametrize("groups", [False, True])
def test_the_scores_of_a_large_training_set_are_never_held_at_once(method, groups):
    budget = 2**18
    train, test = planted_classes(5_000, (3,)), planted_classes(200, (3,), seed=1)
    dense = len(train) * len(test) * 4
    assert dense > 15 * budget
    fitted = with_budget(method, nn.Linear(3, 3), train, budget).fit()
    with LargestTensor() as record:
        if groups:
            fitted.subset_influence(test.tensors, [range(0, 5_000, 2), [1]])
        else:
            fitted.influence(test.tensors, 10)
    assert record.largest <= budget
