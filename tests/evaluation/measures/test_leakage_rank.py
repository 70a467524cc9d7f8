from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from planted import MLP, BatchNormCNN, planted_classes
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import Random, Similarity
from stride_captum.evaluation.comparison.runs.leakage import answer_if_defined, measure_leakage, plant
from stride_captum.evaluation.comparison.shared.score_cache import CachedMethod
from stride_captum.evaluation.measures.leakage_rank import KINDS, leakage, near_duplicate
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task

N_PLANTED, N_TRAIN = 6, 40
SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=8, batch_size=16)


@pytest.fixture
def positions():
    return np.arange(N_TRAIN - N_PLANTED, N_TRAIN)


@pytest.fixture
def scores():
    return np.random.default_rng(0).standard_normal((N_PLANTED, N_TRAIN))


def task_of(network, n=60):
    train, test = (planted_classes(n, network.shape, seed=s) for s in (1, 2))
    return Task("planted", train, test, network, SETTINGS)


class TestFigures:
    def test_without_ties_the_rank_is_the_place_in_the_order(self, scores, positions):
        result = leakage(scores, positions, ks=(1, 3), n_resamples=0)
        order = np.argsort(-scores, axis=1)
        expected = [order[j].tolist().index(positions[j]) for j in range(N_PLANTED)]
        assert result.ranks.tolist() == [expected]
        assert result.mean_rank == pytest.approx(np.mean(expected))
        assert result.sd_rank == pytest.approx(np.std(expected, ddof=1))
        assert result.median_rank == np.median(expected)
        assert result.top1 == np.mean(np.array(expected) == 0)
        for k in (1, 3):
            assert result.rates[k] == pytest.approx(np.isin(order[:, :k], positions).mean())

    def test_the_extremes(self, scores, positions):
        own = np.arange(N_PLANTED), positions
        scores[own] = 9
        best = leakage(scores, positions, n_resamples=20)
        assert (best.mean_rank, best.sd_rank, best.top1, best.rates) == (0, 0, 1, {1: 1.0})
        assert (best.interval.low, best.interval.high) == (0, 0)
        scores[own] = -9
        worst = leakage(scores, positions, n_resamples=0)
        assert (worst.mean_rank, worst.top1) == (N_TRAIN - 1, 0)

    def test_equal_scores_are_in_random_order(self, positions):
        result = leakage(np.zeros((N_PLANTED, N_TRAIN)), positions, ks=(1, 5), n_resamples=0)
        assert result.mean_rank == result.chance_rank == 19.5
        assert result.top1 == pytest.approx(1 / N_TRAIN)
        assert result.rates == pytest.approx({1: N_PLANTED / N_TRAIN, 5: N_PLANTED / N_TRAIN})
        scores = np.zeros((N_PLANTED, N_TRAIN))
        scores[:, :2] = 1
        scores[np.arange(N_PLANTED), positions] = 1
        tied = leakage(scores, positions, n_resamples=0)
        assert (tied.mean_rank, tied.top1) == pytest.approx((1, 1 / 3))

    def test_random_scores_are_at_chance(self):
        scores = np.random.default_rng(1).standard_normal((300, 400))
        result = leakage(scores, np.arange(100, 400), n_resamples=100)
        assert result.interval.low < result.chance_rank < result.interval.high
        assert result.sd_rank == pytest.approx(400 / np.sqrt(12), rel=0.05)

    def test_models_are_ranked_alone(self, scores, positions):
        other = -scores
        both = leakage([scores, torch.tensor(other)], positions, n_resamples=0)
        assert both.ranks.shape == (2, N_PLANTED)
        np.testing.assert_array_equal(both.ranks.sum(0), N_TRAIN - 1)
        alone = [leakage(s, positions, n_resamples=0).mean_rank for s in (scores, other)]
        assert both.mean_rank == pytest.approx(np.mean(alone))

    def test_the_interval_resamples_test_points(self, scores, positions):
        result = leakage(scores, positions, n_resamples=500, level=0.9, seed=2)
        counts = np.random.default_rng(2).multinomial(N_PLANTED, np.full(N_PLANTED, 1 / N_PLANTED), 500)
        low, high = np.quantile(counts @ result.ranks[0] / N_PLANTED, [0.05, 0.95])
        assert (result.interval.low, result.interval.high) == pytest.approx((low, high))
        assert leakage(scores[:1], positions[:1]).interval is None

    def test_result_is_read_at_a_glance_and_written_as_json(self, scores, positions):
        result = leakage(scores, positions, n_resamples=5)
        assert repr(result) == (
            f"Mean rank {result.mean_rank:.2f} ± {result.sd_rank:.2f} of 40 (chance 20), "
            f"top-1 {result.top1:.2f}"
        )
        read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert read["rates"] == {"1": result.rates[1]}

    def test_copies_that_were_there_before_count_as_found(self):
        scores = np.array([[0.9, 0.9, 0.5, 0.9, 0.1], [0.3, 0.2, 0.1, 0.4, 0.5]])
        alone = leakage(scores, [3, 4], n_resamples=0)
        assert alone.ranks.tolist() == [[1.0, 0.0]]  # behind half of two equal ones
        found = leakage(scores, [3, 4], copies=[[0], []], n_resamples=0)
        assert found.ranks.tolist() == [[1 / 3, 0.0]]  # one other among three equal ones, two of them its own
        assert found.top1 == pytest.approx((2 / 3 + 1) / 2)
        assert found.rates[1] == pytest.approx((2 / 3 + 1) / 2)
        better = leakage(scores, [2, 4], copies=[[0, 1, 3], [3]], n_resamples=0)
        assert better.ranks.tolist() == [[0.0, 0.0]]
        assert better.top1 == 1

    def test_copies_give_the_expected_figures_over_random_orders_of_ties(self):
        scores = np.array([[1.0, 1.0, 1.0, 1.0, 0.0]])
        found = leakage(scores, [0], copies=[[2]], n_resamples=0)
        orders = list(permutations(range(4)))
        assert found.ranks[0, 0] == pytest.approx(np.mean([min(o.index(0), o.index(2)) for o in orders]))
        assert found.top1 == pytest.approx(np.mean([o[0] in (0, 2) for o in orders]))

    def test_what_is_wrong_is_said(self, scores, positions):
        with pytest.raises(
            ValueError, match="`copies` must hold a sequence for each of the 6 test points; got 2"
        ):
            leakage(scores, positions, copies=[[], []])
        with pytest.raises(
            ValueError, match=r"`copies` must hold training indices in \[0, 40\); got \[3, 40\]"
        ):
            leakage(scores, positions, copies=[[3], [40], [], [], [], []])
        with pytest.raises(ValueError, match=r"`scores` must have shape \(6, n_train\) for each model"):
            leakage(scores.T, positions)
        with pytest.raises(ValueError, match=r"`scores` must have shape \(6, n_train\) .*; got \[\]"):
            leakage([], positions)
        with pytest.raises(ValueError, match=r"`positions` must be distinct training indices in \[0, 40\)"):
            leakage(scores, positions + 1)
        with pytest.raises(ValueError, match="`positions` must be distinct"):
            leakage(scores, np.zeros(N_PLANTED, dtype=int))
        with pytest.raises(ValueError, match=r"`ks` must be in \[1, 40\]; got 0"):
            leakage(scores, positions, ks=(0,))
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0"):
            leakage(scores, positions, n_resamples=-1)


