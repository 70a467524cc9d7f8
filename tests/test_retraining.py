from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_captum.evaluation import retraining
from stride_captum.evaluation.models import TrainingSettings, digits_mlp
from stride_captum.evaluation.retraining import (
    RetrainingPlan,
    logits_of,
    mean_residual,
    train_attributed,
    train_model,
    train_spiked,
)
from stride_captum.evaluation.tasks import Task, load_task
from stride_captum.subsets import members, membership_from_indices, random_subsets

SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=3, batch_size=8)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


def other_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


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
    run = retraining._run

    def counted(path, *rest):
        run(path, *rest)
        done.append(path.name)

    monkeypatch.setattr(retraining, "_run", counted)
    return done


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
                expected = logits_of(model, task.test.tensors[0][:10])
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
        counted = retraining._run

        def interrupted(path, *rest):
            if len(runs) == 2:
                raise KeyboardInterrupt
            counted(path, *rest)

        monkeypatch.setattr(retraining, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.execute(n_jobs=1, show_progress=False)
        assert len(plan.missing()) == 4
        monkeypatch.setattr(retraining, "_run", counted)
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), unbroken)
        assert len(runs) == len(set(runs)) == 6

    @pytest.mark.parametrize("damage", ["cut", "empty", "text", "other shape", "gone"])
    def test_a_damaged_file_is_recomputed(self, plan, unbroken, runs, damage):
        plan.execute(n_jobs=1, show_progress=False)
        path = plan._path(1, 0)
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "other shape":
            np.save(path, np.zeros((7, 3), dtype=np.float32))
        else:
            path.write_bytes({"cut": whole[:-5], "empty": b"", "text": b"not an array"}[damage])
        assert plan.missing() == [(1, 0)]
        assert np.array_equal(plan.execute(n_jobs=1, show_progress=False), unbroken)
        assert runs[6:] == [path.name]
        assert path.read_bytes() == whole

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
            retraining._write_atomically(tmp_path / "run.npy", write)
        assert list(tmp_path.iterdir()) == []

    def test_bad_plans_are_refused(self, plan):
        with pytest.raises(ValueError, match="`membership` must have n_train = 40 columns; got 41"):
            replace(plan, membership=random_subsets(41, 3, 20))
        with pytest.raises(ValueError, match="`n_seeds` must be at least 1; got 0"):
            replace(plan, n_seeds=0)
        with pytest.raises(ValueError, match="`n_test` must be between 1 and the 20 test points; got 21"):
            replace(plan, n_test=21)


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

    @pytest.mark.parametrize("what", ["one input", "one label", "one test input", "settings", "network"])
    def test_what_determines_a_run_names_it(self, plan, what):
        plan.execute(n_jobs=1, show_progress=False)
        assert len(replace(plan, task=self.changed(plan.task, what)).missing()) == 6

    def test_equal_data_in_other_tensors_is_the_same_run(self, plan):
        plan.execute(n_jobs=1, show_progress=False)
        assert replace(plan, task=self.changed(plan.task, "nothing")).missing() == []

    def test_subset_seed_and_number_of_test_points_name_it(self, plan):
        names = {plan._path(k, s) for k in range(3) for s in range(4)}
        names |= {replace(plan, n_test=9)._path(0, 0)}
        names |= {replace(plan, membership=membership_from_indices([[1, 2, 3]], 40))._path(0, 0)}
        assert len(names) == 14

    def test_labels_flipped_in_place_are_noticed(self, plan):
        plan.execute(n_jobs=1, show_progress=False)
        plan.task.train.tensors[1][0] = (plan.task.train.tensors[1][0] + 1) % 3
        assert len(plan.missing()) == 6

    def test_attributed_models_of_other_data_are_not_used(self, task, tmp_path):
        one = train_attributed(task, 0, tmp_path)
        other = train_attributed(self.changed(task, "one label"), 0, tmp_path)
        assert not torch.equal(one[0].weight, other[0].weight)


