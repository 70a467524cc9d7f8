"""`retrain`: partitions, what is kept on disk, and scores from models that have not seen everything."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from planted import MLP, built, planted_classes
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Checkpoint, ClosedForm, refine
from stride_captum.adapters import TRAK, Similarity
from stride_captum.evaluation import TaskTraining, load_task, retrain
from stride_captum.evaluation.comparison.compare import answer, planned_trainings
from stride_captum.evaluation.comparison.plan import settle
from stride_captum.evaluation.comparison.runs.lds import retrained
from stride_captum.evaluation.comparison.runs.leakage import measure_leakage
from stride_captum.evaluation.comparison.shared.methods import MethodSpec, adapter
from stride_captum.evaluation.comparison.shared.shared import Shared
from stride_captum.evaluation.measures.linear_datamodeling import lds
from stride_captum.evaluation.retraining import attributed_models, task_parts
from stride_captum.evaluation.retraining.attributed_estimates import estimate_cross_fitted
from stride_captum.evaluation.retraining.attributed_models import (
    log_epochs,
    train_attributed,
    train_checkpoints,
)
from stride_captum.evaluation.retraining.cross_fitting import check_apart
from stride_captum.evaluation.retraining.parts import part_trainings
from stride_captum.evaluation.retraining.task_parts import cross_fit, cross_fit_training
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.losses import CrossEntropy
from stride_captum.responses import response_value
from stride_captum.subsets import membership_from_indices, partition, random_subsets

N = 48
X, Y = planted_classes(N, (6,), seed=1).tensors
TEST = planted_classes(7, (6,), seed=2).tensors
CALLS: list[tuple[int, int]] = []


def train(indices, seed):
    """A few steps from scratch."""
    CALLS.append((len(indices), seed))
    model = built(MLP, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[indices]), Y[indices]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


class TestModels:
    def test_each_partition_is_seen_once(self):
        found = retrain(train, N, parts=3, repeats=2, seed=5)
        assert found.membership.shape == (6, N)
        sums = np.asarray(found.membership[:3].sum(axis=0)), np.asarray(found.membership[3:].sum(axis=0))
        assert all((part == 1).all() for part in sums)
        assert [(16, 5 + i) for i in range(6)] == CALLS
        assert found.trainings == 2.0
        for i, checkpoint in enumerate(found.checkpoints):
            assert list(checkpoint.seen) == found.membership[i].indices.tolist()
        assert not np.array_equal(found.membership[0].indices, found.membership[3].indices)

    def test_seeds_that_follow_one_another_share_no_part(self):
        def keys(seed):
            return {job.rows.tobytes() for job in part_trainings(N, 2, 5, seed)}

        assert not any(keys(seed) & keys(seed + 1) for seed in range(20))
        jobs = part_trainings(N, 2, 5, 7)
        fewer = part_trainings(N, 2, 3, 7)
        assert all(np.array_equal(a.rows, b.rows) for a, b in zip(jobs, fewer, strict=False))

    @pytest.mark.parametrize("draw", [np.random.rand, random.random], ids=["NumPy", "random"])
    def test_what_numpy_and_python_draw_follows_the_seed(self, draw):
        def drawn(indices, seed):
            return {"value": torch.tensor(draw())}

        found = []
        for _ in range(2):
            models = retrain(drawn, N, repeats=2, seed=3).checkpoints
            found.append([float(c.weights["value"]) for c in models])
            draw()
        assert found[0] == found[1]
        assert len(set(found[0])) == 4
        before = np.random.get_state()[1].tolist(), random.getstate()
        retrain(drawn, N)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before

    def test_a_training_may_return_checkpoints_along_it(self):
        def along(indices, seed):
            model = train(indices, seed)
            return [built(MLP, seed).state_dict(), model]

        found = retrain(along, N)
        assert found.last == [1, 3]
        assert len(found.checkpoints) == 4
        assert list(found.checkpoints[0].seen) == list(found.checkpoints[1].seen)

    def test_random_states_of_the_caller_are_left_alone_and_trainings_without_a_seed_repeat(self):
        def unseeded(indices, seed):
            return nn.Linear(6, 3)

        torch.manual_seed(3)
        before = torch.get_rng_state()
        one, other = (retrain(unseeded, N, seed=8) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        for a, b in zip(one.checkpoints, other.checkpoints, strict=True):
            assert torch.equal(a.weights["weight"], b.weights["weight"])
        assert not torch.equal(one.checkpoints[0].weights["weight"], one.checkpoints[1].weights["weight"])

    def test_measured_responses_are_those_of_the_last_checkpoints(self):
        found = retrain(train, N, repeats=2)
        network = built(MLP)
        before = copy.deepcopy(network.state_dict())
        measured = found.measured(network, TEST)
        assert measured.shape == (7, 4)
        for i, place in enumerate(found.last):
            network.load_state_dict(found.checkpoints[place].weights)
            with torch.no_grad():
                wanted = response_value(network(TEST[0]), TEST[1], "margin")
            np.testing.assert_allclose(measured[:, i], wanted.double().numpy(), rtol=1e-6)
        network.load_state_dict(before)
        found.measured(network, TEST, "loss")
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.values(), strict=True)
        )


class TestStore:
    def test_what_is_there_is_not_trained_again(self, tmp_path):
        first = retrain(train, N, store=tmp_path)
        CALLS.clear()
        again = retrain(train, N, store=tmp_path)
        assert CALLS == []
        more = retrain(train, N, repeats=2, store=tmp_path)
        assert [seed for _, seed in CALLS] == [2, 3]
        for a, b, c in zip(first.checkpoints, again.checkpoints, more.checkpoints, strict=False):
            assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
            assert all(torch.equal(a.weights[k], c.weights[k]) for k in a.weights)

    def test_a_run_that_is_killed_goes_on(self, tmp_path):
        def fails_at_the_second(indices, seed):
            if seed == 1 and not (tmp_path / "mended").exists():
                raise OSError("no space")
            return train(indices, seed)

        named = r"Training 1, part 2 of 2 with 24 examples and seed 1, failed with OSError: no space"
        with pytest.raises(RuntimeError, match=named):
            retrain(fails_at_the_second, N, store=tmp_path, version="a")
        (tmp_path / "mended").touch()
        CALLS.clear()
        retrain(fails_at_the_second, N, store=tmp_path, version="a")
        assert [seed for _, seed in CALLS] == [1]

    @pytest.mark.parametrize("error", [ValueError("of its own"), TypeError("of its own"), KeyError("key")])
    def test_every_error_of_the_function_names_the_training(self, error):
        def fails(indices, seed):
            if seed == 6:
                raise error
            return nn.Linear(6, 3)

        named = r"Training 2, part 3 of 3 with 16 examples and seed 6, failed with (Value|Type|Key)Error: .*"
        with pytest.raises(RuntimeError, match=named) as raised:
            retrain(fails, N, parts=3, seed=4)
        assert raised.value.__cause__ is error

    def test_a_file_of_something_else_or_of_weights_that_are_not_finite_is_trained_again(self, tmp_path):
        retrain(train, N, store=tmp_path)
        files = sorted((tmp_path / "cross-fitted").iterdir())
        save_file({"weight": torch.zeros(2)}, files[0])
        save_file({"0/weight": torch.full((2,), torch.nan)}, files[1])
        CALLS.clear()
        with pytest.warns(UserWarning, match="it is computed again") as warned:
            retrain(train, N, store=tmp_path)
        said = " ".join(str(w.message) for w in warned)
        assert "is not one of weights along a training" in said
        assert "is not finite" in said
        assert len(CALLS) == 2

    @pytest.mark.parametrize("change", ["seed", "parts", "code", "closure"])
    def test_other_trainings_have_other_names(self, tmp_path, change):
        def of(steps):
            def function(indices, seed):
                CALLS.append((len(indices), seed))
                return nn.Linear(6, 3 + 0 * steps)

            return function

        retrain(of(1), N, store=tmp_path)
        CALLS.clear()
        if change == "code":
            retrain(train, N, store=tmp_path)
        else:
            other = of(2 if change == "closure" else 1)
            options = {"seed": {"seed": 7}, "parts": {"parts": 3}}.get(change, {})
            retrain(other, N, store=tmp_path, **options)
        assert len(CALLS) == (3 if change == "parts" else 2)

    def test_a_version_vouches_for_code(self, tmp_path):
        retrain(train, N, store=tmp_path, version="1")
        CALLS.clear()
        retrain(lambda indices, seed: train(indices, seed), N, store=tmp_path, version="1")
        assert CALLS == []
        retrain(train, N, store=tmp_path, version="2")
        assert len(CALLS) == 2

    def test_a_damaged_file_is_trained_again(self, tmp_path):
        retrain(train, N, store=tmp_path)
        file = sorted((tmp_path / "cross-fitted").iterdir())[0]
        file.write_bytes(file.read_bytes()[:50])
        CALLS.clear()
        with pytest.warns(UserWarning, match="cut off or not a file of weights"):
            retrain(train, N, store=tmp_path)
        assert len(CALLS) == 1


class TestScores:
    def test_a_method_takes_them_as_checkpoints(self):
        found = retrain(train, N)
        data = TensorDataset(X, Y)
        method = STRIDE(built(MLP), data, checkpoints=found.checkpoints)
        scores = method.influence(TEST)
        assert scores.shape == (7, N)
        parts = [STRIDE(built(MLP), data, checkpoints=[c] * 2).influence(TEST) for c in found.checkpoints]
        torch.testing.assert_close(scores, (parts[0] + parts[1]) / 2)

    @pytest.mark.slow
    @pytest.mark.parametrize("build", [STRIDE, Similarity])
    def test_checkpoints_and_models_of_parts_have_half_of_the_weight_each(self, build):
        data, halves = TensorDataset(X, Y), retrain(train, N, parts=4).checkpoints
        along = [{name: (1 + i) * v for name, v in built(MLP).state_dict().items()} for i in (0.0, 0.1)]

        def scores(checkpoints):
            return build(built(MLP), data, checkpoints=checkpoints).influence(TEST)

        wanted = (scores(along) + scores(halves)) / 2
        torch.testing.assert_close(scores([*halves[:2], *along, *halves[2:]]), wanted)

    def test_labels_are_judged_by_the_models_that_have_not_seen_them(self):
        found = retrain(train, N, parts=3)
        flipped = Y.clone()
        flipped[::8] = (flipped[::8] + 1) % 3
        method = STRIDE(built(MLP), TensorDataset(X, flipped), checkpoints=found.checkpoints)
        scores = method.mislabel_scores()
        wanted = torch.zeros(N)
        for checkpoint in found.checkpoints:
            alone = STRIDE(built(MLP), TensorDataset(X, flipped), checkpoints=[checkpoint.weights])
            unseen = torch.ones(N)
            unseen[list(checkpoint.seen)] = 0
            wanted += alone.mislabel_scores() * unseen / 2
        torch.testing.assert_close(scores, wanted)
        whole = STRIDE(
            built(MLP), TensorDataset(X, flipped), checkpoints=[c.weights for c in found.checkpoints]
        )
        assert not torch.allclose(whole.mislabel_scores(), wanted)

    def test_of_each_output_too(self):
        found, data = retrain(train, N).checkpoints, TensorDataset(X, Y)
        every = STRIDE(built(MLP), data, checkpoints=[built(MLP).state_dict(), *found])
        scores = every.mislabel_scores(per_label=True)
        for checkpoint, other in zip(found, found[::-1], strict=True):
            alone = STRIDE(built(MLP), data, checkpoints=[other.weights]).mislabel_scores(per_label=True)
            torch.testing.assert_close(scores[list(checkpoint.seen)], alone[list(checkpoint.seen)])

    @pytest.mark.parametrize("build", [STRIDE, Similarity, TRAK])
    @pytest.mark.slow
    def test_cost_is_known_before(self, build):
        method = build(built(MLP), TensorDataset(X, Y), checkpoints=retrain(train, N).checkpoints)
        assert method.estimate(5).n_train == N

    def test_weights_follow_the_examples_that_are_left(self):
        states = [train(np.arange(n), n).state_dict() for n in (30, 40, N)]
        seen = [None, range(40), None]
        kept = [Checkpoint(state, seen=rows) for state, rows in zip(states, seen, strict=True)]
        how = {"operators": ClosedForm(temperature=2.0)}
        method = STRIDE(built(MLP), TensorDataset(X, Y), checkpoints=kept, **how).fit()
        method.remove_examples(range(40, N))
        wanted = STRIDE(built(MLP), TensorDataset(X[:40], Y[:40]), checkpoints=states, **how).influence(TEST)
        found = method.influence(TEST)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))

    def test_examples_that_every_model_has_seen_are_judged_as_by_one_model(self):
        (one, _) = retrain(train, N).checkpoints
        data = TensorDataset(X, Y)
        found = STRIDE(built(MLP), data, checkpoints=[one]).mislabel_scores()
        wanted = STRIDE(built(MLP), data, checkpoints=[one.weights]).mislabel_scores()
        torch.testing.assert_close(found, wanted)

    def test_they_can_be_refined_by_the_same_models(self):
        found = retrain(train, N, repeats=4)
        scores = STRIDE(built(MLP), TensorDataset(X, Y), checkpoints=found.checkpoints).influence(TEST)
        refined = refine(scores, found.membership, found.measured(built(MLP), TEST))
        assert refined.scores.shape == (7, N)
        assert np.isfinite(float(refined.slope))

    def test_subsets_that_judge_must_not_have_been_used(self):
        used = partition(N, 2, seed=3)
        check_apart(random_subsets(N, 20, N // 2, seed=1), used)
        judge = membership_from_indices([[0, 1, 2], used[1].indices], N)
        with pytest.raises(ValueError, match="`membership` must hold subsets whose models have not entered"):
            check_apart(judge, used)


class TestTasks:
    def test_the_training_of_a_task(self):
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=6)
        task = load_task("synthetic", preset="smoke", training=training)
        whole, along = TaskTraining(task), TaskTraining(task, along=True)
        rows = np.arange(0, task.n_train, 2)
        (last,) = whole(rows, 3)
        states = along(rows, 3)
        assert len(states) == 5  # after epochs 1, 2, 3, 5 and the last
        assert all(torch.equal(states[-1][name], last[name]) for name in last)
        (short,) = TaskTraining(task, epochs=2)(rows, 3)
        assert not torch.equal(
            short["0.weight"] if "0.weight" in short else next(iter(short.values())),
            next(iter(last.values())),
        )
        found = retrain(along, task.n_train)
        assert len(found.checkpoints) == 10


#: With checkpoints at other epochs, and more halves.
FURTHER = (
    "TracIn, 4 checkpoints",
    MethodSpec("two partitions", adapter(Similarity), partitions=2),
)


def counted(train_model, seen):
    def train(*args, **options):
        seen.append(args)
        return train_model(*args, **options)

    return train


class TestComparison:
    ROWS = ("STRIDE", "STRIDE, cross-fitted", "TracIn, cross-fitted", "STRIDE, checkpoints and halves")

    @pytest.mark.slow
    def test_a_row_is_averaged_over_models_of_halves_that_are_trained_as_planned(self, tmp_path):
        task = load_task("synthetic", preset="smoke")
        few = {"n_subsets": 8, "n_seeds": 1, "n_models": 2, "n_test": 12, "store": tmp_path}
        question = settle(self.ROWS, task, measures={"lds": {}}, **few)
        planned = [e for e in planned_trainings(question) if e.purpose == "cross-fitted halves"]
        assert [e.n_missing for e in planned] == [4]
        found = answer(question)
        assert [e.n_missing for e in planned_trainings(question)] == [0, 0, 0, 0]
        folder = tmp_path / "cross-fitted"
        assert len(list(folder.iterdir())) == 4
        rows = {row.name: row for row in found.rows}
        values = [rows[name].lds.per_model for name in self.ROWS]
        assert len({tuple(v) for v in values}) == 4
        apart = [cross_fit(task, number, 1, tmp_path).membership for number in (0, 1)]
        truth = retrained(Shared(question))
        for number, name in enumerate(rows[self.ROWS[-1]].models):
            along = train_checkpoints(task, number, tmp_path, log_epochs(task.training.epochs))
            model = train_attributed(task, number, tmp_path)
            parts = cross_fit(task, number, 1, tmp_path).checkpoints
            every = [*along, model.state_dict(), *parts]
            points = tuple(t[6:12] for t in task.test.tensors)
            scores = STRIDE(model, task.train, checkpoints=every).influence(points)
            assert name == f"seed {number}"
            value = lds([scores.numpy()], truth.membership, truth.reported, n_resamples=0).value
            assert value == pytest.approx(rows[self.ROWS[-1]].lds.per_model[number], abs=1e-6)
        assert not np.array_equal(apart[0][0].indices, apart[1][0].indices)

    @pytest.mark.slow
    @pytest.mark.parametrize("stored", [True, False])
    def test_measures_with_models_of_their_own_train_what_is_planned(self, tmp_path, monkeypatch, stored):
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=5)
        task = load_task("synthetic", preset="smoke", training=training)
        measures = {
            "mislabel": {"n_held_out": 4, "n_models": 2, "detectors": ("confident learning, cross-fitted",)},
            "leakage": {"counts": (3, 5)},
        }
        few = {"n_subsets": 8, "n_test": 12, "store": tmp_path, "n_jobs": 1}
        methods = ("STRIDE", "STRIDE, checkpoints", *self.ROWS[1:2], *FURTHER)
        question = settle(methods, task, measures=measures, **few)
        planned = {estimate.purpose: estimate.n_missing for estimate in planned_trainings(question)}
        assert planned == {
            "mislabel": 2,
            "mislabel, checkpoints of attributed models": 2,
            "mislabel, cross-fitted halves": 8,
            "leakage": 2,
            "leakage, checkpoints of attributed models": 2,
            "leakage, cross-fitted halves": 8,
        }
        trained = []
        for module in (attributed_models, task_parts):
            monkeypatch.setattr(module, "train_model", counted(module.train_model, trained))
        found = answer(question)
        assert len(trained) == sum(planned.values())
        assert not sum(e.n_missing for e in planned_trainings(question))
        names = {(row.name, row.ranking) for row in found.mislabel}
        assert ("STRIDE, cross-fitted", "mislabel scores") in names
        assert ("confident learning, cross-fitted", "detector") in names
        assert {row.name for row in found.leakage} == {spec.name for spec in question.specs}
        if not stored:
            trained.clear()
            measure_leakage(task, question.methods, store=None, counts=(3, 5), n_resamples=0)
            assert len(trained) == 2 + 2 + 8


def test_the_random_state_of_a_gpu_in_use_is_seeded_and_put_back(monkeypatch):
    state, seen = {"seed": torch.tensor([5])}, []
    for name, fake in (
        ("is_initialized", lambda: True),
        ("device_count", lambda: 1),
        ("get_rng_state", lambda device: state["seed"].clone()),
        ("set_rng_state", lambda value, device: state.update(seed=value)),
        ("manual_seed_all", lambda seed: state.update(seed=torch.tensor([seed]))),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)

    def watched(indices, seed):
        seen.append((seed, int(state["seed"])))
        return nn.Linear(2, 2)

    retrain(watched, 10, seed=30)
    assert seen == [(30, 30), (31, 31)]
    assert int(state["seed"]) == 5


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"parts": 1}, "`parts` must be an integer of at least 2; got 1"),
            ({"repeats": 0}, "`repeats` must be an integer of at least 1; got 0"),
            ({"parts": 49}, "`parts` must be at most n_train = 48; got 49"),
        ],
    )
    def test_counts(self, options, message):
        with pytest.raises(ValueError, match=message):
            retrain(train, N, **options)

    def test_what_a_function_returns(self):
        for returned in (None, 3, [nn.Linear(2, 2), "weights"]):
            with pytest.raises(TypeError, match="`train_function` must return a model"):
                retrain(lambda indices, seed, returned=returned: returned, N)
        with pytest.raises(ValueError, match="`train_function` must return at least one model"):
            retrain(lambda indices, seed: [], N)

    def test_weights_that_are_not_finite(self):
        def diverged(indices, seed):
            model = nn.Linear(6, 3)
            with torch.no_grad():
                model.weight[0, 0] = torch.nan
            return model

        with pytest.raises(ValueError, match=r"finite weights; got NaN or infinity in training 0 \(seed 4\)"):
            retrain(diverged, N, seed=4)


class TestStacks:
    @pytest.fixture
    def task(self):
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=3)
        return load_task("synthetic", preset="smoke", training=training)

    @pytest.fixture
    def stacks(self, monkeypatch):
        """Sizes of the stacks that are trained."""
        sizes = []
        train = task_parts.train_stacked

        def counted(build, x, y, rows, *args, **options):
            sizes.append(len(rows))
            return train(build, x, y, rows, *args, **options)

        monkeypatch.setattr(task_parts, "train_stacked", counted)
        return sizes

    def test_their_models_are_those_of_single_trainings(self, task, stacks):
        alone = cross_fit(task, 1, 2, None, engine="processes")
        assert stacks == []
        together = cross_fit(task, 1, 2, None, engine="stacked")
        assert stacks == [4]
        assert together.last == alone.last
        assert together.trainings == alone.trainings == 2
        for one, other in zip(together.checkpoints, alone.checkpoints, strict=True):
            assert one.seen == other.seen
            assert one.weights.keys() == other.weights.keys()
            for name, weight in one.weights.items():
                torch.testing.assert_close(weight, other.weights[name], rtol=1e-3, atol=1e-4)

    def test_parts_of_two_sizes_and_fewer_epochs(self, task, stacks):
        few = task_parts.Split(parts=7, epochs=1)
        sizes = [len(job.rows) for job in part_trainings(task.n_train, 7, 2, 0)]
        alone = cross_fit(task, 0, 2, None, few, engine="processes")
        together = cross_fit(task, 0, 2, None, few, engine="stacked")
        assert sorted(stacks) == sorted(sizes.count(size) for size in set(sizes))
        for one, other in zip(together.checkpoints, alone.checkpoints, strict=True):
            for name, weight in one.weights.items():
                torch.testing.assert_close(weight, other.weights[name], rtol=1e-3, atol=1e-4)

    def test_more_partitions_train_only_the_new_ones(self, task, stacks, tmp_path):
        few = cross_fit(task, 0, 2, tmp_path, engine="stacked")
        more = cross_fit(task, 0, 3, tmp_path, engine="stacked")
        assert stacks == [4, 2]
        assert len(list((tmp_path / "cross-fitted").iterdir())) == 6
        for one, other in zip(few.checkpoints, more.checkpoints, strict=False):
            assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
        cross_fit(task, 0, 3, tmp_path, engine="processes")
        assert len(list((tmp_path / "cross-fitted").iterdir())) == 12

    @pytest.mark.parametrize("repeats", [3, 4])
    def test_auto_stacks_small_networks_from_eight_models_on(self, task, stacks, repeats):
        cross_fit(task, 0, repeats, None)
        assert stacks == ([8] if repeats == 4 else [])

    def test_auto_goes_on_with_the_engine_that_the_store_knows(self, task, stacks, tmp_path):
        cross_fit(task, 0, 1, tmp_path)
        cross_fit(task, 0, 4, tmp_path)
        assert stacks == []
        cross_fit(task, 1, 4, tmp_path)
        cross_fit(task, 1, 1, tmp_path)
        assert stacks == [8]
        assert len(list((tmp_path / "cross-fitted").iterdir())) == 16

    @pytest.mark.slow
    @pytest.mark.parametrize(("engine", "n_workers"), [("auto", 1), ("stacked", 1), ("processes", 2)])
    def test_the_estimate_knows_the_engine(self, task, tmp_path, engine, n_workers):
        runs, how = [(task, 0)], {"engine": engine, "n_jobs": 2}
        before = estimate_cross_fitted(runs, 4, tmp_path, **how)
        assert before.engine == ("processes" if engine == "processes" else "stacked")
        assert (before.n_missing, before.n_workers) == (8, n_workers)
        assert before.seconds > 0
        cross_fit(task, 0, 4, tmp_path, **how)
        assert estimate_cross_fitted(runs, 4, tmp_path, **how).n_missing == 0

    @pytest.mark.parametrize("engine", ["stacked", "batched"])
    def test_an_engine_that_cannot_train_the_task_is_refused(self, engine, tmp_path):
        task = load_task("diabetes", preset="smoke")
        for call in (cross_fit, cross_fit_training):
            with pytest.raises(ValueError, match="`engine` must be"):
                call(task, 0, 1, tmp_path, engine=engine)
        assert list(tmp_path.iterdir()) == []

    def test_diverged_models_are_refused_and_not_kept(self, tmp_path):
        training = TrainingSettings(optimizer="sgd", learning_rate=1e30, epochs=3)
        task = load_task("synthetic", preset="smoke", training=training)
        with pytest.raises(ValueError, match="NaN or infinity in training 0"):
            cross_fit(task, 0, 1, tmp_path, engine="stacked")
        assert not any(tmp_path.rglob("*.safetensors"))

    @pytest.mark.slow
    def test_compare_passes_its_engine(self, task, stacks, tmp_path):
        few = {"n_subsets": 8, "n_seeds": 1, "n_models": 1, "n_test": 12, "n_resamples": 0}
        question = settle(("STRIDE, cross-fitted",), task, store=tmp_path, engine="stacked", **few)
        planned = {e.purpose: (e.engine, e.n_missing) for e in planned_trainings(question)}
        assert planned["cross-fitted halves"] == ("stacked", 2)
        answer(question)
        assert stacks == [2]


class TestMeasured:
    """Responses of the models, for models and losses of every kind."""

    def test_probabilities_that_are_declared_are_no_logits(self):
        found = retrain(lambda *_: softmax(), 8)
        x, y = torch.randn(3, 6), torch.tensor([0, 1, 2])
        loss = CrossEntropy(outputs="probabilities")
        measured = found.measured(softmax(), (x, y), "log-probability", loss=loss)
        for values, place in zip(measured.T, found.last, strict=True):
            model = softmax()
            model.load_state_dict(found.checkpoints[place].weights)
            np.testing.assert_allclose(values, model(x).log()[range(3), y].detach(), rtol=1e-5)

    def test_a_loss_by_name(self):
        found = retrain(lambda *_: nn.Linear(6, 2), 8)
        x, y = torch.randn(3, 6), torch.randn(3, 2)
        measured = found.measured(nn.Linear(6, 2), (x, y), "loss", loss="mse")
        weights = found.checkpoints[found.last[1]].weights
        outputs = x @ weights["weight"].T + weights["bias"]
        np.testing.assert_allclose(measured[:, 1], (outputs - y).square().sum(1) / 2, rtol=1e-5)

    def test_soft_labels_and_positions(self):
        found = retrain(lambda *_: nn.Linear(6, 3), 8)
        x, y = torch.randn(4, 5, 6), torch.randint(3, (4, 5))
        y[:, 3:] = -100
        by_position = found.measured(nn.Linear(6, 3), (x, y), "loss")
        soft = nn.functional.one_hot(y[:, :3], 3).float()
        by_row = [found.measured(nn.Linear(6, 3), (x[:, t], soft[:, t]), "loss") for t in range(3)]
        np.testing.assert_allclose(by_position, sum(by_row), rtol=1e-5)


def softmax():
    return nn.Sequential(nn.Linear(6, 3), nn.Softmax(1))