class TestPlanting:
    def test_exact_duplicates_are_appended_with_their_labels(self):
        task = task_of(MLP)
        planted = plant(task, 4, seed=1)
        (x, y), (x_test, y_test) = planted.task.train.tensors, task.test.tensors
        assert torch.equal(x[:60], task.train.tensors[0])
        assert torch.equal(x[planted.positions], x_test[planted.test_points])
        assert torch.equal(y[planted.positions], y_test[planted.test_points])
        assert (planted.task.n_train, planted.task.test) == (64, task.test)
        assert planted.positions.tolist() == [60, 61, 62, 63]
        assert planted.task.name == "planted with 4 leaked (exact)"

    @pytest.mark.parametrize("kind", ["exact", "noise"])
    def test_copies_that_were_there_are_found_and_said(self, kind):
        clean = task_of(MLP)
        (x, y), (x_test, y_test) = clean.train.tensors, clean.test.tensors
        assert all(len(copies) == 0 for copies in plant(clean, 5, kind=kind).copies)
        first, second = (int(i) for i in plant(clean, 2).test_points)
        there = TensorDataset(
            torch.cat([x, x_test[[first, second]]]),
            torch.cat([y, torch.stack([y_test[first], (1 + y_test[second]) % 3])]),
        )
        task = replace(clean, train=there)
        planted = plant(task, 2, kind=kind)
        # the other one has another label
        assert [copies.tolist() for copies in planted.copies] == [[60], []]
        with pytest.warns(
            UserWarning, match=r"1 of the 2 test examples that leak were in the training set of"
        ):
            measure_leakage(task, {}, counts=(2,), kinds=(kind,))

    def test_two_leaked_examples_that_are_equal_are_copies_of_one_another(self):
        clean = task_of(MLP)
        x, y = (t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in clean.test.tensors)
        planted = plant(replace(clean, test=TensorDataset(x, y)), 2)
        assert [copies.tolist() for copies in planted.copies] == [[61], [60]]

    def test_fewer_are_the_beginning_of_more(self):
        few, many = (plant(task_of(MLP), n).test_points for n in (3, 20))
        assert many[:3].tolist() == few.tolist()
        assert len(set(many)) == 20

    def test_near_duplicates_differ_as_their_names_say(self):
        x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
        before = x.clone()
        copies = {kind: near_duplicate(x, kind, scale=2.0, seed=1) for kind in KINDS}
        assert torch.equal(copies["exact"], x)
        assert torch.equal(copies["shift"][..., 1:], x[..., :-1])
        assert torch.equal(copies["shift"][..., 0], x[..., 0])
        assert torch.equal(copies["flip"].flip(-1), x)
        torch.testing.assert_close(copies["brightness"] - x, torch.full_like(x, 0.2))
        assert (copies["noise"] - x).std().item() == pytest.approx(0.2, rel=0.15)
        assert torch.equal(copies["noise"], near_duplicate(x, "noise", scale=2.0, seed=1))
        assert torch.equal(x, before)
        assert all(copy.data_ptr() != x.data_ptr() for copy in copies.values())

    @pytest.mark.parametrize("kind", ["noise", "brightness"])
    def test_pictures_of_bytes_stay_bytes(self, kind):
        task = task_of(MLP)
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (400, 1, 4, 4), generator=generator, dtype=torch.uint8)
        data = TensorDataset(x, torch.arange(400) % 3)
        planted = plant(replace(task, train=data, test=data), 300, kind=kind)
        inputs = planted.task.train.tensors[0]
        assert inputs.dtype == torch.uint8
        inside = (x[planted.test_points] > 50) & (x[planted.test_points] < 205)
        changes = (inputs[planted.positions].float() - x[planted.test_points].float())[inside]
        tenth = float(x.float().std()) / 10
        size = changes.mean() if kind == "brightness" else changes.std()
        assert size.item() == pytest.approx(tenth, rel=0.05)

    @pytest.mark.parametrize("kind", ["noise", "brightness"])
    def test_tokens_have_no_noise(self, kind):
        task = task_of(MLP)
        data = TensorDataset(torch.arange(80).reshape(20, 4), torch.arange(20) % 3)
        with pytest.raises(ValueError, match=f"`kind` must be 'exact', .* integers; got '{kind}' for int64"):
            plant(replace(task, train=data, test=data), 1, kind=kind)

    def test_what_is_wrong_is_said(self):
        with pytest.raises(
            ValueError, match="`n_planted` must be between 1 and the 60 test examples; got 61"
        ):
            plant(task_of(MLP), 61)
        with pytest.raises(
            ValueError, match=r"`kind` must be one of 'exact', .*; got 'shfit'. Nearest: 'shift'"
        ):
            plant(task_of(MLP), 1, kind="shfit")
        with pytest.raises(
            ValueError, match="`kind` must be 'exact', 'noise' or 'brightness' for inputs that"
        ):
            plant(task_of(MLP), 1, kind="flip")


