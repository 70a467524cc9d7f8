"""A loss of the user's: two functions, and every method answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.adapters import EKFAC, TRAK, CaptumInfluence, DiagonalEKFAC, LossDetector, Random, TracIn
from stride_captum.adapters.captum_influence import ResidualLoss
from stride_captum.losses import MSE, BinaryCrossEntropy, CrossEntropy, SeparateOutputs
from stride_captum.system.saved_values import saved_as

N, N_TEST, D, H = 30, 4, 5, 6


@saved_as("tests.poisson")
@dataclass(frozen=True)
class Poisson(SeparateOutputs):
    """Counts y with the logarithm of their mean as output, `exp(z) - y z`."""

    name: ClassVar[str] = "poisson"

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.exp() - labels * logits

    def curvatures(self, logits: Tensor) -> Tensor:
        return logits.exp()


@pytest.fixture(scope="module")
def counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 2)).double().eval()
    x, x_test = torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
    with torch.no_grad():
        y, y_test = (torch.poisson(model(a).exp()) for a in (x, x_test))
    return model, TensorDataset(x, y), (x_test, y_test)


def test_scores_are_those_of_a_dense_solve(counts):
    model, train, (xt, yt) = counts
    x, y = train.tensors
    method = STRIDE(
        model, train, layers=["1"], loss=Poisson(), operators=ClosedForm(residuals="training", damping=0.2)
    )
    with torch.no_grad():
        h, ht, rate = model[:2](x), model[:2](xt), model(x).exp()
    scale = 1 / h.square().sum(1).mean().sqrt()
    phi, phi_test = (torch.cat([a * scale, torch.ones(len(a), 1)], 1) for a in (h, ht))
    a = phi.T @ phi / N
    kernel = phi_test @ (a + 0.2 * a.diagonal().mean() * torch.eye(H + 1).double()).inverse() @ phi.T / N
    for c in range(2):
        wanted = kernel * (y - rate)[:, c] / (1.2 * rate[:, c].mean())
        torch.testing.assert_close(method.influence((xt, yt), target=c), wanted)
    assert (method.self_influence() >= 0).all()


@pytest.mark.parametrize("method", [STRIDE, TracIn, DiagonalEKFAC, TRAK, EKFAC, Random])
def test_every_method_answers_and_is_saved(counts, method, tmp_path):
    model, train, test = counts
    fitted = method(model, train, loss=Poisson()).fit()
    scores = fitted.influence(test, response="loss")
    assert scores.shape == (N_TEST, N)
    assert scores.isfinite().all()
    fitted.save(tmp_path / "method")
    assert method.load(tmp_path / "method", model, train).influence(test, response="loss").equal(scores)


def test_the_loss_itself_is_a_detector(counts):
    model, train, _ = counts
    x, y = train.tensors
    with torch.no_grad():
        wanted = (model(x).exp() - y * model(x)).sum(1)
    torch.testing.assert_close(LossDetector(model, train, loss=Poisson()).mislabel_scores(), wanted)


def test_gradients_of_tracin_are_those_of_autograd(counts):
    model, train, (xt, yt) = counts

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        loss = Poisson().elementwise(model(x[None]), y[None]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    left, right = ([gradient(*row) for row in zip(*d, strict=True)] for d in ((xt, yt), train.tensors))
    found = TracIn(model, train, loss=Poisson()).influence((xt, yt), response="loss")
    torch.testing.assert_close(found, -torch.stack(left) @ torch.stack(right).T)


def test_losses_of_captum_have_the_curvature_of_the_loss():
    for loss in (Poisson(), BinaryCrossEntropy(), CrossEntropy()):
        z, v = torch.randn(3, 2).double(), torch.randn(3, 2).double()
        potential = ResidualLoss("sum", loss)
        gradient = torch.func.grad(lambda z, p=potential, v=v: p(z, v))(z)
        torch.testing.assert_close(gradient, -v)
        hessian = torch.autograd.functional.hessian(lambda z, p=potential, v=v: p(z[None], v[:1]), z[0])
        wanted = sum(f[0, :, None] * f[0] for f in loss.hessian_factors(z))
        torch.testing.assert_close(hessian, wanted)


def test_captum_must_have_the_loss_of_the_method(counts):
    from captum.influence import TracInCP

    from stride_captum.adapters._captum import keep_weights

    model, train, test = counts

    def build(loss):
        return lambda network, data: TracInCP(
            network, data, [""], keep_weights, loss_fn=ResidualLoss("none", loss), batch_size=N
        )

    found = CaptumInfluence(model, train, build=build(Poisson()), loss=Poisson())
    wanted = TracIn(model, train, loss=Poisson()).influence(test)
    torch.testing.assert_close(found.influence(test), wanted)
    with pytest.raises(ValueError, match="`build` must use the loss of the method, 'poisson'"):
        CaptumInfluence(model, train, build=build("cross_entropy"), loss=Poisson()).fit()


def test_left_out_predictions_of_several_labels_are_cut_to_the_box():
    torch.manual_seed(1)
    loss, y = BinaryCrossEntropy(), torch.tensor([[0.0, 1.0, 0.4]]).double().expand(50, 3)
    predictions = 3 * torch.randn(50, 3).double()
    found = loss.projected(y - predictions, y, torch.zeros(50, 1))
    torch.testing.assert_close(found, y - predictions.clamp(0, 1))
    torch.testing.assert_close(loss.possible(predictions), predictions.clamp(0, 1))


def test_left_out_predictions_of_soft_labels_are_projected_on_the_simplex():
    torch.manual_seed(1)
    loss, y = CrossEntropy(), torch.rand(50, 3).double().softmax(1)
    predictions = 2 * torch.randn(50, 3).double()
    shifts = loss.projection_shift(y - predictions, y)
    found = y - loss.projected(y - predictions, y, shifts)
    torch.testing.assert_close(found, loss.possible(predictions))
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(50).double())


class Mean(Poisson):
    """Its author forgot `reduction="none"`."""

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().elementwise(logits, labels).mean()


class OfRows(Poisson):
    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().elementwise(logits, labels).sum(-1)


class Constant(Poisson):
    def curvatures(self, logits: Tensor) -> Tensor:
        return 1.0


class OfOutputs(Poisson):
    def curvatures(self, logits: Tensor) -> Tensor:
        return torch.ones(logits.shape[-1])


class Summed(Poisson):
    def terms(self, logits: Tensor, labels: Tensor, response: str) -> Tensor:
        return logits.sum()


@pytest.mark.parametrize("method", [STRIDE, TracIn, DiagonalEKFAC, EKFAC, TRAK])
@pytest.mark.parametrize(
    ("loss", "of", "got"),
    [
        (Mean, "elementwise", r"shape \(\)"),
        (OfRows, "elementwise", r"shape \(\d+,\)"),
        (Constant, "curvatures", r"1\.0"),
        (OfOutputs, "curvatures", r"shape \(2,\)"),
        (Summed, "terms", r"shape \(\)"),
    ],
)
def test_a_method_that_returns_another_shape_is_named(counts, method, loss, of, got):
    if of == "curvatures" and method in (TracIn, TRAK):
        pytest.skip("asks for no curvature")
    model, train, test = counts
    must = rf"`{loss.__name__}.{of}` must return a tensor of the shape of the outputs, \(\d+, 2\), one number"
    with pytest.raises(ValueError, match=rf"{must} for each; got {got}\. Take no mean or sum"):
        method(model, train, loss=loss()).influence(test)


@dataclass(frozen=True)
class TimesPoisson(Poisson):
    """A multiple of a loss."""

    factor: float = 1.0

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factor * super().elementwise(logits, labels)

    def curvatures(self, logits: Tensor) -> Tensor:
        return self.factor * super().curvatures(logits)


class WithTemperature(TimesPoisson):
    tempered: ClassVar[bool] = True


@dataclass(frozen=True)
class Squares(SeparateOutputs):
    """`a (y - z)^2`; of `a = 1/2` the loss "mse"."""

    name: ClassVar[str] = "squares"
    damps_outputs: ClassVar[bool] = False

    a: float = 0.5

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.a * (labels - logits).square()

    def curvatures(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, 2 * self.a)


KINDS = ["training", "leave-one-out", "both"]
CURVATURES = ["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", CURVATURES)
class TestMultiples:
    @pytest.mark.parametrize("loss", [TimesPoisson, WithTemperature])
    def test_scores_of_an_output_are_those_of_any_multiple(self, counts, kind, curvature, loss):
        model, train, test = counts
        few = TensorDataset(*(part[:20] for part in train.tensors))
        answers = []
        for factor in (1.0, 200.0):
            operators = ClosedForm(residuals=kind, curvature=curvature)
            method = STRIDE(model, few, loss=loss(factor=factor), operators=operators)
            of_others = method.self_influence(test) / factor
            answer = [method.influence(test), method.self_influence() / factor, of_others]
            method.add_examples(tuple(part[20:] for part in train.tensors))
            answers.append([*answer, method.influence(test)])
        for found, wanted in zip(*answers, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))

    @pytest.mark.parametrize("positions", [False, True])
    def test_squares_are_the_squared_error(self, counts, kind, curvature, positions):
        model, train, (xt, yt) = counts
        x, y = (part.reshape(10, 3, -1) for part in train.tensors) if positions else train.tensors
        test = (xt.reshape(2, 2, -1), yt.reshape(2, 2, -1)) if positions else (xt, yt)
        operators = ClosedForm(residuals=kind, curvature=curvature)
        wanted, *found = (
            STRIDE(model, TensorDataset(x, y), loss=loss, operators=operators).influence(test)
            for loss in (MSE(), Squares(), Squares(a=100.0))
        )
        scale = float(wanted.abs().max())
        for one in found:
            torch.testing.assert_close(one, wanted, rtol=1e-6, atol=1e-8 * scale)


def test_the_residual_of_the_ridge_head_is_that_of_its_prediction(counts):
    model, train, _ = counts
    x, y = train.tensors
    with torch.no_grad():
        z = model(x)
    q = torch.rand_like(y)
    torch.testing.assert_close(Poisson().of_ridge_head(y - q, z, y), y - q)
    torch.testing.assert_close(Squares(a=3.0).of_ridge_head(y - q, z, y), 6 * (y - q))
    for loss in (MSE(), BinaryCrossEntropy(), CrossEntropy()):
        assert loss.of_ridge_head(q, z, y) is q


class Hinge(Poisson):
    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (1 - labels * logits).clamp_min(0)

    def curvatures(self, logits: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(logits[:, 0]), torch.zeros_like(logits[:, 1])], 1)


@dataclass(frozen=True)
class Undefined(Poisson):
    """A curvature that is no number beside finite outputs."""

    value: float = float("nan")

    def curvatures(self, logits: Tensor) -> Tensor:
        return super().curvatures(logits).index_fill(0, torch.tensor([1]), self.value)


class Unchecked(Poisson):
    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        return labels


class TestWhatCannotBeScored:
    @pytest.mark.parametrize("kind", ["training", "both"])
    def test_curvatures_of_zero(self, counts, kind):
        model, train, _ = counts
        match = r"`Hinge.curvatures` must be above 0 in the mean .*; got 0 for output 1. Curvatures are"
        with pytest.raises(ValueError, match=match):
            STRIDE(model, train, loss=Hinge(), operators=ClosedForm(residuals=kind)).fit()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_curvatures_that_are_not_finite(self, counts, value):
        model, train, _ = counts
        match = r"`Undefined.curvatures` must return finite numbers for finite outputs; .* training example 1"
        with pytest.raises(ValueError, match=match):
            STRIDE(model, train, loss=Undefined(value=value)).fit()

    def test_labels_that_a_loss_lets_through_are_not_called_activations(self, counts):
        model, train, _ = counts
        x, y = train.tensors
        y = y.clone()
        y[4, 1] = float("nan")
        with pytest.raises(ValueError, match=r"`train_dataset` must give finite labels; .* for output 1"):
            STRIDE(model, TensorDataset(x, y), loss=Unchecked()).fit()
        x = x.clone()
        x[2] = float("nan")
        with pytest.raises(ValueError, match="`train_dataset` must give finite activations"):
            STRIDE(model, TensorDataset(x, y), loss=Unchecked(), layers=["0"]).fit()
