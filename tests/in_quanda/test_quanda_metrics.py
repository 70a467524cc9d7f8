"""quanda's own metrics, offline, on explainers of ours: each figure is the one that we get ourselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import captum
import numpy as np
import pytest
import torch
from planted import MLP, N_TRAIN, built, trained
from quanda import (
    ClassDetection,
    ClassDetectionMetric,
    LinearDatamodelingMetric,
    MislabelingDetectionMetric,
    ModelRandomizationMetric,
    TopKCardinalityMetric,
)
from quanda.utils.common import get_load_state_dict_func
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Similarity
from stride_captum.adapters.quanda_plugin import STRIDEExplainer, explainer_for
from stride_captum.evaluation import lds, train_model
from stride_captum.evaluation.measures.linear_datamodeling import margins
from stride_captum.evaluation.measures.mislabel_precision import flip_labels, mislabel
from stride_captum.evaluation.measures.statistics import spearman
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.subsets import members, random_subsets

METHODS = [STRIDE, Similarity, ClassRandom]
TRAINING = TrainingSettings(
    optimizer="sgd", learning_rate=0.5, momentum=0.9, weight_decay=0.01, epochs=60, batch_size=64
)
NOISY_TRAINING = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=20, batch_size=16)
N_SUBSETS = 12


def linear() -> nn.Module:
    """With weight decay it is a convex problem: what an example does to it has one answer."""
    return nn.Linear(6, 3).double()


def test_it_is_captum_0_8_and_its_classes_that_we_subclass():
    assert captum.__version__.startswith("0.8.")
    assert issubclass(STRIDE, captum.influence.DataInfluence)


class Setting:
    """A network in float64 (so that rounding swaps no ranks) with its weights in a file, and planted data."""

    def __init__(self, folder: Path, network: str) -> None:
        model, train, test = trained(MLP)
        self.train, self.test = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, test))
        self.model = model.double() if network == "MLP" else self.retrained(range(N_TRAIN), seed=99)
        self.x, self.y = self.test.tensors
        self.path = str(folder / "model.pth")
        torch.save(self.model.state_dict(), self.path)
        self.folder = folder
        self.common = {"model": self.model, "train_dataset": self.train, "checkpoints": [self.path]}

    def retrained(self, rows: Sequence[int], seed: int) -> nn.Module:
        x, y = self.train.tensors
        return train_model(linear, x[list(rows)], y[list(rows)], TRAINING, seed)

    def explanations(self, method: type) -> Tensor:
        return explainer_for(method)(**self.common).explain(self.x, self.y)

    def scores(self, method: type) -> Tensor:
        return method(self.model, self.train).influence((self.x, self.y))


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("quanda"), "MLP")


@pytest.mark.parametrize("method", METHODS)
class TestMetricsOnScores:
    def test_class_detection_is_the_share_of_the_class_among_the_top_k(self, setting, method):
        metric = ClassDetectionMetric(**setting.common, s=5)
        metric.update(setting.explanations(method), setting.y, setting.x)
        top = method(setting.model, setting.train).influence((setting.x, setting.y), 5).indices
        same = setting.train.tensors[1][top] == setting.y[:, None]
        assert metric.compute()["score"] == pytest.approx(float(same.double().mean()), abs=1e-6)

    def test_top_k_cardinality_counts_the_distinct_proponents(self, setting, method):
        metric = TopKCardinalityMetric(**setting.common, top_k=3)
        metric.update(setting.explanations(method))
        top = method(setting.model, setting.train).influence((setting.x, setting.y), 3).indices
        assert metric.compute()["score"] == len(top.unique()) / top.numel()

    def test_model_randomization_explains_the_network_with_other_weights(self, setting, method):
        metric = ModelRandomizationMetric(
            **setting.common,
            model_id=f"model-{method.__name__}",
            cache_dir=str(setting.folder / "randomized"),
            explainer_cls=explainer_for(method),
            expl_kwargs={"layers": ["fc2"]},
        )
        assert metric.rand_explainer.model_id == f"model-{method.__name__}_rand"
        scores = method(setting.model, setting.train, layers=["fc2"]).influence((setting.x, setting.y))
        metric.update(scores, setting.x, setting.y)
        other = method(metric.rand_model, setting.train, layers=["fc2"]).influence((setting.x, setting.y))
        wanted = spearman(scores.T, other.T)
        np.testing.assert_allclose(torch.cat(metric.results["scores"]), wanted, atol=1e-6)
        # A control does not read the network, which this metric is there to find out.
        assert (metric.compute()["score"] > 1 - 1e-6) == (method is ClassRandom)

    def test_the_benchmark_itself_runs_offline(self, setting, method):
        benchmark = ClassDetection(
            model=setting.model,
            train_dataset=setting.train,
            eval_dataset=setting.test,
            checkpoints=[setting.path],
            checkpoints_load_func=get_load_state_dict_func("cpu"),
            s=5,
        )
        found = benchmark.evaluate(explainer_for(method), expl_kwargs={"batch_size": 16}, batch_size=3)
        metric = ClassDetectionMetric(**setting.common, s=5)
        metric.update(setting.scores(method), setting.y)
        assert found["score"] == pytest.approx(metric.compute()["score"], abs=1e-6)


class Retrained:
    """Half-models trained from scratch (not from the full model, as quanda does it), and their margins."""

    def __init__(self, setting: Setting) -> None:
        self.membership = random_subsets(N_TRAIN, N_SUBSETS, N_TRAIN // 2, seed=3)
        self.subsets = [members(self.membership, k).tolist() for k in range(N_SUBSETS)]
        self.files, logits = [], []
        for k, rows in enumerate(self.subsets):
            model = setting.retrained(rows, seed=k)
            self.files.append(str(setting.folder / f"half-{k}.pth"))
            torch.save(model.state_dict(), self.files[-1])
            logits.append(model(setting.x).detach())
        self.logits = torch.stack(logits)
        self.responses = margins(self.logits, setting.y)


@pytest.fixture(scope="module")
def convex(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("convex"), "linear")


@pytest.fixture(scope="module")
def retrained(convex) -> Retrained:
    return Retrained(convex)


class TestLinearDatamodelingScore:
    def metric(self, convex: Setting, retrained: Retrained, correlation: str) -> LinearDatamodelingMetric:
        return LinearDatamodelingMetric(
            **convex.common,
            m=N_SUBSETS,
            correlation_fn=correlation,
            subset_ids=retrained.subsets,
            subset_ckpt_filenames=retrained.files,
            cache_dir=str(convex.folder),
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_ours(self, convex, retrained, method):
        ours = lds(convex.scores(method), retrained.membership, retrained.responses, n_resamples=0)
        metric = self.metric(convex, retrained, "spearman")
        metric.update(convex.explanations(method), convex.y, convex.x)
        assert metric.compute()["score"] == pytest.approx(ours.value, abs=1e-6)
        np.testing.assert_allclose(torch.cat(metric.results["scores"]), ours.per_test[0], atol=1e-6)

    def test_logits_of_retrainings_go_in_without_their_models(self, convex, retrained):
        metric = self.metric(convex, retrained, "spearman")
        metric.subset_ckpt_filenames = ["nowhere"] * N_SUBSETS
        logits = dict(enumerate(retrained.logits))
        metric.update(convex.explanations(STRIDE), convex.y, convex.x, subset_logits=logits)
        ours = lds(convex.scores(STRIDE), retrained.membership, retrained.responses, n_resamples=0)
        assert metric.compute()["score"] == pytest.approx(ours.value, abs=1e-6)

    def test_and_it_is_positive_for_stride(self, convex, retrained):
        ours = lds(convex.scores(STRIDE), retrained.membership, retrained.responses, n_resamples=0)
        assert ours.value > 0.3


class Noisy:
    """A network trained on labels of which a sixth are flipped."""

    def __init__(self) -> None:
        _, train, _ = trained(MLP)
        x, labels = train.tensors
        noisy, self.flipped = flip_labels(labels, 1 / 6, 3, seed=1)
        self.train = TensorDataset(x, torch.from_numpy(noisy))
        self.model: nn.Module = train_model(lambda: built(MLP), *self.train.tensors, NOISY_TRAINING, seed=0)
        self.common: dict[str, Any] = {
            "model": self.model,
            "train_dataset": self.train,
            "mislabeling_indices": np.flatnonzero(self.flipped).tolist(),
        }

    def curve(self, suspicion: Any) -> float:
        """quanda's figure from our AUC.

        Its curve is c_k = (flipped examples among the first k) / M, and its figure the trapezoids
        (sum_k c_k - (c_1 + 1) / 2) / N. A flipped example at place r counts in N + 1 - r of the c_k, so that
        sum_k c_k = N + 1 - mean place, and AUC = 1 - (mean place - (M + 1) / 2) / (N - M).
        """
        n, m = len(self.flipped), int(self.flipped.sum())
        place = (1 - mislabel(suspicion, self.flipped, n_resamples=0).auc) * (n - m) + (m + 1) / 2
        first = self.flipped[int(np.argmax(suspicion))] / m
        return (n + 1 - place - (first + 1) / 2) / n


@pytest.fixture(scope="module")
def noisy() -> Noisy:
    return Noisy()


class TestMislabelDetection:
    @pytest.mark.parametrize("method", [STRIDE, ClassRandom])
    def test_it_is_ours(self, noisy, method):
        metric = MislabelingDetectionMetric(**noisy.common, explainer_cls=explainer_for(method))
        suspicion = method(noisy.model, noisy.train).mislabel_scores()
        assert len(suspicion.unique()) == N_TRAIN
        assert metric.compute()["score"] == pytest.approx(noisy.curve(suspicion), abs=1e-6)

    def test_stride_finds_the_flipped_labels(self, noisy):
        suspicion = STRIDE(noisy.model, noisy.train).mislabel_scores()
        assert mislabel(suspicion, noisy.flipped, n_resamples=0).auc > 0.8

    def test_ranks_survive_the_tie_break_that_puts_small_scores_in_the_order_of_the_data(self, noisy):
        suspicion = 1e-6 * STRIDE(noisy.model, noisy.train).mislabel_scores()
        raw = MislabelingDetectionMetric(**noisy.common, precomputed_self_influence=suspicion)
        assert raw.compute()["score"] == pytest.approx(noisy.curve(np.arange(N_TRAIN)), abs=1e-6)
        assert raw.compute()["score"] < noisy.curve(suspicion) - 0.1
        ranks = STRIDEExplainer(noisy.model, noisy.train).self_influence()
        assert ranks.dtype == torch.float64
        assert ranks.argsort().tolist() == suspicion.argsort().tolist()
        assert ranks.sort().values.tolist() == [1e3 * i for i in range(N_TRAIN)]
