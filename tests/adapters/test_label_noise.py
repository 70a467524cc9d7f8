from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from planted import MLP, BatchNormCNN, Fails, expect_untouched, loader, planted_classes, trained, unusual
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import Checkpoint
from stride_captum.adapters import ConfidentLearning, LossDetector
from stride_captum.adapters.folds import logistic_regression, out_of_sample_probabilities
from stride_captum.adapters.label_noise import (
    QUALITIES,
    LabelNoiseDetector,
)
from stride_captum.losses import CrossEntropy

N, WRONG = 120, list(range(3, 120, 10))
try:
    import cleanlab  # noqa: F401

    WITH_CLEANLAB = True
except ImportError:
    WITH_CLEANLAB = False
needs_cleanlab = pytest.mark.skipif(not WITH_CLEANLAB, reason="the extra `cleanlab` is not installed")

DETECTORS = [
    LossDetector,
    pytest.param(ConfidentLearning, marks=needs_cleanlab),
]


@pytest.fixture
def noisy() -> tuple[nn.Module, TensorDataset]:
    """A network trained on true labels, and examples of which one in ten has a wrong one."""
    model, (x, y) = trained(MLP)[0], planted_classes(N, seed=1, noise=0.4).tensors
    wrong = y.clone()
    wrong[WRONG] = (y[WRONG] + 1) % 3
    return model, TensorDataset(x, wrong)


@pytest.mark.parametrize("detector", DETECTORS)
class TestEveryDetector:
    def test_wrong_labels_are_suspect(self, noisy, detector):
        scores = detector(*noisy).mislabel_scores()
        assert scores.shape == (N,)
        found = set(scores.topk(len(WRONG)).indices.tolist())
        assert len(found & set(WRONG)) >= 0.75 * len(WRONG)

    @pytest.mark.slow
    def test_loaders_and_batch_sizes_and_a_second_call_change_nothing(self, noisy, detector):
        model, train = noisy
        wanted = detector(model, train).mislabel_scores()
        for found in (detector(model, loader(train, 7)), detector(model, train, batch_size=5)):
            torch.testing.assert_close(found.mislabel_scores(), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.mislabel_scores(), found.mislabel_scores())

    def test_the_model_is_left_as_it_was(self, detector):
        model, train, _ = trained(BatchNormCNN, n_train=20, steps=3)
        wanted = detector(model, train).mislabel_scores()
        unusual(model)
        with expect_untouched(model):
            torch.testing.assert_close(detector(model, Fails(train)).mislabel_scores(), wanted)
            with pytest.raises(RuntimeError, match="a broken example"):
                detector(model, Fails(train, at=13), batch_size=4).mislabel_scores()

    def test_what_cannot_be_read_is_refused(self, noisy, detector):
        model, (x, y) = noisy[0], noisy[1].tensors
        shuffled = torch.utils.data.DataLoader(noisy[1], shuffle=True)
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module; got function"):
            detector(lambda x: x, noisy[1])
        with pytest.raises(
            TypeError, match=r"`train_dataset` must be a Dataset or .* TensorDataset\(inputs, lab"
        ):
            detector(model, (x, y))
        with pytest.raises(ValueError, match=r"`batch_size` must be an integer of at least 1; got 0"):
            detector(model, noisy[1], batch_size=0)
        backwards = torch.utils.data.DataLoader(noisy[1], sampler=range(N - 1, -1, -1))
        with pytest.raises(ValueError, match=r"`train_dataset` must give the examples .* 119 in place 0"):
            detector(model, backwards)
        with pytest.raises(ValueError, match="`train_dataset` must give its examples in the same order"):
            detector(model, shuffled)
        with pytest.raises(ValueError, match="`train_dataset` must hold at least one example; got an empty"):
            detector(model, TensorDataset(x[:0], y[:0]))
        with pytest.raises(ValueError, match=r"`train_dataset` must give one label per example.*; got none"):
            detector(model, TensorDataset(x)).mislabel_scores()
        with pytest.raises(ValueError, match=r"`train_dataset` must hold class indices in \[0, 3\); got 3"):
            detector(model, TensorDataset(x, y + 1)).mislabel_scores()


