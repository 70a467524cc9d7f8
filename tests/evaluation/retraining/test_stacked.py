"""A stack of models is the models trained one by one."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from stride_captum.evaluation.benchmarks.retraining import bench_retraining
from stride_captum.evaluation.cli.app import app
from stride_captum.evaluation.report.terminal import console
from stride_captum.evaluation.retraining.stacked import train_stacked, why_not_stacked
from stride_captum.evaluation.retraining.training import logits_of, train_model
from stride_captum.evaluation.tasks.networks import TrainingSettings, cifar10_cnn, digits_mlp, mnist_mlp

ADAM = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=4, batch_size=8, weight_decay=0.01)
SGD = TrainingSettings(
    optimizer="sgd", learning_rate=0.05, epochs=4, batch_size=8, weight_decay=0.01, momentum=0.9
)
SEEDS = (11, 3, 7)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).double()


def dropout_twice() -> nn.Module:
    """One Dropout module called twice, one of whole channels, and two that do nothing or everything."""
    dropout = nn.Dropout(0.3)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.Dropout2d(0.4), nn.Dropout(0.0), nn.Flatten(), dropout]
    return nn.Sequential(*layers, nn.Linear(48, 6), nn.ReLU(), dropout, nn.Linear(6, 3)).double()


def everything_dropped() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(16, 3)).double()


class Tied(nn.Module):
    """Two layers with one weight, one frozen layer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        x = self.frozen(x.flatten(1)).relu()
        return self.out(self.scale * self.two(self.one(x).relu()).relu())


def tied() -> nn.Module:
    return Tied().double()


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, x):
        return F.dropout(self.linear(x.flatten(1)), 0.5, self.training)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (60,), generator=generator)


def subsets(size):
    return [np.sort(np.random.default_rng(i).choice(60, size, replace=False)) for i in range(len(SEEDS))]


@pytest.mark.slow
@pytest.mark.parametrize("training", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("build_model", [mlp, batch_norm_cnn, dropout_twice, everything_dropped, tied])
@pytest.mark.parametrize("size", [29, 24, 17, 5], ids=["last of 5", "even", "last of 1", "one batch"])
def test_is_every_model_trained_alone(data, build_model, training, size):
    x, y = data
    models = train_stacked(build_model, x, y, subsets(size), training, SEEDS)
    logits = models.logits(x)
    for i, (rows, seed) in enumerate(zip(subsets(size), SEEDS, strict=True)):
        alone = train_model(build_model, x[rows], y[rows], training, seed)
        torch.testing.assert_close(logits[i], logits_of(alone, x), rtol=1e-9, atol=1e-10)
        state = models.state_dict(i)
        assert state.keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-9)
        alone.load_state_dict(state)
        torch.testing.assert_close(logits_of(alone, x), logits[i], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("build_model", [digits_mlp, mnist_mlp, cifar10_cnn])
def test_networks_of_the_paper_after_a_few_steps(build_model):
    shape = {digits_mlp: (1, 8, 8), mnist_mlp: (1, 28, 28), cifar10_cnn: (3, 32, 32)}[build_model]
    x = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 10
    rows = [np.arange(8), np.arange(4, 12)]
    training = replace(SGD, epochs=2, batch_size=4, learning_rate=0.01)
    logits = train_stacked(build_model, x, y, rows, training, (0, 1)).logits(x)
    for i in range(2):
        alone = train_model(build_model, x[rows[i]], y[rows[i]], training, i)
        torch.testing.assert_close(logits[i], logits_of(alone, x), rtol=1e-3, atol=1e-4)


def test_the_same_stack_has_the_same_bits(data):
    x, y = data
    one, two = (train_stacked(dropout_twice, x, y, subsets(20), ADAM, SEEDS).logits(x) for _ in range(2))
    assert torch.equal(one, two)


def test_models_do_not_see_one_another(data):
    """A neighbor that diverges changes nothing."""
    x, y = data
    spoiled = x.clone()
    spoiled[50:] = 1e300
    rows = [np.arange(20), np.arange(40, 60), np.arange(20, 40)]
    calm = train_stacked(mlp, x, y, rows, SGD, SEEDS).logits(x)
    beside = train_stacked(mlp, spoiled, y, rows, SGD, SEEDS).logits(x)
    assert not torch.isfinite(beside[1]).all()
    torch.testing.assert_close(beside[[0, 2]], calm[[0, 2]], rtol=1e-12, atol=1e-12)


def test_random_state_tensors_and_batches_of_the_logits(data):
    x, y = data
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    copies = x.clone(), y.clone()
    models = train_stacked(dropout_twice, x, y, subsets(20), ADAM, SEEDS)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    torch.testing.assert_close(models.logits(x, batch_size=7), models.logits(x))
    assert not models.logits(x).requires_grad


def test_subsets_and_seeds_that_do_not_fit_are_refused(data):
    x, y = data
    with pytest.raises(ValueError, match=r"`subsets` must all have one size, at least 1; got sizes \[2, 3\]"):
        train_stacked(mlp, x, y, [np.arange(3), np.arange(2)], ADAM, (0, 1))
    with pytest.raises(ValueError, match=r"`subsets` must all have one size, at least 1; got sizes \[\]"):
        train_stacked(mlp, x, y, [], ADAM, ())
    with pytest.raises(ValueError, match=r"`subsets` must all have one size, at least 1; got sizes \[0\]"):
        train_stacked(mlp, x, y, [np.arange(0)], ADAM, (0,))
    with pytest.raises(ValueError, match="`seeds` must be one for each of the 2 subsets; got 3 seeds"):
        train_stacked(mlp, x, y, [np.arange(3), np.arange(3)], ADAM, SEEDS)
    with pytest.raises(ValueError, match="`optimizer` must be one of 'adam', 'sgd'; got 'adamw'"):
        train_stacked(mlp, x, y, subsets(4), replace(ADAM, optimizer="adamw"), SEEDS)


def test_why_a_network_cannot_be_stacked(data):
    x = data[0].float()[:2]
    assert why_not_stacked(lambda: mlp().float(), x) is None
    assert "random operation" in why_not_stacked(FunctionalDropout, x)
    assert ".item()" in why_not_stacked(
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, momentum=None), nn.Linear(16, 3)), x
    )


def test_the_benchmark_reports_ratios_and_sizes():
    (row,) = bench_retraining(("digits",), stack_sizes=(3,), n_single=2, n_jobs=1, repeats=2)
    assert (row["case"], row["stack_size"], row["subset_size"], row["device"]) == ("digits", 3, 698, "cpu")
    assert row["n_parameters"] == 64 * 128 + 128 * 64 + 64 * 10 + 128 + 64 + 10
    assert 0 < row["smallest_ratio"] <= row["ratio"] <= row["largest_ratio"]


@pytest.mark.slow
def test_the_command_prints_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)  # cells wrap in a narrow terminal
    arguments = ["bench", "retraining", "--case", "digits", "--stack", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "retraining.json").read_text())["rows"]
    assert row["stack_size"] == 2
    assert f"{row['ratio']:.3g}" in result.output

    wrong = CliRunner().invoke(app, ["bench", "retraining", "--case", "digit"])
    assert wrong.exit_code == 2
    assert "`cases` must be one of 'digits', 'mnist', 'cifar10'; got 'digit'" in wrong.output
