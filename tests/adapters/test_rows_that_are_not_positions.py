"""Layers whose rows are not the labeled positions one by one: convolutions, prompts, positions first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn
from stride_captum.losses import CrossEntropy

WIDTH, N_CLASSES, IGNORED = 3, 3, -100

#: Each with labels of the Fisher matrix that are given, so that nothing is drawn.
FISHERS = [
    (DiagonalEKFAC, {"fisher": "exact"}),
    (DiagonalEKFAC, {"fisher": "empirical", "relative": False}),
    (EKFAC, {"fisher": "empirical"}),
    (EKFAC, {"fisher": "empirical", "damping": 0.01}),
    (EKFAC, {"fisher": "empirical", "strategy": "kfac", "damping": 0.01}),
    (EKFAC, {"fisher": "empirical", "strategy": "diagonal"}),
]


class Convolutions(nn.Module):
    """`(n, 3, 2, 2)` to `(n, 3, 1, 1)`, or to `(n, 3)`; in between there are 9 pixels."""

    def __init__(self, positions: bool = True) -> None:
        super().__init__()
        self.positions = positions
        self.inner, self.outer = nn.Conv2d(WIDTH, 4, 2, padding=1), nn.Conv2d(4, N_CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.outer(torch.tanh(self.inner(x)))
        return z if self.positions else z[:, :, 0, 0]


class Prompt(nn.Module):
    """`(n, P, 3)` to `(n, P, 3)`; one layer sees a row more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(torch.cat([x[:, :1] * 0 + 0.3, x], 1)))
        z: Tensor = self.outer(h[:, 1:] + h[:, :1])
        return z


class DeadUnits(nn.Module):
    """`(n, P, 3)` to `(n, P, 3)`, with rows whose units are all dead."""

    def __init__(self, by_time: bool) -> None:
        super().__init__()
        self.by_time, self.inner, self.outer = by_time, nn.Linear(WIDTH, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.outer(torch.relu(self.inner(x.transpose(0, 1) if self.by_time else x) - 0.3))
        return z.transpose(0, 1) if self.by_time else z


class OneRow(nn.Module):
    """`(n, 12)` to `(n, 1, 3)`, without a layer that gives `(n, 1, n_features)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.outer(torch.tanh(self.inner(x)))
        return z[:, None]


def network(build: Any, **options: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        built: nn.Module = build(**options).double().eval()
    return built


def drawn(build: Any, n: int = 9) -> tuple[Tensor, Tensor]:
    """Inputs and labels of every position."""
    generator = torch.Generator().manual_seed(0)
    pixels = build is Convolutions
    shape, labels = ((n, WIDTH, 2, 2), (n, 1, 1)) if pixels else ((n, 5, WIDTH), (n, 5))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(N_CLASSES, labels, generator=generator)


def made(method: Any, model: nn.Module, x: Tensor, y: Tensor, weight: Any = None, **options: Any) -> Any:
    if method is EKFAC:
        pytest.importorskip("kronfluence")
    given = {"batch_size": 4, **options}
    return method(model, TensorDataset(x, y), loss=CrossEntropy(weight=weight), **given)


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [None, [1.0, 6.0, 0.2], [1.0, 2.0, 0.0]])
@pytest.mark.parametrize(("method", "options"), FISHERS)
def test_an_image_with_one_label_is_an_example_without_positions(method, options, weight):
    x, y = drawn(Convolutions)
    if weight is not None:  # an absolute damping is one of the mean weight
        mean = torch.tensor(weight, dtype=torch.float64)[y]
        weight = torch.tensor(weight, dtype=torch.float64) / mean.sum() * (mean > 0).sum()
    images, plain = network(Convolutions), network(Convolutions, positions=False)
    found = made(method, images, x, y, weight, **options).influence((x[:3], y[:3]))
    wanted = made(method, plain, x, y[:, 0, 0], weight, **options).influence((x[:3], y[:3, 0, 0]))
    same(found, wanted)


@pytest.mark.parametrize("build", [Convolutions, Prompt])
class TestAnExampleWithoutLabels:
    @pytest.fixture
    def problem(self, build):
        x, y = drawn(build)
        y[2] = IGNORED
        return network(build), x, y

    @pytest.mark.slow
    @pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.3]])
    @pytest.mark.parametrize(
        ("method", "options"), [*FISHERS, (TRAK, {"projection_dim": 64, "damping": 0.5}), (TracIn, {})]
    )
    def test_its_removal_changes_nothing(self, problem, method, options, weight):
        model, x, y = problem
        rest = torch.arange(len(x)) != 2
        whole = made(method, model, x, y, weight, **options)
        less = made(method, model, x[rest], y[rest], weight, **options)
        found = whole.influence((x[:2], y[:2]))
        same(found[:, rest], less.influence((x[:2], y[:2])))
        assert not found[:, 2].any()
        same(whole.self_influence()[rest], less.self_influence())

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "options"), FISHERS)
    def test_equal_weights_of_classes_are_none(self, problem, method, options):
        model, x, y = problem
        found, wanted = (made(method, model, x, y, w, **options) for w in ([1.0] * N_CLASSES, None))
        same(found.influence((x[:2], y[:2])), wanted.influence((x[:2], y[:2])))

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "options"), FISHERS)
    def test_a_class_of_weight_0_alone_is_no_label(self, problem, method, options):
        model, x, y = problem
        y = y.where(y != 1, IGNORED)
        other = y.clone()
        other[2] = 1
        found, wanted = (made(method, model, x, each, [1.0, 0.0, 2.0], **options) for each in (other, y))
        same(found.influence((x[:2], y[:2])), wanted.influence((x[:2], y[:2])))


@pytest.mark.parametrize("method", [DiagonalEKFAC, EKFAC])
@pytest.mark.parametrize("label", [IGNORED, 1])
def test_a_training_set_without_labels_is_refused(method, label):
    x, y = drawn(Prompt)
    none = made(method, network(Prompt), x, torch.full_like(y, label), [1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="`train_dataset` must have at least one label that is not ignored"):
        none.fit()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5, 8, 24])
@pytest.mark.parametrize(("method", "options"), FISHERS)
def test_neither_batches_nor_the_order_of_rows_change_scores_where_units_are_dead(
    method, options, batch_size
):
    x, y = drawn(DeadUnits, 24)
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.35] = IGNORED
    plain = made(method, network(DeadUnits, by_time=False), x, y, **options)
    found = made(method, network(DeadUnits, by_time=True), x, y, batch_size=batch_size, **options)
    same(found.influence((x, y)), plain.influence((x, y)))


def test_features_of_positions_that_nothing_gives_are_missed_in_the_refusal():
    x, y = drawn(Convolutions)
    with pytest.raises(ValueError, match="no Linear or convolution gives one row for each position"):
        made(TracIn, OneRow().double().eval(), x.flatten(1), y[:, 0], residuals="both").fit()