def test_the_interface_is_abstract(noisy):
    with pytest.raises(TypeError, match="abstract"):
        LabelNoiseDetector(*noisy)


def test_labels_of_another_length_are_refused(noisy):
    model, (x, y) = noisy[0], noisy[1].tensors
    two = [(x[:20], y[:19])]
    with pytest.raises(
        ValueError, match="`train_dataset` must carry one label for each of 20 examples; got 19"
    ):
        LossDetector(model, torch.utils.data.DataLoader(two, batch_size=None)).mislabel_scores()


class TestLossDetector:
    def test_it_is_the_training_loss_of_each_example(self, noisy):
        model, (x, y) = noisy[0], noisy[1].tensors
        scores = LossDetector(*noisy).mislabel_scores()
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, F.cross_entropy(model(x), y, reduction="none").detach())

    def test_losses_that_round_to_zero_stay_apart(self):
        class Sure(nn.Module):
            def forward(self, x):
                return x

        logits = torch.tensor([[30.0, 0.0], [20.0, 0.0], [25.0, 0.0]])
        scores = LossDetector(Sure(), TensorDataset(logits, torch.zeros(3).long())).mislabel_scores()
        assert scores.argsort(descending=True).tolist() == [1, 2, 0]
        torch.testing.assert_close(scores, torch.exp(-logits[:, 0]), rtol=1e-3, atol=0)

    def test_nan_is_not_hidden(self, noisy):
        model, (x, y) = noisy[0], noisy[1].tensors
        spoilt = x.clone()
        spoilt[4] = float("nan")
        scores = LossDetector(model, TensorDataset(spoilt, y)).mislabel_scores()
        assert scores.isnan().nonzero().flatten().tolist() == [4]


def test_a_probability_that_is_none_is_named_by_its_place_in_the_training_set(noisy):
    y = noisy[1].tensors[1]
    p = F.one_hot(y, 3) * 0.7 + 0.1
    p[9] = 2.0
    with pytest.raises(ValueError, match="other numbers for training example 9"):
        LossDetector(
            nn.Identity(), TensorDataset(p, y), batch_size=4, loss=CrossEntropy(outputs="probabilities")
        ).mislabel_scores()


class TestOutOfSampleProbabilities:
    def test_nobody_is_predicted_by_a_fit_that_has_seen_it(self):
        labels, seen = np.arange(20) % 3, []

        def fit_predict(train: Any, test: Any) -> Any:
            assert set(train) & set(test) == set()
            assert sorted([*train, *test]) == list(range(20))
            seen.extend(test)
            return np.eye(20)[test]

        found = out_of_sample_probabilities(fit_predict, labels, n_folds=4)
        assert sorted(seen) == list(range(20))
        assert np.array_equal(found, np.eye(20))

    @pytest.mark.parametrize("n_folds", [2, 3, 7])
    def test_folds_are_stratified_and_every_class_is_in_every_fit(self, n_folds):
        labels = np.array([0] * 30 + [1] * 14 + [2] * 2)

        def fit_predict(train: Any, test: Any) -> Any:
            assert set(labels[train]) == {0, 1, 2}
            for c in (0, 1):
                share = (labels == c).sum() / n_folds
                assert abs((labels[test] == c).sum() - share) < 1 + 1e-9
            return np.ones((len(test), 1))

        out_of_sample_probabilities(fit_predict, labels, n_folds)

    def test_the_seed_chooses_the_folds(self):
        def folds(seed: int) -> list[list[int]]:
            found: list[list[int]] = []

            def fit_predict(train: Any, test: Any) -> Any:
                found.append(test.tolist())
                return np.ones((len(test), 1))

            out_of_sample_probabilities(fit_predict, torch.arange(40) % 2, 5, seed)
            return found

        state = np.random.get_state()[1].tolist()
        assert folds(0) == folds(0) != folds(1)
        assert np.random.get_state()[1].tolist() == state

    @pytest.mark.parametrize("n_folds", [1, 0, 11, 2.0, True])
    def test_the_number_of_folds(self, n_folds):
        with pytest.raises(ValueError, match="`n_folds` must be an integer from 2 to the 10 examples; got"):
            out_of_sample_probabilities(lambda train, test: np.ones((len(test), 1)), np.arange(10), n_folds)

    @pytest.mark.parametrize(
        ("answer", "why"),
        [
            (lambda test: np.ones(len(test)), r"return 5 rows of probabilities; got shape \(5,\)"),
            (lambda test: np.ones((2, 1)), r"return 5 rows of probabilities; got shape \(2, 1\)"),
            (lambda test: np.ones((len(test), 2)), "return rows of probabilities that add up to 1; got oth"),
            (
                lambda test: [[1.5, -0.5]] * len(test),
                "return rows of probabilities that add up to 1; got oth",
            ),
            (lambda test: [[np.nan, 1.0]] * len(test), "return rows of probabilities that add up to 1; got"),
            (
                lambda test: np.eye(2 + (0 in test))[[0] * len(test)],
                r"return one column per class; got widths \[2, 3\]",
            ),
        ],
    )
    def test_what_is_no_row_of_probabilities_is_refused(self, answer, why):
        with pytest.raises(ValueError, match=f"`fit_predict` must {why}"):
            out_of_sample_probabilities(lambda train, test: answer(test), np.arange(10) % 2, 2)


