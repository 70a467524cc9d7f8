from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import MLP, planted_classes

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, Random
from stride_captum.evaluation.comparison.runs.counterfactual import measure_counterfactual
from stride_captum.evaluation.comparison.runs.removal_plan import cost, counterfactual_plan
from stride_captum.evaluation.measures.counterfactual_difference import (
    difference,
    difference_at_equal_depletion,
)
from stride_captum.evaluation.measures.counterfactual_drop import (
    class_depletion,
    counterfactual,
    probabilities,
    removals,
    resolve_counts,
)
from stride_captum.evaluation.measures.statistics import t_interval
from stride_captum.evaluation.retraining.attributed_models import train_attributed
from stride_captum.evaluation.retraining.training import logits_of, train_model
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task
from stride_captum.subsets import members

N_SEEDS, N_TEST = 3, 5


@pytest.fixture
def intact():
    return np.random.default_rng(0).uniform(0.6, 1, size=(N_SEEDS, N_TEST))


@pytest.fixture
def removed(intact):
    factors = np.random.default_rng(1).uniform(0, 1, size=(2, 3, N_SEEDS, N_TEST))
    return intact * np.sort(factors, axis=1)[:, ::-1]


@pytest.fixture
def shares():
    return np.sort(np.random.default_rng(2).uniform(0, 1, size=(2, 3, N_TEST)), axis=1)


@pytest.fixture
def result(intact, removed, shares):
    return counterfactual(intact, removed, shares, counts=(2, 4, 8), n_resamples=100)


class TestRemovals:
    scores = np.random.default_rng(0).standard_normal((4, 30))

    @pytest.mark.parametrize("opponents", [False, True])
    def test_they_are_the_strongest_and_hold_those_of_smaller_counts(self, opponents):
        found = removals(self.scores, [1, 5, 0.5], opponents)
        assert [rows.shape for rows in found] == [(4, 1), (4, 5), (4, 15)]
        order = np.argsort(self.scores, axis=1)
        for rows in found:
            k = rows.shape[1]
            strongest = order[:, :k] if opponents else order[:, ::-1][:, :k]
            np.testing.assert_array_equal(rows, strongest)
            np.testing.assert_array_equal(rows, found[-1][:, :k])

    @pytest.mark.parametrize("opponents", [False, True])
    def test_ties_are_in_a_seeded_random_order_whatever_the_order_of_the_data(self, opponents):
        classes, scores = np.repeat(np.arange(4), 50), np.zeros((40, 200))
        few, many = removals(scores, [20, 50], opponents)
        np.testing.assert_array_equal(few, many[:, :20])
        assert all(len(set(row)) == 50 for row in many.tolist())
        share = np.bincount(classes[many].ravel(), minlength=4) / many.size
        assert np.abs(share - 0.25).max() < 4 * (0.25 * 0.75 / many.size) ** 0.5
        again, other = (removals(torch.zeros(40, 200), [50], opponents, seed=s)[0] for s in (0, 1))
        np.testing.assert_array_equal(again, many)
        assert not np.array_equal(other, many)

    def test_ties_do_not_mix_with_others(self):
        scores = np.repeat([3.0, 2.0, 1.0], 5)[None]
        assert set(removals(scores, [7])[0][0, :5]) == set(range(5))
        assert set(removals(scores, [7], opponents=True)[0][0, :5]) == set(range(10, 15))

    def test_counts_are_numbers_or_shares(self):
        assert resolve_counts([1, np.float32(0.1), np.int64(30), 0.5], 200) == (1, 20, 30, 100)
        for wrong in ([0], [200], [1.5], [True], [0.001]):
            with pytest.raises(ValueError, match=r"`counts` must be integers in \[1, 200\) or shares in"):
                resolve_counts(wrong, 200)
        for wrong in ([], [5, 5], [20, 0.1], [9, 3]):
            with pytest.raises(ValueError, match=r"`counts` must increase \(here of 200 examples\)"):
                resolve_counts(wrong, 200)

    def test_what_is_wrong_is_said(self):
        with pytest.raises(ValueError, match=r"`scores` must have shape \(n_test, n_train\); got \(30,\)"):
            removals(self.scores[0], [1])
        with pytest.raises(ValueError, match="`scores` must be finite; got 120 values that are not"):
            removals(self.scores * np.nan, [1])

    def test_depletion_is_the_share_of_the_class_that_is_gone(self):
        train = np.array([0, 0, 0, 0, 1, 1])
        found = class_depletion([[[4], [4]], [[0, 5, 1], [4, 5, 0]]], train, [0, 1])
        assert found.tolist() == [[0, 0.5], [0.5, 1]]
        assert np.isnan(class_depletion([[[0]]], train, [2])).all()


