"""quanda's contract for explainers, and our own promises within it."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import datasets
import pytest
import torch
from flat_options import arguments
from planted import (
    MLP,
    N_TEST,
    N_TRAIN,
    BatchNormCNN,
    HuggingFaceLike,
    ListOfDicts,
    built,
    expect_untouched,
    trained,
)
from quanda.explainers import Explainer
from quanda.explainers.utils import explain_fn_from_explainer, self_influence_fn_from_explainer
from torch import nn

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Random, Similarity
from stride_captum.adapters.quanda_plugin import InfluenceExplainer, STRIDEExplainer, explainer_for

METHODS = [STRIDE, Similarity, ClassRandom]


@pytest.fixture
def checkpoint(planted, tmp_path) -> str:
    torch.save(planted[0].state_dict(), tmp_path / "last.pth")
    return str(tmp_path / "last.pth")


@pytest.mark.parametrize("method", METHODS)
class TestContract:
    def test_it_is_an_explainer_named_after_its_method(self, method):
        explainer = explainer_for(method)
        assert issubclass(explainer, Explainer)
        assert explainer.__name__ == f"{method.__name__}Explainer"
        assert explainer.method is method
        assert "image_classification" in explainer.accepted_tasks
        assert "model_id" in inspect.signature(explainer.__init__).parameters

    def test_scores_are_those_of_the_method(self, planted, checkpoint, method):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        explainer = explainer_for(method)(
            model=built(MLP, 5),
            train_dataset=train,
            checkpoints=[checkpoint],
            checkpoints_load_func=None,
            layers=["fc1"],
            batch_size=10,
        )
        wanted = method(model, train, layers=["fc1"])
        found = explainer.explain(test_data=x, targets=y)
        assert found.shape == (N_TEST, N_TRAIN)
        torch.testing.assert_close(found, wanted.influence((x, y)))
        assert torch.equal(explainer.explain(x, y.tolist()), found)
        others = (y + 1) % 3
        torch.testing.assert_close(explainer.explain(x, others), wanted.influence((x, others)))
        predicted = wanted.influence((x,), target="predicted")
        torch.testing.assert_close(explainer.explain(x), predicted)
        with torch.inference_mode():
            torch.testing.assert_close(explainer.explain(x, y), found)

    def test_the_functions_around_explainers_work_with_it(self, planted, checkpoint, method):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        explainer = explainer_for(method)
        options: dict[str, Any] = {"model": model, "train_dataset": train, "checkpoints": checkpoint}
        found = explain_fn_from_explainer(explainer, test_data=x, targets=y, **options)
        assert torch.equal(found, method(model, train).influence((x, y)))
        ranks = self_influence_fn_from_explainer(explainer, batch_size=4, **options)
        own = method(model, train).mislabel_scores()
        assert ranks.shape == (N_TRAIN,)
        assert torch.equal(ranks[:, None] > ranks, own[:, None] > own)


class TestModels:
    def test_a_model_in_train_mode_is_explained_in_eval_mode_and_left_as_it_was(self, tmp_path):
        model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
        wanted = STRIDE(model, train).influence(test.tensors)
        torch.save(model.state_dict(), tmp_path / "last.pth")
        other = built(BatchNormCNN, 7).train()
        with expect_untouched(other):
            explainer = STRIDEExplainer(model=other, train_dataset=train, checkpoints=[tmp_path / "last.pth"])
            found = explainer.explain(*test.tensors)
            explainer.self_influence()
        torch.testing.assert_close(found, wanted)

    def test_what_happens_to_the_model_and_its_file_later_changes_nothing(self, planted, checkpoint):
        model, train, test = copy.deepcopy(planted[0]), planted[1], planted[2]
        explainer = STRIDEExplainer(model=model, train_dataset=train, checkpoints=[checkpoint])
        torch.save(built(MLP, 9).state_dict(), checkpoint)
        model.load_state_dict(built(MLP, 8).state_dict())
        wanted = STRIDE(planted[0], train).influence(test.tensors)
        assert torch.equal(explainer.explain(*test.tensors), wanted)

    def test_the_last_checkpoint_counts_or_all_of_them(self, planted, checkpoint, tmp_path):
        model, train, test = planted
        torch.save(built(MLP, 3).state_dict(), tmp_path / "first.pth")
        paths = [str(tmp_path / "first.pth"), checkpoint]
        common: dict[str, Any] = {"model": built(MLP, 4), "train_dataset": train, "checkpoints": paths}
        last = STRIDEExplainer(**common).explain(*test.tensors)
        torch.testing.assert_close(last, STRIDE(model, train).influence(test.tensors))
        every = STRIDEExplainer(**common, every_checkpoint=True).explain(*test.tensors)
        torch.testing.assert_close(every, STRIDE(model, train, checkpoints=paths).influence(test.tensors))
        assert not torch.allclose(last, every)

    def test_without_checkpoints_the_model_is_explained_as_it_is(self, planted):
        model, train, test = planted
        found = STRIDEExplainer(model, train).explain(*test.tensors)
        assert torch.equal(found, STRIDE(model, train).influence(test.tensors))

    def test_a_load_function_of_the_caller(self, planted):
        model, train, test = planted
        states = {"only": model.state_dict()}

        def load(network: nn.Module, name: str) -> float:
            network.load_state_dict(states[name])
            return 0.1

        explainer = STRIDEExplainer(built(MLP, 2), train, checkpoints=["only"], checkpoints_load_func=load)
        wanted = STRIDE(model, train).influence(test.tensors)
        assert torch.equal(explainer.explain(*test.tensors), wanted)


class TestData:
    def test_dicts_and_hugging_face_data_sets(self):
        model, train, test = built(HuggingFaceLike), ListOfDicts(20), ListOfDicts(4, seed=1)
        wanted = STRIDE(model, train).influence(test)
        columns = ("input_ids", "attention_mask", "labels")
        table = datasets.Dataset.from_dict({name: getattr(train, name).tolist() for name in columns})
        inputs = {name: getattr(test, name) for name in columns[:2]}
        for source in (train, table):
            explainer = STRIDEExplainer(model, source, task="text_classification", batch_size=8)
            torch.testing.assert_close(explainer.explain(inputs, test.labels), wanted)
            predicted = STRIDE(model, train).influence(test, target="predicted")
            torch.testing.assert_close(explainer.explain(inputs), predicted)

    def test_options_of_the_method_go_through(self, planted):
        model, train, test = planted
        config = arguments(response="logit", damping=1.0)
        found = STRIDEExplainer(model, train, **config).explain(*test.tensors)
        assert torch.equal(found, STRIDE(model, train, **config).influence(test.tensors))


class Undecided(Random):
    def mislabel_scores(self):
        return torch.tensor([2.0, 1.0, 1.0, 3.0])


class Broken(Random):
    def mislabel_scores(self):
        return torch.tensor([2.0, float("nan"), 1.0])


class TestRanks:
    def test_equal_scores_share_a_rank(self, planted):
        ranks = explainer_for(Undecided)(*planted[:2]).self_influence()
        assert ranks.tolist() == [1e3, 0.0, 0.0, 2e3]

    def test_scores_that_are_not_finite_have_none(self, planted):
        with pytest.raises(ValueError, match="`mislabel_scores` must be finite; got 1 values that are not"):
            explainer_for(Broken)(*planted[:2]).self_influence()


class TestClasses:
    def test_one_class_for_each_method(self):
        assert explainer_for(STRIDE) is STRIDEExplainer
        assert explainer_for(Similarity) is explainer_for(Similarity)
        assert pickle.loads(pickle.dumps(STRIDEExplainer)) is STRIDEExplainer

    def test_a_subclass_names_its_method(self, planted):
        class Mine(InfluenceExplainer):
            method = Similarity

        model, train, test = planted
        wanted = Similarity(model, train).influence(test.tensors)
        assert torch.equal(Mine(model, train).explain(*test.tensors), wanted)
        with pytest.raises(TypeError, match="abstract"):
            InfluenceExplainer(model, train)

    @pytest.mark.parametrize("wrong", [MLP, "STRIDE"])
    def test_other_things_than_methods_are_refused(self, wrong):
        with pytest.raises(TypeError, match="`method` must be a subclass of InfluenceMethod; got"):
            explainer_for(wrong)

    def test_other_tasks_are_refused_by_quanda(self, planted):
        with pytest.raises(ValueError, match="Task causal_lm not supported"):
            STRIDEExplainer(*planted[:2], task="causal_lm")
