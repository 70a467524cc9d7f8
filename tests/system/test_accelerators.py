"""Accelerators that torch sees here: every method answers as on the processor, and leaves all as it was."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_calls import METHODS, assert_same_answers, every_call
from planted import MLP, trained
from torch import nn

from stride_captum import STRIDE, Checkpoint
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    ConfidentLearning,
    DiagonalEKFAC,
    LossDetector,
    Similarity,
    TracIn,
)
from stride_captum.conformance import check, shipped, shipped_at_positions, shipped_for
from stride_captum.doctor import accelerators, check_device
from stride_captum.evaluation import compare, load_task
from stride_captum.evaluation.retraining.cross_fitting import retrain
from stride_captum.evaluation.retraining.stacked import train_stacked
from stride_captum.evaluation.retraining.training import logits_of, train_model
from stride_captum.evaluation.tasks.networks import TrainingSettings

HERE = [torch.device(name) for name in accelerators()] or [
    pytest.param(None, marks=pytest.mark.skip(reason="torch sees no accelerator here"))
]
pytestmark = pytest.mark.xdist_group("accelerators")
#: Training on random batches amplifies rounding.
TOLERANCES = {True: 1e-3, False: 1e-5}
SUBJECTS = {subject.name: subject for subject in (*shipped(), *shipped_for("mse"), *shipped_at_positions())}


@pytest.fixture(params=HERE, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    found = request.param
    return torch.device("mps") if found.type == "mps" else torch.device(found.type, found.index or 0)


@pytest.fixture
def settings(device: torch.device) -> Any:
    """Settings of the caller that make products on the device less exact."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield torch.autocast(device.type, torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def random_state(device: torch.device) -> torch.Tensor:
    return torch.mps.get_rng_state() if device.type == "mps" else torch.cuda.get_rng_state(device)


def scores_of(build: Any, model: nn.Module, train: Any, test: Any, **options: Any) -> torch.Tensor:
    return build(model, train, **options).influence(test.tensors).cpu()


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:.*in no subset")
class TestEveryMethod:
    @pytest.mark.parametrize("name", METHODS)
    def test_answers_as_on_the_processor(self, name: str, device: torch.device) -> None:
        model, train, test = trained(MLP)
        wanted = every_call(METHODS[name](model, train), test.tensors)
        points = tuple(part.to(device) for part in test.tensors)
        found = every_call(METHODS[name](copy.deepcopy(model).to(device), train), points)
        assert_same_answers(found, wanted, device, TOLERANCES[name.startswith("operators")])

    @pytest.mark.parametrize("name", METHODS)
    def test_settings_of_the_caller_change_nothing(
        self, name: str, device: torch.device, settings: Any
    ) -> None:
        model, train, test = trained(MLP)
        network = copy.deepcopy(model).to(device)
        points = tuple(part.to(device) for part in test.tensors)
        with settings:
            found = METHODS[name](network, train).influence(points)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        assert_close(found, METHODS[name](network, train).influence(points))

    @pytest.mark.parametrize("name", METHODS)
    def test_random_state_and_weights_are_left_alone(self, name: str, device: torch.device) -> None:
        model, train, test = trained(MLP)
        network = copy.deepcopy(model).to(device)
        before = random_state(device), torch.get_rng_state(), copy.deepcopy(network.state_dict())
        METHODS[name](network, train).influence(test.tensors)
        assert torch.equal(random_state(device), before[0])
        assert torch.equal(torch.get_rng_state(), before[1])
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[2][key])
            assert value.device == device

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_laws(self, name: str, device: torch.device) -> None:
        subject = SUBJECTS[name]
        build = partial(subject.build, device=device)
        report = check(build, exceptions=subject.exceptions, name=name, loss=subject.loss)
        assert report.passed, (report.failures, report.needless_exceptions)


