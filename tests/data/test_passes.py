"""Passes over the training set: column i is the i-th example of each pass, or an error says what differs."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import METHODS, planted_classes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn
from stride_captum.data.digests import Digests
from stride_captum.data.passes import Passes
from stride_captum.data.reading import Reading

SEVERAL = [TRAK, DiagonalEKFAC, EKFAC, TracIn]


class OneShot(IterableDataset):
    """A file that was opened once: its iterator is always the same."""

    def __init__(self, data: TensorDataset) -> None:
        self.rows = iter(list(zip(*data.tensors, strict=True)))

    def __iter__(self) -> Iterator[Any]:
        return self.rows


class Hidden(OneShot):
    """The same behind an iterator that looks new each time."""

    def __iter__(self) -> Iterator[Any]:
        return (row for row in self.rows)


class ShuffledStream(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        order = list(range(len(self.data)))
        random.shuffle(order)
        return (self.data[i] for i in order)


class ShuffledItems(Dataset):
    """A data set that shuffles itself whenever its first example is read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.order = data, list(range(len(data)))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        if i == 0:
            random.shuffle(self.order)
        return self.data[self.order[i]]


class SameLabels(ShuffledItems):
    """The same among examples of one class: labels do not tell."""

    def __getitem__(self, i: int) -> Any:
        return super().__getitem__(i)[0], self.data.tensors[1][i]


class Augmented(ShuffledItems):
    def __getitem__(self, i: int) -> Any:
        x, y = self.data[i]
        return x + 0.1 * torch.randn(x.shape), y


class Grows(ShuffledItems):
    """A data set that has one example more, or fewer, after it was walked once."""

    def __init__(self, data: TensorDataset, change: int) -> None:
        super().__init__(data)
        self.n, self.change = 40, change

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if i == 39 and self.n == 40:
            self.n += self.change
        return self.data[i]


class TestOnePass:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("batch_size", [5, 48, 1000])
    def test_a_stream_that_can_be_walked_once_gives_all_its_columns(self, planted, method, batch_size):
        model, train, test = planted
        wanted = method(model, train).influence(test.tensors)
        for source in (OneShot(train), Hidden(train), DataLoader(OneShot(train), batch_size=batch_size)):
            found = method(model, source, batch_size=batch_size).influence(test.tensors)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", SEVERAL)
    def test_methods_with_several_passes_say_so_before_they_start(self, planted, method):
        model, train, _ = planted
        source = OneShot(train)
        with pytest.raises(ValueError, match=r"`train_dataset` must be a source that can be walked several"):
            method(model, source).fit()
        assert len(list(source)) == 48  # nothing was read

    def test_several_checkpoints_are_several_passes(self, planted):
        model, train, _ = planted
        states = [model.state_dict()] * 2
        with pytest.raises(ValueError, match=r"walked several times, which this method needs"):
            STRIDE(model, OneShot(train), checkpoints=states).fit()

    @pytest.mark.parametrize("method", SEVERAL)
    def test_a_later_pass_that_has_nothing_left_is_refused(self, planted, method):
        with pytest.raises(ValueError, match=r"`train_dataset` must .*(same examples|at least one example)"):
            method(planted[0], Hidden(planted[1]), batch_size=7).fit().influence(planted[2].tensors)

    def test_a_second_fit_of_a_stream_that_is_used_up_says_what_to_do(self, planted):
        method = STRIDE(planted[0], OneShot(planted[1])).fit()
        with pytest.raises(ValueError, match=r"`train_dataset` must hold at least one example.*walked once"):
            method.fit()