class TestFigures:
    def test_probabilities_are_those_of_softmax(self):
        logits = np.random.default_rng(0).standard_normal((2, 3, N_TEST, 4))
        labels = np.array([0, 1, 2, 3, 0])
        e = np.exp(logits)
        expected = (e / e.sum(-1, keepdims=True))[..., np.arange(N_TEST), labels]
        np.testing.assert_allclose(probabilities(logits, labels), expected)
        np.testing.assert_allclose(probabilities(torch.tensor(logits), torch.tensor(labels)), expected)

    def test_the_drop_is_against_the_intact_model_of_the_same_seed(self, intact, removed, shares, result):
        for c in range(3):
            literal = [
                intact[s, t] - removed[m, c, s, t]
                for m in range(2)
                for s in range(N_SEEDS)
                for t in range(N_TEST)
            ]
            assert result.drop[c] == pytest.approx(np.mean(literal))
            assert result.depletion[c] == pytest.approx(shares[:, c].mean())
            assert result.intervals[c].low < result.drop[c] < result.intervals[c].high
        one = counterfactual(intact, removed[0], shares[0], counts=(2, 4, 8), n_resamples=0)
        np.testing.assert_array_equal(one.drops, result.drops[:1])
        assert one.intervals is None

    def test_nothing_removed_drops_nothing_and_everything_drops_all(self, intact, shares):
        same = counterfactual(intact, np.stack([intact] * 3), shares[0], counts=(2, 4, 8))
        assert same.drop == (0, 0, 0)
        gone = counterfactual(intact, np.zeros((3, N_SEEDS, N_TEST)), shares[0], counts=(2, 4, 8))
        assert gone.drop == pytest.approx((intact.mean(),) * 3)
        assert gone.intervals[0].low < intact.mean() < gone.intervals[0].high

    def test_the_interval_is_students_of_the_mean_over_models(self, result):
        for c in range(3):
            assert result.intervals[c] == t_interval(result.drops.mean(0)[c], result.drop[c])

    @pytest.mark.parametrize("counts", [(4, 2), (0, 4), (4, 4), (-2, 4), (2.5, 4), (True, 4)])
    def test_counts_that_no_evaluation_has_are_refused(self, counts):
        with pytest.raises(
            ValueError, match=r"`counts` must be (increasing numbers|an integer of at least 1)"
        ):
            counterfactual([[0.9]], [[[0.6]], [[0.5]]], [[0.5], [0.6]], counts=counts)

    def test_result_is_read_at_a_glance_and_written_as_json(self, result, intact, removed, shares):
        assert repr(result).startswith("Drop (proponents removed) k=2: ")
        assert f"k=8: {result.drop[2]:.3f} {result.intervals[2]} at depletion" in repr(result)
        other = counterfactual(intact, removed, shares, counts=(2, 4, 8), opponents=True, n_resamples=0)
        assert repr(other).startswith(f"Drop (opponents removed) k=2: {other.drop[0]:.3f} at depletion")
        read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        np.testing.assert_allclose(read["drops"], result.drops.mean(2))
        assert (read["n_seeds"], read["counts"]) == (3, [2, 4, 8])

    def test_what_is_wrong_is_said(self, intact, removed, shares):
        with pytest.raises(
            ValueError, match=r"`removed` must have shape \(n_models, 2, n_seeds, n_test\) bes"
        ):
            counterfactual(intact, removed, shares, counts=(2, 4))
        with pytest.raises(ValueError, match="`removed` must have shape"):
            counterfactual(intact[0], removed, shares, counts=(2, 4, 8))
        with pytest.raises(ValueError, match=r"`depletions` must have shape \(n_models, n_counts, n_test\)"):
            counterfactual(intact, removed, shares[0], counts=(2, 4, 8))
        with pytest.raises(ValueError, match="`intact` must hold probabilities; got a value outside"):
            counterfactual(intact + 1, removed, shares, counts=(2, 4, 8))
        with pytest.raises(ValueError, match="`removed` must be finite"):
            counterfactual(intact, removed * np.nan, shares, counts=(2, 4, 8))
        with pytest.raises(ValueError, match="`n_resamples` must be at least 0"):
            counterfactual(intact, removed, shares, counts=(2, 4, 8), n_resamples=-1)


