from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import METHODS, MLP, HuggingFaceLike, OneLogit, TwoInputs, built, examples, planted_classes
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Random
from stride_captum.data.inputs import count_batches, count_examples, raw_batches

SHUFFLES = "`train_dataset` must give its examples in the same order every time; .* shuffle=False: column i"


class Stream(IterableDataset):
    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[i] for i in range(len(self.dataset)))


class Scrambled(Sampler):
    """Shuffles with Python's global random state."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        return iter(random.sample(range(self.n), self.n))


class Backwards(Scrambled):
    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))


class PairBatches(Sampler):
    def __iter__(self):
        return iter([[5, 4], [3, 2], [1, 0]])


class TestOrder:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_shuffling_training_loader_is_refused_with_the_remedy(self, planted, method):
        with pytest.raises(ValueError, match=SHUFFLES):
            method(planted[0], DataLoader(planted[1], batch_size=8, shuffle=True))

    def test_a_shuffling_test_loader_is_refused(self, planted):
        with pytest.raises(ValueError, match="`inputs` must give its examples in the same order"):
            STRIDE(*planted[:2]).influence(DataLoader(planted[2], shuffle=True))

    @pytest.mark.parametrize("n", [2, 3, 48])
    def test_every_kind_of_random_sampler_is_seen_through(self, n):
        dataset = planted_classes(n)
        for sampler in (SubsetRandomSampler(range(n)), WeightedRandomSampler([1.0] * n, n), Scrambled(n)):
            for loader in (
                DataLoader(dataset, sampler=sampler),
                DataLoader(dataset, sampler=sampler, batch_size=2),
            ):
                with pytest.raises(ValueError, match=SHUFFLES):
                    STRIDE(MLP(), loader)

    def test_looking_through_a_sampler_leaves_the_random_states_alone(self, planted):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with pytest.raises(ValueError, match=SHUFFLES):
            STRIDE(planted[0], DataLoader(planted[1], sampler=Scrambled(48)))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]

    @pytest.mark.parametrize("method", METHODS)
    def test_columns_that_are_not_the_places_in_the_data_set_are_refused(self, planted, method):
        model, train, _ = planted
        loaders = [
            (DataLoader(train, sampler=Backwards(48), batch_size=5), "example 47 in place 0"),
            (DataLoader(Subset(train, range(6)), batch_sampler=PairBatches()), "example 5 in place 0"),
            (DataLoader(train, sampler=[i // 2 for i in range(96)], batch_size=7), "example 0 in place 1"),
            (
                DataLoader(train, sampler=DistributedSampler(train, 2, 0, shuffle=False)),
                "example 2 in place 1",
            ),
            (DataLoader(train, sampler=DistributedSampler(train, 1, 0)), "example .* in place"),
        ]
        for loader, what in loaders:
            with pytest.raises(
                ValueError, match=rf"`train_dataset` must give .* {what}.*Subset\(dataset, order"
            ):
                method(model, loader)

    def test_samplers_in_the_order_of_the_data_set_are_examples(self, planted):
        model, train, test = planted
        scores = STRIDE(model, train).influence(test.tensors)
        for loader in (
            DataLoader(train, sampler=range(48), batch_size=5),
            DataLoader(train, sampler=DistributedSampler(train, 1, 0, False), batch_size=5),
        ):
            torch.testing.assert_close(
                STRIDE(model, loader).influence(test.tensors), scores, rtol=1e-4, atol=1e-5
            )

    def test_dropping_the_last_batch_leaves_its_columns_out(self, planted):
        loader = DataLoader(planted[1], batch_size=10, drop_last=True)
        assert STRIDE(planted[0], loader).influence(planted[2].tensors).shape == (7, 40)


class TestNothing:
    @pytest.mark.parametrize("method", METHODS)
    def test_an_empty_training_set_is_refused(self, method):
        empty = TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
        for source in (empty, DataLoader(empty)):
            with pytest.raises(ValueError, match="`train_dataset` must hold at least one example"):
                method(MLP(), source)

    @pytest.mark.parametrize(
        "empty",
        [
            (),
            (torch.zeros(0, 6), torch.zeros(0)),
            {"labels": torch.zeros(0)},
            DataLoader(TensorDataset(torch.zeros(0, 1))),
        ],
    )
    def test_empty_test_inputs_are_refused(self, planted, empty):
        with pytest.raises(ValueError, match="`inputs` must hold at least one example"):
            STRIDE(*planted[:2]).influence(empty)

    def test_a_stream_that_ends_at_once_is_refused(self, planted):
        nothing = DataLoader(Stream(TensorDataset(torch.zeros(0, 6), torch.zeros(0))))
        with pytest.raises(ValueError, match="`inputs` must hold at least one example"):
            STRIDE(*planted[:2]).influence(nothing)
        with pytest.raises(ValueError, match="`inputs` must hold at least one example"):
            STRIDE(*planted[:2]).self_influence(nothing)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_training_stream_that_ends_at_once_is_refused(self, method):
        nothing = Stream(TensorDataset(torch.zeros(0, 6), torch.zeros(0)))
        with pytest.raises(ValueError, match="`train_dataset` must hold at least one example"):
            method(MLP(), nothing).fit()


@pytest.mark.parametrize("method", METHODS)
class TestTargets:
    def test_regression_targets_are_refused(self, planted, method):
        train = TensorDataset(planted[1].tensors[0], torch.full((48,), 0.5))
        with pytest.raises(
            ValueError,
            match=r"`train_dataset` must hold class indices; got the value 0[.]5[.] Targets",
        ):
            method(planted[0], train).fit()
        with pytest.raises(ValueError, match=r"`inputs` must hold class indices; got the value 0[.]5"):
            method(*planted[:2]).influence((train.tensors[0][:2], train.tensors[1][:2]))

    def test_multi_label_targets_are_refused(self, planted, method):
        train = TensorDataset(planted[1].tensors[0], torch.ones(48, 3))
        several = (
            r"one class index per example.*shape \(48, 3\).*Several|sum 1; got a row with the sum 3. Several"
        )
        with pytest.raises(ValueError, match=several):
            method(planted[0], train).fit()

    def test_labels_out_of_range_are_refused(self, planted, method):
        x = planted[2].tensors[0]
        for wrong in (3, -1):
            with pytest.raises(
                ValueError, match=rf"`inputs` must hold class indices in \[0, 3\); got {wrong}"
            ):
                method(*planted[:2]).influence((x, torch.full((7,), wrong)))
            with pytest.raises(
                ValueError, match=rf"`target` must hold class indices in \[0, 3\); got {wrong}"
            ):
                method(*planted[:2]).influence((x,), target=wrong)

    def test_training_labels_out_of_range_are_refused(self, planted, method):
        train = TensorDataset(planted[1].tensors[0], torch.full((48,), 3))
        if method in (Random, ClassRandom):  # which know nothing of the number of classes
            assert method(planted[0], train).influence(planted[2].tensors).shape == (7, 48)
            return
        with pytest.raises(ValueError, match=r"`train_dataset` must hold class indices in \[0, 3\)"):
            method(planted[0], train).fit()

    def test_a_training_set_without_labels_is_refused(self, planted, method):
        with pytest.raises(
            ValueError, match=r"`train_dataset` must give one label per example, last in .* got [Nn]one"
        ):
            method(planted[0], TensorDataset(planted[1].tensors[0])).fit()

    def test_whole_floats_and_columns_are_labels(self, planted, method):
        x, y = planted[2].tensors
        found = method(*planted[:2])
        wanted = found.influence((x, y))
        for labels in (y.double(), y[:, None], y.to(torch.uint8), y.tolist(), y.numpy()):
            assert torch.equal(found.influence((x, labels)), wanted)

    def test_one_label_for_a_sequence_of_outputs_is_refused(self, method):
        train = TensorDataset(torch.zeros(4, 5, 6), torch.zeros(4))
        refused = r"hold labels (of shape \(\d, 5\)|for 5 positions)|return one row of logits"
        with pytest.raises(ValueError, match=refused):
            method(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), train).influence(
                (torch.zeros(2, 5, 6), torch.zeros(2))
            )

    def test_every_way_to_name_a_class_gives_the_same(self, planted, method):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        found = method(model, train)
        wanted = found.influence((x, y))
        for target in (y, y.tolist(), y.numpy(), y.int()):
            assert torch.equal(found.influence((x,), target=target), wanted)
        assert torch.equal(
            found.influence((x,), target=1), found.influence((x, torch.ones(7)), target="label")
        )
        predicted = model(x).argmax(1)
        assert torch.equal(found.influence((x,), target="predicted"), found.influence((x, predicted)))
        in_batches = found.influence(DataLoader(TensorDataset(x, y), batch_size=3), target=predicted)
        torch.testing.assert_close(in_batches, found.influence((x, predicted)))


class TestRefusedArguments:
    def test_targets_of_another_kind(self, planted):
        method = STRIDE(*planted[:2])
        x = planted[2].tensors[0]
        with pytest.raises(
            ValueError, match="`target` must be 'label', 'predicted' or class indices; got 'lable'"
        ):
            method.influence((x,), target="lable")
        for wrong in (1.5, True):
            with pytest.raises(TypeError, match="`target` must be 'label', 'predicted' or class indices"):
                method.influence((x,), target=wrong)
        mask = [True, False] * 3 + [True]
        for wrong in (mask, torch.tensor(mask), np.array(mask)):
            with pytest.raises(ValueError, match=r"`target` must be .* class indices; got .*Write 0 and 1"):
                method.influence((x,), target=wrong)
        with pytest.raises(
            ValueError, match=r"`target` must be 'label', 'predicted' or class indices; got .'a'"
        ):
            method.influence((x,), target=["a"])
        with pytest.raises(
            ValueError, match="`target` must hold one class per test point; got 3 classes for more"
        ):
            method.influence((x,), target=[0, 1, 2])
        with pytest.raises(
            ValueError, match="`target` must hold one class for each of the 7 test points; got 8"
        ):
            method.influence((x,), target=[0] * 8)

    def test_missing_labels_name_the_remedy(self, planted):
        with pytest.raises(ValueError, match=r"`inputs` must carry labels, as in .*target='predicted'"):
            STRIDE(*planted[:2]).influence((planted[2].tensors[0],))

    def test_labels_of_another_length(self, planted):
        x, y = planted[2].tensors
        with pytest.raises(ValueError, match="`inputs` must carry one label for each of 7 examples; got 6"):
            STRIDE(*planted[:2]).influence((x, y[:6]))

    def test_a_bare_tensor_names_the_remedy(self, planted):
        for call in (STRIDE(*planted[:2]).influence, STRIDE(*planted[:2]).self_influence):
            with pytest.raises(TypeError, match=r"`inputs` must be a Dataset.*got Tensor. Write \(x, y\)"):
                call(planted[2].tensors[0])
        with pytest.raises(TypeError, match=r"`train_dataset` must be a Dataset.*got Tensor"):
            STRIDE(planted[0], planted[1].tensors[0])

    def test_examples_that_are_bare_tensors(self, planted):
        class Bare(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return torch.zeros(6)

        with pytest.raises(
            TypeError, match=r"`train_dataset` must give batches \(inputs..., labels\).*got Tensor"
        ):
            STRIDE(planted[0], Bare()).fit()

    @pytest.mark.parametrize(
        "batch", [(torch.zeros(2, 6), torch.zeros(2)), [(torch.zeros(6), 0)], {"labels": 1}]
    )
    def test_a_training_set_must_be_a_source(self, batch):
        with pytest.raises(
            TypeError, match=r"`train_dataset` must be a Dataset or a DataLoader; .*TensorDataset"
        ):
            STRIDE(MLP(), batch)

    @pytest.mark.parametrize("wrong", [3, None, object()])
    def test_things_that_hold_no_data(self, planted, wrong):
        with pytest.raises(TypeError, match="`train_dataset` must be a Dataset"):
            STRIDE(planted[0], wrong)
        with pytest.raises(TypeError, match="`inputs` must be a Dataset"):
            STRIDE(*planted[:2]).influence(wrong)

    def test_a_batch_without_tensors(self, planted):
        with pytest.raises(ValueError, match="`inputs` must hold a batch of examples; got one label"):
            STRIDE(*planted[:2]).influence([1, 2])
        with pytest.raises(TypeError, match="`inputs` must hold at least one tensor"):
            STRIDE(*planted[:2]).influence(["a"])

    def test_a_model_that_returns_no_tensor(self):
        class Odd(nn.Module):
            def forward(self, x):
                return [x]

        with pytest.raises(
            TypeError, match=r"`model` must return a tensor, an object with a tensor `.logits`, or a dict"
        ):
            examples((torch.zeros(1),)).outputs(Odd())


@pytest.mark.parametrize("method", METHODS)
class TestKindsOfData:
    def test_iterable_data_sets_are_read_like_others(self, planted, method):
        model, train, test = planted
        wanted = method(model, train).influence(test.tensors)
        for source in (Stream(train), DataLoader(Stream(train), batch_size=48)):
            found = method(model, source, batch_size=48)
            assert torch.equal(found.influence(test.tensors), wanted)
            assert torch.equal(found.influence(DataLoader(Stream(test), batch_size=7)), wanted)

    def test_a_single_test_point_is_a_batch(self, planted, method):
        x, y = planted[2].tensors
        found = method(*planted[:2])
        assert found.influence((x[:1], y[:1])).shape == (1, 48)
        assert found.influence((x[:1], y[:1]), 3).indices.shape == (1, 3)

    def test_a_single_training_example_is_a_training_set(self, planted, method):
        x, y = planted[1].tensors
        found = method(planted[0], TensorDataset(x[:1], y[:1]))
        assert found.influence(planted[2].tensors).shape == (7, 1)
        assert found.self_influence().shape == (1,)

    @pytest.mark.parametrize("squeeze", [False, True])
    def test_binary_models_with_one_logit(self, method, squeeze):
        train, test = (TensorDataset(x, y % 2) for x, y in (planted_classes(n).tensors for n in (20, 5)))
        model = built(lambda: OneLogit(squeeze))
        found = method(model, train)
        scores = found.influence(test.tensors)
        assert scores.shape == (5, 20)
        x, y = test.tensors
        torch.testing.assert_close(found.influence((x[:1], y[:1])), scores[:1])
        found = method(TwoLogits(model), train)
        torch.testing.assert_close(found.influence(test.tensors), scores)

    def test_two_inputs_by_position(self, method):
        x, y = planted_classes(20).tensors
        model = built(TwoInputs)
        found = method(model, TensorDataset(x, x.flip(1), y))
        scores = found.influence((x[:3], x[:3].flip(1), y[:3]))
        assert scores.shape == (3, 20)
        assert not torch.allclose(scores, found.influence((x[:3], x[:3], y[:3])))

    def test_dict_batches_and_outputs_with_logits(self, method):
        from planted import ListOfDicts

        train, test = ListOfDicts(20), ListOfDicts(5, seed=1)
        found = method(built(HuggingFaceLike), train, batch_size=6)
        scores = found.influence(test)
        assert scores.shape == (5, 20)
        torch.testing.assert_close(found.influence(test[:]), scores)
        assert found.influence({k: v for k, v in test[:].items() if k != "labels"}, target=1).shape == (5, 20)

    def test_subclasses_of_tensor_data_set_are_read_through_their_own_items(self, planted, method):
        class Shifted(TensorDataset):
            def __getitem__(self, i):
                x, y = super().__getitem__(i)
                return x + 1, y

        x, y = planted[1].tensors
        found = method(planted[0], Shifted(x, y), batch_size=48).influence(planted[2].tensors)
        wanted = method(planted[0], TensorDataset(x + 1, y)).influence(planted[2].tensors)
        assert torch.equal(found, wanted)


class TwoLogits(nn.Module):
    """The same binary model with the logits (-z/2, z/2) written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x).reshape(-1, 1)
        return torch.cat([-z / 2, z / 2], 1)


