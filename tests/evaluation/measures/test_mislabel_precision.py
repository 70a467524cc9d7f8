from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from planted import MLP, planted_classes
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from stride_captum import STRIDE
from stride_captum.adapters import Random, Similarity
from stride_captum.evaluation.comparison.runs.mislabel import (
    flipped_task,
    held_out_influence,
    measure_mislabel,
)
from stride_captum.evaluation.measures.mislabel_precision import (
    INSPECTED,
    ROC_GRID,
    expected_hits,
    flip_labels,
    mislabel,
)
from stride_captum.evaluation.retraining.attributed_models import train_attributed
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task

N = 80


@pytest.fixture
def flipped():
    return np.random.default_rng(0).permutation(N) < 20


@pytest.fixture
def scores(flipped):
    return np.random.default_rng(1).standard_normal(N) + flipped


class TestFlips:
    labels = np.random.default_rng(0).integers(0, 5, size=3000)

    @pytest.mark.parametrize("kind", ["symmetric", "class-dependent"])
    def test_the_share_is_exact_and_flipped_labels_are_other_classes(self, kind):
        noisy, flipped = flip_labels(self.labels, 0.1, 5, kind=kind, seed=3)
        assert flipped.sum() == 300
        np.testing.assert_array_equal(noisy != self.labels, flipped)
        assert set(noisy) == set(range(5))

    def test_symmetric_flips_reach_all_other_classes_equally(self):
        noisy, flipped = flip_labels(self.labels, 0.9, 5)
        steps = np.bincount((noisy - self.labels)[flipped] % 5, minlength=5)
        assert steps[0] == 0
        assert np.abs(steps[1:] - 675).max() < 4 * np.sqrt(2700 * 3 / 16)

    def test_class_dependent_flips_go_to_the_next_class(self):
        noisy, flipped = flip_labels(self.labels, 0.3, 5, kind="class-dependent")
        assert set((noisy - self.labels)[flipped] % 5) == {1}

    @pytest.mark.parametrize("kind", ["symmetric", "class-dependent"])
    def test_labels_that_nobody_has_are_not_made(self, kind):
        classes = np.array([0, 2, 5])
        labels = classes[self.labels % 3]
        noisy, flipped = flip_labels(labels, 0.2, 6, kind=kind, seed=3)
        np.testing.assert_array_equal(noisy != labels, flipped)
        assert set(noisy[flipped]) == {0, 2, 5}
        as_if = flip_labels(self.labels % 3, 0.2, 3, kind=kind, seed=3)[0]
        np.testing.assert_array_equal(noisy, classes[as_if])

    def test_the_seed_decides_and_the_input_is_left_alone(self):
        before = self.labels.copy()
        one, other = (flip_labels(self.labels, 0.1, 5, seed=s) for s in (1, 2))
        np.testing.assert_array_equal(one[0], flip_labels(torch.tensor(self.labels), 0.1, 5, seed=1)[0])
        assert (one[1] != other[1]).any()
        np.testing.assert_array_equal(self.labels, before)

    def test_what_is_wrong_is_said(self):
        with pytest.raises(ValueError, match="`kind` must be one of 'symmetric', 'class-dependent'; got"):
            flip_labels(self.labels, 0.1, 5, kind="symetric")
        with pytest.raises(ValueError, match=r"`rate` must be in \(0, 1\); got 10"):
            flip_labels(self.labels, 10, 5)
        with pytest.raises(ValueError, match="`n_classes` must be at least 2; got 1"):
            flip_labels(self.labels, 0.1, 1)
        with pytest.raises(ValueError, match=r"`labels` must be classes in \[0, 4\)"):
            flip_labels(self.labels, 0.1, 4)
        with pytest.raises(
            ValueError, match=r"`labels` must be of at least 2 classes; got class \[3\] alone"
        ):
            flip_labels([3, 3, 3], 0.4, 5)
        for rate, n_flipped in ((0.0001, 0), (0.9999, 3000)):
            with pytest.raises(
                ValueError, match=rf"`rate` must flip some of the 3000 .*; got {rate}: {n_flipped}"
            ):
                flip_labels(self.labels, rate, 5)