class TestDifferences:
    def test_equal_counts_are_paired(self, result, intact, removed, shares):
        other = counterfactual(intact, removed - 0.1 * removed, shares, counts=(2, 4, 8), n_resamples=0)
        gap = difference(other, result, n_resamples=100)
        assert gap.value == pytest.approx([b - a for a, b in zip(result.drop, other.drop, strict=True)])
        nothing = difference(result, result, n_resamples=50)
        assert nothing.value == (0, 0, 0)
        assert all(i.low == i.high == 0 for i in nothing.intervals)
        assert gap.undefined == (0, 0, 0)
        assert json.loads(json.dumps(gap.to_dict(), allow_nan=False))["counts"] == [2, 4, 8]

    def curve(self, intact, depletions, slopes, counts=(2, 4, 8)):
        """A result whose drop is `slopes * depletion` at every seed and test point."""
        drops = slopes * depletions[:, :, None, :] * np.ones((1, 1, N_SEEDS, 1))
        return counterfactual(intact, intact - drops, depletions, counts=counts, n_resamples=0)

    def test_a_method_that_only_empties_the_class_gains_nothing_at_equal_depletion(self, intact, shares):
        slopes = np.random.default_rng(0).uniform(0.2, 0.5, size=(1, 1, N_SEEDS, N_TEST))
        full = np.maximum(shares, np.linspace(0.4, 1, 3)[None, :, None])
        full[:, -1] = 1
        reference = self.curve(intact, full, slopes)
        same = self.curve(intact, shares, slopes)
        gap = difference_at_equal_depletion(same, reference, n_resamples=50)
        assert gap.value == pytest.approx((0, 0, 0), abs=1e-12)
        assert (gap.intervals[0].low, gap.intervals[0].high) == pytest.approx((0, 0), abs=1e-12)
        plain = difference(same, reference, n_resamples=0)
        assert max(plain.value[:2]) < 0
        better = self.curve(intact, shares, slopes * 1.5)
        expected = (0.5 * slopes * shares[:, :, None]).mean((0, 2, 3))
        np.testing.assert_allclose(difference_at_equal_depletion(better, reference).value, expected)

    def test_the_curve_is_straight_between_its_points(self, intact):
        reference = counterfactual(
            intact,
            intact - np.array([0.1, 0.5])[:, None, None],
            np.full((2, N_TEST), [[0.2], [0.6]]),
            counts=(2, 6),
        )
        drops = np.zeros((4, N_SEEDS, N_TEST))
        depletions = np.full((4, N_TEST), [[0.0], [0.1], [0.3], [0.6]])
        gap = difference_at_equal_depletion(
            counterfactual(intact, intact - drops, depletions, counts=(1, 2, 3, 4)), reference
        )
        assert gap.value == pytest.approx((0, -0.05, -0.2, -0.5))

    def test_beyond_the_curve_nothing_is_said(self, intact):
        def at(depletion, drop):
            return counterfactual(intact, (intact - drop)[None], np.full((1, N_TEST), depletion), counts=(2,))

        gap = difference_at_equal_depletion(at(0.5, 0.3), at(0.4, 0.3))
        assert np.isnan(gap.value[0])
        assert gap.undefined == (N_TEST,)
        assert gap.to_dict()["value"] == [None]
        assert np.isnan(difference_at_equal_depletion(at(0.5, 0.3), at(np.nan, 0.3)).value[0])

    def test_an_emptied_class_is_compared_with_the_smallest_count_that_empties_it(self, intact):
        def of(drops):
            drops = np.array(drops)[:, None, None]
            return counterfactual(intact, intact - drops, np.ones((2, N_TEST)), counts=(20, 40))

        assert difference_at_equal_depletion(of([0.4, 0.5]), of([0.3, 0.1])).value == pytest.approx(
            (0.1, 0.2)
        )

    def test_what_is_wrong_is_said(self, result, intact, removed, shares):
        two = counterfactual(intact, removed[:, :2], shares[:, :2], counts=(2, 4), n_resamples=0)
        with pytest.raises(ValueError, match=r"`a and b` must remove the same counts; got \(2, 4\) and"):
            difference(two, result)
        one = counterfactual(intact, removed[0], shares[0], counts=(2, 4, 8), n_resamples=0)
        with pytest.raises(ValueError, match="`a and b` must have the same models, seeds and test points"):
            difference(one, result)
        other = counterfactual(intact, removed, shares, counts=(2, 4, 8), opponents=True, n_resamples=0)
        with pytest.raises(ValueError, match="`a and b` must both remove proponents or both opponents"):
            difference(other, result)
        with pytest.raises(
            ValueError, match=r"`a` must be a result of removing proponents; .* at equal counts"
        ):
            difference_at_equal_depletion(other, other)


SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.02, epochs=6, batch_size=16)


@pytest.fixture(scope="module")
def task():
    train, test = planted_classes(60, seed=1, noise=0.5), planted_classes(20, seed=2, noise=0.5)
    return Task("planted", train, test, MLP, SETTINGS)


@pytest.fixture(scope="module")
def models(task):
    return {f"seed {s}": train_attributed(task, s) for s in range(2)}


def runs_in(store):
    """The files of a store with the times they were written."""
    return {path.name: path.stat().st_mtime_ns for path in store.glob("run-*")}


def build(cls):
    return lambda model, data, options: cls(model, data, **options)


METHODS = {"STRIDE": build(STRIDE), "ClassRandom": build(ClassRandom), "Random": build(Random)}
FEW = {"counts": (2, 0.2), "test_points": (4, 1), "n_seeds": 2, "n_jobs": 1, "n_resamples": 20}


class TestPlan:
    def test_sets_that_coincide_are_trained_once_and_the_first_is_intact(self, task, tmp_path):
        one = [np.array([[3, 1], [2, 5]]), np.array([[3, 1, 0], [2, 5, 4]])]
        two = [np.array([[1, 3], [7, 8]]), np.array([[1, 3, 9], [0, 1, 3]])]
        plan, places = counterfactual_plan(task, {"a": one, "b": two}, [0, 1], n_seeds=2, store=tmp_path)
        assert places["a"].tolist() == [[1, 2], [3, 4]]
        assert places["b"].tolist() == [[1, 5], [6, 3]]
        assert members(plan.membership, 0).tolist() == list(range(60))
        assert members(plan.membership, 6).tolist() == [i for i in range(60) if i not in (1, 3, 9)]
        assert plan.membership.shape[0] == 7
        assert plan.n_test == 2

    def test_all_runs_of_a_seed_start_alike(self, task, tmp_path):
        plan, _ = counterfactual_plan(task, {"a": [np.array([[3, 1]])]}, [0], n_seeds=2, store=tmp_path)
        assert plan.common_seeds

    def test_the_cost_is_told_before_anything_runs(self, task):
        few = {"counts": (2, 4), "n_seeds": 2, "n_jobs": 1}
        told = cost(task, n_methods=3, n_test=5, n_models=2, **few)
        assert told.n_missing == told.n_runs == (3 * 2 * 5 * 2 + 1) * 2
        assert told.seconds > 0
        assert cost(task, n_methods=1, n_test=1, **few).n_runs == 3 * 2
        with pytest.raises(ValueError, match="`counts` must increase"):
            cost(task, n_methods=3, counts=(4, 2), n_test=5, n_seeds=2)