class TestOrder:
    @pytest.mark.parametrize("method", [*METHODS, *SEVERAL])
    @pytest.mark.parametrize("kind", [ShuffledStream, ShuffledItems])
    def test_data_that_shuffle_themselves_are_refused(self, planted, method, kind):
        model, train, test = planted
        random.seed(0)
        with pytest.raises(ValueError, match=r"`train_dataset` must give the same examples in the same"):
            method(model, kind(train), batch_size=16).influence(test.tensors)

    @pytest.mark.parametrize("method", [STRIDE, TRAK])
    def test_an_order_that_labels_do_not_show_is_seen_in_the_inputs(self, planted, method):
        model, train, test = planted
        data = TensorDataset(train.tensors[0], torch.zeros(48, dtype=torch.long))
        with pytest.raises(ValueError, match=r"another example at place \d+ when it was read again"):
            method(model, SameLabels(data), batch_size=16).influence(test.tensors)

    @pytest.mark.parametrize(("change", "what"), [(1, "more than 40"), (-1, "39 examples in a later pass")])
    def test_another_number_of_examples_in_a_later_pass(self, planted, change, what):
        with pytest.raises(ValueError, match=what):
            TRAK(planted[0], Grows(planted[1], change), batch_size=7).fit()

    def test_labels_that_change_between_passes_name_the_example(self, planted):
        model, train, test = planted
        labels = train.tensors[1].clone()
        method = TRAK(model, TensorDataset(train.tensors[0], labels)).fit()
        TracIn(model, method.train_dataset).fit()
        labels[30] = (labels[30] + 1) % 3
        other = DiagonalEKFAC(model, TensorDataset(train.tensors[0], labels))
        other.fit()
        labels[31] = (labels[31] + 1) % 3
        with pytest.raises(ValueError, match=r"another label for example 31 when it was read again"):
            other.influence(test.tensors)


class TestAugmentation:
    @pytest.mark.parametrize("method", [STRIDE, TRAK, TracIn, METHODS[-1]])
    def test_other_inputs_of_the_same_examples_are_said_once(self, planted, method):
        model, train, test = planted
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="`train_dataset` gives other inputs.*transform") as seen:
            method(model, Augmented(train), batch_size=16).influence(test.tensors)
        assert len(seen) == 1

    def test_a_random_state_that_the_data_draw_from_moves_on_within_a_pass_and_is_put_back(self, planted):
        model, train, _ = planted
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = STRIDE(model, Augmented(train), batch_size=16).fit()
        assert torch.equal(torch.get_rng_state(), before)
        assert method.digests_.inputs.unique().numel() == 48
        noise = [torch.randn(6) for _ in range(2)]
        assert not torch.equal(*noise)


class TestDigests:
    @pytest.mark.parametrize("method", [*METHODS, TRAK])
    def test_a_fit_leaves_a_digest_of_each_example(self, planted, method):
        model, train, _ = planted
        x, y = train.tensors
        found = method(model, train, batch_size=7).fit().digests_
        wanted = Digests.of(48, y, [x])
        assert torch.equal(found.labels, wanted.labels)
        assert torch.equal(found.inputs, wanted.inputs)

    def test_padding_to_the_longest_of_a_batch_is_no_augmentation(self):
        rows = [(torch.ones(3 + i % 4), i % 2) for i in range(12)]

        def pad(items: list[Any]) -> tuple[Tensor, Tensor]:
            width = max(len(x) for x, _ in items)
            x = torch.stack([torch.cat([x, x.new_zeros(width - len(x))]) for x, _ in items])
            return x, torch.tensor([y for _, y in items])

        passes = Passes(DataLoader(rows, 5, collate_fn=pad), 5, Reading())
        for _ in range(2):
            assert sum(len(batch) for batch in passes.walk()) == 12
        assert passes.repeatable

    def test_what_was_read_to_look_comes_first_in_the_next_pass(self):
        data = planted_classes(10)
        passes = Passes(OneShot(data), 4, Reading())
        assert torch.equal(passes.first().first_tensor, data.tensors[0][:4])
        assert passes.first().columns == slice(0, 4)
        batches = list(passes.walk())
        assert torch.equal(torch.cat([batch.first_tensor for batch in batches]), data.tensors[0])
        assert [batch.columns for batch in batches] == [slice(0, 4), slice(4, 8), slice(8, 10)]
