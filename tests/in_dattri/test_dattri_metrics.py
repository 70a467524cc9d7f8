"""dattri's own metrics on attributors of ours: each figure is the one that we get ourselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from dattri.algorithm import TracInAttributor
from dattri.metric import calculate_lds_ground_truth, loo_corr, mislabel_detection_auc
from dattri.metric import lds as dattri_lds
from dattri.model_util.retrain import retrain_lds
from dattri.task import AttributionTask
from planted import MLP, N_TEST, N_TRAIN, built, loader, planted_classes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Similarity
from stride_captum.adapters.dattri_plugin import attributor_for
from stride_captum.evaluation import lds, train_model
from stride_captum.evaluation.measures.linear_datamodeling import margins
from stride_captum.evaluation.measures.mislabel_precision import flip_labels, mislabel
from stride_captum.evaluation.measures.statistics import pearson
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.subsets import membership_from_indices

METHODS = [STRIDE, Similarity, ClassRandom]
TRAINING = TrainingSettings(
    optimizer="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.01, epochs=60, batch_size=64
)
NOISY_TRAINING = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=20, batch_size=16)
N_SUBSETS = 12


def linear() -> nn.Module:
    """With weight decay it is a convex problem: what an example does to it has one answer."""
    return nn.Linear(6, 3).double()


class Setting:
    """A linear network in float64 (so that rounding swaps no ranks) on planted data, as a task of dattri."""

    def __init__(self) -> None:
        self.train, self.test = (
            TensorDataset(d.tensors[0].double(), d.tensors[1])
            for d in (planted_classes(N_TRAIN, seed=1), planted_classes(N_TEST, seed=2))
        )
        self.model = self.retrained(range(N_TRAIN), seed=99)
        self.train_loader, self.test_loader = loader(self.train, 20), loader(self.test, 3)

    def loss(self, parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = torch.func.functional_call(self.model, parameters, batch[0])
        return F.cross_entropy(logits, batch[1].long())

    @property
    def task(self) -> AttributionTask:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        return AttributionTask(loss_func=self.loss, model=linear(), checkpoints=state)

    def attributed(self, method: type) -> Tensor:
        attributor = attributor_for(method)(self.task)
        attributor.cache(self.train_loader)
        with torch.no_grad():
            return attributor.attribute(self.train_loader, self.test_loader)

    def scores(self, method: type) -> Tensor:
        return method(self.model, self.train).influence(self.test.tensors)

    def retrained(self, rows: Sequence[int], seed: int = 0) -> nn.Module:
        x, y = self.train.tensors
        return train_model(linear, x[list(rows)], y[list(rows)], TRAINING, seed)

    def margins(self, model: nn.Module) -> Tensor:
        x, y = self.test.tensors
        with torch.no_grad():
            return torch.from_numpy(margins(model(x), y))


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.fixture(scope="module")
def half_models(setting, tmp_path_factory) -> tuple[Tensor, Tensor]:
    """dattri's own ground truth: half-models that it asks us to train, and minus what we return of each."""

    def train(subset: DataLoader, seed: int) -> nn.Module:
        return setting.retrained(subset.dataset.indices, seed)  # a `Subset`: not places in the loader

    def minus_margin(path: Path, test_loader: DataLoader) -> Tensor:
        model = linear()
        model.load_state_dict(torch.load(path))
        return -setting.margins(model)

    folder = str(tmp_path_factory.mktemp("dattri") / "halves")
    deterministic = torch.backends.cudnn.deterministic
    with torch.random.fork_rng(devices=[]):  # dattri seeds torch and changes its settings
        retrain_lds(train, setting.train_loader, folder, num_subsets=N_SUBSETS, subset_ratio=0.5, seed=1)
    torch.backends.cudnn.deterministic = deterministic
    return calculate_lds_ground_truth(minus_margin, folder, setting.test_loader)


@pytest.mark.parametrize("method", METHODS)
class TestCorrelations:
    def test_lds_is_ours_for_every_test_point(self, setting, half_models, method):
        values, indices = half_models
        found, _ = dattri_lds(setting.attributed(method), half_models)
        membership = membership_from_indices(list(indices), N_TRAIN)
        ours = lds(setting.scores(method), membership, values, n_resamples=0)
        np.testing.assert_allclose(found, ours.per_test[0], atol=1e-9)
        assert float(found.mean()) == pytest.approx(ours.value)

    def test_loo_correlation_is_that_of_scores_with_the_drop_of_the_margin(self, setting, left_out, method):
        found, _ = loo_corr(setting.attributed(method), (-left_out, torch.arange(N_TRAIN)))
        np.testing.assert_allclose(found, pearson(setting.scores(method).T, -left_out), atol=1e-9)


@pytest.fixture(scope="module")
def left_out(setting) -> Tensor:
    """Margins `(n_train, n_test)` of models trained without one example each."""
    rows = range(N_TRAIN)
    models = [setting.retrained([i for i in rows if i != out]) for out in rows]
    return torch.stack([setting.margins(model) for model in models])


class TestSign:
    def test_lds_is_positive_for_stride(self, setting, half_models):
        assert float(dattri_lds(setting.attributed(STRIDE), half_models)[0].mean()) > 0.3

    def test_leave_one_out_correlation_is_positive_for_stride(self, setting, left_out):
        truth = -left_out, torch.arange(N_TRAIN)
        assert float(loo_corr(setting.attributed(STRIDE), truth)[0].mean()) > 0.5

    def test_scores_have_the_sign_of_dattris_own(self, setting):
        """dattri attributes the loss, with plus for examples that lower it: those that raise the margin."""
        tracin = TracInAttributor(setting.task, torch.ones(1), normalized_grad=False)
        theirs = tracin.attribute(setting.train_loader, setting.test_loader)
        assert theirs.shape == (N_TRAIN, N_TEST)
        assert float(np.mean(pearson(setting.attributed(STRIDE), theirs))) > 0.3


class TestMislabels:
    def test_the_area_under_the_curve_is_ours(self, setting):
        x, labels = setting.train.tensors
        noisy, flipped = flip_labels(labels, 1 / 6, 3, seed=1)
        train = TensorDataset(x, torch.from_numpy(noisy))
        model = train_model(lambda: built(MLP).double(), *train.tensors, NOISY_TRAINING, seed=0)
        attributor = attributor_for(STRIDE)(AttributionTask(setting.loss, model, model.state_dict()))
        source = loader(train)
        attributor.cache(source)
        method = STRIDE(model, train)
        for found, wanted in (
            (attributor.self_attribute(source), method.self_influence()),
            (attributor.mislabel_scores(source), method.mislabel_scores()),
        ):
            torch.testing.assert_close(found, wanted)
            area, _ = mislabel_detection_auc(found, torch.from_numpy(flipped))
            ours = mislabel(wanted, flipped, n_resamples=0).auc
            assert float(area) == pytest.approx(ours, abs=1e-6)
        assert ours > 0.8
