"""Explanations of a task: what is said of a model that cannot be explained, and what is left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum.evaluation import Task, explain, load_task
from stride_captum.evaluation.tasks.networks import TrainingSettings

SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=15, batch_size=16)
TRAINED = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=4)


@pytest.fixture(scope="module")
def task():
    return load_task("synthetic", preset="smoke", training=TRAINED)


def binary(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return TensorDataset(torch.randn(n, 5, generator=generator) + 3 * torch.eye(5)[y], y)


def one_logit():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))


class TwoLogits(nn.Module):
    """The same network with the logits (-z/2, z/2)."""

    def __init__(self):
        super().__init__()
        self.inner = one_logit()

    def forward(self, x):
        z = self.inner(x)
        return torch.cat([-z / 2, z / 2], 1)


def test_one_logit_is_explained_as_its_two_classes():
    """Trained apart, with binary cross-entropy and with cross-entropy, the two are one model."""
    train, test = binary(40, 0), binary(10, 1)
    found = {}
    for build in (one_logit, TwoLogits):
        explanation, _ = explain(Task("b", train, test, build, SETTINGS), indices=[0, 3], k=40)
        found[build] = explanation.points
        assert explanation.accuracy["train"] == 1
    for one, two in zip(*found.values(), strict=True):
        assert one.predicted == two.predicted == one.label
        assert one.probability == pytest.approx(two.probability, rel=1e-3)
        assert one.response == pytest.approx(two.response, rel=1e-3)
        assert [n.index for n in one.proponents[:5]] == [n.index for n in two.proponents[:5]]


class TestChance:
    def test_a_model_that_has_learned_nothing_is_named(self, task):
        explanation, _ = explain(
            replace(task, training=replace(TRAINED, learning_rate=0.0)), indices=[0], k=2
        )
        assert "The model has learned nothing: it is right for" in explanation.note
        assert "Its scores mean nothing" in explanation.note

    def test_one_that_has_is_not(self, task):
        explanation, _ = explain(replace(task, note="As it is."), indices=[0], k=2)
        assert explanation.note == "As it is."


class TestModels:
    def test_the_callers_model_stays_as_it_is(self, task):
        model = task.build_model().train()
        explain(task, indices=[0], k=2, model=model)
        assert model.training

    def test_one_that_gives_no_finite_logits(self, task):
        model = task.build_model()
        model[-1].bias.data[0] = float("nan")
        with pytest.raises(
            ValueError, match="`model` must give finite logits; got NaN or infinity for `test`"
        ):
            explain(task, model=model)

    def test_one_that_gives_probabilities(self, task):
        model = nn.Sequential(task.build_model(), nn.Softmax(1))
        with pytest.raises(ValueError, match="`model` must return logits; got probabilities"):
            explain(task, model=model)

    def test_one_with_too_few_classes(self, task):
        with pytest.raises(ValueError, match=r"`test` must hold class indices in \[0, 3\)"):
            explain(task, model=nn.Sequential(nn.Linear(20, 3)))

    def test_missing_values(self, task):
        x, y = (t.clone() for t in task.test.tensors)
        x[7, 0] = float("nan")
        with pytest.raises(
            ValueError, match="`test` must hold finite inputs; got NaN or infinity in example 7"
        ):
            explain(replace(task, test=TensorDataset(x, y)), model=task.build_model())


class TestDevice:
    def test_it_reaches_the_training_and_the_method(self, task, tmp_path):
        explanation, method = explain(task, indices=[0], k=2, device="cpu", store=tmp_path)
        assert method.device == torch.device("cpu")
        assert explanation.environment["device"] == "cpu"

    def test_one_that_is_not_there_is_refused_before_the_training(self, task, tmp_path):
        with pytest.raises(
            ValueError, match="`device` must be a device that torch can use here; got 'cuda:99'"
        ):
            explain(task, device="cuda:99", store=tmp_path)
        assert list(tmp_path.iterdir()) == []