class TestLogisticRegression:
    def test_it_finds_planted_classes_out_of_sample(self):
        x, y = (t.numpy() for t in planted_classes(60, noise=0.2).tensors)
        found = out_of_sample_probabilities(logistic_regression(x, y, 3), y, 5)
        assert (found.argmax(1) == y).all()

    def test_a_class_that_a_fit_has_not_seen_gets_zero(self):
        x, y = (t.numpy() for t in planted_classes(20).tensors)
        fit_predict = logistic_regression(x, np.where(y == 1, 0, y), 4)
        found = fit_predict(np.arange(15), np.arange(15, 20))
        assert found.shape == (5, 4)
        assert (found[:, [1, 3]] == 0).all()
        np.testing.assert_allclose(found.sum(1), 1)


@needs_cleanlab
class TestConfidentLearning:
    @pytest.mark.parametrize("quality", QUALITIES)
    def test_scores_are_one_minus_the_quality_of_cleanlab(self, noisy, quality):
        from cleanlab.rank import get_label_quality_scores

        x, y = noisy[1].tensors
        fit_predict = logistic_regression(x.numpy(), y.numpy(), 3)
        detector = ConfidentLearning(*noisy, fit_predict=fit_predict, n_folds=4, seed=3, quality=quality)
        probabilities = out_of_sample_probabilities(fit_predict, y.numpy(), 4, 3)
        wanted = 1 - get_label_quality_scores(y.numpy(), probabilities, method=quality)
        found = detector.mislabel_scores()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, torch.from_numpy(wanted))
        assert 0 <= float(found.min()) <= float(found.max()) <= 1

    def test_by_default_the_features_are_all_that_weight_layers_read_but_the_last(self, noisy):
        model, (x, y) = noisy[0], noisy[1].tensors
        features = torch.cat([x, model.fc1(x).relu()], 1).detach().numpy()
        by_hand = logistic_regression(features, y.numpy(), 3)
        wanted = ConfidentLearning(*noisy, fit_predict=by_hand).mislabel_scores()
        torch.testing.assert_close(ConfidentLearning(*noisy).mislabel_scores(), wanted)

    def test_layers_are_read_where_they_are_named(self, noisy):
        model, (x, y) = noisy[0], noisy[1].tensors
        by_hand = logistic_regression(model.fc2(model.fc1(x).relu()).detach().numpy(), y.numpy(), 3)
        wanted = ConfidentLearning(*noisy, fit_predict=by_hand).mislabel_scores()
        torch.testing.assert_close(ConfidentLearning(*noisy, layers=["fc2"]).mislabel_scores(), wanted)

    def test_a_network_of_one_layer_keeps_it(self, noisy):
        x, y = noisy[1].tensors
        by_hand = logistic_regression(x.numpy(), y.numpy(), 3)
        wanted = ConfidentLearning(*noisy, fit_predict=by_hand).mislabel_scores()
        found = ConfidentLearning(nn.Linear(6, 3), noisy[1]).mislabel_scores()
        torch.testing.assert_close(found, wanted)

    def test_features_with_nan_are_refused(self, noisy):
        model, (x, y) = noisy[0], noisy[1].tensors
        spoilt = x.clone()
        spoilt[4] = float("nan")
        with pytest.raises(ValueError, match="`train_dataset` must give finite activations; got NaN or inf"):
            ConfidentLearning(model, TensorDataset(spoilt, y)).mislabel_scores()

    def test_the_quality_is_one_of_cleanlab(self, noisy):
        with pytest.raises(ValueError, match=r"`quality` must be one of 'self_confidence', .*; got 'margin'"):
            ConfidentLearning(*noisy, quality="margin")


