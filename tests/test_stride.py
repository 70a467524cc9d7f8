from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from flat_options import arguments
from planted import MLP, planted_classes
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from stride_captum import STRIDE, ClosedForm
from stride_captum.closed_form.moments import scaled_features
from stride_captum.closed_form.options import Curvature, Residuals
from stride_captum.residuals import DEFAULT_TEMPERATURE, RIDGE_SHARE, mean_residual, project_on_simplex
from stride_captum.responses import response_gradient, response_value

CURVATURES, RESIDUALS = get_args(Curvature), get_args(Residuals)


def blobs(n, n_classes=3, n_features=5, noise=1.0, seed=0, dtype=torch.float64):
    """Gaussian classes; `noise` is the standard deviation around centres of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(
        n_classes, n_features, dtype=torch.float64, generator=torch.Generator().manual_seed(9)
    )
    labels = torch.randint(n_classes, (n,), generator=generator)
    x = 1.5 * centres[labels] + noise * torch.randn(n, n_features, dtype=torch.float64, generator=generator)
    return x.to(dtype), labels


def trained_mlp(x, y, n_classes=3, width=8, steps=120):
    """A small network with two layers of features, fitted well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, n_classes)).to(
            x.dtype
        )
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.fixture(scope="module")
def network():
    x, y = blobs(60)
    return trained_mlp(x, y), x, y


@pytest.fixture(scope="module")
def wide_network():
    x, y = blobs(300, n_features=12, dtype=torch.float32)
    return trained_mlp(x, y, width=32), x, y


def stride(model, x, y, held_out=None, layers=None, **options):
    return STRIDE(model, TensorDataset(x, y), held_out=held_out, layers=layers, **arguments(**options))


def mlp_features(model, x):
    """What the two weight layers read."""
    with torch.no_grad():
        return torch.cat([x, model[1](model[0](x))], dim=1), model(x)