class TestRuns:
    @pytest.mark.slow
    def test_rows_are_the_figures_written_out(self, task, models, tmp_path):
        rows = {r.name: r for r in measure_counterfactual(task, METHODS, models, store=tmp_path, **FEW)}
        (x, y), (x_test, y_test) = task.train.tensors, task.test.tensors
        drops, changes = np.empty((2, 2, 2, 2)), np.empty((2, 2))
        row = rows["STRIDE"]
        for m, model in enumerate(models.values()):
            scores = STRIDE(model, task.train).influence((x_test[[4, 1]], y_test[[4, 1]]))
            for c, k in enumerate((2, 12)):
                for t, point in enumerate((4, 1)):
                    gone = scores[t].argsort(descending=True)[:k]
                    kept = torch.tensor([i for i in range(60) if i not in gone])
                    share = (y[gone] == y_test[point]).sum() / (y == y_test[point]).sum()
                    assert row.result.depletions[m, c, t] == pytest.approx(share.item())
                    changes[m, c] = -scores[t, gone].sum()
                    for s in range(2):
                        p = [
                            logits_of(
                                train_model(MLP, x[rows], y[rows], SETTINGS, 1_000_003 * (s + 1)),
                                x_test,
                            )[point].softmax(0)[y_test[point]]
                            for rows in (torch.arange(60), kept)
                        ]
                        drops[m, c, s, t] = p[0] - p[1]
        np.testing.assert_allclose(row.result.drops, drops, atol=1e-5)
        assert row.result.counts == (2, 12)
        assert row.against_reference.value[1] == pytest.approx(
            row.result.drop[1] - rows["ClassRandom"].result.drop[1]
        )
        assert row.at_equal_depletion.undefined == (0, 0)
        reference = rows["ClassRandom"]
        assert reference.against_reference is reference.at_equal_depletion is None
        assert rows["ClassRandom"].result.depletion[1] > rows["Random"].result.depletion[1]
        assert row.calibration.n_seeds == 2
        assert len(row.calibration.per_count) == 2
        read = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert read["cost"]["n_queries"] == 2

    @pytest.mark.slow
    def test_calibration_compares_changes_of_the_margin(self, task, models, tmp_path, monkeypatch):
        seen = {}
        name = "stride_captum.evaluation.comparison.runs.counterfactual.calibration_of_removals"

        def spy(predicted, measured, **options):
            seen.update(predicted=predicted, measured=measured)
            return None

        monkeypatch.setattr(name, spy)
        measure_counterfactual(task, {"Random": build(Random)}, models, store=tmp_path, **FEW)
        (x, y), (x_test, y_test) = task.train.tensors, task.test.tensors
        scores = Random(models["seed 1"], task.train).influence((x_test[[4, 1]], y_test[[4, 1]]))
        top = scores[1].topk(2)
        assert seen["predicted"][1, 0, 1] == pytest.approx(-top.values.sum().item(), rel=1e-6)
        kept = torch.tensor([i for i in range(60) if i not in top.indices])
        margins = []
        for rows in (kept, torch.arange(60)):
            z = logits_of(train_model(MLP, x[rows], y[rows], SETTINGS, 1_000_003), x_test)[1]
            others = z[torch.arange(3) != y_test[1]]
            margins.append((z[y_test[1]] - others.logsumexp(0)).item())
        assert seen["measured"].shape == (2, 2, 2, 2)
        assert seen["measured"][1, 0, 0, 1] == pytest.approx(margins[0] - margins[1], abs=1e-4)

    @pytest.mark.slow
    def test_a_second_call_retrains_nothing_and_more_points_keep_what_is_done(self, task, models, tmp_path):
        few = {**FEW, "n_seeds": 1}
        # Random scores do not depend on the model: both ask for the same sets.
        methods = {"Random": build(Random)}
        one = measure_counterfactual(task, methods, models, store=tmp_path, **few)
        first = runs_in(tmp_path)
        assert len(first) == 2 * 2 + 1
        two = measure_counterfactual(task, methods, models, store=tmp_path, **few)
        assert runs_in(tmp_path) == first
        assert one[0].result.drop == two[0].result.drop
        measure_counterfactual(task, methods, models, store=tmp_path, **{**few, "test_points": (1, 2, 4)})
        more = runs_in(tmp_path)
        assert len(more) == 5 + 2
        assert first.items() <= more.items()

    @pytest.mark.slow
    def test_stacked_retrainings_give_the_same_figures(self, task, models, tmp_path):
        model = {"seed 0": models["seed 0"]}
        one, two = (
            measure_counterfactual(task, {"Random": build(Random)}, model, store=tmp_path, engine=e, **FEW)
            for e in ("processes", "stacked")
        )
        np.testing.assert_allclose(one[0].result.drops, two[0].result.drops, atol=1e-3)

    @pytest.mark.slow
    def test_removing_opponents_of_the_planted_kind_raises_the_probability(self, task, tmp_path):
        x, y = (t.clone() for t in task.train.tensors)
        y[:18] = (y[:18] + 1) % 3
        noisy = replace(task, train=torch.utils.data.TensorDataset(x, y))

        class Oracle(Random):
            """Scores the wrong labels lowest."""

            def score_columns(self, state, prepared, columns):
                places = torch.arange(columns.start, columns.stop)
                return (places >= 18).float().expand(len(prepared.keys), -1)

        models = {"seed 0": train_attributed(noisy, 0)}
        points = [int(i) for i in range(6)]
        (row,) = measure_counterfactual(
            noisy,
            {"Oracle": build(Oracle)},
            models,
            store=tmp_path,
            counts=(18,),
            test_points=points,
            n_seeds=2,
            n_jobs=1,
            opponents=True,
            n_resamples=0,
        )
        assert row.result.drop[0] < -0.05
        assert row.at_equal_depletion is None

    def test_what_is_wrong_is_said(self, task, models, tmp_path):
        for points in ([], [1, 1], [20], [-1]):
            with pytest.raises(ValueError, match=r"`test_points` must be distinct places in \[0, 20\)"):
                measure_counterfactual(task, METHODS, models, store=tmp_path, test_points=points)