def test_without_cleanlab_there_is_a_hint(noisy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    with pytest.raises(ImportError, match=r'ConfidentLearning needs cleanlab: pip install "cleanlab>=\S+"'):
        ConfidentLearning(*noisy)


@needs_cleanlab
class TestModelsOfParts:
    """Confident learning with models that have seen a part of the data each."""

    @pytest.fixture
    def parts(self):
        model, train, _ = trained(MLP)
        other = trained(MLP, steps=7)[0]
        rows = torch.arange(48)
        seen = [rows[rows % 3 == 0], rows[rows % 3 != 0], rows[rows % 3 == 1]]
        return (
            model,
            train,
            [
                Checkpoint(net.state_dict(), seen=part.tolist())
                for net, part in zip((model, other, model), seen, strict=True)
            ],
        )

    def test_each_example_is_judged_by_those_that_have_not_seen_it(self, parts):
        model, train, kept = parts
        x, y = train.tensors
        networks = [copy.deepcopy(model) for _ in kept]
        wanted = torch.empty(48, dtype=torch.float64)
        for network, checkpoint in zip(networks, kept, strict=True):
            network.load_state_dict(checkpoint.weights)
        for i in range(48):
            unseen = [n for n, c in zip(networks, kept, strict=True) if i not in c.seen]
            p = [network(x[i : i + 1]).double().softmax(1)[0, y[i]] for network in unseen]
            wanted[i] = 1 - torch.stack(p).mean()
        before = copy.deepcopy(model.state_dict())
        found = ConfidentLearning(model, train, checkpoints=kept, batch_size=7).mislabel_scores()
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-7)
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())

    def test_models_that_have_seen_everything_are_not_asked(self, parts):
        model, train, kept = parts
        broken = Checkpoint({name: torch.full_like(v, torch.nan) for name, v in model.state_dict().items()})
        found = ConfidentLearning(model, train, checkpoints=[broken, *kept]).mislabel_scores()
        assert torch.equal(found, ConfidentLearning(model, train, checkpoints=kept).mislabel_scores())

    def test_what_all_have_seen_is_refused(self, parts):
        model, train, kept = parts
        must = r"`checkpoints` must leave every example unseen by one of them; got example 0, which all have"
        with pytest.raises(ValueError, match=must):
            ConfidentLearning(model, train, checkpoints=kept[:1]).mislabel_scores()
        with pytest.raises(ValueError, match=must):
            ConfidentLearning(model, train, checkpoints=[model.state_dict()]).mislabel_scores()
        with pytest.raises(ValueError, match="`checkpoints` must be given without `fit_predict`; got both"):
            ConfidentLearning(model, train, checkpoints=kept, fit_predict=lambda a, b: None)