class LogisticRegression:
    """Softmax regression on phi with penalty lambda/2 |a|^2 in the coordinates of phi, to the optimum.

    Written with phi, weights of examples and batched Newton steps only, so that it can be retrained
    without any example.
    """

    def __init__(self, penalty, n=200, n_classes=3, n_features=4):
        self.x, self.y = blobs(n, n_classes, n_features, noise=1.5)
        self.n, self.n_classes, self.penalty = n, n_classes, penalty
        self.norm = self.x.square().sum(1).mean().sqrt()
        self.a = self.fit(torch.ones(1, n, dtype=torch.float64))[0]

    def phi(self, x):
        return torch.cat([x / self.norm, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)

    def objective(self, a):
        z = self.phi(self.x) @ a.reshape(-1, self.n_classes)
        return F.cross_entropy(z, self.y) + self.penalty / 2 * a.square().sum()

    def fit(self, weights):
        """Minimizers of `1/N sum_i w_i H(y_i, softmax(a^T phi_i)) + lambda/2 |a|^2`, one for each row w."""
        phi, e = self.phi(self.x), F.one_hot(self.y, self.n_classes).double()
        dim = phi.shape[1] * self.n_classes
        a = torch.zeros(len(weights), phi.shape[1], self.n_classes, dtype=torch.float64)
        for _ in range(40):
            p = torch.einsum("nd,bdc->bnc", phi, a).softmax(-1)
            errors = weights[:, :, None] * (p - e) / self.n
            gradient = torch.einsum("nd,bnc->bdc", phi, errors) + self.penalty * a
            if gradient.abs().max() < 1e-13:
                return a
            curvature = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
            weighted = curvature * weights[:, :, None, None] / self.n
            hessian = torch.einsum("nd,ne,bnkl->bdkel", phi, phi, weighted).reshape(-1, dim, dim)
            hessian += self.penalty * torch.eye(dim, dtype=torch.float64)
            a = a - torch.linalg.solve(hessian, gradient.reshape(-1, dim)).reshape(a.shape)
        raise AssertionError("Newton's method has not converged")

    def model(self):
        """The same function of x as a network."""
        linear = nn.Linear(self.x.shape[1], self.n_classes).double()
        with torch.no_grad():
            linear.weight.copy_((self.a[:-1] / self.norm).T)
            linear.bias.copy_(self.a[-1])
        return linear

    def damping(self):
        """The option `damping` that means the same lambda."""
        p = (self.phi(self.x) @ self.a).softmax(1)
        mean_a = self.phi(self.x).square().mean()
        mean_sigma = (1 - p.square().sum(1)).mean() / (self.n_classes - 1)
        return float(self.penalty / (mean_a * mean_sigma))


@pytest.fixture(scope="module", params=[1e-2, 1e-6])
def regression(request):
    return LogisticRegression(request.param)


class TestLogisticRegression:
    """Scores in their units, against the influence function and against real retraining."""

    def scores(self, regression, x, y, response, **options):
        options = {"residuals": "training", "curvature": "gauss-newton", **options}
        config = arguments(damping=regression.damping(), **options)
        method = STRIDE(regression.model(), TensorDataset(regression.x, regression.y), **config)
        return method.influence((x, y), response=response)

    @pytest.mark.slow
    @pytest.mark.parametrize("response", ["margin", "loss", "logit"])
    def test_the_score_is_the_influence_function(self, regression, response):
        x, y = blobs(6, noise=1.5, n_features=4, seed=1)
        flat = regression.a.flatten()
        hessian = torch.autograd.functional.hessian(regression.objective, flat)
        expected = torch.zeros(6, regression.n, dtype=torch.float64)
        phi, phi_test = regression.phi(regression.x), regression.phi(x)
        p = (phi @ regression.a).softmax(1)
        for j in range(6):
            g = torch.autograd.functional.jacobian(
                lambda a, j=j: response_value(
                    phi_test[j : j + 1] @ a.reshape(regression.a.shape), y[j : j + 1], response
                )[0],
                flat,
            )
            for i in range(regression.n):
                r = F.one_hot(regression.y[i], 3) - p[i]
                expected[j, i] = g @ torch.linalg.solve(hessian, torch.outer(phi[i], r).flatten())
        scores = self.scores(regression, x, y, response)
        torch.testing.assert_close(scores, expected / regression.n, rtol=1e-6, atol=1e-9)

    def test_the_score_is_the_change_that_retraining_without_the_example_undoes(self, regression):
        x, y = blobs(20, noise=1.5, n_features=4, seed=1)
        n = regression.n
        margins = response_value(regression.phi(x) @ regression.a, y, "margin")
        without = regression.fit(1 - torch.eye(n, dtype=torch.float64))
        left_out = response_value(regression.phi(x) @ without, y, "margin")
        effects = (margins - left_out).T
        scores = self.scores(regression, x, y, "margin")
        for score, effect in zip(scores, effects, strict=True):
            assert torch.corrcoef(torch.stack([score, effect]))[0, 1] > 0.99
        assert float((scores * effects).sum() / scores.square().sum()) == pytest.approx(1, abs=0.1)

    def test_every_other_curvature_agrees_in_direction(self, regression):
        x, y = blobs(20, noise=1.5, n_features=4, seed=1)
        exact = self.scores(regression, x, y, "margin").flatten()
        for curvature in CURVATURES:
            scores = self.scores(regression, x, y, "margin", curvature=curvature).flatten()
            assert torch.corrcoef(torch.stack([exact, scores]))[0, 1] > 0.85, curvature


class TestFrequencies:
    """The exactly solvable case: features name a cell, and the fitted model counts labels in each cell.

    With n_c examples of class c among the n of a cell, the margin is `log n_c - log(n - n_c)`. By the
    derivative, one example of class c is worth `1/n_c`, and one of another class `-1/(n - n_c)`.
    """

    COUNTS = ((6, 3, 3), (2, 8, 4), (5, 5, 10))

    def data(self, counts):
        cells = [cell for cell, row in enumerate(counts) for count in row for _ in range(count)]
        labels = torch.tensor([c for row in counts for c, count in enumerate(row) for _ in range(count)])
        logits = torch.tensor(counts, dtype=torch.float64).log()
        cells = torch.tensor(cells)
        return F.one_hot(cells, len(counts)).double(), logits[cells], labels, cells

    def expected(self, counts, cells, labels):
        n_cells, n_classes = len(counts), len(counts[0])
        scores = torch.zeros(n_cells * n_classes, len(labels), dtype=torch.float64)
        for cell in range(n_cells):
            for c in range(n_classes):
                same = counts[cell][c]
                others = sum(counts[cell]) - same
                for i, (of, label) in enumerate(zip(cells.tolist(), labels.tolist(), strict=True)):
                    if of == cell:
                        scores[cell * n_classes + c, i] = 1 / same if label == c else -1 / others
        return scores

    def queries(self, counts):
        n_cells, n_classes = len(counts), len(counts[0])
        cells = torch.arange(n_cells).repeat_interleave(n_classes)
        logits = torch.tensor(counts, dtype=torch.float64).log()[cells]
        return F.one_hot(cells, n_cells).double(), logits, torch.arange(n_classes).repeat(n_cells)

    def test_gauss_newton_scores_are_the_derivatives_of_the_log_odds(self):
        features, logits, labels, cells = self.data(self.COUNTS)
        config = arguments(residuals="training", curvature="gauss-newton", damping=1e-7)
        scores = STRIDE.from_features(features, logits, labels, **config).influence(self.queries(self.COUNTS))
        torch.testing.assert_close(scores, self.expected(self.COUNTS, cells, labels), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_so_are_all_others_for_two_classes_of_equal_odds_up_to_what_they_leave_out(self, curvature):
        counts = ((6, 3), (3, 6), (12, 6))
        features, logits, labels, cells = self.data(counts)
        config = arguments(residuals="training", curvature=curvature, damping=1e-7)
        scores = STRIDE.from_features(features, logits, labels, **config).influence(self.queries(counts))
        torch.testing.assert_close(scores, self.expected(counts, cells, labels), rtol=1e-5, atol=1e-5)

    def test_removing_an_example_changes_the_log_odds_by_the_score_to_second_order(self):
        counts = tuple(tuple(10 * count for count in row) for row in self.COUNTS)
        features, logits, labels, cells = self.data(counts)
        config = arguments(residuals="training", curvature="gauss-newton", damping=1e-7)
        method = STRIDE.from_features(features, logits, labels, **config)
        scores = method.influence(self.queries(counts))
        for cell, row in enumerate(counts):
            for c, same in enumerate(row):
                others = sum(row) - same
                mine = scores[cell * 3 + c, cells == cell]
                of_class = labels[cells == cell] == c
                gained = float(np.log(same) - np.log(same - 1))
                lost = float(np.log(others - 1) - np.log(others))
                torch.testing.assert_close(
                    mine[of_class], torch.full_like(mine[of_class], gained), rtol=0.03, atol=0
                )
                torch.testing.assert_close(
                    mine[~of_class], torch.full_like(mine[~of_class], lost), rtol=0.03, atol=0
                )


@pytest.mark.parametrize("residuals", RESIDUALS)
@pytest.mark.parametrize("curvature", CURVATURES)
class TestEveryOption:
    @pytest.fixture
    def method(self, network, residuals, curvature):
        model, x, y = network
        return stride(model, x, y, residuals=residuals, curvature=curvature, damping=0.1).fit()

    def test_scores_are_the_definition(self, method, network):
        model, x, y = network
        few = (x[:4] + 0.1, y[:4])
        scores = method.influence(few)
        assert scores.dtype == torch.float64
        form = method._states[0].operators
        phi = scaled_features(mlp_features(model, x)[0], form.scale)
        features, logits = mlp_features(model, few[0])
        phi_test, g = scaled_features(features, form.scale), response_gradient(logits, few[1], "margin")
        for i in (0, 7, 33):
            terms = form.curvature.precondition(phi[i : i + 1], form.residuals[i : i + 1])
            by_train = sum((u @ phi_test.T) * (v @ g.T) for u, v in terms)[0] / len(x)
            torch.testing.assert_close(scores[:, i], by_train, rtol=1e-7, atol=1e-9)

    def test_self_influence_is_the_diagonal_and_not_negative(self, method, network):
        _, x, y = network
        own = method.self_influence()
        torch.testing.assert_close(
            own, -method.influence((x, y), response="loss").diagonal(), rtol=1e-7, atol=1e-12
        )
        assert (own >= 0).all()
        assert own.max() > 0

    @pytest.mark.slow
    def test_cosine_is_the_explicit_normalisation(self, method, network):
        model, x, y = network
        form = method._states[0].operators
        features, logits = mlp_features(model, x)
        phi, g = scaled_features(features, form.scale), response_gradient(logits, y, "margin")

        def norms(vectors):
            terms = form.curvature.precondition(phi, vectors)
            return sum((u * phi).sum(1) * (v * vectors).sum(1) for u, v in terms).sqrt()

        scores, cosine = method.influence((x, y)), method.influence((x, y), normalize="cosine")
        products = norms(g)[:, None] * norms(form.residuals) / len(x)
        explicit = torch.where(products > 0, scores / products.clamp_min(1e-300), 0.0)
        torch.testing.assert_close(cosine, explicit, rtol=1e-7, atol=1e-9)
        assert cosine.abs().max() <= 1 + 1e-9

    def test_self_influence_of_other_examples_has_their_ridge_residuals_as_they_are(self, method, network):
        model, x_train, y_train = network
        x, y = blobs(10, noise=2.0, seed=5)
        own = method.self_influence((x, y))
        form = method._states[0].operators
        early = [*range(len(form.ridge_head.weights) - 1), -1]
        assert len(early) < len(form.scale)
        phi_train = scaled_features(form.features, form.scale)[:, early]
        penalty = 0.1 * phi_train.square().mean() * len(x_train) * torch.eye(phi_train.shape[1])
        e_train, e = F.one_hot(y_train, 3).double(), F.one_hot(y, 3).double()
        head = torch.linalg.solve(phi_train.T @ phi_train + penalty, phi_train.T @ e_train)
        features, logits = mlp_features(model, x)
        phi, p = scaled_features(features, form.scale), logits.softmax(1)
        tempered, ridge = (
            e - (logits / form.temperature).softmax(1),
            e - project_on_simplex(phi[:, early] @ head),
        )
        residuals = {
            "training": e - p,
            "temperature": tempered,
            "leave-one-out": ridge,
            "both": (1 - RIDGE_SHARE) * tempered + RIDGE_SHARE * form.ridge_ratio * ridge,
        }[method.operators.residuals]
        terms = form.curvature.precondition(phi, e - p)
        expected = sum((u * phi).sum(1) * (v * residuals).sum(1) for u, v in terms) / len(x_train)
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-12)
        assert (own >= 0).all()
        if method.operators.residuals in ("training", "temperature"):
            again = method.self_influence((x_train, y_train))
            torch.testing.assert_close(again, method.self_influence(), rtol=1e-7, atol=1e-12)


class TestCosine:
    def test_a_zero_norm_gives_zero(self):
        features, labels = torch.eye(4), torch.tensor([0, 1, 0, 1])
        logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0], [-1e4, 1e4]])
        config = arguments(residuals="training")
        method = STRIDE.from_features(features, logits, labels, **config)
        batch = (features, logits, labels)
        assert (method.influence(batch)[:, 3] == 0).all()
        cosine = method.influence(batch, normalize="cosine")
        assert torch.isfinite(cosine).all()
        assert (cosine[:, 3] == 0).all()
        assert (method.influence(batch, normalize="cosine", response="loss")[3] == 0).all()
        assert (cosine[:3, :3] != 0).all()

    @pytest.mark.parametrize("confidence", [40, 80, 95, 200])
    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_it_does_not_depend_on_the_size_of_a_residual(self, curvature, confidence):
        features, logits, labels = torch.eye(3)[[0, 0, 1, 2]], torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
        logits[1, 0] = confidence
        config = arguments(residuals="training", curvature=curvature)
        method = STRIDE.from_features(features, logits, labels, **config)
        cosine = method.influence((features, logits, labels), normalize="cosine")
        assert cosine.abs().max() <= 1 + 1e-5
        if confidence < 90:
            torch.testing.assert_close(cosine[:, 1], cosine[:, 0], rtol=1e-4, atol=1e-5)
        else:  # the residual has no accurate size in float32
            assert (cosine[:, 1] == 0).all()

    @pytest.mark.parametrize(
        ("residuals", "share"), [("training", 1), ("temperature", 1), ("both", 0.9), ("leave-one-out", 0.75)]
    )
    def test_planted_duplicates_come_first(self, wide_network, residuals, share):
        model, x, y = wide_network
        planted = torch.arange(0, 300, 15)
        method = stride(model, x, y, residuals=residuals)
        batch = (x[planted], y[planted])
        first = method.influence(batch, 1, normalize="cosine")[0][:, 0]
        raw = method.influence(batch, 1)[0][:, 0]
        assert (first == planted).double().mean() >= share
        assert (raw == planted).double().mean() < 0.5