def build(cls):
    return lambda model, data, options: cls(model, data, **options)


class TestRuns:
    @pytest.mark.slow
    def test_similarity_finds_exact_duplicates_and_random_does_not(self, tmp_path):
        rows = measure_leakage(
            task_of(MLP),
            {"Similarity": build(Similarity), "STRIDE": build(STRIDE), "Random": build(Random)},
            store=tmp_path,
            counts=(1, 10),
            n_models=2,
            n_resamples=20,
        )
        found = {(row.name, row.n_planted, row.normalize): row.result for row in rows}
        ways = [("Similarity", None), ("Similarity", "cosine"), ("STRIDE", None), ("STRIDE", "cosine")]
        assert list(found) == [(name, n, way) for n in (1, 10) for name, way in [*ways, ("Random", None)]]
        # Cosines of penultimate ReLU features can tie at 1 in float32: near the top, not always first.
        assert found["Similarity", 10, None].mean_rank < 2
        assert found["STRIDE", 10, "cosine"].mean_rank < 3
        assert found["Random", 10, None].mean_rank > 15
        assert list(found["Random", 10, None].rates) == [1, 10]
        assert found["Similarity", 10, None].ranks.shape == (2, 10)
        assert {row.cost.n_queries for row in rows} == {1, 10}
        assert json.loads(json.dumps(rows[0].to_dict()))["kind"] == "exact"
        assert len(list(tmp_path.glob("attributed-*"))) == 4

    @pytest.mark.slow
    def test_images_leak_in_every_way(self):
        rows = measure_leakage(
            task_of(BatchNormCNN, n=24),
            {"Random": build(Random)},
            counts=(2,),
            kinds=KINDS,
            options={"Random": {"seed": 4}},
            n_resamples=0,
        )
        assert [row.kind for row in rows] == list(KINDS)
        assert rows[0].result.n_train == 26

    @pytest.mark.slow
    def test_methods_are_normalised_where_they_can_be_and_other_errors_are_raised(self):
        task = task_of(MLP)
        model, batch = task.build_model(), task.test.tensors

        class Refuses(Similarity):
            def train_norms(self, state):
                raise self.no_norms()

        class Broken(Similarity):
            def train_norms(self, state):
                raise ValueError("`features` must be finite; got NaN.")

        def found(cls, normalize):
            return answer_if_defined(CachedMethod(build(cls), model, task, {}, None, 1.0), batch, normalize)

        assert {cls: found(cls, "cosine") is not None for cls in (Similarity, Random, Refuses)} == {
            Similarity: True, Random: False, Refuses: False
        }  # fmt: skip
        assert found(Random, None) is not None
        with pytest.raises(ValueError, match="`features` must be finite"):
            found(Broken, "cosine")

    def test_there_is_at_least_one_model(self):
        with pytest.raises(ValueError, match="`n_models` must be at least 1; got 0"):
            measure_leakage(task_of(MLP), {}, n_models=0)