class TestFigures:
    def test_without_ties_they_are_those_of_scikit_learn(self, scores, flipped):
        result = mislabel(scores, flipped, n_resamples=0)
        top = np.argsort(-scores)[:20]
        assert result.precision == result.recall == flipped[top].mean()
        assert result.average_precision == pytest.approx(average_precision_score(flipped, scores))
        assert result.auc == pytest.approx(roc_auc_score(flipped, scores))
        fpr, tpr, _ = roc_curve(flipped, scores, drop_intermediate=False)
        away = np.abs(ROC_GRID[:, None] - fpr).min(1) > 1e-9
        expected = [tpr[np.searchsorted(fpr, x, side="right") - 1] for x in ROC_GRID]
        np.testing.assert_allclose(np.array(result.roc)[away], np.array(expected)[away])

    def test_the_extremes(self, flipped):
        perfect, worst = (mislabel(s * flipped - s * 0.5, flipped, n_resamples=20) for s in (1.0, -1.0))
        assert (perfect.precision, perfect.average_precision, perfect.auc) == pytest.approx((1, 1, 1))
        assert perfect.interval.low == perfect.interval.high == 1
        assert perfect.found[-1] == 1
        assert perfect.roc == (1.0,) * 101
        assert (worst.precision, worst.auc, worst.found[-1]) == pytest.approx((0, 0, 0))

    def test_a_ranking_that_says_nothing_gets_the_rate_wherever_the_flips_lie(self):
        for flipped in (np.arange(N) < 20, np.arange(N) >= N - 20):
            result = mislabel(np.zeros(N), flipped, n_resamples=0)
            assert result.precision == pytest.approx(result.rate) == pytest.approx(0.25)
            assert result.auc == pytest.approx(0.5)
            assert result.found == pytest.approx(INSPECTED)
            np.testing.assert_allclose(result.roc, ROC_GRID)

    def test_random_scores_get_the_rate(self, flipped):
        generator = np.random.default_rng(3)
        result = mislabel(list(generator.standard_normal((300, N))), flipped, n_resamples=0)
        assert result.precision == pytest.approx(0.25, abs=0.02)
        assert result.auc == pytest.approx(0.5, abs=0.02)

    @pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
    def test_ties_are_the_mean_over_all_their_orders(self, m):
        scores = np.array([2.0, 1.0, 1.0, 1.0, 0.0, 0.0])
        flipped = np.array([False, True, False, True, False, True])
        result = mislabel(scores, flipped, m=m, n_resamples=0)
        hits, precisions = [], []
        for order in permutations(range(6)):
            if all(a <= b for a, b in zip(-scores[list(order)], -scores[list(order[1:])], strict=False)):
                ordered = flipped[list(order)]
                hits.append(ordered[:m].sum())
                places = np.flatnonzero(ordered)
                precisions.append(np.mean((np.arange(3) + 1) / (places + 1)))
        assert len(hits) == 12
        assert result.precision == pytest.approx(np.mean(hits) / m)
        assert result.recall == pytest.approx(np.mean(hits) / 3)
        assert result.average_precision == pytest.approx(np.mean(precisions))
        assert result.auc == pytest.approx(roc_auc_score(flipped, scores))
        assert expected_hits(scores, flipped, m) == pytest.approx(np.mean(hits))

    def test_order_and_monotone_maps_do_not_matter(self, scores, flipped):
        rows = np.random.default_rng(2).permutation(N)
        one = mislabel(scores, flipped, n_resamples=0).to_dict()
        assert mislabel(scores[rows], flipped[rows], n_resamples=0).to_dict() == one
        assert mislabel(np.exp(scores), flipped, n_resamples=0).to_dict() == one

    def test_models_may_have_flips_of_their_own(self, scores, flipped):
        other = np.roll(flipped, 7)
        result = mislabel([scores, scores], np.stack([flipped, other]), n_resamples=0)
        alone = [mislabel(scores, f, n_resamples=0) for f in (flipped, other)]
        assert result.per_model == tuple(r.precision for r in alone)
        assert result.auc == pytest.approx(np.mean([r.auc for r in alone]))
        both = mislabel(torch.tensor(np.stack([scores, scores]), requires_grad=True), flipped, n_resamples=0)
        assert both.per_model == (alone[0].precision,) * 2

    def test_the_interval_is_the_bootstrap_written_out(self, scores, flipped):
        result = mislabel(scores, flipped, n_resamples=40, seed=4)
        generator = np.random.default_rng(4)
        for r in range(40):
            rows = generator.integers(0, N, size=N)
            sample = mislabel(scores[rows], flipped[rows], n_resamples=0)
            assert result.draws[r, 0] == pytest.approx(sample.precision)
        low, high = np.quantile(result.draws[:, 0], [0.025, 0.975])
        assert (result.interval.low, result.interval.high) == pytest.approx((low, high))
        assert result.interval_auc.low < result.auc < result.interval_auc.high
        assert result.interval_average_precision.low < result.average_precision

    def test_samples_of_flipped_or_of_other_labels_alone_are_left_out(self):
        result = mislabel(np.array([0.0, 1.0]), np.array([True, False]), n_resamples=200)
        drawn = np.isfinite(result.draws[:, 0])
        assert 60 < drawn.sum() < 140  # half of them
        assert not result.draws[drawn].any()
        assert (result.interval.low, result.interval.high) == (0, 0)

    def test_result_is_read_at_a_glance_and_written_as_json(self, scores, flipped):
        result = mislabel(scores, flipped, n_resamples=10)
        assert repr(result).startswith(f"Precision {result.precision:.3f} [{result.interval.low:.3f}, ")
        assert "(chance 0.250)" in repr(result)
        read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert read["m"] == [20]
        assert "draws" not in read

    def test_what_is_wrong_is_said(self, scores, flipped):
        with pytest.raises(ValueError, match="`scores` must be finite; got 1 values that are not"):
            mislabel(np.where(np.arange(N) == 3, np.nan, scores), flipped)
        with pytest.raises(ValueError, match=r"`scores` must have shape \(80,\) for each model; got \(79,\)"):
            mislabel(scores[1:], flipped)
        with pytest.raises(ValueError, match="`scores` must hold one vector for each attributed model"):
            mislabel([], flipped)
        with pytest.raises(ValueError, match="`flipped` must be boolean"):
            mislabel(scores, flipped.astype(int))
        with pytest.raises(ValueError, match="`flipped` must hold flipped and unflipped labels"):
            mislabel(scores, np.zeros(N, dtype=bool))
        with pytest.raises(ValueError, match=r"`m` must be in \[1, 80\]; got 81"):
            mislabel(scores, flipped, m=81)
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0"):
            mislabel(scores, flipped, n_resamples=-1)