class TestMislabels:
    @pytest.mark.parametrize("curvature", ["identity", "gauss-newton"])
    def test_planted_flips_have_the_highest_scores(self, curvature):
        x, clean = blobs(300, n_features=8, noise=0.7, dtype=torch.float32)
        flipped = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:30]
        y = clean.clone()
        y[flipped] = (y[flipped] + 1) % 3
        method = stride(trained_mlp(x, y, width=32), x, y, curvature=curvature)
        scores = method.mislabel_scores()
        assert scores.shape == (300,)
        found = scores.topk(30).indices
        assert len(set(found.tolist()) & set(flipped.tolist())) >= 27

    def test_it_is_the_norm_of_the_leave_one_out_residual(self, network):
        model, x, y = network
        method = stride(model, x, y)
        form = method.fit()._states[0].operators
        early = [*range(len(form.ridge_head.weights) - 1), -1]  # all layers but the last, and the constant
        phi = scaled_features(mlp_features(model, x)[0], form.scale)[:, early]
        penalty = 0.1 * phi.square().mean() * len(x) * torch.eye(phi.shape[1], dtype=torch.float64)
        for i in (3, 40):
            keep = torch.arange(len(x)) != i
            gram = phi[keep].T @ phi[keep] + penalty
            e = F.one_hot(y, 3).double()
            head = torch.linalg.solve(gram, phi[keep].T @ e[keep])
            torch.testing.assert_close(method.mislabel_scores()[i], (e[i] - phi[i] @ head).norm())


