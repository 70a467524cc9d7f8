from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum.evaluation.comparison.plan import settle
from stride_captum.evaluation.comparison.shared.shared import Shared
from stride_captum.evaluation.retraining import attributed_models as attributed_training
from stride_captum.evaluation.retraining import cross_fitting, engines, spikes
from stride_captum.evaluation.retraining import files as retraining_files
from stride_captum.evaluation.retraining import workers as retraining_workers
from stride_captum.evaluation.retraining.attributed_estimates import estimate_spiked
from stride_captum.evaluation.retraining.attributed_models import (
    spiked_epoch,
    train_attributed,
    train_spiked,
)
from stride_captum.evaluation.retraining.estimate import RetrainingEstimate
from stride_captum.evaluation.retraining.plan import RetrainingPlan, without_diverged
from stride_captum.evaluation.retraining.plan_files import files_for
from stride_captum.evaluation.retraining.spikes import NoSpikeError
from stride_captum.evaluation.retraining.task_parts import cross_fit
from stride_captum.evaluation.retraining.training import logits_of, mean_residual, train_model
from stride_captum.evaluation.tasks.loading import load_task
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.tasks.task import Task
from stride_captum.subsets import members, membership_from_indices, random_subsets
from stride_captum.system.atomic import atomic_write

pytestmark = pytest.mark.xdist_group("processes")

SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=3, batch_size=8)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def small_network_of_doubles() -> nn.Module:
    return small_network().double()


def other_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def wide_network() -> nn.Module:
    return nn.Linear(4, 250_000 // 5 + 1)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3))


class Unmappable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x if x.sum() > 0 else -x)


def unmappable_network() -> nn.Module:
    return Unmappable()


SCALE = 1.0


def network_scaled_by(scale: float) -> nn.Module:
    network = small_network()
    with torch.no_grad():
        network[0].weight.mul_(scale)
    return network


def scaled(by: float):
    return lambda: network_scaled_by(by)


def network_of_a_constant() -> nn.Module:
    return network_scaled_by(SCALE)


def network_of_a_file(path: str) -> nn.Module:
    network = small_network()
    network[0].weight.data = torch.load(path)
    return network


class ForwardOfAConstant(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x):
        return super().forward(x) * SCALE


def forward_by(by: float):
    """A network of one name and one `repr` with another forward pass."""
    act = {1.0: "x", 2.0: "x.relu()"}[by]
    namespace = {"nn": nn}
    exec(f"class Net(nn.Linear):\n def forward(self, x): return super().forward({act})", namespace)
    return partial(namespace["Net"], 4, 3)


def network_of_numbers(draw) -> nn.Module:
    network = small_network()
    network[0].weight.data.fill_(
        float(np.asarray(draw()).reshape(-1)[0]) if draw is not torch.rand else draw(1)[0]
    )
    return network


def network_of_its_own_numbers() -> nn.Module:
    return network_of_numbers(np.random.default_rng().random)


class Unlucky(nn.Module):
    """A network that fails, or diverges, in the run with one seed."""

    def __init__(self, seed: int, fails: bool) -> None:
        super().__init__()
        self.network, self.seed, self.fails = small_network(), seed, fails

    def forward(self, x):
        unlucky = torch.initial_seed() == self.seed
        if unlucky and self.fails and self.training:
            raise RuntimeError("out of memory")
        return self.network(x) + (torch.nan if unlucky else 0.0)


def broken_network() -> nn.Module:
    torch.rand(1)
    raise RuntimeError("no such network")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return Task(
        "small", TensorDataset(x[:40], y[:40]), TensorDataset(x[40:], y[40:]), small_network, SETTINGS
    )


@pytest.fixture
def plan(task, tmp_path):
    return RetrainingPlan(task, random_subsets(40, 3, 21, seed=0), 2, tmp_path / "store", 10)


@pytest.fixture
def unbroken(plan, tmp_path):
    return replace(plan, store=tmp_path / "unbroken").execute(n_jobs=1, show_progress=False)


@pytest.fixture
def runs(monkeypatch):
    """The files that retrainings were run for, in order."""
    done = []
    run = retraining_workers.write_runs

    def counted(path, **arguments):
        run(path, **arguments)
        done.append(path.name)

    monkeypatch.setattr(retraining_workers, "write_runs", counted)
    return done


#: Damages of a file, and what is said of them.
DAMAGES = {
    "cut": "cut off or not an array",
    "empty": "cut off or not an array",
    "text": "cut off or not an array",
    "archive": "cut off or not an array",
    "whole numbers": "not an array of floats",
    "other points": "of shape",
    "other classes": "of shape",
    "not finite": "not finite",
}


