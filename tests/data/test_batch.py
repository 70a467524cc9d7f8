"""What a batch is: labels, parts with one row for each example, copies for the model."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from planted import examples, planted_classes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE, Batch
from stride_captum.adapters import TRAK, KNNShapley, Random, Similarity
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading

Pair = namedtuple("Pair", ["left", "right"])
X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


class Joined(nn.Module):
    """The planted network behind inputs that come in two parts, in any of several kinds of containers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *parts: Any, **named: Any) -> Tensor:
        (pair,) = parts if len(parts) == 1 else (parts,) if parts else (named,)
        if isinstance(pair, dict):
            pair = list(pair.values())
        left, right = pair["both"] if isinstance(pair, dict) else pair
        return self.net(torch.cat([left, right], 1))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2], x[:, 2:]


NESTED = {
    "a tuple in a tuple": lambda x, y: (halves(x), y),
    "a list in a tuple": lambda x, y: (list(halves(x)), y),
    "a dict in a tuple": lambda x, y: (dict(zip("ab", halves(x), strict=True)), y),
    "an ordered dict in a tuple": lambda x, y: (OrderedDict(zip("ab", halves(x), strict=True)), y),
    "a named tuple in a tuple": lambda x, y: (Pair(*halves(x)), y),
    "two tensors": lambda x, y: (*halves(x), y),
    "a dict": lambda x, y: {**dict(zip("ab", halves(x), strict=True)), "labels": y},
}


class Nested(Dataset):
    def __init__(self, data: TensorDataset, build: Any) -> None:
        self.data, self.build = data, build

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        x, y = (tensor[i : i + 1] for tensor in self.data.tensors)
        return self.alone(self.build(x, y))

    def alone(self, content: Any) -> Any:
        """Without the dimension of the batch, for a loader to put it back."""
        if isinstance(content, Tensor):
            return content[0]
        if isinstance(content, dict):
            return type(content)((key, self.alone(value)) for key, value in content.items())
        values = [self.alone(value) for value in content]
        return type(content)(*values) if hasattr(content, "_fields") else type(content)(values)


