"""`BinaryCrossEntropy(pos_weight=...)`: against torch autograd, by hand, and by laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn
from stride_captum.adapters.gradients.fisher import fisher_vectors
from stride_captum.closed_form.training_residuals import out_of_sample_residuals
from stride_captum.evaluation.tasks.task_loss import objective
from stride_captum.losses import BinaryCrossEntropy, CrossEntropy
from stride_captum.residuals import RIDGE_SHARE

N, N_TEST, D, H, C = 30, 5, 4, 6, 3
W = torch.tensor([0.25, 3.0, 12.0], dtype=torch.float64)
WEIGHTED, PLAIN = BinaryCrossEntropy(pos_weight=W), BinaryCrossEntropy()
KINDS = ["training", "temperature", "leave-one-out", "both"]
RESPONSES = ["margin", "logit", "probability", "log-probability", "loss"]


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A model, inputs, soft and hard labels, and test points."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double().eval()
        x, xt = torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
        y = (torch.rand(N, C) < 0.4).double()
        y[:5] = torch.rand(5, C).double()
        return model, x, y, (xt, (torch.rand(N_TEST, C) < 0.5).double())


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(50, C, generator=generator, dtype=torch.float64)
    return z, torch.rand(50, C, generator=generator, dtype=torch.float64)


def of_torch(z: Tensor, y: Tensor, w: Tensor = W) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, pos_weight=w, reduction="none")


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def on(z: Tensor) -> Tensor:
    """The probability q of a positive where the model that was trained with w says z."""
    return torch.sigmoid(z - W.log())


class TestAgainstTorch:
    def test_values(self, rows):
        z, y = rows
        same(WEIGHTED.values(z, y), of_torch(z, y).sum(1))
        same(WEIGHTED.response_value(z, y, "loss"), of_torch(z, y).sum(1))
        same(WEIGHTED.response_value(z, y, "log-probability"), -of_torch(z, y, torch.ones(C)).sum(1))

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_residuals(self, rows, temperature):
        z, y = rows
        leaf = (z / temperature).requires_grad_()
        (gradient,) = torch.autograd.grad(of_torch(leaf, y).sum(), leaf)
        same(WEIGHTED.residuals(z, y, temperature), -gradient)
        if temperature == 1:
            same(WEIGHTED.response_gradient(z, y, "loss"), gradient)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_the_curvature_is_a_mean_over_labels(self, rows, temperature):
        z, _ = rows
        leaf = (z / temperature).requires_grad_()
        each = []
        for label in (0.0, 1.0):
            (first,) = torch.autograd.grad(
                of_torch(leaf, torch.full_like(z, label)).sum(), leaf, create_graph=True
            )
            each.append(torch.autograd.grad(first.sum(), leaf)[0])
        q = on(leaf.detach())
        wanted = (1 - q) * each[0] + q * each[1]
        total = torch.zeros(C, dtype=torch.float64)
        WEIGHTED.hessians(z, temperature).add_to(total)
        same(total, wanted.sum(0))
        if temperature == 1:
            same(WEIGHTED.curvatures(z), wanted)
            same(torch.stack(WEIGHTED.hessian_factors(z)).square().sum(0), wanted)

    def test_vectors_of_the_fisher_matrix_have_the_curvature_as_their_squares(self, rows):
        z, _ = rows
        q, wanted = on(z), WEIGHTED.curvatures(z)
        total, mean = torch.zeros_like(z), torch.zeros_like(z)
        for label, share in ((0.0, 1 - q), (1.0, q)):
            y, unused = torch.full_like(z, label), torch.zeros(len(z), C)
            (vectors,) = fisher_vectors("empirical", z, y, unused, WEIGHTED)
            total, mean = total + share * vectors**2, mean + share * WEIGHTED.residuals(z, y)
        same(total, wanted)
        assert float(mean.abs().max()) < 1e-12
        steps = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        found = WEIGHTED.drawn_residuals(z[:1].expand(len(steps), -1), steps[:, None].expand(-1, C))
        torch.testing.assert_close(found.mean(0), torch.zeros(C).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close(found.square().mean(0), wanted[0], rtol=1e-3, atol=1e-3)

    def test_mean_residuals_are_weighted_means_of_distances(self, rows):
        z, y = rows[0], (rows[1] > 0.5).double()
        omega = torch.where(y > 0, W, 1.0)
        wanted = (omega * (y - (z / 2).sigmoid()).abs()).sum(1) / omega.sum(1)
        same(WEIGHTED.mean_residuals(z, y, 2.0), wanted)

    def test_the_objective_of_the_harness(self, rows):
        z, y = rows
        same(objective(WEIGHTED, z, y), of_torch(z, y).sum(1).mean())


class TestOutOfSample:
    def residuals(self, problem: Any, loss: Any, kind: str) -> Tensor:
        model, x, y, _ = problem
        z = model(x).detach()
        return out_of_sample_residuals(x, z, y, [D], kind, 2.0, loss=loss)

    def test_a_ridge_head_says_how_often_a_label_is_on(self, problem):
        y = problem[2]
        left_out = self.residuals(problem, PLAIN, "leave-one-out")
        q = y - left_out
        p = W * q / (W * q + 1 - q)
        same(self.residuals(problem, WEIGHTED, "leave-one-out"), W * y * (1 - p) - (1 - y) * p)

    def test_the_ridge_part_has_the_norm_of_the_other(self, problem):
        model, x, y, _ = problem
        tempered = WEIGHTED.residuals(model(x).detach(), y, 2.0)
        ridge = self.residuals(problem, WEIGHTED, "leave-one-out")
        ratio = (tempered.square().sum(0) / ridge.square().sum(0)).sqrt()
        wanted = (1 - RIDGE_SHARE) * tempered + RIDGE_SHARE * ratio * ridge
        same(self.residuals(problem, WEIGHTED, "both"), wanted)

    def test_of_other_examples(self, problem):
        model, x, y, test = problem
        asked = TensorDataset(x, y)
        method = STRIDE(model, asked, loss=WEIGHTED, operators=ClosedForm(residuals="both")).fit()
        assert (method.self_influence(test) > 0).all()


def stride(
    model: nn.Module, x: Tensor, y: Tensor, loss: Any, kind: str, curvature: str = "kronecker"
) -> STRIDE:
    operators = ClosedForm(residuals=kind, curvature=curvature, damping=0.2)
    return STRIDE(model, TensorDataset(x, y), layers=["1"], loss=loss, operators=operators)


@pytest.mark.parametrize(("kind", "temperature"), [("training", 1.0), ("temperature", 2.0)])
def test_scores_have_the_residual_over_the_curvature(problem, kind, temperature):
    """The feature side is that of the plain loss, and outputs do not mix."""
    model, x, y, test = problem
    z = model(x).detach()
    found, plain = (stride(model, x, y, loss, kind) for loss in (WEIGHTED, PLAIN))
    for c in range(C):
        r, r1 = (loss.residuals(z, y, temperature)[:, c] for loss in (WEIGHTED, PLAIN))
        s, s1 = (loss.curvatures(z / temperature)[:, c].sum() for loss in (WEIGHTED, PLAIN))
        wanted = plain.influence(test, target=c, response="logit") * (r / r1) * (s1 / s)
        same(found.influence(test, target=c, response="logit"), wanted, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", ["kronecker", "eigenvalue-corrected", "gauss-newton"])
def test_labels_do_not_mix(problem, kind, curvature):
    model, x, y, (xt, yt) = problem
    whole = stride(model, x, y, WEIGHTED, kind, curvature)
    each = []
    for c in range(C):
        last = nn.Linear(H, 1).double()
        with torch.no_grad():
            last.weight.copy_(model[2].weight[c : c + 1])
            last.bias.copy_(model[2].bias[c : c + 1])
        loss = BinaryCrossEntropy(pos_weight=float(W[c]))
        one = nn.Sequential(model[0], model[1], last)
        each.append(stride(one, x, y[:, c : c + 1], loss, kind, curvature))
    tolerance = 1e-6 if curvature == "gauss-newton" else 1e-9
    for response in RESPONSES:
        wanted = sum(m.influence((xt, yt[:, c : c + 1]), response=response) for c, m in enumerate(each))
        same(whole.influence((xt, yt), response=response), wanted, tolerance)
    same(whole.self_influence(), sum(m.self_influence() for m in each), tolerance)


METHODS: list[tuple[Any, dict[str, Any]]] = [
    *((STRIDE, {"operators": ClosedForm(residuals=kind)}) for kind in KINDS),
    (TracIn, {}),
    (TracIn, {"residuals": "both"}),
    (TRAK, {"projection_dim": 20}),
    (DiagonalEKFAC, {"fisher": "exact"}),
    (DiagonalEKFAC, {"fisher": "sampled"}),
    (EKFAC, {}),
    (EKFAC, {"fisher": "empirical"}),
]


def made(method: Any, model: nn.Module, x: Tensor, y: Tensor, loss: Any, **options: Any) -> Any:
    if method is EKFAC:
        pytest.importorskip("kronfluence")
    return method(model, TensorDataset(x, y), loss=loss, **options)


@pytest.mark.parametrize(("method", "options"), METHODS)
class TestEveryMethod:
    @pytest.mark.slow
    def test_ones_are_none(self, problem, method, options):
        model, x, y, test = problem
        for ones in (1, torch.ones(C)):
            found = made(method, model, x, y, BinaryCrossEntropy(pos_weight=ones), **options)
            wanted = made(method, model, x, y, PLAIN, **options)
            for response in RESPONSES:
                same(
                    found.influence(test, response=response), wanted.influence(test, response=response), 1e-9
                )
            same(found.self_influence(), wanted.self_influence(), 1e-9)

    @pytest.mark.slow
    def test_weights_change_scores_and_keep_the_laws(self, problem, method, options):
        model, x, y, test = problem
        found = made(method, model, x, y, WEIGHTED, **options)
        assert not torch.allclose(
            found.influence(test), made(method, model, x, y, PLAIN, **options).influence(test)
        )
        parts = sum(found.influence(test, target=c) for c in range(C))
        same(found.influence(test), parts, 1e-9)
        every = -found.influence((x, y), response="loss").diagonal()
        same(found.self_influence(), every, 1e-9)

    def test_positions_are_rows(self, problem, method, options):
        """One position an example is an example with one row of outputs."""
        if options.get("residuals") == "both" and method is not STRIDE:
            pytest.skip("inputs of several axes are no features of the ridge head")
        if method is EKFAC and not options:
            pytest.skip("labels are drawn by the bits of the inputs")
        model, x, y, (xt, yt) = problem
        if method is STRIDE:  # inputs of several axes are no features by default
            options = {**options, "layers": ["0", "1"]}
        found = made(method, model, x[:, None], y[:, None], WEIGHTED, **options)
        wanted = made(method, model, x, y, WEIGHTED, **options)
        same(found.influence((xt[:, None], yt[:, None])), wanted.influence((xt, yt)), 1e-9)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (TracIn, {}),
        (TracIn, {"residuals": "temperature"}),
        (TRAK, {"projection_dim": 20}),
        (DiagonalEKFAC, {"fisher": "empirical", "dense": "diagonal"}),
        (EKFAC, {"fisher": "empirical", "strategy": "diagonal"}),
    ],
)
def test_one_label_is_two_classes_with_weights(problem, method, options):
    """Where the Hessian, if any, is of the labels of the training set."""
    model, x, y, (xt, yt) = problem
    last = nn.Linear(H, 1).double()
    with torch.no_grad():
        last.weight.copy_(4 * model[2].weight[:1])
        last.bias.zero_()
    one, label = nn.Sequential(model[0], model[1], last), y[:, 1].round().long()
    asked, test = (xt, yt[:, 1:2]), (xt, yt[:, 1].long())
    of_label = made(method, one, x, label.double()[:, None], BinaryCrossEntropy(pos_weight=3.0), **options)
    of_classes = made(method, one, x, label, CrossEntropy(weight=[1.0, 3.0]), **options)
    same(of_label.influence(asked), of_classes.influence(test), 1e-9)
    omega = torch.where(label == 1, 3.0, 1.0)  # of classes, it is no part of the response
    same(of_label.self_influence(), of_classes.self_influence() * omega, 1e-9)


class TestOptions:
    @pytest.mark.parametrize("given", [[1.0, 2.0], torch.ones(5)])
    def test_as_many_as_labels(self, problem, given):
        model, x, y, _ = problem
        with pytest.raises(
            ValueError, match="`pos_weight` must hold one number, or one for each of 3 labels"
        ):
            TracIn(model, TensorDataset(x, y), loss=BinaryCrossEntropy(pos_weight=given)).fit()

    @pytest.mark.parametrize("given", [0, [1.0, 0.0], -1.0, float("nan"), [[1.0]]])
    def test_values(self, given):
        with pytest.raises(ValueError, match="`pos_weight` must hold numbers"):
            BinaryCrossEntropy(pos_weight=given)

    def test_kinds(self):
        with pytest.raises(TypeError, match="`pos_weight` must hold a number"):
            BinaryCrossEntropy(pos_weight=object())

    def test_one_number_in_any_form(self):
        forms = (2, 2.0, [2.0], torch.tensor(2.0), torch.tensor([2.0]))
        assert {BinaryCrossEntropy(pos_weight=given).pos_weight for given in forms} == {2.0}

    def test_they_are_saved(self, problem, tmp_path):
        model, x, y, test = problem
        method = stride(model, x, y, WEIGHTED, "both").fit()
        method.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, TensorDataset(x, y))
        assert loaded.loss == WEIGHTED
        assert loaded.influence(test).equal(method.influence(test))
