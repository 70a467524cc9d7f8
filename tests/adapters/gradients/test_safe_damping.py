from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from planted import MLP, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC
from stride_captum.adapters.gradients.safe_damping import check_damping, least_lambda, rounding_of

pytest.importorskip("kronfluence")

METHODS: dict[str, Callable[..., Any]] = {
    "TRAK, more coordinates than examples": partial(TRAK, projection_dim=256),
    "TRAK, fewer": partial(TRAK, projection_dim=20),
    "TRAK, other residuals": partial(TRAK, projection_dim=256, residuals="temperature"),
    "DiagonalEKFAC": partial(DiagonalEKFAC, fisher="empirical"),
    "EKFAC": partial(EKFAC, fisher="empirical"),
    "KFAC": partial(EKFAC, fisher="empirical", strategy="kfac"),
}
DAMPINGS = [1.0, 1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10]


@cache
def problem(kind: str) -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    """A trained network, its training set and test points: wide features, or near duplicates."""
    generator = torch.Generator().manual_seed(0)
    n, width = (60, 300) if kind == "wide" else (60, 12)
    centers = torch.randn(4, width, generator=generator)
    labels = torch.randint(0, 4, (n + 8,), generator=generator)
    x = 0.6 * centers[labels] + torch.randn(n + 8, width, generator=generator)
    if kind == "near duplicates":
        half = n // 2
        x[half:n] = x[:half] + 1e-5 * torch.randn(half, width, generator=generator)
        labels[half:n] = labels[:half]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:n]), labels[:n]).backward()
        optimizer.step()
    return model.eval(), TensorDataset(x[:n], labels[:n]), (x[n:], labels[n:])


def in_double(
    model: nn.Module, train: TensorDataset, test: tuple[Tensor, Tensor]
) -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    x, y = train.tensors
    return copy.deepcopy(model).double(), TensorDataset(x.double(), y), (test[0].double(), test[1])


def answers(method: Any, test: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [method.influence(test), method.influence(test, normalize="cosine"), method.self_influence()]


def refusal(method: Any) -> str | None:
    """What `fit` says of the damping, None where it is taken."""
    try:
        method.fit()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wide", "near duplicates"])
@pytest.mark.parametrize("name", METHODS)
def test_scores_in_float32_are_those_in_float64_or_the_damping_is_refused(name, kind) -> None:
    model, train, test = problem(kind)
    twin, exact_train, exact_test = in_double(model, train, test)
    refused, errors = [], []
    for damping in DAMPINGS:
        method = METHODS[name](model, train, damping=damping)
        refused.append(refusal(method))
        if refused[-1] is None:
            found = answers(method, test)
            wanted = answers(METHODS[name](twin, exact_train, damping=damping), exact_test)
            errors += [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < 0.01, errors
    assert len(errors) >= 6
    assert all(why is None or "`damping` must be at least" in why for why in refused)
    assert refused == sorted(refused, key=bool), "a smaller damping is taken where a larger one is refused"


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_damping_that_is_named_is_taken(name) -> None:
    model, train, test = problem("near duplicates")
    why = refusal(METHODS[name](model, train, damping=1e-14))
    if why is None:
        assert name == "TRAK, fewer"
        return
    least = float(why.partition("at least ")[2].partition(" ")[0])
    assert METHODS[name](model, train, damping=least).influence(test).isfinite().all()
    assert refusal(METHODS[name](model, train, damping=0.8 * least)) is not None


@pytest.mark.slow
def test_trak_with_more_coordinates_than_examples_keeps_five_digits_at_a_damping_of_a_millionth() -> None:
    model, train, test = problem("wide")
    twin, exact_train, exact_test = in_double(model, train, test)
    found = TRAK(model, train, damping=1e-6).influence(test)
    wanted = TRAK(twin, exact_train, damping=1e-6).influence(exact_test)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_float64_allows_less() -> None:
    model, train, test = in_double(*problem("near duplicates"))
    for method in METHODS.values():
        scores = method(model, train, damping=1e-8).influence(test)
        assert bool(scores.isfinite().all())


def test_elementwise_kernels_need_no_bound() -> None:
    model, train, test = problem("wide")
    twin, exact_train, exact_test = in_double(model, train, test)
    for method in (
        partial(DiagonalEKFAC, dense="diagonal", fisher="empirical"),
        partial(EKFAC, strategy="diagonal", fisher="empirical"),
    ):
        found = method(model, train, damping=1e-12).influence(test)
        wanted = method(twin, exact_train, damping=1e-12).influence(exact_test)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_damping_that_is_set_later_is_checked_too() -> None:
    model, train, test = problem("wide")
    method = EKFAC(model, train)
    scores = method.influence(test)
    with pytest.raises(
        ValueError, match=r"`damping` must be at least .* Or take strategy='diagonal'\. Or give"
    ):
        method.damping = 1e-15
    assert method.damping is None
    assert torch.equal(method.influence(test), scores)


def test_no_damping_where_gradients_are_zero_is_refused() -> None:
    class Spare(nn.Module):
        """A hidden unit that is always off."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.fc.bias.data[2] = -1e4

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x).relu())

    _, train, _ = trained(MLP, n_train=12, steps=0)
    with pytest.raises(
        ValueError, match="`damping` must be above 0 where gradients are 0 in all examples; got 0"
    ):
        EKFAC(Spare(), train, strategy="diagonal", damping=0).fit()


def test_the_bound_follows_the_eigenvalues() -> None:
    assert rounding_of(torch.float32) == 2.0**-24
    assert least_lambda(torch.tensor([0.0, 1.0]), 0.25) == 0.25
    assert least_lambda(torch.tensor([-0.1, 1.0]), 0.25) == 0.25
    assert least_lambda(torch.tensor([0.5, 1.0]), 0.25) == 0.0
    check_damping(0.1, [(0.25, 0.3, 3.0), (0.0, 0.0, 0.0)], 0.25, "")
    with pytest.raises(
        ValueError, match=r"at least 0\.13 for scores .*; got 0\.1\. Or rest\. Or give the model"
    ):
        check_damping(0.1, [(0.25, 0.2, 2.0), (0.1, 1.0, 10.0)], 0.25, "Or rest.")
    with pytest.raises(ValueError, match=r"got 0\.1\. Or rest\.$"):
        check_damping(0.1, [(0.25, 0.2, 2.0)], rounding_of(torch.float64), "Or rest.")
