"""Explanations of a task: what is said of a model that cannot be explained, and what is left as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Trained, reliability
from stride_captum.evaluation import Task, explain, load_task, train_attributed
from stride_captum.evaluation.comparison.explained_models import ExplainedModels, planned_models
from stride_captum.evaluation.comparison.runs.leakage import plant
from stride_captum.evaluation.comparison.shared.gallery import Gallery
from stride_captum.evaluation.report.html import write_explanation
from stride_captum.evaluation.report.terminal import show_explanation
from stride_captum.evaluation.retraining.task_parts import cross_fit
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


class TestCrossFitted:
    def test_scores_and_predictions_are_those_of_the_models_of_parts(self, task, tmp_path):
        found, method = explain(task, indices=[3], k=task.n_train, retrainings=2, store=tmp_path, seed=1)
        models = cross_fit(task, 1, 2, tmp_path)
        assert len(list((tmp_path / "cross-fitted").iterdir())) == 4
        assert not list(tmp_path.glob("attributed-*"))  # nobody asked for that training
        x, y = (t[3:4] for t in task.test.tensors)
        network = task.build_model()
        scores = STRIDE(network, task.train, checkpoints=models.checkpoints).influence((x, y))[0]
        for n in found.points[0].proponents:
            assert n.score == pytest.approx(float(scores[n.index]), rel=1e-4, abs=1e-6)
        mean = 0
        for place in models.last:
            network.load_state_dict(models.checkpoints[place].weights)
            mean = mean + network(x).softmax(1)[0, y[0]].detach() / 4
        assert found.points[0].probability == pytest.approx(float(mean), rel=1e-4)
        wanted = reliability(method, (x, y))
        assert found.points[0].reliability == pytest.approx(float(wanted[0]))
        answered = {"answered": "cross-fitted models", "n_models": 4, "parts": 2, "trainings": 2.0}
        assert found.models == answered
        assert "explain the training procedure, not one file of weights" in found.note
        assert "Predictions are those of the mean of these models" in found.note

    def test_models_that_are_certain_have_finite_logits(self):
        class Certain(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(5, 3)

            def forward(self, x):
                return 300 * self.linear(x)

        x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, torch.arange(40) % 3)
        task = Task("certain", data, data, Certain, replace(SETTINGS, epochs=1))
        models = cross_fit(task, 0, 1, None)
        logits = ExplainedModels(Certain(), models, False, 2, task.loss).outputs(x)
        p = 0.0
        for checkpoint in models.checkpoints:
            network = Certain()
            network.load_state_dict(checkpoint.weights)
            p = p + network(x).double().softmax(1) / 2
        assert (p.float() == 0).any()  # whose log is not finite
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits.double(), p.log(), rtol=1e-3, atol=1e-3)
        assert explain(task, indices=[0], k=1, retrainings=1)[0].points

    def test_predictions_are_those_of_a_model_that_is_given(self, task, tmp_path):
        model = train_attributed(task, 0)
        plain, _ = explain(task, indices=[3], model=model)
        found, _ = explain(task, indices=[3], model=model, retrainings=1, store=tmp_path)
        assert found.points[0].probability == pytest.approx(plain.points[0].probability)
        assert found.points[0].proponents != plain.points[0].proponents
        assert "Predictions are those of the model that was given" in found.note
        assert plain.models == {"answered": "one model", "n_models": 1, "parts": None, "trainings": 0.0}
        assert plain.note == task.note

    def test_models_may_be_trained_by_a_function(self, task):
        calls = []

        def train(indices, seed):
            calls.append((len(indices), seed))
            torch.manual_seed(seed)
            return task.build_model()

        found, _ = explain(task, indices=[0], retrainings=1, parts=3, train_function=train, seed=4)
        assert calls == [(100, 4), (100, 5), (100, 6)]
        assert found.models["n_models"] == 3

    @pytest.mark.slow
    def test_what_would_be_trained_is_said_before(self, task, tmp_path):
        def train(indices, seed):
            return task.build_model()

        how = {
            "given": False, "seed": 1, "store": tmp_path, "parts": 2, "train_function": None, "device": "cpu",
            "n_jobs": 1,
        }  # fmt: skip
        halves, cost = planned_models(task, retrainings=2, **how)
        assert "4 trainings of synthetic-300: 0 are in the store, 4 are to do" in halves
        assert cost == "This costs 2 trainings on the whole training set."
        assert not list(tmp_path.iterdir())
        explain(task, indices=[0], retrainings=2, store=tmp_path, seed=1)
        assert "all are in the store" in planned_models(task, retrainings=2, **how)[0]
        (one,) = planned_models(task, retrainings=0, **how)
        assert "1 training of synthetic-300: 0 are in the store" in one
        assert planned_models(task, retrainings=0, **how | {"given": True}) == [
            "The model is given: nothing is trained."
        ]
        own = how | {"train_function": train, "parts": 3}
        said = "3 trainings by your function on 100 of 300 examples each: {} are in the store, {} are to do."
        assert planned_models(task, retrainings=1, **own)[0] == said.format(0, 3)
        explain(task, indices=[0], retrainings=1, parts=3, train_function=train, store=tmp_path, seed=1)
        assert planned_models(task, retrainings=1, **own)[0] == said.format(3, 0)

    def test_what_cannot_be_is_refused(self, task):
        with pytest.raises(ValueError, match="`retrainings` must be an integer of at least 0; got -1"):
            explain(task, indices=[0], retrainings=-1)
        with pytest.raises(ValueError, match="`train_function` must be left out without `retrainings`"):
            explain(task, indices=[0], train_function=lambda indices, seed: None)


class TestReliability:
    def test_it_is_in_the_explanation_and_in_the_report(self, task, tmp_path):
        found, method = explain(task, indices=[0, 5])
        x, y = (t[[0, 5]] for t in task.test.tensors)
        wanted = reliability(method, (x, y)).tolist()
        assert [p.reliability for p in found.points] == pytest.approx(wanted)
        results = found.to_dict()
        results["points"][0]["reliability"], results["points"][1]["reliability"] = 0.3, 0.9
        images = (task.train.tensors[0], task.test.tensors[0])
        page = write_explanation(results, *images, tmp_path / "report.html").read_text("utf-8")
        assert page.count("nothing stands out") == 1
        assert "Reliability of the scores 0.30" in page
        assert "Reliability of the scores 0.90" in page

    def test_the_terminal_says_where_nothing_stands_out(self, task, capsys):
        found, _ = explain(task, indices=[0, 5])
        points = [replace(p, reliability=r) for p, r in zip(found.points, (0.3, 0.9), strict=True)]
        show_explanation(replace(found, points=points))
        assert "Nothing stands out for #0: estimates" in capsys.readouterr().out

    @pytest.mark.slow
    def test_trained_operators_of_one_model_have_none(self, task):
        found, _ = explain(task, indices=[0], operators=Trained(iterations=2))
        assert found.points[0].reliability is None


class TestIds:
    def test_examples_are_called_by_their_ids(self, task, tmp_path, capsys):
        named = replace(task, ids=[f"img{i}.png" for i in range(task.n_train)])
        found, method = explain(named, indices=[0], k=2)
        assert [n.id for n in found.points[0].proponents] == [
            f"img{n.index}.png" for n in found.points[0].proponents
        ]
        assert found.suspects[0].id == f"img{found.suspects[0].index}.png"
        images = (task.train.tensors[0], task.test.tensors[0])
        page = write_explanation(found.to_dict(), *images, tmp_path / "report.html").read_text("utf-8")
        assert f"img{found.points[0].proponents[0].index}.png" in page
        assert f", #{found.points[0].proponents[0].index}<" not in page
        show_explanation(found)
        assert f"img{found.suspects[0].index}.png" in capsys.readouterr().out
        assert method.ids[3] == "img3.png"

    def test_a_task_takes_those_of_its_data_set(self, task):
        class Named(TensorDataset):
            ids = tuple(range(100, 400))

        assert replace(task, train=Named(*task.train.tensors), ids=None).ids[:2] == ("100", "101")
        with pytest.raises(ValueError, match="`ids` must hold one for each of 300 training examples; got 3"):
            replace(task, ids=["a", "b", "c"])

    def test_they_are_in_the_gallery_of_a_comparison(self, task):
        named = replace(task, ids=[f"row {i}" for i in range(task.n_train)])
        gallery = Gallery(
            named, {"seed 0": task.build_model()}, range(4), rank_suspects=False, n_points=1, k=2
        )
        gallery.add("a", None, np.arange(4 * task.n_train, dtype=float).reshape(4, -1))
        last = task.n_train - 1
        (best, second) = gallery.to_dict()["methods"][0]["points"][0]["proponents"]
        assert (best["id"], second["id"]) == (f"row {last}", f"row {last - 1}")
        assert plant(named, 2).task.ids[-1].startswith("copy of test point ")