def spoil(path, damage):
    whole, array = path.read_bytes(), np.load(path)
    if damage == "whole numbers":
        np.save(path, array.astype(np.int64))
    elif damage == "other points":
        np.save(path, array[..., 1:, :])
    elif damage == "other classes":
        np.save(path, array[..., 1:])
    elif damage == "not finite":
        array.flat[3] = np.nan
        np.save(path, array)
    else:
        cut = {"cut": whole[:-5], "empty": b"", "text": b"not an array", "archive": b"PK\x03\x04 none"}
        path.write_bytes(cut[damage])


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class TestTrainModel:
    def test_same_seed_same_bits_another_seed_other_weights(self, task):
        one, two, other = (
            logits_of(train_model(small_network, *task.train.tensors, SETTINGS, seed), task.test.tensors[0])
            for seed in (0, 0, 1)
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)

    def test_callers_random_state_and_tensors_are_left_alone(self, task):
        before, x = random_states(), task.train.tensors[0].clone()
        model = train_model(small_network, *task.train.tensors, SETTINGS, 0)
        with pytest.raises(RuntimeError, match="no such network"):
            train_model(broken_network, *task.train.tensors, SETTINGS, 0)
        assert random_states() == before
        assert torch.equal(task.train.tensors[0], x)
        assert not model.training

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["adam", "sgd"])
    def test_lowers_the_residual(self, task, optimizer):
        training = replace(SETTINGS, optimizer=optimizer, epochs=40, learning_rate=0.02, momentum=0.5)
        residuals = []
        train_model(
            small_network,
            *task.train.tensors,
            training,
            0,
            after_epoch=lambda epoch, model: residuals.append(mean_residual(model, *task.train.tensors)),
        )
        assert len(residuals) == 40
        assert residuals[-1] < 0.6 * residuals[0]

    def test_looking_on_does_not_change_the_training(self, task):
        epochs = []
        watched = train_model(
            small_network,
            *task.train.tensors,
            SETTINGS,
            0,
            after_epoch=lambda e, m: epochs.append((e, m.training)),
        )
        alone = train_model(small_network, *task.train.tensors, SETTINGS, 0)
        assert epochs == [(1, False), (2, False), (3, False)]
        assert torch.equal(watched[0].weight, alone[0].weight)

    def test_a_last_batch_of_one_is_skipped(self, task):
        x, y = (t[:9] for t in task.train.tensors)
        assert torch.isfinite(logits_of(train_model(small_network, x, y, SETTINGS, 0), x)).all()

    def test_unknown_optimizers_are_refused(self, task):
        with pytest.raises(ValueError, match="`optimizer` must be one of 'adam', 'sgd'; got 'adamw'"):
            train_model(small_network, *task.train.tensors, replace(SETTINGS, optimizer="adamw"), 0)


def test_logits_do_not_depend_on_the_batch_size(task):
    model, x = small_network().eval(), task.train.tensors[0]
    torch.testing.assert_close(logits_of(model, x, 7), model(x).detach())
    assert not logits_of(model, x).requires_grad


def test_mean_residual_is_half_the_l1_norm(task):
    x, y = task.train.tensors
    model = small_network().eval()
    p = model(x).softmax(-1).detach()
    expected = (nn.functional.one_hot(y, 3) - p).abs().sum(1).mean() / 2
    assert mean_residual(model, x, y) == pytest.approx(expected.item(), abs=1e-6)


