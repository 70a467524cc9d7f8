"""Every answer is exact to a stated bound, or refused: over dampings, margins, sizes of features, and dtypes.

The reference is written for accuracy and nothing else. It works in float64 on the numbers as they are given:
A^-1 from singular values, Sigma as a sum over pairs of classes, residuals in the logarithm, and one ridge
regression for each example that is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flat_options import arguments
from torch import Tensor
from torch.nn import functional as F

from stride_captum import STRIDE
from stride_captum.closed_form import moments

N, N_TEST, WIDTHS, C = 60, 7, (12, 8), 4
DAMPINGS = (0.3, 0.04, 1e-3, 1e-5, 1e-7)
MARGINS = (0.0, 20.0, 34.0, 45.0, 60.0, 150.0, 600.0)
SIZES = ((1.0, 1.0), (1e-30, 1.0), (1e30, 1e-30), (1e-20, 1e-20), (1e18, 1e3))
#: Largest error, in units of the largest entry of a row of scores, or of the largest of a vector.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-8}


class Problem:
    """Features of two layers, and logits that are right by a margin; wrong by it for every tenth example."""

    def __init__(
        self,
        margin: float = 0.0,
        sizes: tuple[float, float] = (1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        wrong: bool = False,
        n_train: int = N,
        mean: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.n_train, n = n_train, n_train + N_TEST
        layers = [(randn(n, width) + mean) * size for width, size in zip(WIDTHS, sizes, strict=True)]
        self.features = torch.cat(layers, 1).to(dtype)
        self.labels = torch.randint(C, (n,), generator=generator)
        sure = F.one_hot(self.labels, C).double()
        if wrong:
            sure[::10] = sure[::10].roll(1, 1)
        self.logits = (randn(n, C) + margin * sure).to(dtype)

    @property
    def train(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._rows(slice(0, self.n_train))

    @property
    def test(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._rows(slice(self.n_train, None))

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.features[rows], self.logits[rows], self.labels[rows]

    def method(self, **options) -> STRIDE:
        wanted = arguments(**options)
        projection = wanted.pop("features", None)
        return STRIDE.from_features(*self.train, widths=WIDTHS, projection=projection, **wanted)


class Reference:
    """The definition of every answer of the closed form with one Kronecker term."""

    def __init__(self, problem: Problem, damping: float, temperature: float, kind: str) -> None:
        self.n, self.labels, self.logits = problem.n_train, problem.labels, problem.logits.double()
        self.phi = self._phi(problem.features.double())
        at = 1.0 if kind == "training" else temperature
        log_p = self._log_p(self.logits[: self.n], at)
        tempered = self._residuals(self.logits[: self.n], self.labels[: self.n], at)
        self.left_out = self._left_out(self.phi[: self.n, [*range(WIDTHS[0]), -1]], damping)
        e = F.one_hot(self.labels[: self.n], C).double()
        ridge = e - self._on_simplex(e - self.left_out)
        # In units of the largest, squares of residuals stay within float64.
        unit = tempered.abs().max()
        both = 0.6 * tempered / unit + 0.4 * ridge * (tempered / unit).norm() / ridge.norm()
        self.residuals = {"both": both, "leave-one-out": ridge / unit}.get(kind, tempered / unit)
        sigma = self._sigma(log_p, unit)
        mean = sigma.trace() / (C - 1)
        penalty = damping * torch.eye(C, dtype=torch.float64)
        self.class_inverse = torch.linalg.inv(sigma / mean + penalty) / mean
        self.inverse = self._inverse(damping)
        self.unit = unit

    def scores(self) -> Tensor:
        others = self.logits[self.n :].clone()
        y = self.labels[self.n :]
        others[range(len(y)), y] = -torch.inf
        gradients = F.one_hot(y, C).double() - others.softmax(1)
        self.test_norms = (self._form(self.phi[self.n :]) * self._class_form(gradients, gradients)).sqrt()
        kernel = self.phi[self.n :] @ self.inverse @ self.phi[: self.n].T
        return kernel * (gradients @ self.class_inverse @ self.residuals.T) / self.n

    def cosine(self) -> Tensor:
        scores = self.scores()
        norms = (self._form(self.phi[: self.n]) * self._class_form(self.residuals, self.residuals)).sqrt()
        return scores * self.n / self.test_norms[:, None] / norms

    def self_influence(self) -> Tensor:
        loss = self._residuals(self.logits[: self.n], self.labels[: self.n], 1.0)
        return self._form(self.phi[: self.n]) * self._class_form(loss, self.residuals) / self.n

    def mislabel_scores(self) -> Tensor:
        return self.left_out.norm(dim=1)

    def _phi(self, features: Tensor) -> Tensor:
        layers = [layer / layer.abs().max() for layer in features.split(WIDTHS, 1)]
        layers = [layer / layer[: self.n].square().sum(1).mean().sqrt() for layer in layers]
        return torch.cat([*layers, torch.ones(len(features), 1)], 1)

    def _inverse(self, damping: float) -> Tensor:
        phi = self.phi[: self.n]
        _, singular, v = torch.linalg.svd(phi)
        singular = F.pad(singular, (0, len(v) - len(singular)))
        penalty = damping * phi.square().sum() / self.n / phi.shape[1]
        return v.T @ torch.diag(1 / (singular.square() / self.n + penalty)) @ v

    def _left_out(self, phi: Tensor, damping: float) -> Tensor:
        """Ridge regressions as least squares, which keep twice the digits of normal equations."""
        e, x = F.one_hot(self.labels[: self.n], C).double().numpy(), phi.numpy()
        ridge = np.sqrt(damping * (x * x).sum() / x.shape[1]) * np.eye(x.shape[1])
        residuals = []
        for i in range(self.n):
            keep = np.arange(self.n) != i
            above = np.concatenate([x[keep], ridge])
            below = np.concatenate([e[keep], np.zeros((x.shape[1], C))])
            residuals.append(e[i] - x[i] @ np.linalg.lstsq(above, below, rcond=None)[0])
        return torch.from_numpy(np.stack(residuals))

    def _form(self, phi: Tensor) -> Tensor:
        return (phi @ self.inverse * phi).sum(1)

    def _class_form(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ self.class_inverse * right).sum(1)

    @staticmethod
    def _log_p(logits: Tensor, temperature: float) -> Tensor:
        return (logits / temperature).log_softmax(1)

    @classmethod
    def _residuals(cls, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        log_p = cls._log_p(logits, temperature)
        rows = range(len(labels))
        result = -log_p.exp()
        log_p = log_p.clone()
        log_p[rows, labels] = -torch.inf
        result[rows, labels] = log_p.logsumexp(1).exp()
        return result

    @staticmethod
    def _sigma(log_p: Tensor, unit: Tensor) -> Tensor:
        """`E[diag p - p p^T] = sum_{a < b} E[p_a p_b] (e_a - e_b) (e_a - e_b)^T`, in the unit."""
        sigma = torch.zeros(C, C, dtype=torch.float64)
        for a, b in itertools.combinations(range(C), 2):
            d = torch.zeros(C, dtype=torch.float64)
            d[a], d[b] = 1.0, -1.0
            sigma += (log_p[:, a] + log_p[:, b] - unit.log()).exp().mean() * torch.outer(d, d)
        return sigma

    @staticmethod
    def _on_simplex(points: Tensor) -> Tensor:
        low, high = points.amin(1, keepdim=True) - 1, points.amax(1, keepdim=True)
        for _ in range(100):
            middle = (low + high) / 2
            above = (points - middle).clamp_min(0).sum(1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (points - high).clamp_min(0)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest error in units of the largest entry of its row."""
    return float(((found.double() - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())


def answers(problem: Problem, **options) -> dict[str, Callable[[], Tensor]]:
    method = problem.method(**options)
    return {
        "scores": lambda: method.influence(problem.test),
        "cosine": lambda: method.influence(problem.test, normalize="cosine"),
        "self_influence": method.self_influence,
        "mislabel_scores": method.mislabel_scores,
    }


def check(problem: Problem, dtype: torch.dtype, damping: float, temperature: float, kind: str) -> list[str]:
    """Compare all answers; returns those that were refused."""
    options = {"damping": damping, "head_damping": damping, "temperature": temperature, "residuals": kind}
    reference, refused = Reference(problem, damping, temperature, kind), []
    for name, ask in answers(problem, **options).items():
        try:
            found = ask()
        except ValueError as reason:
            refused.append(f"{name}: {reason}")
            continue
        assert found.dtype == dtype
        assert bool(torch.isfinite(found).all()), name
        assert error(found, getattr(reference, name)()) < BOUND[dtype], (name, options)
    return refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestGrid:
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("damping", DAMPINGS)
    @pytest.mark.slow
    def test_dampings_and_sizes_of_features(self, dtype, sizes, damping):
        assert check(Problem(3.0, sizes, dtype), dtype, damping, 2.0, "both") == []

    @pytest.mark.parametrize("kind", ["training", "temperature", "leave-one-out", "both"])
    @pytest.mark.parametrize("margin", MARGINS)
    @pytest.mark.parametrize("wrong", [False, True])
    @pytest.mark.slow
    def test_margins_and_residuals(self, dtype, margin, kind, wrong):
        temperature = 1.0 if kind == "training" else 2.0
        refused = check(Problem(margin, dtype=dtype, wrong=wrong), dtype, 0.3, temperature, kind)
        assert all("`temperature` must" in said or "`model` must have losses" in said for said in refused)
        if margin <= 60:
            assert refused == []
        elif margin == 150 and not wrong and kind != "leave-one-out" and dtype == torch.float32:
            assert [said.split(":")[0] for said in refused] == ["self_influence"]  # its products are 1e-65
        elif margin == 600 and kind == "training":
            assert len(refused) == 4
        elif dtype == torch.float64:
            assert refused == []

    @pytest.mark.parametrize("margin", [40.0, 60.0])
    @pytest.mark.parametrize("sizes", [(1e-25, 1e25), (1e-30, 1e-30)], ids=str)
    @pytest.mark.parametrize("damping", [0.3, 1e-6])
    def test_all_at_once(self, dtype, margin, sizes, damping):
        assert check(Problem(margin, sizes, dtype, wrong=True), dtype, damping, 1.0, "both") == []


@pytest.mark.parametrize("damping", [0.3, 0.04, 1e-4])
@pytest.mark.parametrize(("n_train", "mean"), [(12, 1.0), (N, 30.0), (N, 1000.0)])
@pytest.mark.parametrize("cheap", [0, 2**28])
def test_few_examples_and_features_that_hardly_vary(monkeypatch, damping, n_train, mean, cheap):
    monkeypatch.setattr(moments, "_CHEAP", cheap)
    problem = Problem(n_train=n_train, mean=mean)
    assert check(problem, torch.float32, damping, 2.0, "both") == []


def test_many_features_that_hardly_vary():
    """Float32 has no digits left for what an inverse of A makes of their mean."""
    generator = torch.Generator().manual_seed(0)
    features, logits = (
        torch.randn(520, 400, generator=generator) + 10,
        torch.randn(520, C, generator=generator),
    )
    labels = torch.randint(C, (520,), generator=generator)
    found, wanted = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, wanted)):
        arrays = features.to(dtype), logits.to(dtype), labels
        test = tuple(part[500:] for part in arrays)
        method = STRIDE.from_features(*(part[:500] for part in arrays))
        results += [
            method.influence(test),
            method.influence(test, normalize="cosine"),
            method.self_influence(),
        ]
    for single, double in zip(found, wanted, strict=True):
        assert error(single, double) < 1e-5