class TestTemperature:
    def test_held_out_data_set_it(self, network):
        model, x, y = network
        held_out = TensorDataset(*blobs(70, noise=1.6, seed=3))
        method = stride(model, x, y, held_out=held_out).fit()
        with torch.no_grad():
            target = mean_residual(model(held_out.tensors[0]), held_out.tensors[1])
            found = mean_residual(model(x), y, method.temperature_)
        assert method.temperature_ > 1
        assert found == pytest.approx(target, rel=1e-3)

    def test_without_them_it_is_the_default_and_the_option_wins(self, network):
        model, x, y = network
        assert stride(model, x, y).fit().temperature_ == DEFAULT_TEMPERATURE
        held_out = blobs(20, noise=1.6, seed=3)
        assert stride(model, x, y, held_out=held_out, temperature=3.5).fit().temperature_ == 3.5

    def test_it_changes_residuals_and_curvature_alike(self, network):
        model, x, y = network
        options = {"residuals": "temperature", "temperature": 2.5, "curvature": "identity"}
        form = stride(model, x, y, **options).fit()._states[0].operators
        with torch.no_grad():
            p = (model(x) / 2.5).softmax(1)
        torch.testing.assert_close(form.residuals, F.one_hot(y, 3) - p)
        assert float(form.curvature.scale) == pytest.approx(float((1 - p.square().sum(1)).mean() / 2))