class TestPlan:
    def test_is_every_subset_trained_by_hand(self, plan, task):
        logits = plan.execute(n_jobs=1, show_progress=False)
        assert logits.shape == (2, 3, 10, 3)
        x, y = task.train.tensors
        for s in range(2):
            for k in range(3):
                rows = torch.from_numpy(members(plan.membership, k))
                model = train_model(small_network, x[rows], y[rows], SETTINGS, plan._seed(k, s))
                expected = logits_of(model, task.test.tensors[0])[:10]  # all are evaluated together
                assert torch.equal(torch.from_numpy(logits[s, k]), expected)
        assert len(np.unique(logits.reshape(6, -1), axis=0)) == 6

    def test_a_second_execution_trains_nothing(self, plan, unbroken, runs):
        first = plan.execute(n_jobs=1, show_progress=False)
        assert len(runs) == 6
        assert plan.missing() == []
        second = plan.execute(n_jobs=1, show_progress=False)
        assert len(runs) == 6
        assert np.array_equal(first, second)
        assert np.array_equal(first, unbroken)

    def test_an_interrupted_plan_resumes_with_the_same_bits(self, plan, unbroken, runs, monkeypatch):
        counted = retraining_workers.write_runs

        def interrupted(path, **arguments):
            if len(runs) == 2:
                raise KeyboardInterrupt
            counted(path, **arguments)

        monkeypatch.setattr(retraining_workers, "write_runs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.execute(n_jobs=1, show_progress=False)
        assert len(plan.missing()) == 4
        monkeypatch.setattr(retraining_workers, "write_runs", counted)
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), unbroken)
        assert len(runs) == len(set(runs)) == 6

    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ["processes", "stacked"])
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_file_is_said_and_recomputed(self, plan, runs, damage, engine):
        execute = partial(plan.execute, n_jobs=1, show_progress=False, engine=engine)
        unbroken = execute()
        path = files_for(plan, engine, "cpu")[0].path
        whole = path.read_bytes()
        done = len(runs)
        spoil(path, damage)
        assert plan.missing(engine=engine)[0] == (0, 0)
        assert plan.estimate(1, engine=engine).n_damaged == (1 if engine == "processes" else 6)
        with pytest.warns(UserWarning, match=f"{path.name} is {DAMAGES[damage]}.*: it is computed again"):
            again = execute()
        assert np.array_equal(again, unbroken)
        assert runs[done:] == [path.name]
        assert path.read_bytes() == whole
        execute()

    def test_a_file_that_is_gone_is_recomputed_without_a_word(self, plan, unbroken, runs):
        plan.execute(n_jobs=1, show_progress=False)
        plan._path(1, 0).unlink()
        assert plan.missing() == [(1, 0)]
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), unbroken)
        assert runs[6:] == [plan._path(1, 0).name]

    def test_a_run_that_diverges_is_said(self, plan):
        training = replace(SETTINGS, optimizer="sgd", learning_rate=1e30)
        plan = replace(plan, task=replace(plan.task, training=training))
        with pytest.warns(
            UserWarning,
            match=r"6 of 6 retrainings of small diverged: .*\(subset 0, seed 0\), .*\.\.\. are not "
            r"finite\. Train with smaller steps",
        ):
            logits = plan.execute(n_jobs=1, show_progress=False)
        assert not np.isfinite(logits).all(axis=(2, 3)).any()
        assert len(plan.missing()) == 6
        with pytest.raises(
            ValueError,
            match=r"`training` must let at least 90% of the 3 subsets of small converge; got 3 that "
            r"diverged, \(subset 0, seed 0\), .*, \.\.\.\. Train with smaller steps \(`learning_rate`",
        ):
            without_diverged(plan, logits)

    def test_subsets_that_diverge_are_left_out_and_counted(self, plan):
        plan = replace(plan_with(plan, build_model=partial(Unlucky, plan._seed(1, 0), False)), n_seeds=1)
        plan = replace(plan, membership=random_subsets(40, 12, 21))
        with pytest.warns(
            UserWarning, match=r"1 of 12 retrainings of small diverged: .* \(subset 1, seed 0\) are"
        ):
            logits = plan.execute(n_jobs=1, show_progress=False)
        membership, found, left_out = without_diverged(plan, logits)
        assert left_out == [1]
        assert np.array_equal(found, np.delete(logits, 1, axis=1))
        assert np.array_equal(membership.toarray(), np.delete(plan.membership.toarray(), 1, axis=0))

    @pytest.mark.slow
    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_a_run_that_fails_is_named_and_those_before_it_stay(self, plan, n_jobs):
        plan = plan_with(plan, build_model=partial(Unlucky, plan._seed(2, 1), True))
        with pytest.raises(
            RuntimeError,
            match=r"Retraining \(subset 2, seed 1\) failed with .*: out of memory\)?\. Those that "
            r"were done before are in .*store: the same call continues from there\.",
        ):
            plan.execute(n_jobs=n_jobs, show_progress=False)
        assert (2, 1) in plan.missing()
        assert len(plan.missing()) <= n_jobs

    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ["processes", "stacked"])
    def test_fewer_test_points_are_read_off_what_is_there(self, plan, runs, engine, monkeypatch):
        monkeypatch.setattr(retraining_files, "EVALUATED", 4)
        execute = {"n_jobs": 1, "show_progress": False, "engine": engine}
        ten = plan.execute(**execute)
        done = len(runs)
        three = replace(plan, n_test=3)
        assert three.missing(engine=engine) == []
        assert np.array_equal(three.execute(**execute), ten[:, :, :3])
        assert len(runs) == done
        twelve = replace(plan, n_test=12).execute(**execute)  # more than are there
        assert len(runs) == 2 * done
        np.testing.assert_allclose(twelve[:, :, :10], ten, rtol=1e-5, atol=1e-6)  # other batches
        few = replace(three, store=plan.store / "other")
        few.execute(**execute)
        assert replace(few, n_test=4).missing(engine=engine) == []
        assert len(replace(few, n_test=5).missing(engine=engine)) == 6

    def test_stored_zeros_are_no_members(self, plan):
        membership = plan.membership.copy()
        membership.data[2] = 0.0
        assert len(members(replace(plan, membership=membership).membership, 0)) == 20
        membership.data[2] = 2.0
        with pytest.raises(ValueError, match="`membership` must hold zeros and ones"):
            replace(plan, membership=membership)

    def test_a_plan_that_grows_keeps_its_runs(self, plan, runs):
        small = plan.execute(n_jobs=1, show_progress=False)
        more = replace(plan, membership=random_subsets(40, 4, 21, seed=0), n_seeds=3)
        large = more.execute(n_jobs=1, show_progress=False)
        assert len(runs) == 12
        assert np.array_equal(large[:2, :3], small)

    def test_random_state_is_left_alone(self, plan):
        before = random_states()
        plan.missing()
        plan.execute(n_jobs=1, show_progress=False)
        train_attributed(plan.task, 0, plan.store)
        train_attributed(plan.task, 0, plan.store)
        assert random_states() == before

    def test_the_number_of_threads_does_not_change_the_bits_and_comes_back(self, plan, unbroken):
        torch.set_num_threads(2)
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), unbroken)
        assert torch.get_num_threads() == 2

    def test_a_write_that_fails_leaves_nothing(self, tmp_path):
        def write(name):
            with open(name, "w") as file:
                file.write("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            atomic_write(tmp_path / "run.npy", write)
        assert list(tmp_path.iterdir()) == []

    def test_bad_plans_are_refused(self, plan):
        with pytest.raises(ValueError, match="`membership` must have n_train = 40 columns; got 41"):
            replace(plan, membership=random_subsets(41, 3, 20))
        empty = membership_from_indices([[1], []], 40)
        with pytest.raises(
            ValueError, match="`membership` must keep an example in every subset; got none in 1"
        ):
            replace(plan, membership=empty)
        with pytest.raises(ValueError, match="`n_seeds` must be at least 1; got 0"):
            replace(plan, n_seeds=0)
        with pytest.raises(ValueError, match="`n_test` must be between 1 and the 20 test points; got 21"):
            replace(plan, n_test=21)
        with pytest.raises(ValueError, match=r"`engine` must be one of .*; got 'stack'\. Nearest: 'stacked'"):
            plan.execute(engine="stack")


class TestCommonSeeds:
    def test_subsets_share_their_start_and_seeds_do_not(self, plan):
        membership = membership_from_indices([range(20), range(20), range(20, 40)], 40)
        same = replace(plan, membership=membership, common_seeds=True)
        logits = same.execute(n_jobs=1, show_progress=False)
        assert np.array_equal(logits[:, 0], logits[:, 1])
        assert not np.array_equal(logits[0, 0], logits[1, 0])
        assert not np.array_equal(logits[0, 0], logits[0, 2])
        other = replace(same, common_seeds=False).execute(n_jobs=1, show_progress=False)
        assert not np.array_equal(other[:, 0], other[:, 1])

    def test_another_plan_reads_the_runs_that_are_its_own(self, plan):
        paths = {replace(plan, common_seeds=flag)._path(k, 1) for flag in (False, True) for k in range(3)}
        assert len(paths) == 5
        assert plan._path(0, 1) == replace(plan, common_seeds=True)._path(0, 1)


class TestEngines:
    def test_stacks_are_the_single_runs_up_to_rounding(self, plan):
        train, test = (
            TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (plan.task.train, plan.task.test)
        )
        task = replace(plan.task, train=train, test=test, build_model=small_network_of_doubles)
        plan = replace(plan, task=task)
        single = plan.execute(n_jobs=1, show_progress=False)
        stacked = plan.execute(n_jobs=1, show_progress=False, engine="stacked")
        assert single.dtype == stacked.dtype == np.float64
        np.testing.assert_allclose(stacked, single, rtol=1e-9, atol=1e-9)

    def test_neither_engine_reads_the_files_of_the_other(self, plan, runs):
        plan.execute(n_jobs=1, show_progress=False, engine="stacked")
        assert len(plan.missing()) == 6
        plan.execute(n_jobs=1, show_progress=False)
        assert [name.split("-")[0] for name in runs] == ["stack"] + 6 * ["run"]
        assert plan.missing(engine="stacked") == []

    def test_an_interrupted_plan_of_stacks_gives_the_same_bits(self, plan, runs, monkeypatch):
        monkeypatch.setattr(engines, "_CPU_STACK", 2)
        plan = replace(plan, membership=random_subsets(40, 5, 21, seed=0))
        unbroken = plan.execute(n_jobs=1, show_progress=False, engine="stacked")
        assert len(runs) == 6
        for file in files_for(plan, "stacked", "cpu")[1::2]:
            file.path.unlink()
        assert np.array_equal(plan.execute(1, False, engine="stacked"), unbroken)
        assert len(runs) == 9

    @pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 100])
    def test_a_stack_holds_equally_large_subsets_and_every_run_is_in_one(self, plan, monkeypatch, limit):
        monkeypatch.setattr(engines, "_CPU_STACK", limit)
        subsets = [range(9), range(5), range(1, 10), range(2, 11), range(4)]
        plan = replace(plan, membership=membership_from_indices(subsets, 40), n_seeds=4)
        files = files_for(plan, "stacked", "cpu")
        assert sorted(run for file in files for run in file.runs) == [
            (k, s) for k in range(5) for s in range(4)
        ]
        for file in files:
            assert len(file.runs) <= limit
            assert len({len(subsets[k]) for k, _ in file.runs}) == 1
            assert file.shape == (len(file.runs), 20, 3)
        assert len({file.path for file in files}) == len(files)

    def test_seeds_that_are_added_leave_full_stacks_as_they_were(self, plan, monkeypatch):
        monkeypatch.setattr(engines, "_CPU_STACK", 6)
        more = replace(plan, n_seeds=5)
        first, *_ = (file.path for file in files_for(plan, "stacked", "cpu"))
        assert first == files_for(more, "stacked", "cpu")[0].path
        assert len(files_for(more, "stacked", "cpu")) == 3

    @pytest.mark.slow
    @pytest.mark.parametrize("n_seeds", [1, 2, 3])
    def test_seeds_that_are_added_leave_what_is_stored_as_it_is(self, plan, runs, monkeypatch, n_seeds):
        monkeypatch.setattr(engines, "_CPU_STACK", 6)  # two seeds of three subsets
        few = replace(plan, n_seeds=n_seeds).execute(1, False, engine="stacked")
        assert len(runs) == -(-n_seeds // 2)
        for more in (n_seeds + 1, n_seeds + 2):
            logits = replace(plan, n_seeds=more).execute(1, False, engine="stacked")
            assert np.array_equal(logits[:n_seeds], few)
            missing = replace(plan, n_seeds=more + 1).missing(engine="stacked")
            assert {seed for _, seed in missing} == {more}

    def test_auto_stacks_many_runs_of_small_networks_without_convolutions(self, plan):
        def chosen(**changes):
            return plan_with(plan, **changes).estimate(1, engine="auto").engine

        assert chosen() == "processes"
        assert chosen(n_seeds=3) == "stacked"
        for network in (wide_network, convolutions, unmappable_network):
            assert chosen(n_seeds=3, build_model=network) == "processes"

    def test_off_the_cpu_auto_stacks_what_can_be_mapped(self, plan):
        device = torch.device("meta")
        for network in (wide_network, convolutions):
            assert files_for(plan_with(plan, n_seeds=3, build_model=network), "auto", device)[0].stacked
        other = plan_with(plan, n_seeds=3, build_model=unmappable_network)
        assert not files_for(other, "auto", device)[0].stacked
        assert not files_for(plan, "auto", device)[0].stacked

    def test_auto_goes_on_with_what_the_store_has(self, plan, runs):
        plan = replace(plan, n_seeds=3)
        single = replace(plan, n_seeds=1).execute(n_jobs=1, show_progress=False)
        logits = plan.execute(n_jobs=1, show_progress=False, engine="auto")
        assert np.array_equal(logits[:1], single)
        assert len(runs) == 9
        assert plan.missing(engine="auto") == []

    def test_devices_have_names_of_their_own(self, plan):
        for engine in ("processes", "stacked"):
            paths = {files_for(plan, engine, device)[0].path for device in ("cpu", "cpu:0", "meta")}
            assert len(paths) == 2
        assert plan._path(0, 0) == files_for(plan, "processes", "cpu")[0].path

    def test_networks_that_cannot_be_mapped_are_refused(self, plan):
        plan = plan_with(plan, build_model=unmappable_network)
        with pytest.raises(
            ValueError, match=r"`engine` must be 'processes' for this network; .* control flow"
        ):
            plan.execute(engine="stacked")


def plan_with(plan, build_model=small_network, **changes):
    return replace(plan, task=replace(plan.task, build_model=build_model), **changes)


class TestEstimate:
    @pytest.fixture
    def seconds(self, monkeypatch):
        """A second for an example of each epoch."""
        monkeypatch.setattr(RetrainingPlan, "_seconds_per_example", lambda *a: 1.0)

    @pytest.mark.parametrize("engine", ["processes", "stacked"])
    def test_counts_what_would_be_done(self, plan, seconds, engine):
        expected = plan.estimate(1, engine=engine)
        assert (expected.n_runs, expected.n_missing, expected.n_stored, expected.n_damaged) == (6, 6, 0, 0)
        assert expected.seconds == 6 * 21 * 3
        assert not plan.store.exists()
        plan.execute(n_jobs=1, show_progress=False, engine=engine)
        assert sum(path.stat().st_size for path in plan.store.iterdir()) == expected.n_bytes
        assert plan.estimate(1, engine=engine).n_missing == 0

    def test_workers_share_the_runs_and_the_largest_bounds_them(self, plan, seconds):
        membership = membership_from_indices([range(40), [1], [2]], 40)
        plan = replace(plan, membership=membership, n_seeds=1)
        assert plan.estimate(3).seconds == 40 * 3
        assert plan.estimate(2).n_workers == 2
        assert plan.estimate(9).n_workers == 3

    def test_is_a_sentence(self, plan):
        told = RetrainingEstimate("small", 100, 2, "processes", 50, 1, 2, 750.0, 1_800_000)
        assert str(told) == (
            "200 retrainings of small (100 subsets x 2 seeds): 50 are in the store, 150 (1 damaged) are to "
            "do one by one, which takes about 12 min with 2 workers and 1.80 MB of disk."
        )
        assert "in stacks, which takes about 9.0 s with 1 worker" in str(
            replace(told, engine="stacked", seconds=9.0, n_workers=1)
        )
        assert "about 2.5 h" in str(replace(told, seconds=9000.0))
        assert str(replace(told, n_stored=200)).endswith("(100 subsets x 2 seeds): all are in the store.")

    @pytest.mark.parametrize("engine", ["processes", "stacked"])
    def test_times_a_short_run_and_leaves_everything_alone(self, plan, engine):
        before = random_states()
        assert plan.estimate(1, engine=engine).seconds > 0
        assert random_states() == before
        assert not plan.store.exists()

    def test_a_long_run_is_timed_on_twenty_batches(self, plan, monkeypatch):
        seen, run = [], retraining_workers.train_and_evaluate

        def watched(**arguments):
            seen.append((len(arguments["subsets"][0]), arguments["training"].epochs))
            return run(**arguments)

        monkeypatch.setattr(retraining_workers, "train_and_evaluate", watched)
        training = replace(SETTINGS, batch_size=1)
        plan_of_ones = replace(plan, task=replace(plan.task, training=training, build_model=convolutions))
        plan_of_ones.estimate(1)
        assert seen == [(2, 1), (20, 1), (20, 1)]


def test_the_bar_counts_runs_and_starts_where_the_store_is(plan, capsys):
    plan.execute(n_jobs=1, show_progress=False)
    plan._path(2, 1).unlink()
    plan.execute(n_jobs=1)
    shown = capsys.readouterr().err
    assert "5/6" in shown
    assert "6/6" in shown
    plan.execute(n_jobs=1)
    assert capsys.readouterr().err == ""


class TestFingerprint:
    def changed(self, task, what):
        (x, y), (x_test, y_test) = (tuple(t.clone() for t in d.tensors) for d in (task.train, task.test))
        if what == "one input":
            x[3, 2] += 1e-6
        elif what == "one label":
            y[5] = (y[5] + 1) % 3
        elif what == "one test input":
            x_test[0, 0] += 1
        changed = replace(task, train=TensorDataset(x, y), test=TensorDataset(x_test, y_test))
        if what == "settings":
            changed = replace(changed, training=replace(SETTINGS, epochs=4))
        elif what == "network":
            changed = replace(changed, build_model=other_network)
        return changed

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["one input", "one label", "one test input", "settings", "network"])
    def test_what_determines_a_run_names_it(self, plan, what):
        plan.execute(n_jobs=1, show_progress=False)
        assert len(replace(plan, task=self.changed(plan.task, what)).missing()) == 6

    def test_equal_data_in_other_tensors_is_the_same_run(self, plan):
        plan.execute(n_jobs=1, show_progress=False)
        assert replace(plan, task=self.changed(plan.task, "nothing")).missing() == []

    def test_subset_and_seed_name_it(self, plan):
        plan = replace(plan, n_seeds=4)
        names = {plan._path(k, s) for k in range(3) for s in range(4)}
        names |= {replace(plan, membership=membership_from_indices([[1, 2, 3]], 40))._path(0, 0)}
        assert len(names) == 13

    def test_labels_flipped_in_place_are_noticed(self, plan):
        plan.execute(n_jobs=1, show_progress=False)
        plan.task.train.tensors[1][0] = (plan.task.train.tensors[1][0] + 1) % 3
        assert len(plan.missing()) == 6

    def test_data_edited_below_the_tensors_are_noticed(self, plan):
        labels = plan.task.train.tensors[1].numpy().copy()
        train = TensorDataset(plan.task.train.tensors[0], torch.from_numpy(labels))
        plan = replace(plan, task=replace(plan.task, train=train))
        before = plan.execute(n_jobs=1, show_progress=False)
        labels[:] = (labels + 1) % 3  # neither the version of the tensor nor the sum of its bits need change
        assert len(plan.missing()) == 6
        assert not np.array_equal(plan.execute(n_jobs=1, show_progress=False), before)

    @pytest.mark.parametrize(
        "what", ["forward", "closure", "partial", "default", "constant", "global", "file"]
    )
    def test_what_the_network_is_made_of_names_it(self, plan, tmp_path, monkeypatch, what):
        named = {
            "closure": scaled,
            "partial": lambda by: partial(network_scaled_by, by),
            "forward": forward_by,
        }
        named |= {"default": lambda by: lambda scale=by: network_scaled_by(scale)}
        names = []
        for by in (1.0, 2.0, 1.0):
            monkeypatch.setitem(globals(), "SCALE", by)
            torch.save(torch.full((6, 4), by), tmp_path / "weights.pt")
            network = {"constant": network_of_a_constant, "global": ForwardOfAConstant}.get(what)
            if what == "file":
                network = partial(network_of_a_file, str(tmp_path / "weights.pt"))
            elif network is None:
                network = named[what](by)
            names.append(plan_with(plan, build_model=network)._path(0, 0))
        assert names[0] == names[2] != names[1]

    def test_torchs_version_names_it(self, plan, monkeypatch):
        before = plan._path(0, 0)
        monkeypatch.setattr(torch, "__version__", "0.0")
        assert plan._path(0, 0) != before

    def test_a_network_that_no_seed_determines_is_said_and_never_read_again(self, plan, runs):
        plan = plan_with(replace(plan, n_seeds=1), build_model=network_of_its_own_numbers)
        for done in (3, 6):
            with pytest.warns(
                UserWarning, match=r"`build_model` gives another network each time under one seed"
            ):
                plan.execute(n_jobs=1, show_progress=False)
            assert len(runs) == done

    @pytest.mark.parametrize("draw", [torch.rand, np.random.rand, lambda: random.random()])
    def test_a_network_that_a_seed_determines_is_read_again_wherever_it_draws(self, plan, draw):
        before = random_states()
        plan = plan_with(plan, build_model=partial(network_of_numbers, draw))
        assert plan._path(0, 0) == plan._path(0, 0)
        assert random_states() == before

    def test_a_network_without_a_digest_is_said_and_never_read_again(self, plan):
        lock = threading.Lock()

        def network():
            with lock:
                return small_network()

        plan = plan_with(plan, build_model=network)
        with pytest.warns(
            UserWarning,
            match=r"Stored trainings of small are not reused: `build_model\.lock` is of type lock, .*\. "
            r"Leave that out of the network and its factory\.",
        ):
            one = plan._path(0, 0)
        with pytest.warns(UserWarning, match="are not reused"):
            assert plan._path(0, 0) != one

    @pytest.mark.slow
    def test_names_are_those_of_another_process(self, tmp_path):
        found = {
            subprocess.run(
                [sys.executable, "-c", NAMED],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(found) == 1
        assert re.fullmatch(r"run-[0-9a-f]{24}-5\.npy [0-9a-f]{24}\n", found.pop())

    def test_plans_of_other_tasks_share_a_store_and_no_file(self, plan):
        one = plan.execute(n_jobs=1, show_progress=False)
        changed = replace(plan, task=self.changed(plan.task, "one label"))
        other = changed.execute(n_jobs=1, show_progress=False)
        assert len(list(plan.store.iterdir())) == 12
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), one)
        assert not np.array_equal(one, other)

    def test_attributed_models_of_other_data_are_not_used(self, task, tmp_path):
        one = train_attributed(task, 0, tmp_path)
        other = train_attributed(self.changed(task, "one label"), 0, tmp_path)
        assert not torch.equal(one[0].weight, other[0].weight)