@pytest.mark.parametrize("curvature", ["identity", "eigenvalue-corrected", "gauss-newton"])
class TestOtherCurvatures:
    """In float32 against themselves in float64, whose formulas other tests compare with dense ones."""

    @pytest.mark.slow
    @pytest.mark.parametrize("damping", [0.3, 1e-5])
    @pytest.mark.parametrize(("margin", "sizes"), [(0.0, (1e-30, 1e25)), (60.0, (1.0, 1.0))], ids=str)
    def test_float32_has_the_digits_of_float64(self, curvature, damping, margin, sizes):
        single, double = (Problem(margin, sizes, wrong=True) for _ in range(2))
        double.features, double.logits = double.features.double(), double.logits.double()
        found, wanted = (answers(p, curvature=curvature, damping=damping) for p in (single, double))
        for name, ask in found.items():
            assert error(ask(), wanted[name]()) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 40.0])
def test_half_precision_is_read_and_no_product_is_rounded_to_it(dtype, margin):
    problem = Problem(margin, dtype=dtype)
    reference = Reference(problem, 0.1, 2.0, "both")
    for name, ask in answers(problem, damping=0.1).items():
        found = ask()
        assert found.dtype == torch.float32
        assert error(found, getattr(reference, name)()) < BOUND[torch.float32], name


class TestTrainedOperators:
    CONFIG = arguments(operators="trained", n_subsets=6, rank=3, iterations=4, subsets="partition")

    def scores(self, problem: Problem) -> Tensor:
        method = STRIDE.from_features(*problem.train, widths=WIDTHS, **self.CONFIG)
        return method.influence(problem.test)

    @pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
    def test_the_size_of_features_changes_nothing(self, sizes):
        wanted = self.scores(Problem(3.0))
        assert error(self.scores(Problem(3.0, sizes)), wanted.double()) < 1e-4

    def test_features_in_half_precision_are_scaled_in_float32(self):
        half = Problem(3.0, dtype=torch.bfloat16)
        single = Problem(3.0)
        single.features, single.logits = half.features.float(), half.logits.float()
        assert torch.equal(self.scores(half), self.scores(single))


@pytest.mark.parametrize("kind", ["random", "pca"])
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_projections_of_features_of_every_size(kind, sizes):
    options = {"projection": kind, "projection_width": 5}
    found, wanted = (answers(Problem(3.0, s), **options) for s in (sizes, SIZES[0]))
    for name, ask in found.items():
        assert error(ask(), wanted[name]().double()) < 1e-4, name