@pytest.mark.slow
@pytest.mark.parametrize("method", [STRIDE, Similarity, KNNShapley, Random, TRAK])
@pytest.mark.parametrize("kind", NESTED)
def test_nested_inputs_score_as_flat_ones(planted, method, kind):
    model, train, test = planted
    wanted = method(model, train, batch_size=7).influence(test.tensors)
    nested = method(Joined(model), Nested(train, NESTED[kind]), batch_size=7)
    torch.testing.assert_close(nested.influence(NESTED[kind](*test.tensors)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NESTED)
def test_nested_batches_are_cut_and_counted(kind):
    batch = examples(NESTED[kind](X, Y))
    assert len(batch) == 5
    pieces = list(batch.split(2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    again = [
        torch.cat(parts) for parts in zip(*[[p for _, p in piece.parts()] for piece in pieces], strict=True)
    ]
    for found, wanted in zip(again, halves(X), strict=True):
        assert torch.equal(found, wanted)
    assert type(pieces[0].content) is type(batch.content)
    picked = batch[torch.tensor([3, 0])]
    assert picked.labels.tolist() == [0, 0]
    assert torch.equal(dict(picked.parts())[next(iter(dict(batch.parts())))], X[[3, 0], :2])


def test_more_than_1024_nested_test_points_have_one_row_each(planted):
    model, train, _ = planted
    more = planted_classes(1500, seed=3).tensors
    wanted = STRIDE(model, train).influence(more)
    found = STRIDE(Joined(model), Nested(train, NESTED["a tuple in a tuple"])).influence(
        (halves(more[0]), more[1])
    )
    assert found.shape == (1500, len(train))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    """The planted network times the mean of a tensor that all examples share."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, bank: Tensor) -> Tensor:
        return self.net(x) * bank.mean()


def with_bank(data: TensorDataset, bank: Tensor, batch_size: int, first: bool = False) -> DataLoader:
    def collate(items: list[Any]) -> tuple[Tensor, ...]:
        x, y = (torch.stack(column) for column in zip(*items, strict=True))
        return (bank, x, y) if first else (x, bank, y)

    return DataLoader(data, batch_size, collate_fn=collate)


class TestSharedParts:
    @pytest.mark.parametrize("method", [STRIDE, TRAK, Random])
    @pytest.mark.parametrize("n_test", [4, 7, 1300])
    def test_a_tensor_that_all_examples_share_is_given_whole(self, planted, method, n_test):
        model, train, _ = planted
        bank = torch.ones(4, 3)
        test = planted_classes(n_test, seed=5).tensors
        wanted = method(model, train).influence(test)
        found = method(Shared(model), with_bank(train, bank, 20)).influence((test[0], bank, test[1]))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_what_looks_like_both_is_refused_and_can_be_said(self, planted):
        model, train, test = planted
        bank = torch.arange(8.0)[:, None].expand(8, 3) / 3.5
        loader = with_bank(train, bank, 8)  # 48 examples in batches of 8: the bank has as many rows
        with pytest.raises(
            ValueError, match=r"`train_dataset` must show which parts.*\(8, 3\) at \[1\].*per_example"
        ):
            STRIDE(Shared(model), loader).fit()
        said = STRIDE(Shared(model), loader, batch=Batch(per_example=[0]))
        wanted = STRIDE(model, train).influence(test.tensors)
        found = said.influence((test.tensors[0], bank, test.tensors[1]))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_equal_rows_are_no_reason_to_refuse(self, planted):
        model, train, test = planted
        mask = torch.ones(8, 3)
        found = STRIDE(Shared(model), with_bank(train, mask, 8)).influence(
            (test.tensors[0], mask[:7], test.tensors[1])
        )
        wanted = STRIDE(model, train).influence(test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_a_part_of_another_length_is_not_cut_by_guess(self, planted):
        model, train, _ = planted
        x, y = planted_classes(1300, seed=5).tensors
        with pytest.raises(
            ValueError, match=r"`inputs` must have 1300 rows in each part.*\(4, 3\) at \[1\].*per_example"
        ):
            STRIDE(model, train, batch=Batch(forward=lambda m, b: m(b[0]))).influence(
                (x, torch.ones(4, 3), y)
            )

    def test_declared_parts_are_believed(self):
        reading = Reading(Batch(per_example=["x"]))
        batch = ExampleBatch({"x": X, "bank": torch.ones(5, 1), "labels": Y}, reading)
        assert batch[:2].content["bank"].shape == (5, 1)
        assert batch[:2].content["x"].shape == (2, 6)
        nested = Reading(Batch(per_example=[(0, "x")]))
        batch = ExampleBatch(({"x": X, "bank": torch.ones(5, 1)}, Y), nested)
        assert batch[:2].content[0]["bank"].shape == (5, 1)
        wrong = ExampleBatch({"x": X[:3], "labels": Y}, reading)
        with pytest.raises(
            ValueError, match=r"`inputs` must have 5 rows in each part.*shape \(3, 6\) at \['x'\]"
        ):
            wrong[:2]


class TestOptions:
    def test_labels_under_another_key(self, planted):
        model, train, test = planted
        wanted = STRIDE(model, train).influence(test.tensors)
        rows = [{"x": x, "label": y} for x, y in zip(*train.tensors, strict=True)]
        inputs = dict(zip(("x", "label"), test.tensors, strict=True))
        found = STRIDE(model, DataLoader(rows), batch=Batch(label_key="label")).influence(inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(
            ValueError,
            match=r"`train_dataset` must give dicts with the key 'labels'; .*'x', 'label'.*label_key",
        ):
            STRIDE(model, DataLoader(rows)).fit()

    def test_labels_in_another_place(self, planted):
        model, train, test = planted
        wanted = STRIDE(model, train).influence(test.tensors)
        flipped = TensorDataset(*reversed(train.tensors))
        found = STRIDE(model, flipped, batch=Batch(label_key=0)).influence(tuple(reversed(test.tensors)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", [STRIDE, TRAK, Similarity, Random])
    def test_a_forward_of_the_users(self, planted, method):
        model, train, test = planted
        extra = TensorDataset(train.tensors[0], torch.arange(48), train.tensors[1])
        batch = Batch(forward=lambda model, batch: {"scores": model(batch[0])}["scores"])
        wanted = method(model, train).influence(test.tensors)
        found = method(model, extra, batch=batch).influence(
            (test.tensors[0], torch.arange(7), test.tensors[1])
        )
        if method is not Random:  # whose scores depend on all inputs
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"forward": 3}, "`forward` must be a function"),
            ({"label_key": True}, "`label_key` must be a key"),
            ({"label_key": 0.5}, "`label_key` must be a key"),
            ({"per_example": "x"}, "`per_example` must be a list of keys"),
            ({"per_example": 3}, "`per_example` must be a list of keys"),
        ],
    )
    def test_options_of_other_kinds_are_refused(self, options, message):
        with pytest.raises(TypeError, match=message):
            Batch(**options)

    def test_a_batch_in_place_of_its_description_is_refused(self, planted):
        with pytest.raises(TypeError, match=r"`batch` must be a stride_captum.Batch; got dict"):
            STRIDE(*planted[:2], batch={"label_key": "y"})
        with pytest.raises(ValueError, match=r"`label_key` must be a place in a tuple"):
            STRIDE(*planted[:2], batch=Batch(label_key="y")).fit()

    @pytest.mark.parametrize("labels", [["a", "b"], ("cat", "dog"), [None, None]])
    def test_labels_that_are_no_numbers_name_the_remedy(self, labels):
        with pytest.raises(ValueError, match=r"`inputs` must give labels that are numbers.*Map"):
            _ = examples((X[:2], labels)).labels


class TestCopies:
    def test_the_model_may_destroy_what_it_gets(self):
        class Greedy(nn.Module):
            def forward(self, x, named, texts, array):
                texts.append("more")
                array += 1
                named["a"].zero_()
                return x.mul_(2)

        x, a, texts, array = X.clone(), torch.ones(5), ["t"] * 5, np.zeros(5)
        batch = examples((x, {"a": a}, texts, array, Y))
        assert torch.equal(batch.outputs(Greedy()), 2 * X)
        assert torch.equal(batch.outputs(Greedy()), 2 * X)
        assert torch.equal(x, X)
        assert a.sum() == 5
        assert texts == ["t"] * 5
        assert array.sum() == 0

    def test_inputs_that_require_a_gradient_give_scores_without_one(self, planted):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        scores = STRIDE(model, train).influence((x.clone().requires_grad_(), y))
        assert not scores.requires_grad

    def test_columns_follow_slices(self):
        batch = ExampleBatch((X, Y), Reading(), columns=slice(10, 15))
        assert batch[1:3].columns == slice(11, 13)
        assert batch[3:].columns == slice(13, 15)
        assert batch[torch.tensor([0])].columns is None


def test_a_packed_sequence_is_moved_and_not_cut():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    batch = examples((packed, torch.tensor([0, 1])))
    assert len(batch.to(torch.device("cpu"))) == 2
    assert not batch.can_be_cut()
    assert batch.first(1) is batch
    with pytest.raises(ValueError, match="`inputs` must have 2 rows in each part"):
        batch[:1]


def test_texts_that_the_default_collate_makes_a_tuple_of_are_one_part():
    batch = examples((("a", "bb", "c"), torch.tensor([0, 1, 0])))
    assert len(batch) == 3
    assert batch[1:].content[0] == ("bb", "c")
    assert batch[torch.tensor([2, 0])].content[0] == ("c", "a")
    assert [path for path, _ in batch.example_parts()] == [(0,)]