class TestAttributed:
    def test_is_kept_and_read_back_bit_for_bit(self, task, tmp_path, monkeypatch):
        trained = train_attributed(task, 3, tmp_path)
        monkeypatch.setattr(attributed_training, "train_model", lambda *a, **k: pytest.fail("trained again"))
        read = train_attributed(task, 3, tmp_path)
        assert not read.training
        for name, value in trained.state_dict().items():
            assert torch.equal(read.state_dict()[name], value)

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            ("cut", "cut off or not a file of weights"),
            ("empty", "cut off or not a file of weights"),
            ("other network", "of another network"),
            ("other shape", "of another network"),
            ("not finite", "not finite"),
        ],
    )
    def test_a_damaged_file_is_said_and_trained_again(self, task, tmp_path, damage, said):
        trained = train_attributed(task, 3, tmp_path)
        (path,) = tmp_path.iterdir()
        whole, state = path.read_bytes(), load_file(path)
        if damage in ("cut", "empty"):
            path.write_bytes(whole[:-9] if damage == "cut" else b"")
        elif damage == "other network":
            save_file({"weight": torch.zeros(2)}, path)
        else:
            bad = torch.zeros(6, 5) if damage == "other shape" else torch.full((6, 4), torch.nan)
            save_file({**state, "0.weight": bad}, path)
        with pytest.warns(UserWarning, match=f"{path.name} is {said}: it is computed again"):
            again = train_attributed(task, 3, tmp_path)
        assert torch.equal(again[0].weight, trained[0].weight)
        assert path.read_bytes() == whole

    def test_has_one_thread_and_gives_the_threads_back(self, task, monkeypatch):
        seen, train = [], attributed_training.train_model

        def watched(*arguments, **options):
            seen.append(torch.get_num_threads())
            return train(*arguments, **options)

        monkeypatch.setattr(attributed_training, "train_model", watched)
        torch.set_num_threads(2)
        train_attributed(task, 0)
        assert seen == [1]
        assert torch.get_num_threads() == 2

    def test_without_a_store_it_is_the_trained_model(self, task):
        expected = train_model(small_network, *task.train.tensors, SETTINGS, 3)
        assert torch.equal(train_attributed(task, 3)[0].weight, expected[0].weight)

    def test_no_spike_is_said(self, task, tmp_path):
        with pytest.raises(
            RuntimeError, match=r"None of 2 trainings of small had a spike with a mean residual above 1\.0"
        ):
            train_spiked(task, tmp_path, threshold=1.0, tries=2)