def test_the_threshold_is_a_soft_threshold(network):
    model, x, y = network
    dense = stride(model, x, y).influence((x[:9], y[:9]))
    alpha = float(dense.abs().median())
    sparse = stride(model, x, y, threshold=alpha).influence((x[:9], y[:9]))
    torch.testing.assert_close(sparse, dense.sign() * (dense.abs() - alpha).clamp_min(0))
    assert 0.4 < (sparse == 0).double().mean() < 0.6


class TestLayers:
    def test_each_layer_has_unit_mean_square_norm(self, network):
        model, x, y = network
        method = stride(model, x, y).fit()
        assert method.layers_ == ["0:input", "2:input"]
        form = method._states[0].operators
        torch.testing.assert_close(form.features, mlp_features(model, x)[0])
        phi = scaled_features(form.features, form.scale)
        for layer in phi.split([5, 8, 1], dim=1):
            assert float(layer.square().sum(1).mean()) == pytest.approx(1)
        assert (phi[:, -1] == 1).all()

    def test_the_units_of_a_layer_change_nothing(self, network):
        model, x, y = network
        features, logits = mlp_features(model, x)
        units = torch.cat([torch.full((5,), 1e3), torch.full((8,), 1e-4)]).double()
        scores = [
            STRIDE.from_features(f, logits, y, widths=[5, 8]).influence((f[:6], logits[:6], y[:6]))
            for f in (features, features * units)
        ]
        torch.testing.assert_close(*scores)


