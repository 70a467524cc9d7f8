"""dattri's contract for attributors, and our own promises within it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dattri.algorithm.base import BaseAttributor
from dattri.benchmark.utils import SubsetSampler
from dattri.task import AttributionTask
from planted import MLP, N_TEST, N_TRAIN, BatchNormCNN, built, expect_untouched, loader, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Similarity
from stride_captum.adapters.dattri_plugin import InfluenceAttributor, STRIDEAttributor, attributor_for

METHODS = [STRIDE, Similarity, ClassRandom]


def some_loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
    raise AssertionError("our methods do not ask for the loss of the task")


def task_of(model: nn.Module, checkpoints: Any = None, **options: Any) -> AttributionTask:
    return AttributionTask(some_loss, model, checkpoints or model.state_dict(), **options)


@pytest.fixture
def attributor(planted) -> InfluenceAttributor:
    """STRIDE on the planted network, with the training set cached."""
    found = STRIDEAttributor(task_of(planted[0]))
    found.cache(loader(planted[1]))
    return found


@pytest.mark.parametrize("method", METHODS)
class TestContract:
    def test_it_is_an_attributor_named_after_its_method(self, method):
        assert issubclass(attributor_for(method), BaseAttributor)
        assert attributor_for(method).__name__ == f"{method.__name__}Attributor"
        assert attributor_for(method).method is method

    def test_scores_are_the_transpose_of_ours(self, planted, method):
        model, train, test = planted
        attributor = attributor_for(method)(task_of(model), layers=["fc1"])
        attributor.cache(loader(train, 10))
        wanted = method(model, train, layers=["fc1"]).influence(test.tensors)
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                found = attributor.attribute(loader(train, 7), loader(test, 3))
            assert found.shape == (N_TRAIN, N_TEST)
            assert not found.requires_grad
            torch.testing.assert_close(found, wanted.T)

    def test_the_callers_model_is_left_as_it_was(self, planted, method):
        model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
        wanted = method(model, train).influence(test.tensors)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        other = built(BatchNormCNN, 7).train()
        task = task_of(other, state)
        with expect_untouched(other):
            attributor = attributor_for(method)(task)
            attributor.cache(loader(train))
            found = attributor.attribute(loader(train), loader(test))
            attributor.self_attribute(loader(train))
        torch.testing.assert_close(found, wanted.T)


class TestRows:
    ROWS = (5, 0, 47, 12)

    def loaders(self, train: TensorDataset) -> Iterator[DataLoader]:
        yield DataLoader(train, batch_size=3, sampler=SubsetSampler(list(self.ROWS)))
        yield DataLoader(Subset(train, self.ROWS), batch_size=2)
        yield DataLoader(Subset(Subset(train, (12, 47, 0, 5)), (3, 2, 1, 0)), batch_size=2)
        yield DataLoader(train, batch_sampler=[[5, 0], [47, 12]])

    def test_they_follow_the_samplers_and_subsets_of_the_loader(self, planted, attributor):
        _, train, test = planted
        every = attributor.attribute(loader(train), loader(test))
        own = attributor.self_attribute(loader(train))
        suspicion = attributor.mislabel_scores(loader(train))
        rows = list(self.ROWS)
        for source in self.loaders(train):
            assert torch.equal(attributor.attribute(source, loader(test)), every[rows])
            assert torch.equal(attributor.self_attribute(source), own[rows])
            assert torch.equal(attributor.mislabel_scores(source), suspicion[rows])

    def test_a_loader_that_drops_the_last_batch_gives_fewer(self, planted, attributor):
        _, train, test = planted
        every = attributor.attribute(loader(train), loader(test))
        source = DataLoader(train, batch_size=10, drop_last=True)
        assert torch.equal(attributor.attribute(source, loader(test)), every[:40])

    def test_columns_follow_the_test_loader(self, planted, attributor):
        _, train, test = planted
        every = attributor.attribute(loader(train), loader(test))
        source = DataLoader(test, batch_size=2, sampler=SubsetSampler([6, 1]))
        torch.testing.assert_close(attributor.attribute(loader(train), source), every[:, [6, 1]])

    def test_the_training_set_may_be_part_of_a_data_set(self, planted):
        model, train, test = planted
        full = DataLoader(train, batch_size=4, sampler=SubsetSampler(list(range(30, 40))))
        attributor = STRIDEAttributor(task_of(model))
        attributor.cache(full)
        wanted = STRIDE(model, Subset(train, range(30, 40))).influence(test.tensors)
        torch.testing.assert_close(attributor.attribute(full, loader(test)), wanted.T)
        part = DataLoader(Subset(train, [33, 31]))
        torch.testing.assert_close(attributor.attribute(part, loader(test)), wanted.T[[3, 1]])
        with pytest.raises(ValueError, match="`train_dataloader` must give examples that cache"):
            attributor.attribute(DataLoader(Subset(train, [33, 29])), loader(test))

    def test_without_cache_the_first_loader_is_the_training_set(self, planted):
        model, train, test = planted
        attributor = STRIDEAttributor(task_of(model))
        with pytest.warns(UserWarning, match=r"cache\(\) was not called: train_dataloader is the training"):
            found = attributor.attribute(loader(train), loader(test))
        torch.testing.assert_close(found, STRIDE(model, train).influence(test.tensors).T)
        assert attributor.self_attribute(loader(train)).shape == (N_TRAIN,)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


class TestRefusals:
    def test_other_data(self, planted, attributor):
        _, train, test = planted
        with pytest.raises(ValueError, match=r"got others. Build both loaders on the same data set object"):
            attributor.attribute(loader(TensorDataset(*train.tensors)), loader(test))

    def test_loaders_that_shuffle(self, planted, attributor):
        _, train, test = planted
        mixed = DataLoader(train, shuffle=True)
        with pytest.raises(ValueError, match="`full_train_dataloader` must give its examples in the same"):
            attributor.cache(mixed)
        with pytest.raises(ValueError, match="`train_dataloader` must give its examples in the same order"):
            attributor.attribute(mixed, loader(test))
        with pytest.raises(ValueError, match="`inputs` must give its examples in the same order"):
            attributor.attribute(loader(train), DataLoader(test, shuffle=True))

    def test_loaders_without_indices(self, planted, attributor):
        _, train, test = planted
        for source in (train, DataLoader(train, batch_size=None)):
            with pytest.raises(TypeError, match="`train_dataloader` must be a DataLoader that makes the bat"):
                attributor.attribute(source, loader(test))
        with pytest.raises(TypeError, match="must be a DataLoader of a data set with indices; got Stream"):
            attributor.cache(DataLoader(Stream()))

    @pytest.mark.parametrize("wrong", [MLP, "STRIDE"])
    def test_other_things_than_methods(self, wrong):
        with pytest.raises(TypeError, match="`method` must be a subclass of InfluenceMethod; got"):
            attributor_for(wrong)


class TestTasks:
    @pytest.fixture
    def states(self, planted) -> list[dict[str, Tensor]]:
        return [planted[0].state_dict(), built(MLP, 1).state_dict()]

    def scores(self, planted, task: AttributionTask, **options: Any) -> Tensor:
        attributor = STRIDEAttributor(task, **options)
        attributor.cache(loader(planted[1]))
        return attributor.attribute(loader(planted[1]), loader(planted[2]))

    def test_scores_are_averaged_over_checkpoints(self, planted, states, tmp_path):
        model, train, test = planted
        wanted = STRIDE(model, train, checkpoints=states).influence(test.tensors).T
        torch.testing.assert_close(self.scores(planted, task_of(built(MLP, 2), states)), wanted)
        paths = [str(tmp_path / f"{i}.pt") for i in range(2)]
        for path, state in zip(paths, states, strict=True):
            torch.save(state, path)
        torch.testing.assert_close(self.scores(planted, task_of(built(MLP, 2), paths)), wanted)

    def test_a_load_function_may_return_another_model(self, planted, states):
        def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
            other = built(MLP, 3)
            other.load_state_dict(state)
            return other

        wanted = STRIDE(planted[0], planted[1], checkpoints=states).influence(planted[2].tensors).T
        task = task_of(built(MLP, 2), states, checkpoints_load_func=load)
        torch.testing.assert_close(self.scores(planted, task), wanted)

    def test_the_response_is_the_margin_or_what_is_asked_for(self, planted):
        model, train, test = planted
        method = STRIDE(model, train)
        for response in (None, "margin", "loss"):
            wanted = method.influence(test.tensors, response=response or "margin").T
            torch.testing.assert_close(self.scores(planted, task_of(model), response=response), wanted)


class TestClasses:
    def test_one_class_for_each_method(self):
        assert attributor_for(STRIDE) is STRIDEAttributor
        assert attributor_for(Similarity) is attributor_for(Similarity)

    def test_a_subclass_names_its_method(self, planted, attributor):
        class Mine(InfluenceAttributor):
            method = STRIDE

        mine = Mine(task_of(planted[0]))
        mine.cache(loader(planted[1]))
        loaders = loader(planted[1]), loader(planted[2])
        assert torch.equal(mine.attribute(*loaders), attributor.attribute(*loaders))
        with pytest.raises(TypeError, match="abstract"):
            InfluenceAttributor(task_of(planted[0]))