#: Mean residuals after nine epochs.
FALLS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
RISES = (0.9, 0.1, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1, 0.1)


class TestSpikes:
    """The mean residual after each epoch is given here; the trainings are real."""

    @pytest.fixture
    def task(self, task):
        return replace(task, training=replace(SETTINGS, epochs=9))

    @pytest.fixture
    def residuals(self, monkeypatch):
        """Mean residuals by epoch, of one training after the other."""
        found: list[float] = []
        monkeypatch.setattr(spikes, "mean_residual", lambda *args: found.pop(0))
        return found

    def test_is_the_highest_of_the_last_six_epochs(self, task, residuals, tmp_path):
        residuals += RISES
        seen = {}

        def look(epoch, model):
            seen[epoch] = {name: t.clone() for name, t in model.state_dict().items()}

        train_model(small_network, *task.train.tensors, task.training, 0, after_epoch=look)
        spiked = train_attributed(task, 0, tmp_path, spike=True)
        assert all(torch.equal(t, seen[6][name]) for name, t in spiked.state_dict().items())
        assert spiked_epoch(task, 0, tmp_path) == 6
        assert not residuals
        again = train_attributed(task, 0, tmp_path, spike=True)  # from the store
        assert all(torch.equal(t, seen[6][name]) for name, t in again.state_dict().items())

    @pytest.mark.parametrize(
        "given",
        [FALLS, [0.9, 0.1, 0.1, 0.1, 0.15, 0.2, 0.2, 0.1, 0.1], [0.1, 0.9, 0.1, *[0.1] * 6]],
        ids=["falls", "less than twice", "too early"],
    )
    def test_a_training_without_one_is_refused_and_not_repeated(self, task, residuals, given, tmp_path):
        residuals += given
        for _ in range(2):
            with pytest.raises(NoSpikeError, match="training of small with seed 0 has no spike: after none"):
                train_attributed(task, 0, tmp_path, spike=True)
        assert not residuals
        assert spiked_epoch(task, 0, tmp_path) is None

    def test_seeds_without_one_are_passed_over(self, task, residuals, tmp_path, monkeypatch):
        residuals += [*FALLS, *RISES]
        monkeypatch.setattr(attributed_training, "mean_residual", lambda *args: 0.3)
        assert train_spiked(task, tmp_path, first_seed=3)[1] == 4
        found, seeds = estimate_spiked(task, tmp_path, 1)
        assert (found.n_runs, found.n_missing, seeds) == (30, 30, [100])

    def test_the_estimate_knows_what_the_store_tells(self, task, residuals, tmp_path, monkeypatch):
        residuals += [*FALLS, *RISES]
        monkeypatch.setattr(attributed_training, "mean_residual", lambda *args: 0.3)
        train_spiked(task, tmp_path)
        found, seeds = estimate_spiked(task, tmp_path, 1)
        assert (found.n_runs, found.n_missing, found.at_most, seeds) == (1, 0, "", [101])

    def test_a_model_that_was_stopped_has_no_later_checkpoints(self, task, residuals, tmp_path, monkeypatch):
        residuals += RISES
        monkeypatch.setattr(attributed_training, "mean_residual", lambda *args: 0.3)
        few = {"n_subsets": 4, "n_seeds": 1, "n_models": 1, "n_test": 10, "n_spiked": 1}
        question = settle(["STRIDE, checkpoints"], task, store=tmp_path, measures=["lds"], **few)
        assert question.epochs == [1, 2, 3, 5, 8]
        shared = Shared(question)
        name = "seed 100, stopped on a spike"
        states = shared.along(name, question.epochs)
        assert len(shared.along("seed 0", question.epochs)) == 6
        assert list(shared.checkpoints[name]) == [1, 2, 3, 5]
        assert len(states) == 5
        assert all(torch.equal(t, states[-1][k]) for k, t in shared.models[name].state_dict().items())
        assert sum(e.n_missing for e in Shared(question).model_estimates) == 0


