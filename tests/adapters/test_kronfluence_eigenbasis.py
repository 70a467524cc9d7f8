"""EKFAC in the eigenbasis against kronfluence's own rotations of whole gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from stride_captum.data.batch import ExampleBatch

pytest.importorskip("kronfluence")

from kronfluence.factor.eigen import fit_lambda_matrices_with_loader

from stride_captum.adapters._kronfluence import eigenbasis
from stride_captum.adapters._kronfluence.calls import Batch, Batches, Kronfluence

N, C = 6, 3


class Pooled(nn.Module):
    """Linear layers on several positions of each example."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4, bias=bias), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh()).mean(1)


def rows(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, C))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, C))


# A row of few positions is rotated by itself, of many the whole gradient; so is that of a convolution.
CASES = {
    "one row": (rows, (5,)),
    "one row, more outputs than inputs": (lambda: nn.Sequential(nn.Linear(2, 7), nn.Linear(7, C)), (2,)),
    "one row, no bias": (lambda: rows(bias=False), (5,)),
    "two positions": (Pooled, (2, 5)),
    "two positions, no bias": (lambda: Pooled(bias=False), (2, 5)),
    "many positions": (Pooled, (40, 5)),
    "convolution": (convolution, (2, 4, 4)),
}


WIDE = {"wide": (lambda: nn.Sequential(nn.Linear(900, 600), nn.Tanh(), nn.Linear(600, C)), (900,))}


class Problem:
    """A wrapped model with random residuals and gradients, and its factors."""

    def __init__(self, case: str, n_query: int) -> None:
        build, shape = {**CASES, **WIDE}[case]
        torch.manual_seed(0)
        model = build().double().eval()
        x, labels = torch.randn(N, *shape).double(), torch.zeros(N, dtype=torch.long)
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.own = Kronfluence(model, names, "ekfac", True, 1e-3)
        residuals = torch.randn(N, C).double()
        self.train: list[Batch] = [
            {
                "residuals": residuals[half],
                "labels": labels[half],
                "examples": ExampleBatch.of((x[half], labels[half])),
            }
            for half in (slice(0, N // 2), slice(N // 2, N))
        ]
        self.query: Batch = {
            "gradients": torch.randn(n_query, C).double(),
            "residuals": residuals[:n_query],
            "examples": ExampleBatch.of((x[:n_query], labels[:n_query])),
        }
        self.factors = self.own.fit(lambda draw: self.train)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Influence and self-influence."""
        pairwise = self.own.scores(self.factors, self.query, self.train, N)
        return pairwise, self.own.self_scores(self.factors, [self.query])


def close(ours: Tensor, theirs: Tensor) -> bool:
    assert float(theirs.abs().max()) > 0
    return float((ours - theirs).norm() / theirs.norm()) < 1e-12


@pytest.mark.parametrize("n_query", [1, N])
@pytest.mark.parametrize("case", CASES)
def test_lambda_and_scores_are_those_of_whole_gradients(
    case: str, n_query: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(case, n_query)
    basis = {name: part for name, part in problem.factors.items() if "eigen" in name}
    _, plain = problem.own._call(
        fit_lambda_matrices_with_loader,
        task=problem.own.losses,
        loader=Batches(problem.train),
        eigen_factors=basis,
    )
    for name, reference in plain["lambda_matrix"].items():
        assert close(problem.factors["lambda_matrix"][name], reference), name
    ours = problem.scores()
    monkeypatch.setattr(Kronfluence, "_in_basis", lambda self, factors, n_train=0: nullcontext())
    for own, theirs in zip(ours, problem.scores(), strict=True):
        assert close(own, theirs)


def test_rows_are_rotated_where_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    rotated = eigenbasis._Rotated._rows

    def counted(self, input_activation, output_gradient):
        shapes.append(output_gradient.shape)
        return rotated(self, input_activation, output_gradient)

    monkeypatch.setattr(eigenbasis._Rotated, "_rows", counted)
    for case in CASES:
        shapes.clear()
        Problem(case, N).scores()
        assert bool(shapes) == ("many" not in case), case


def test_layers_and_strategy_are_put_back() -> None:
    model = rows().eval()
    own = Kronfluence(model, ["0", "2"], "ekfac", True, 1e-3)
    basis = {
        f"{kind}_eigenvectors": {str(m.name): torch.eye(9) for m in own.tracked}
        for kind in ("gradient", "activation")
    }

    def raising() -> None:
        with own._in_basis(basis):
            assert own.factor_args.strategy == "diagonal"
            assert all("compute_pairwise_score" in vars(layer) for layer in own.tracked)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        raising()
    assert own.factor_args.strategy == "ekfac"
    assert not any("compute_pairwise_score" in vars(layer) for layer in own.tracked)


def test_other_queries_have_their_own_products() -> None:
    problem = Problem("convolution", N)
    (layer,) = (m for m in problem.own.tracked if isinstance(m.original_module, nn.Conv2d))
    x, gradients = torch.randn(N, 2, 4, 4).double(), torch.randn(N, 4, 4, 4).double()
    queries = [torch.randn(2, 4, 19).double() for _ in range(2)]
    with problem.own._in_basis(problem.factors):
        each = layer.compute_per_sample_gradient(input_activation=x, output_gradient=gradients)
        for query in queries:
            found = layer.compute_pairwise_score(query, x, gradients)
            assert close(found, torch.einsum("qoi,noi->qn", query, each))


def test_self_influence_of_wide_layers_keeps_its_digits_in_float32() -> None:
    problem = Problem("wide", N)
    layer = next(m for m in problem.own.tracked if m.original_module.out_features == 600)
    x, gradients, query = torch.rand(N, 900), torch.rand(N, 600), torch.rand(N, 600, 901)
    for name, n in (("gradient", 600), ("activation", 901)):
        problem.factors[f"{name}_eigenvectors"][layer.name] = torch.eye(n)
    with problem.own._in_basis(problem.factors):
        ours = layer.compute_self_measurement_score(query, x, gradients)
    inputs = torch.cat([x, torch.ones(N, 1)], 1).double()
    theirs = torch.einsum("noi,no,ni->n", query.double(), gradients.double(), inputs)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-6


@pytest.mark.parametrize("n_query", [4, 5, 40])
def test_scores_hold_no_more_than_the_smaller_product(n_query: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("one row", N)
    (layer,) = (m for m in problem.own.tracked if m.original_module.out_features == 4)
    x, gradients, query = torch.randn(N, 5), torch.randn(N, 4), torch.randn(n_query, 4, 6)
    largest = []
    multiply = torch.Tensor.__mul__

    def measured(a: Tensor, b: Tensor) -> Tensor:
        largest.append(a.numel())
        return multiply(a, b)

    with problem.own._in_basis(problem.factors, N):
        monkeypatch.setattr(torch.Tensor, "__mul__", measured)
        layer.compute_pairwise_score(query, x, gradients)
    # Up to the longer side, (n_query, n, shorter side); then no product of queries but the scores.
    assert largest == ([n_query * N * 4] if n_query <= 6 else [])
