"""Binary cross-entropy: one label is the binary case, and labels do not mix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.losses import BinaryCrossEntropy, CrossEntropy

N, N_TEST, D, H, C = 40, 6, 5, 7, 3
KINDS = ["training", "temperature", "leave-one-out", "both"]
CURVATURES = ["kronecker", "eigenvalue-corrected", "gauss-newton"]
RESPONSES = ["margin", "logit", "probability", "log-probability", "loss"]


class Several(nn.Module):
    def __init__(self, n_labels: int = C) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, H), nn.Tanh(), nn.Linear(H, n_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class OneOf(nn.Module):
    """One output of a network with several."""

    def __init__(self, whole: Several, output: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = whole.fc1, whole.act, nn.Linear(H, 1).double()
        with torch.no_grad():
            self.fc2.weight.copy_(whole.fc2.weight[output : output + 1])
            self.fc2.bias.copy_(whole.fc2.bias[output : output + 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(scope="module")
def several():
    torch.manual_seed(0)
    model = Several().double()
    with torch.no_grad():
        model.fc2.weight.mul_(4)
    x, x_test = torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
    y = ((model(x) + torch.randn(N, C)) > 0).double()
    return model.eval(), x, y, x_test, (torch.rand(N_TEST, C) > 0.5).double()


def stride(model, x, y, loss, kind="both", curvature="kronecker", **options):
    operators = ClosedForm(residuals=kind, curvature=curvature, **options.pop("closed_form", {}))
    return STRIDE(model, TensorDataset(x, y), layers=["act"], loss=loss, operators=operators, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.slow
def test_several_labels_score_what_as_many_binary_models_score(several, kind, curvature):
    model, x, y, xt, yt = several
    whole = stride(model, x, y, "binary_cross_entropy", kind, curvature)
    each = [
        stride(OneOf(model, c), x, y[:, c : c + 1], "binary_cross_entropy", kind, curvature) for c in range(C)
    ]
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if curvature == "gauss-newton" else {"rtol": 1e-9, "atol": 1e-12}
    for response in RESPONSES:
        wanted = [m.influence((xt, yt[:, c : c + 1]), response=response) for c, m in enumerate(each)]
        torch.testing.assert_close(whole.influence((xt, yt), response=response), sum(wanted), **tolerance)
        for c in range(C):
            found = whole.influence((xt, yt), response=response, target=c)
            torch.testing.assert_close(found, wanted[c], **tolerance)
    torch.testing.assert_close(whole.self_influence(), sum(m.self_influence() for m in each), **tolerance)
    per_label = torch.stack([m.mislabel_scores() for m in each], 1)
    torch.testing.assert_close(whole.mislabel_scores(per_label=True), per_label)
    torch.testing.assert_close(whole.mislabel_scores(), per_label.norm(dim=1))


@pytest.mark.parametrize("kind", ["training", "temperature"])
@pytest.mark.parametrize("curvature", [*CURVATURES, "identity"])
def test_one_label_is_the_binary_case(several, kind, curvature):
    model, x, y, xt, yt = several
    binary = OneOf(model, 1)
    several_labels = stride(binary, x, y[:, 1:2], "binary_cross_entropy", kind, curvature)
    classes = stride(binary, x, y[:, 1].long(), "cross_entropy", kind, curvature)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if curvature == "gauss-newton" else {"rtol": 1e-9, "atol": 1e-12}
    for response in ("margin", "probability", "log-probability", "loss"):
        found = several_labels.influence((xt, yt[:, 1:2]), response=response)
        wanted = classes.influence((xt, yt[:, 1].long()), response=response)
        torch.testing.assert_close(found, wanted, **tolerance)
    torch.testing.assert_close(several_labels.self_influence(), classes.self_influence(), **tolerance)


def test_both_residuals_of_one_label_differ_a_little_from_the_binary_case(several):
    """A box in the place of a simplex."""
    model, x, y, xt, yt = several
    binary = OneOf(model, 1)
    found = stride(binary, x, y[:, 1:2], "binary_cross_entropy").influence((xt, yt[:, 1:2]))
    wanted = stride(binary, x, y[:, 1].long(), "cross_entropy").influence((xt, yt[:, 1].long()))
    assert 0 <= (found - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("kind", ["training", "temperature"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_scores_are_those_of_a_dense_solve(several, kind, curvature):
    """Each label damped by its own entry; the Hessian is diag p (1 - p) at the temperature."""
    model, x, y, xt, yt = several
    temperature, damping = (1.0 if kind == "training" else 2.0), 0.3
    with torch.no_grad():
        h, ht = (model.act(model.fc1(a)) for a in (x, xt))
        p, pt = torch.sigmoid(model(x) / temperature), torch.sigmoid(model(xt))
    scale = 1 / h.square().sum(1).mean().sqrt()
    phi, phi_test = (torch.cat([a * scale, torch.ones(len(a), 1)], 1) for a in (h, ht))
    second, variances = phi.T @ phi / N, p * (1 - p)
    found = stride(model, x, y, "binary_cross_entropy", kind, curvature).influence(
        (xt, yt), response="loss", target=2
    )
    own = variances[:, 2]
    level, eye = damping * second.diagonal().mean(), torch.eye(H + 1).double()
    if curvature == "kronecker":
        matrix = (second + level * eye) * own.mean() * (1 + damping)
    else:
        matrix = (phi * own[:, None]).T @ phi / N
        if curvature == "eigenvalue-corrected":
            basis = torch.linalg.eigh(second)[1]
            matrix = basis @ (basis.T @ matrix @ basis).diagonal().diag() @ basis.T
        matrix = matrix + level * own.mean() * eye
    r = y[:, 2] - p[:, 2]
    wanted = (pt[:, 2] - yt[:, 2])[:, None] * (phi_test @ torch.linalg.solve(matrix, phi.T)) * r / N
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


class TestLoss:
    loss = BinaryCrossEntropy()
    z = torch.tensor([[1.5, -2.0, 0.3], [30.0, -30.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, 1.0]], dtype=torch.float64)

    def test_values_are_those_of_torch(self):
        wanted = nn.functional.binary_cross_entropy_with_logits(self.z, self.y, reduction="none").sum(1)
        torch.testing.assert_close(self.loss.values(self.z, self.y), wanted)
        torch.testing.assert_close(self.loss.response_value(self.z, self.y, "loss"), wanted)

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_residuals_are_minus_the_gradient(self, temperature):
        z = (self.z / temperature).requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss.values(z, self.y).sum(), z)
        torch.testing.assert_close(self.loss.residuals(self.z, self.y, temperature), -gradient)

    @pytest.mark.parametrize("response", RESPONSES)
    def test_gradients_of_responses(self, response):
        for asked in (self.y, self.y.masked_fill(torch.tensor([False, True, False]), float("nan"))):
            z = self.z.clone().requires_grad_()
            (wanted,) = torch.autograd.grad(self.loss.response_value(z, asked, response).sum(), z)
            torch.testing.assert_close(self.loss.response_gradient(self.z, asked, response), wanted)
            assert wanted.isfinite().all()

    def test_factors_and_draws_have_the_variance_of_the_gradient(self):
        hessian = sum(v[:, :, None] * v[:, None, :] for v in self.loss.hessian_factors(self.z))
        p = torch.sigmoid(self.z)
        torch.testing.assert_close(
            hessian, torch.diag_embed(p * torch.sigmoid(-self.z)), rtol=1e-6, atol=1e-20
        )
        z = self.z[:1].expand(100_000, 3)
        r = self.loss.drawn_residuals(z, torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(r.T @ r / 100_000, torch.diag((p * (1 - p))[0]), atol=3e-3, rtol=0)

    def test_a_sure_label_keeps_its_digits(self):
        z = torch.tensor([[40.0]], dtype=torch.float64)
        found = self.loss.residuals(z, torch.ones(1, 1))
        assert float(found) == pytest.approx(4.248354255291589e-18, rel=1e-12, abs=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.full((N, C), 2.0), r"must hold labels from 0 \(off\) to 1 \(on\).*got 2.0"),
            (torch.zeros(N, dtype=torch.long), r"must hold labels of shape \(n, 3\).*class indices need"),
        ],
    )
    def test_labels(self, several, labels, message):
        with pytest.raises(ValueError, match=message):
            stride(several[0], several[1], labels, "binary_cross_entropy").fit()

    def test_probabilities(self, several):
        model, x, y, xt, yt = several
        ending = nn.Sequential(model, nn.Sigmoid())
        data, options = TensorDataset(x, y), {"layers": ["0.act"]}
        with pytest.raises(ValueError, match=r"got probabilities: outputs between 0 and 1 .*BinaryCross"):
            STRIDE(ending, data, loss="binary_cross_entropy", **options).fit()
        said = STRIDE(ending, data, loss=BinaryCrossEntropy(outputs="probabilities"), **options)
        wanted = stride(model, x, y, "binary_cross_entropy")
        torch.testing.assert_close(
            said.influence((xt, yt)), wanted.influence((xt, yt)), rtol=1e-8, atol=1e-12
        )

    def test_labels_that_are_needed(self, several):
        model, x, y, xt, _ = several
        method = stride(model, x, y, "binary_cross_entropy")
        assert method.influence((xt,), response="logit").shape == (N_TEST, N)
        with pytest.raises(ValueError, match="`inputs` must carry labels"):
            method.influence((xt,))
        assert method.influence((xt,), target="predicted").shape == (N_TEST, N)

    def test_a_label_that_the_model_is_sure_of(self, several):
        model, x, y, *_ = several
        sure = OneOf(model, 0)
        with torch.no_grad():
            sure.fc2.bias.fill_(900.0)
        with pytest.raises(ValueError, match="`temperature` must leave the model some uncertainty"):
            stride(sure, x, y[:, :1], "binary_cross_entropy", "training").fit()

    def test_several_labels_point_to_their_loss(self, several):
        with pytest.raises(ValueError, match="need loss='binary_cross_entropy'"):
            stride(several[0], several[1], several[2], CrossEntropy()).fit()
        with pytest.raises(ValueError, match="`outputs` must be one of 'logits', 'probabilities'; got 'p'"):
            BinaryCrossEntropy(outputs="p")


def test_the_temperature_is_matched_on_the_mean_distance_from_the_labels(several):
    model, x, y, xt, _ = several
    method = stride(
        model, x, y, "binary_cross_entropy", "temperature", held_out=TensorDataset(xt, 1 - y[:N_TEST])
    ).fit()
    with torch.no_grad():
        wanted = (1 - y[:N_TEST] - torch.sigmoid(model(xt))).abs().mean()
        found = (y - torch.sigmoid(model(x) / method.temperature_)).abs().mean()
    assert method.temperature_ > 1
    assert float(found) == pytest.approx(float(min(wanted, torch.tensor(0.5))), abs=0.01)