def masked():
    network = small_network()
    network.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    return network


class TestInfiniteBuffers:
    """A mask with -inf is no sign of a training that diverged."""

    def test_of_attributed_models_are_found_in_the_store(self, task, tmp_path):
        task = replace(task, build_model=masked)
        one = train_attributed(task, 0, tmp_path)
        (path,) = tmp_path.iterdir()
        before = path.stat().st_mtime_ns
        two = train_attributed(task, 0, tmp_path)
        assert torch.equal(one.mask, two.mask)
        assert path.stat().st_mtime_ns == before

    def test_of_models_of_parts_are_kept(self, task, tmp_path):
        task = replace(task, build_model=masked)
        found = [cross_fit(task, 0, 1, tmp_path).checkpoints[0].weights["mask"] for _ in range(2)]
        assert torch.equal(*found)
        assert cross_fitting.retrain(lambda rows, seed: masked(), 10).last == [0, 1]

    def test_weights_that_are_infinite_are_refused(self):
        def diverged(rows, seed):
            network = masked()
            network[0].weight.data[0, 0] = torch.inf
            return network

        with pytest.raises(ValueError, match="must return models with finite weights"):
            cross_fitting.retrain(diverged, 10)


NAMED = """
import torch
from torch.utils.data import TensorDataset
from stride_captum.evaluation.tasks.networks import TrainingSettings, digits_mlp
from stride_captum.evaluation.retraining.plan import RetrainingPlan
from stride_captum.evaluation.retraining.store import Fingerprints
from stride_captum.evaluation.tasks.task import Task
from stride_captum.subsets import membership_from_indices

x, y = torch.arange(9 * 64.0).reshape(9, 1, 8, 8) / 64, torch.arange(9) % 3
training = TrainingSettings(optimizer="adam", learning_rate=1e-3, epochs=1)
task = Task("fixed", TensorDataset(x[:4], y[:4]), TensorDataset(x[4:], y[4:]), digits_mlp, training)
plan = RetrainingPlan(task, membership_from_indices([[0, 1, 3], [0, 2]], 4), 2, "none", 2)
print(plan._path(0, 0).name, Fingerprints(task).of(7, None, extra="attributed spike=False"))
"""

