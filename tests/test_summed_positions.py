"""Examples with several positions as one row of outputs: labels, targets and temperatures of gradient methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn

METHODS = (TracIn, TRAK, DiagonalEKFAC, EKFAC)


def made(method: Any, model: nn.Module, *parts: Tensor, **options: Any) -> Any:
    """A method on a training set; one whose numbers do not depend on the order of positions."""
    if method is EKFAC:
        pytest.importorskip("kronfluence")
    own = {DiagonalEKFAC: {"fisher": "exact"}, EKFAC: {"fisher": "empirical"}}.get(method, {})
    return method(model, TensorDataset(*parts), **own, **options)


def network(n_outputs: int) -> nn.Module:
    """Rows of three numbers to `n_outputs`, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, n_outputs)).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to a share of the largest, which is not 0."""
    assert a.shape == b.shape
    assert float(b.abs().max()) > 0
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


class TestOneOutput:
    """Outputs `(n, P, 1)` with labels `(n, P)`, one number for each position."""

    LOSSES = ("mse", "binary_cross_entropy")

    @staticmethod
    def labels(loss: str, *shape: int) -> Tensor:
        y = draw(*shape, seed=2)
        return y if loss == "mse" else (y > 0).double()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("loss", LOSSES)
    def test_one_position_is_an_example_without(self, method, loss):
        x, y = draw(6, 1, 3), self.labels(loss, 6, 1)
        model, test = network(1), (x[:2], y[:2])
        rows = made(method, model, x[:, 0], y, loss=loss)
        together = made(method, model, x, y, loss=loss)
        same(together.influence(test), rows.influence((x[:2, 0], y[:2])))
        same(together.influence(test, response="loss"), rows.influence((x[:2, 0], y[:2]), response="loss"))
        same(together.self_influence(), rows.self_influence())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("loss", LOSSES)
    def test_a_number_for_each_position_may_have_an_axis_of_its_own(self, method, loss):
        x, y = draw(6, 4, 3), self.labels(loss, 6, 4)
        plain, column = (made(method, network(1), x, labels, loss=loss) for labels in (y, y[..., None]))
        same(plain.influence((x[:2], y[:2])), column.influence((x[:2], y[:2, :, None])))
        same(plain.self_influence(), column.self_influence())

    @pytest.mark.parametrize("loss", LOSSES)
    def test_products_are_those_of_gradients_by_torch(self, loss):
        x, y = draw(6, 4, 3), self.labels(loss, 6, 4)
        model = network(1)
        of_torch = {"mse": F.mse_loss, "binary_cross_entropy": F.binary_cross_entropy_with_logits}[loss]
        factor = 0.5 if loss == "mse" else 1.0  # the loss of this package is half the square
        gradients = []
        for one, label in zip(x, y, strict=True):
            value = factor * of_torch(model(one[None]), label[None, :, None], reduction="sum")
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())]))
        products = torch.stack(gradients) @ torch.stack(gradients).T
        same(made(TracIn, model, x, y, loss=loss).influence((x, y), response="loss"), -products)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_maps_with_one_channel(self, loss):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Conv2d(2, 1, 3, padding=1).double()
        x, y = draw(6, 2, 3, 4), self.labels(loss, 6, 3, 4)
        plain, channel = (made(TracIn, model, x, labels, loss=loss) for labels in (y, y[:, None]))
        same(plain.influence((x[:2], y[:2])), channel.influence((x[:2], y[:2, None])))