class TestAttributed:
    def test_is_kept_and_read_back_bit_for_bit(self, task, tmp_path, monkeypatch):
        trained = train_attributed(task, 3, tmp_path)
        monkeypatch.setattr(retraining, "train_model", lambda *a, **k: pytest.fail("trained again"))
        read = train_attributed(task, 3, tmp_path)
        assert not read.training
        for name, value in trained.state_dict().items():
            assert torch.equal(read.state_dict()[name], value)

    def test_a_damaged_file_is_trained_again(self, task, tmp_path):
        trained = train_attributed(task, 3, tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-9])
        assert torch.equal(train_attributed(task, 3, tmp_path)[0].weight, trained[0].weight)

    def test_without_a_store_it_is_the_trained_model(self, task):
        expected = train_model(small_network, *task.train.tensors, SETTINGS, 3)
        assert torch.equal(train_attributed(task, 3)[0].weight, expected[0].weight)

    def test_a_spike_is_the_worst_of_the_last_six_epochs(self, task):
        task = replace(task, training=replace(SETTINGS, epochs=9))
        seen = {}

        def look(epoch, model):
            seen[epoch] = mean_residual(model, *task.train.tensors)

        train_model(small_network, *task.train.tensors, task.training, 0, after_epoch=look)
        spiked = train_attributed(task, 0, spike=True)
        assert mean_residual(spiked, *task.train.tensors) == max(v for e, v in seen.items() if e >= 4)
        assert max(seen, key=seen.get) < 4

    def test_the_first_seed_above_the_threshold_is_taken(self, task, tmp_path):
        residuals = [
            mean_residual(train_attributed(task, seed, tmp_path, spike=True), *task.train.tensors)
            for seed in range(4)
        ]
        threshold = sorted(residuals)[1]
        model, seed = train_spiked(task, tmp_path, threshold=threshold, first_seed=0, tries=4)
        assert seed == next(i for i, r in enumerate(residuals) if r > threshold)
        assert mean_residual(model, *task.train.tensors) == residuals[seed]

    def test_no_spike_is_said(self, task, tmp_path):
        with pytest.raises(
            RuntimeError, match=r"None of 2 trainings of small had a mean residual above 1\.0"
        ):
            train_spiked(task, tmp_path, threshold=1.0, tries=2)


KILLED = """
import os, sys
from pathlib import Path
from stride_captum.evaluation import retraining
from stride_captum.evaluation.models import TrainingSettings
from stride_captum.evaluation.tasks import load_task
from stride_captum.subsets import random_subsets

task = load_task("digits", preset="smoke", training=TrainingSettings(**{settings}))
plan = retraining.RetrainingPlan(task, random_subsets(300, 3, 150, seed=0), 1, Path(sys.argv[1]), 20)
replace, renamed = os.replace, []

def die_at_the_third(source, target):
    if len(renamed) == 2:
        os._exit(9)
    renamed.append(target)
    replace(source, target)

os.replace = die_at_the_third
plan.execute(n_jobs=1, show_progress=False)
"""


def test_a_killed_plan_resumes_in_another_process_with_the_same_bits(tmp_path):
    settings = {"optimizer": "adam", "learning_rate": 1e-3, "epochs": 2}
    script = KILLED.format(settings=settings)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], check=False)
    assert killed.returncode == 9
    task = load_task("digits", preset="smoke", training=TrainingSettings(**settings))
    assert task.build_model is digits_mlp
    plan = RetrainingPlan(task, random_subsets(300, 3, 150, seed=0), 1, tmp_path / "killed", 20)
    assert plan.missing() == [(2, 0)]
    resumed = plan.execute(n_jobs=1, show_progress=False)
    unbroken = replace(plan, store=tmp_path / "unbroken").execute(n_jobs=1, show_progress=False)
    assert np.array_equal(resumed, unbroken)