KILLED = """
import sys
from pathlib import Path
from stride_captum.evaluation.tasks.networks import TrainingSettings
from stride_captum.evaluation.retraining.plan import RetrainingPlan
from stride_captum.evaluation.tasks.loading import load_task
from stride_captum.subsets import random_subsets

task = load_task("digits", preset="smoke", training=TrainingSettings(**{settings}))
plan = RetrainingPlan(task, random_subsets(300, 40, 150, seed=0), 1, Path(sys.argv[1]), 20)
plan.execute(n_jobs=1, show_progress=False)
"""


@pytest.mark.slow
def test_a_plan_that_is_killed_resumes_in_another_process_with_the_same_bits(tmp_path):
    settings = {"optimizer": "adam", "learning_rate": 1e-3, "epochs": 4}
    store = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(settings=settings), str(store)])
    while process.poll() is None and len(list(store.glob("*.npy"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    task = load_task("digits", preset="smoke", training=TrainingSettings(**settings))
    plan = RetrainingPlan(task, random_subsets(300, 40, 150, seed=0), 1, store, 20)
    assert 0 < len(plan.missing()) <= 37
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that was being written is not taken for a damaged one
        resumed = plan.execute(n_jobs=1, show_progress=False)
    unbroken = replace(plan, store=tmp_path / "unbroken").execute(n_jobs=1, show_progress=False)
    assert np.array_equal(resumed, unbroken)