@pytest.fixture(scope="module")
def task():
    settings = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=12, batch_size=16)
    train, test = planted_classes(120, seed=1, noise=0.3), planted_classes(40, seed=2, noise=0.3)
    return Task("planted", train, test, MLP, settings)


class Oracle(Similarity):
    """Knows the clean labels of the planted task."""

    clean = None

    def mislabel_scores(self):
        return (self.train_dataset.tensors[1] != self.clean).float()


def build(cls, **fixed):
    return lambda model, data, options: cls(model, data, **fixed, **options)


class TestRuns:
    def test_the_noise_is_in_the_training_labels_alone(self, task):
        noisy, flipped = flipped_task(task, 0.2, seed=5)
        x, y = noisy.train.tensors
        assert torch.equal(x, task.train.tensors[0])
        assert noisy.test is task.test
        np.testing.assert_array_equal((y != task.train.tensors[1]).numpy(), flipped)
        assert (flipped.sum(), y.dtype, noisy.n_train) == (24, torch.int64, 120)
        assert noisy.name == "planted, 20% symmetric flips"

    def test_the_mean_influence_does_not_depend_on_batches(self, task, monkeypatch):
        model = train_attributed(task, 0)
        method = STRIDE(model, task.train).fit()
        whole = np.asarray(method.influence(task.test.tensors, response="margin", target="label"))
        monkeypatch.setattr("stride_captum.evaluation.comparison.runs.mislabel._HELD_OUT_BATCH", 7)
        found, rounding = held_out_influence(method, task.test.tensors), 1e-6 * float(np.abs(whole).max())
        np.testing.assert_allclose(found, whole.astype(np.float64).mean(0), rtol=0, atol=rounding)

    @pytest.mark.slow
    def test_methods_and_detectors_find_planted_flips(self, task, tmp_path):
        Oracle.clean = task.train.tensors[1]
        rows = measure_mislabel(
            task,
            {"STRIDE": build(STRIDE), "Random": build(Random), "Oracle": build(Oracle)},
            detectors={
                "loss": lambda model, data: torch.nn.functional.cross_entropy(
                    model(data.tensors[0]), data.tensors[1], reduction="none"
                )
            },
            store=tmp_path,
            n_models=2,
            n_resamples=30,
        )
        figures = {(row.name, row.ranking): row.result.precision for row in rows}
        ways = ["self-influence", "held-out influence"]
        assert list(figures) == [
            ("STRIDE", ways[0]),
            ("STRIDE", ways[1]),
            ("STRIDE", "mislabel scores"),
            ("Random", ways[0]),
            ("Random", ways[1]),
            ("Oracle", ways[0]),
            ("Oracle", ways[1]),
            ("Oracle", "mislabel scores"),
            ("loss", "detector"),
        ]
        assert figures["Oracle", "mislabel scores"] == 1
        assert figures["loss", "detector"] > 0.8
        assert min(figures["STRIDE", way] for way in ways) > 0.6
        assert figures["Random", "self-influence"] < 0.4
        assert [row.uses_influence for row in rows] == [True] * 8 + [False]
        assert rows[-1].fit_seconds == 0 < rows[0].fit_seconds
        assert all(len(row.result.per_model) == 2 and row.ranking_seconds > 0 for row in rows)
        assert json.loads(json.dumps(rows[0].to_dict()))["result"]["m"] == [12, 12]
        assert len(list(tmp_path.glob("attributed-*"))) == 2

    @pytest.mark.slow
    def test_options_reach_the_method(self, task):
        rows = [
            measure_mislabel(
                replace(task, training=replace(task.training, epochs=1)),
                {"Random": build(Random)},
                options={"Random": {"seed": s}},
                n_resamples=0,
            )[0].result.auc
            for s in (1, 1, 2)
        ]
        assert rows[0] == rows[1] != rows[2]

    def test_what_is_wrong_is_said(self, task):
        with pytest.raises(ValueError, match=r"`detectors` must have names of their own; got \['a'\]"):
            measure_mislabel(task, {"a": build(Random)}, detectors={"a": lambda m, d: None})
        with pytest.raises(ValueError, match="`n_models` must be at least 1"):
            measure_mislabel(task, {}, n_models=0)