class TestExampleBatch:
    def test_pieces_of_a_batch_are_the_batch(self):
        batch = (torch.arange(7.0)[:, None], torch.tensor(3.0), "kept", list(range(7)), np.arange(7))
        pieces = list(examples(batch).split(3))
        assert [len(piece) for piece in pieces] == [3, 3, 1]
        pieces = [piece.content for piece in pieces]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), batch[0])
        assert [piece[1].item() for piece in pieces] == [3.0] * 3
        assert [piece[2] for piece in pieces] == ["kept"] * 3
        assert [i for piece in pieces for i in piece[3]] == list(range(7))
        assert np.concatenate([piece[4] for piece in pieces]).tolist() == list(range(7))
        whole = examples(batch)
        assert list(whole.split(7)) == [whole]

    def test_dicts_are_cut_by_key(self):
        batch = {"x": torch.arange(4), "scale": torch.tensor(2.0), "labels": torch.arange(4)}
        piece = examples(batch)[1:3].content
        assert piece["x"].tolist() == [1, 2]
        assert piece["scale"].item() == 2.0

    def test_labels_and_inputs_are_told_apart(self):
        x, y = torch.zeros(2, 3), torch.tensor([0, 1])
        assert torch.equal(examples((x, y)).labels, y)
        assert examples((x,)).labels is None
        assert examples({"x": x}).labels is None
        assert examples({"x": x, "labels": [0, 1]}).labels.tolist() == [0, 1]
        assert examples((x, y)).first_tensor is x
        assert examples((x,)).first_tensor is x
        assert examples({"labels": y, "x": x}).first_tensor is x
        assert examples((None, y)).first_tensor is None

    def test_outputs_are_unwrapped(self):
        class Wrapped(nn.Module):
            def forward(self, x):
                return SimpleNamespace(logits=2 * x)

        class Keyed(nn.Module):
            def forward(self, x):
                return {"loss": None, "logits": 2 * x}

        for model in (Wrapped(), Keyed()):
            assert examples((torch.ones(1), None)).outputs(model).item() == 2
        assert examples((torch.tensor(1.0),)).outputs(nn.Identity()).shape == (1,)

    def test_moving_keeps_the_callers_objects_and_other_values(self):
        x = torch.zeros(2)
        batch = {"x": x, "name": "a"}
        moved = examples(batch).to(torch.device("meta")).content
        assert moved["x"].device.type == "meta"
        assert moved["name"] == "a"
        assert batch["x"] is x

    def test_counts_are_what_is_examples(self):
        dataset = planted_classes(10)
        sources = [
            dataset,
            DataLoader(dataset, batch_size=4),
            DataLoader(dataset, batch_size=4, drop_last=True),
            DataLoader(dataset, sampler=SequentialSampler(range(6)), batch_size=4),
        ]
        for source in sources:
            found = list(raw_batches(source, 3, "inputs"))
            assert count_batches(source, 3) == len(found)
            assert count_examples(source) == sum(len(batch[-1]) for batch in found)
        by_pairs = DataLoader(dataset, batch_sampler=PairBatches())
        for unknown in (Stream(dataset), DataLoader(Stream(dataset)), by_pairs):
            assert count_batches(unknown, 3) is None
            assert count_examples(unknown) is None
