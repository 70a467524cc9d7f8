"""Answers of methods are kept on disk: asked once, never used for anything else."""

import json

import numpy as np
import pytest
import torch
from planted import MLP, planted_classes

from stride_captum import STRIDE
from stride_captum.adapters import EKFAC, DiagonalEKFAC, Random
from stride_captum.evaluation import kept_answers
from stride_captum.evaluation.kept_answers import KeptMethod
from stride_captum.evaluation.models import TrainingSettings
from stride_captum.evaluation.tasks import Task


@pytest.fixture
def task():
    settings = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=1)
    return Task("planted", planted_classes(30, seed=1), planted_classes(8, seed=2), MLP, settings)


@pytest.fixture
def model(task):
    torch.manual_seed(0)
    return task.build_model().eval()


@pytest.fixture
def batch(task):
    return task.test.tensors


def build(cls):
    return lambda model, data, options: cls(model, data, **options)


def kept(task, model, store, cls=DiagonalEKFAC, **options):
    return KeptMethod(build(cls), model, task, options, store, 0.5)


def never(method):
    raise AssertionError("it was asked again")


class TestKeeping:
    def test_what_is_there_is_neither_fitted_nor_asked_again(self, task, model, batch, tmp_path):
        first = kept(task, model, tmp_path)
        answer = first.margins(batch)
        expected = DiagonalEKFAC(model, task.train).influence(batch)
        np.testing.assert_array_equal(answer.values, expected.numpy())
        second = kept(task, model, tmp_path)
        again = second.margins(batch)
        np.testing.assert_array_equal(again.values, answer.values)
        assert again.values.dtype == answer.values.dtype
        assert not hasattr(second.method, "fit_seconds_")
        facts = [{k: v for k, v in vars(a).items() if k != "values"} for a in (answer, again)]
        assert facts[0] == facts[1]
        assert again.cost(8).fit_seconds == first.method.fit_seconds_
        assert again.cost(8).forward_seconds == 0.5

    def test_another_question_is_another_answer(self, task, model, batch, tmp_path):
        method = kept(task, model, tmp_path)
        plain = method.margins(batch).values
        assert not np.array_equal(plain, method.margins(batch, "cosine").values)
        assert len(method.margins((batch[0][:3], batch[1][:3])).values) == 3
        own = method.ask("self-influence", (), lambda m: m.self_influence()).values
        assert own.shape == (30,)
        assert len(list((tmp_path / "answers").iterdir())) == 4

    def test_settings_weights_and_data_make_another_method(self, task, model, batch, tmp_path):
        kept(task, model, tmp_path).ask("x", (), lambda m: np.ones(1))

        def asked_again(task, model, cls=DiagonalEKFAC, **options):
            with pytest.raises(AssertionError, match="asked again"):
                kept(task, model, tmp_path, cls, **options).ask("x", (), never)

        asked_again(task, model, damping=0.7)
        asked_again(task, model, STRIDE)
        torch.manual_seed(1)
        asked_again(task, task.build_model().eval())
        x, y = task.train.tensors
        other = Task("planted", torch.utils.data.TensorDataset(x + 1e-6, y), task.test, MLP, task.training)
        asked_again(other, model)
        kept(task, model, tmp_path).ask("x", (), never)

    def test_an_option_that_is_set_on_a_fitted_method_counts(self, task, model, batch, tmp_path):
        pytest.importorskip("kronfluence")
        method = kept(task, model, tmp_path, EKFAC, damping=1e-3)
        weak = method.margins(batch).values
        method.method.damping = 10.0
        assert not np.array_equal(method.margins(batch).values, weak)
        assert len(list((tmp_path / "answers").iterdir())) == 2
        np.testing.assert_array_equal(
            kept(task, model, tmp_path, EKFAC, damping=10.0).margins(batch).values,
            method.margins(batch).values,
        )

    def test_other_code_is_another_method(self, task, model, batch, tmp_path, monkeypatch):
        kept(task, model, tmp_path).ask("x", (), lambda m: np.ones(1))
        monkeypatch.setattr(kept_answers, "_code", lambda: "another")
        with pytest.raises(AssertionError, match="asked again"):
            kept(task, model, tmp_path).ask("x", (), never)

    def test_the_code_of_other_packages_is_not_known(self, task, model, batch, tmp_path):
        class Mine(Random):
            pass

        kept(task, model, tmp_path, Mine).margins(batch)
        assert not (tmp_path / "answers").exists()

    @pytest.mark.parametrize("content", [b"", b"\x10", None])
    def test_a_damaged_file_is_computed_again(self, task, model, batch, tmp_path, content):
        answer = kept(task, model, tmp_path).margins(batch)
        (path,) = (tmp_path / "answers").iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[:-7] if content is None else content)
        with pytest.warns(UserWarning, match="is cut off or not an answer: it is computed again"):
            again = kept(task, model, tmp_path).margins(batch)
        np.testing.assert_array_equal(again.values, answer.values)
        assert json.dumps(kept(task, model, tmp_path).margins(batch).values.tolist())

    def test_without_a_store_nothing_is_written(self, task, model, batch, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        kept(task, model, None).margins(batch)
        assert not list(tmp_path.iterdir())