class TestFromFeatures:
    def test_it_is_the_model_with_the_same_features(self, network):
        model, x, y = network
        features, logits = mlp_features(model, x)
        for options in ({}, {"curvature": "gauss-newton"}, {"residuals": "training"}):
            from_model = stride(model, x, y, **options)
            precomputed = STRIDE.from_features(features, logits, y, widths=[5, 8], **arguments(**options))
            batch = (features[:7], logits[:7], y[:7])
            torch.testing.assert_close(precomputed.influence(batch), from_model.influence((x[:7], y[:7])))
            torch.testing.assert_close(precomputed.self_influence(), from_model.self_influence())
            torch.testing.assert_close(precomputed.mislabel_scores(), from_model.mislabel_scores())

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_memory_maps_are_read_in_place_and_not_written(self, network, tmp_path, mode):
        model, x, y = network
        features, logits = (part.float().numpy() for part in mlp_features(model, x))
        path = tmp_path / "features.npy"
        np.save(path, features)
        before = path.read_bytes()
        mapped = np.load(path, mmap_mode=mode)
        method = STRIDE.from_features(mapped, logits, y.numpy(), widths=[5, 8])
        batch = tuple(torch.as_tensor(part[:4]) for part in (features, logits, y.numpy()))
        expected = STRIDE.from_features(features, logits, y, widths=[5, 8]).influence(batch)
        torch.testing.assert_close(method.influence(batch), expected)
        kept = method._states[0].operators.features
        assert kept.data_ptr() == mapped.__array_interface__["data"][0]
        assert path.read_bytes() == before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_half_precision_is_only_for_storage(self, network, dtype, curvature):
        model, x, y = network
        features, logits = (part.to(dtype) for part in mlp_features(model, x))
        config = arguments(curvature=curvature)
        half = STRIDE.from_features(features, logits, y, **config)
        single = STRIDE.from_features(features.float(), logits.float(), y, **config)
        batch = (features[:5], logits[:5], y[:5])
        full = (features[:5].float(), logits[:5].float(), y[:5])
        for normalize in (None, "cosine"):
            scores = half.influence(batch, normalize=normalize)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, single.influence(full, normalize=normalize))
        torch.testing.assert_close(half.self_influence(), single.self_influence())
        torch.testing.assert_close(half.self_influence(batch), single.self_influence(full))
        assert half._states[0].operators.features.dtype == dtype

    @pytest.mark.parametrize(
        ("features", "logits"), [("double", "float"), ("float", "double"), ("half", "double")]
    )
    def test_features_and_logits_may_differ_in_dtype(self, network, features, logits):
        model, x, y = network
        h, z = mlp_features(model, x)
        exact = STRIDE.from_features(h, z, y).influence((h[:5], z[:5], y[:5]))
        h, z = getattr(h, features)(), getattr(z, logits)()
        scores = STRIDE.from_features(h, z, y).influence((h[:5], z[:5], y[:5]))
        assert scores.dtype == (torch.float64 if features == "double" else torch.float32)
        torch.testing.assert_close(scores.double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": torch.zeros(60)}, r"`features` must have 2 dimensions .*shape \(60,\)"),
            ({"logits": torch.zeros(59, 3)}, r"`logits` must have .* n_train = 60 rows; got shape \(59, 3\)"),
            ({"labels": torch.zeros(60, 1, 1)}, r"`labels` must have 1 or 2 dimensions .*shape \(60, 1, 1\)"),
            ({"labels": torch.full((60,), 3)}, r"`labels` must hold class indices in \[0, 3\); got 3"),
            ({"widths": [5, 9]}, "`widths` must add up to n_features = 13; got 14"),
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(self, network, change, message):
        model, x, y = network
        features, logits = mlp_features(model, x)
        arguments = {"features": features, "logits": logits, "labels": y, "widths": None, **change}
        with pytest.raises(ValueError, match=message):
            STRIDE.from_features(**arguments)


class OneLogit(nn.Module):
    """The last logit minus the first of a model with two."""

    def __init__(self, model, flat):
        super().__init__()
        self.model = model
        self.flat = flat

    def forward(self, x):
        z = self.model(x)
        difference = z[:, 1:] - z[:, :1]
        return difference.squeeze(1) if self.flat else difference


class TestOneLogit:
    @pytest.mark.parametrize("flat", [True, False])
    def test_scores_are_those_of_two_logits(self, flat):
        x, y = blobs(60, n_classes=2)
        model = trained_mlp(x, y, n_classes=2)
        pair, single = stride(model, x, y), stride(OneLogit(model, flat), x, y)
        for response in ("margin", "probability", "log-probability", "loss"):
            torch.testing.assert_close(
                single.influence((x[:9], y[:9]), response=response),
                pair.influence((x[:9], y[:9]), response=response),
            )
        torch.testing.assert_close(single.self_influence(), pair.self_influence())
        torch.testing.assert_close(single.mislabel_scores(), pair.mislabel_scores())

    def test_the_logit_is_the_margin_and_float_labels_are_classes(self):
        x, y = blobs(60, n_classes=2)
        model = OneLogit(trained_mlp(x, y, n_classes=2), flat=False)
        method = STRIDE(model, TensorDataset(x, y[:, None].double()))
        batch = (x[:9], y[:9, None].double())
        margin = method.influence(batch, response="margin")
        torch.testing.assert_close(method.influence(batch, response="logit"), margin)
        assert torch.equal(margin, stride(model, x, y).influence((x[:9], y[:9])))

    def test_precomputed_features_with_one_logit(self):
        x, y = blobs(60, n_classes=2)
        model = OneLogit(trained_mlp(x, y, n_classes=2), flat=False)
        with torch.no_grad():
            features, z = torch.cat([x, model.model[1](model.model[0](x))], dim=1), model(x)
        method = STRIDE.from_features(features, z, y, widths=[5, 8])
        batch = (features[:9], z[:9], y[:9])
        torch.testing.assert_close(method.influence(batch), stride(model, x, y).influence((x[:9], y[:9])))


class TestCost:
    """What the closed form promises: forward passes, two products, and nothing else."""

    def test_no_gradient_of_the_network_is_taken(self, network, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("a gradient was asked for")

        model, x, y = network
        for owner, name in [
            (torch.autograd, "grad"),
            (torch.autograd, "backward"),
            (torch.Tensor, "backward"),
        ]:
            monkeypatch.setattr(owner, name, refuse)
        modes = []
        handle = model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        method = stride(model, x, y)
        scores = method.influence((x[:5], y[:5]), normalize="cosine")
        method.self_influence(), method.mislabel_scores(), method.self_influence((x[:5], y[:5]))
        handle.remove()
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert not scores.requires_grad
        assert modes
        assert not any(modes)

    @pytest.mark.parametrize(("batch_size", "passes"), [(16, 4), (60, 1), (1000, 1), (59, 2)])
    def test_one_forward_pass_over_the_training_set_and_small_probes(self, network, batch_size, passes):
        model, x, y = network
        sizes = []
        handle = model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        method = STRIDE(model, TensorDataset(x, y), batch_size=batch_size).fit()
        probes = len(sizes) - passes
        assert sum(sizes[probes:]) == 60
        assert 0 < probes <= 8
        assert max(sizes[:probes]) <= 3
        method.self_influence(), method.mislabel_scores()
        assert len(sizes) == probes + passes
        method.influence((x[:5], y[:5]))
        assert sizes[probes + passes :] == [5]
        handle.remove()

    def test_fit_takes_two_products_of_n_d_d(self):
        n, d, n_classes = 2000, 100, 10
        x, y = blobs(n, n_classes, d, dtype=torch.float32)
        model = nn.Linear(d, n_classes)
        with FlopCounterMode(display=False) as forward:
            model(x)
        with FlopCounterMode(display=False) as fit:
            method = stride(model, x, y).fit()
        small = 3 * 2 * (n + d) * d * n_classes
        assert fit.get_total_flops() <= forward.get_total_flops() + 2 * (2 * n * (d + 1) ** 2) + small

        with FlopCounterMode(display=False) as query:
            method.influence((x[:50], y[:50]))
        small = 2 * 50 * d * n_classes + 2 * 50 * n * n_classes
        assert query.get_total_flops() <= 2 * 50 * (d + 1) * (n + d + 1) + small

    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_no_step_is_taken_example_by_example(self, curvature):
        class Count(TorchDispatchMode):
            calls = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.calls += 1
                return func(*args, **(kwargs or {}))

        calls = []
        for n in (100, 1000):
            x, y = blobs(n)
            method = STRIDE(
                nn.Linear(5, 3).double(), TensorDataset(x, y), operators=ClosedForm(curvature=curvature)
            )
            with Count() as count:
                method.fit()
            calls.append(count.calls)
        assert calls[0] == calls[1]


def test_float32_and_float64_models_give_scores_of_their_dtype():
    x, y = blobs(60)
    model = trained_mlp(x, y)
    double = stride(model, x, y).influence((x[:5], y[:5]))
    single = stride(model.float(), x.float(), y).influence((x[:5].float(), y[:5]))
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4 * double.abs().max().item())


def test_a_damping_that_is_too_small_for_float32_is_refused():
    x, y = blobs(40, n_features=200, dtype=torch.float32)
    with pytest.raises(ValueError, match="`damping` must be large enough"):
        STRIDE.from_features(x, x[:, :3], y, operators=ClosedForm(damping=1e-12)).fit()


def test_a_notebook_shows_whether_it_is_fitted_and_on_what():
    data = planted_classes(20, seed=0)
    method = STRIDE(MLP().eval(), data)
    assert "n_train" not in method._repr_html_()
    shown = method.fit()._repr_html_()
    assert "<th" in shown
    assert all(str(name) in shown for name in ["20", *method.layers_])