class TestAround:
    def test_the_doctor_finds_nothing(self, device: torch.device) -> None:
        assert check_device(str(device)).status == "ok"

    @pytest.mark.parametrize("kind", [LossDetector, ConfidentLearning])
    def test_detectors_of_label_noise(self, kind: Any, device: torch.device) -> None:
        model, train, _ = trained(MLP)
        wanted = kind(model, train).mislabel_scores()
        found = kind(copy.deepcopy(model).to(device), train).mislabel_scores().cpu()
        torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("build", [STRIDE, EKFAC, DiagonalEKFAC, TRAK, TracIn, Similarity])
    def test_checkpoints_lie_on_either_device(self, build: Any, device: torch.device) -> None:
        model, train, test = trained(MLP)
        first = copy.deepcopy(model)
        with torch.no_grad():
            for weight in first.parameters():
                weight.mul_(0.9)
        kept = [first.state_dict(), model.state_dict()]
        wanted = scores_of(build, model, train, test, checkpoints=kept)
        on_device = [{k: v.to(device) for k, v in state.items()} for state in kept]
        for states in (kept, on_device):
            network = copy.deepcopy(model).to(device)
            assert_close(scores_of(build, network, train, test, checkpoints=states), wanted, 1e-4)

    def test_models_of_parts(self, device: torch.device) -> None:
        model, train, test = trained(MLP)
        kept = [
            Checkpoint(model.state_dict(), seen=range(24)),
            Checkpoint(model.state_dict(), seen=range(24, 48)),
        ]
        wanted = STRIDE(model, train, checkpoints=kept)
        found = STRIDE(copy.deepcopy(model).to(device), train, checkpoints=kept)
        assert_close(found.influence(test.tensors).cpu(), wanted.influence(test.tensors))
        assert_close(found.mislabel_scores().cpu(), wanted.mislabel_scores().cpu())

    @pytest.mark.parametrize("build", [STRIDE, TRAK])
    def test_a_saved_method_is_loaded_on_either_device(
        self, build: Any, device: torch.device, tmp_path: Path
    ) -> None:
        model, train, test = trained(MLP)
        wanted = scores_of(build, model, train, test)
        network = copy.deepcopy(model).to(device)
        method = build(network, train).fit()
        method.save(tmp_path / "method")
        for place in (network, model):
            found = type(method).load(tmp_path / "method", place, train).influence(test.tensors)
            assert_close(found.cpu(), wanted)

    def test_stored_features(self, device: torch.device, tmp_path: Path) -> None:
        model, train, test = trained(MLP)
        reference = STRIDE(model, train).fit()
        method = STRIDE(copy.deepcopy(model).to(device), train, feature_store=tmp_path / "store")
        for change in (
            lambda m: m.fit(),
            lambda m: m.remove_examples([0, 7]),
            lambda m: m.add_examples(tuple(part[:3] for part in train.tensors)),
        ):
            wanted = change(reference).influence(test.tensors)
            assert_close(change(method).influence(test.tensors).cpu(), wanted)

    def test_the_budget_bounds_the_memory_of_the_device(self, device: torch.device) -> None:
        if device.type != "cuda":
            pytest.skip("this accelerator does not tell its peak memory")
        n, width, budget = 40_000, 256, 2**24
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 10)).to(device).eval()
        train = torch.utils.data.TensorDataset(torch.randn(n, 32), torch.randint(10, (n,)))
        points = torch.randn(500, 32), torch.randint(10, (500,))
        method = STRIDE(network, train, memory_budget=budget).fit()
        scores = method.influence(points, k=10)
        del scores
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        method.influence(points, k=10)
        torch.cuda.synchronize(device)
        assert torch.cuda.max_memory_allocated(device) - before < 3 * budget


class TestTraining:
    def task(self) -> Any:
        training = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=3)
        return load_task("synthetic", preset="smoke", training=training)

    def test_a_stack_trains_as_the_single_models(self, device: torch.device) -> None:
        task = self.task()
        x, y = task.train.tensors
        rows = [np.arange(150), np.arange(100, 250)]
        stack = train_stacked(task.build_model, x, y, rows, task.training, (3, 4), device=device)
        found = stack.logits(task.test.tensors[0].to(device)).cpu()
        for i, seed in enumerate((3, 4)):
            part = torch.from_numpy(rows[i])
            model = train_model(task.build_model, x[part], y[part], task.training, seed, device=device)
            assert_close(found[i], logits_of(model, task.test.tensors[0]).cpu(), 1e-3)

    def test_trainings_of_the_user_draw_from_the_device(self, device: torch.device) -> None:
        before = random_state(device)

        def train(indices: Any, seed: int) -> nn.Module:
            network = nn.Linear(3, 2).to(device)
            with torch.no_grad():
                network.weight.copy_(torch.randn(2, 3, device=device))
            return network

        first, second = (retrain(train, 10, parts=2, version="a") for _ in range(2))
        for one, other in zip(first.checkpoints, second.checkpoints, strict=True):
            assert torch.equal(one.weights["weight"].cpu(), other.weights["weight"].cpu())
        assert torch.equal(random_state(device), before)

    @pytest.mark.slow
    def test_every_measure(self, device: torch.device, tmp_path: Path) -> None:
        measures = {
            "lds": {},
            "calibration": {},
            "retrainings": {"budgets": (0, 1, 2), "methods": ("STRIDE", "TracIn")},
            "counterfactual": {"counts": (20,), "n_points": 2, "n_seeds": 1},
            "mislabel": {"n_held_out": 20, "detectors": ("loss",)},
            "leakage": {"counts": (4,)},
        }
        sizes = {"n_subsets": 6, "n_seeds": 1, "n_models": 1, "n_test": 20, "n_jobs": 1, "n_resamples": 20}
        methods = ["STRIDE", "STRIDE, checkpoints", "STRIDE, cross-fitted", "TracIn", "ClassRandom"]
        wanted, found = (
            compare(methods, self.task(), store=tmp_path / where, measures=measures, device=where, **sizes)
            for where in ("cpu", str(device))
        )
        for a, b in zip(found.rows, wanted.rows, strict=True):
            assert a.lds.value == pytest.approx(b.lds.value, abs=0.05)
        for a, b in zip(found.retrainings, wanted.retrainings, strict=True):
            assert (a.name, a.source, a.trainings) == (b.name, b.source, b.trainings)
        for a, b in zip(found.mislabel, wanted.mislabel, strict=True):
            assert a.result.precision == pytest.approx(b.result.precision, abs=0.1)
