"""Squared error: scores against exact refits of a linear head, and against dense formulas in float64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Batch, ClosedForm
from stride_captum.losses import MSE, CrossEntropy, loss_of
from stride_captum.residuals import RIDGE_SHARE

N, N_TEST, D, H = 40, 6, 5, 7


class Frozen(nn.Module):
    """A frozen backbone and a linear head."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.backbone, self.act = nn.Linear(D, H).requires_grad_(False), nn.Tanh()
        self.head = nn.Linear(H, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.backbone(x)))


class Ridge:
    """The head at its optimum, `1/2 sum_{i in S} |y_i - phi_i B|^2 + N lambda / 2 |B|^2`, for any S."""

    def __init__(self, n_outputs: int = 1, damping: float = 0.05, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.damping, self.model = damping, Frozen(n_outputs).double()
        self.x, self.x_test = torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
        noise = torch.randn(N, n_outputs).double()
        self.y = self.x[:, :1] * torch.arange(1, n_outputs + 1) + 0.5 * noise + 3
        self.y_test = torch.randn(N_TEST, n_outputs).double()
        h = self.hidden(self.x)
        self.scale = 1 / h.square().sum(1).mean().sqrt()
        self.phi, self.phi_test = self.extended(self.x), self.extended(self.x_test)
        self.a = self.phi.T @ self.phi / N
        self.inverse = (self.a + damping * self.a.diagonal().mean() * torch.eye(H + 1).double()).inverse()
        self.weights = self.solve(range(N))
        with torch.no_grad():
            self.model.head.weight.copy_(self.weights[:-1].T * self.scale)
            self.model.head.bias.copy_(self.weights[-1])

    def hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.act(self.model.backbone(x))

    def extended(self, x: Tensor) -> Tensor:
        h = self.hidden(x) * self.scale
        return torch.cat([h, torch.ones(len(h), 1).double()], 1)

    def solve(self, rows: Iterable[int]) -> Tensor:
        kept = list(rows)
        phi, y = self.phi[kept], self.y[kept]
        penalty = self.damping * self.a.diagonal().mean() * torch.eye(H + 1).double()
        return torch.linalg.solve(phi.T @ phi / N + penalty, phi.T @ y / N)

    def stride(self, residuals: str = "leave-one-out", curvature: str = "identity", **options) -> STRIDE:
        damping = {"damping": self.damping, "head_damping": self.damping}
        return STRIDE(
            self.model,
            TensorDataset(self.x, self.y),
            layers=["act"],
            loss=options.pop("loss", "mse"),
            operators=ClosedForm(residuals=residuals, curvature=curvature, **damping),
            **options,
        )

    @property
    def left_out(self) -> Tensor:
        """Residuals of the refits, `(N, n_outputs)`."""
        others = [self.solve(j for j in range(N) if j != i) for i in range(N)]
        return torch.stack([self.y[i] - self.phi[i] @ w for i, w in enumerate(others)])


@pytest.mark.parametrize("curvature", ["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_scores_are_the_exact_changes_of_leaving_one_out(curvature, n_outputs):
    ridge = Ridge(n_outputs)
    others = [ridge.solve(j for j in range(N) if j != i) for i in range(N)]
    changes = torch.stack([ridge.phi_test @ (ridge.weights - w) for w in others], 1)  # (n_test, N, C)
    method = ridge.stride(curvature=curvature)
    for target in range(n_outputs):
        scores = method.influence((ridge.x_test, ridge.y_test), target=target)
        error = (scores - changes[:, :, target]).abs().max() / changes.abs().max()
        assert error < 1e-11 if curvature != "gauss-newton" else error < 1e-9
    total = method.influence((ridge.x_test, ridge.y_test))
    torch.testing.assert_close(total, changes.sum(2), rtol=1e-8, atol=1e-12)


def test_a_linear_model_is_its_own_head():
    ridge = Ridge(2)
    linear = ridge.model.head
    data = TensorDataset(ridge.hidden(ridge.x), ridge.y)
    operators = ClosedForm(residuals="leave-one-out", curvature="identity", damping=0.05, head_damping=0.05)
    method = STRIDE(linear, data, layers=[":input"], loss="mse", operators=operators)
    found = method.influence((ridge.hidden(ridge.x_test), ridge.y_test), target=1)
    wanted = ridge.stride().influence((ridge.x_test, ridge.y_test), target=1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("n_outputs", [1, 3])
class TestDenseFormulas:
    def residuals(self, ridge: Ridge, kind: str) -> Tensor:
        training = ridge.y - ridge.phi @ ridge.weights
        parts = {"training": training, "leave-one-out": ridge.left_out}
        if kind == "both":
            return (1 - RIDGE_SHARE) * training + RIDGE_SHARE * ridge.left_out
        return parts[kind]

    @pytest.mark.parametrize("kind", ["training", "leave-one-out", "both"])
    def test_scores_of_both_responses(self, n_outputs, kind):
        ridge, r = Ridge(n_outputs), self.residuals(Ridge(n_outputs), kind)
        kernel = ridge.phi_test @ ridge.inverse @ ridge.phi.T / N
        z = ridge.phi_test @ ridge.weights
        test, method = (ridge.x_test, ridge.y_test), ridge.stride(kind)
        torch.testing.assert_close(method.influence(test), kernel * r.sum(1))
        loss = kernel * ((z - ridge.y_test) @ r.T)
        torch.testing.assert_close(method.influence(test, response="loss"), loss)
        one = kernel * (z - ridge.y_test)[:, :1] * r[:, 0]
        torch.testing.assert_close(method.influence(test, response="loss", target=0), one)

    @pytest.mark.parametrize("kind", ["training", "leave-one-out", "both"])
    def test_self_influence(self, n_outputs, kind):
        ridge, r = Ridge(n_outputs), self.residuals(Ridge(n_outputs), kind)
        training = ridge.y - ridge.phi @ ridge.weights
        forms = ((ridge.phi @ ridge.inverse) * ridge.phi).sum(1)
        own = ridge.stride(kind).self_influence()
        torch.testing.assert_close(own, forms * (training * r).sum(1) / N)

    def test_self_influence_of_other_examples(self, n_outputs):
        ridge = Ridge(n_outputs)
        r = ridge.y_test - ridge.phi_test @ ridge.weights
        forms = ((ridge.phi_test @ ridge.inverse) * ridge.phi_test).sum(1)
        own = ridge.stride("both").self_influence((ridge.x_test, ridge.y_test))
        torch.testing.assert_close(own, forms * r.square().sum(1) / N)

    def test_mislabel_scores(self, n_outputs):
        ridge = Ridge(n_outputs)
        method = ridge.stride()
        torch.testing.assert_close(method.mislabel_scores(), ridge.left_out.norm(dim=1))
        torch.testing.assert_close(method.mislabel_scores(per_label=True), ridge.left_out.abs())

    def test_sums_over_subsets(self, n_outputs):
        ridge, groups = Ridge(n_outputs), [[0, 3, 5], list(range(10)), []]
        test = ridge.x_test, ridge.y_test
        method = ridge.stride()
        scores, found = method.influence(test), method.subset_influence(test, groups)
        torch.testing.assert_close(found, torch.stack([scores[:, g].sum(1) for g in groups], 1))
        exact = [ridge.solve(j for j in range(N) if j not in g) for g in groups]
        removed = torch.stack([(ridge.phi_test @ (ridge.weights - w)).sum(1) for w in exact], 1)
        gap = (found - removed).norm(dim=0)[:2] / removed.norm(dim=0)[:2]
        assert 1e-3 < gap[0] < 0.2
        assert gap[1] < 0.6  # examples that go together change what is left for one another


def test_the_default_options_answer():
    ridge = Ridge(2)
    method = STRIDE(ridge.model, TensorDataset(ridge.x, ridge.y), loss=MSE())
    assert method.response == "output"
    assert method.fit().temperature_ == 1.0
    assert method.influence((ridge.x_test, ridge.y_test)).shape == (N_TEST, N)
    assert (method.influence((ridge.x_test, ridge.y_test), normalize="cosine").abs() <= 1 + 1e-9).all()


def test_labels_of_one_output_may_be_a_vector():
    ridge = Ridge(1)
    rows = ridge.stride().influence((ridge.x_test, ridge.y_test), response="loss")
    method = STRIDE(
        ridge.model,
        TensorDataset(ridge.x, ridge.y[:, 0]),
        layers=["act"],
        loss="mse",
        operators=ridge.stride().operators,
    )
    assert method.influence((ridge.x_test, ridge.y_test[:, 0]), response="loss").equal(rows)


def test_a_saved_method_and_a_store_give_the_same(tmp_path):
    ridge, test = Ridge(3), (Ridge(3).x_test, Ridge(3).y_test)
    method = ridge.stride("both").fit()
    method.save(tmp_path / "method")
    data = TensorDataset(ridge.x, ridge.y)
    loaded = STRIDE.load(tmp_path / "method", ridge.model, data)
    assert loaded.loss == MSE()
    assert loaded.influence(test).equal(method.influence(test))
    stored = ridge.stride("both", feature_store=tmp_path / "store")
    torch.testing.assert_close(
        stored.influence(test).double(), method.influence(test), rtol=1e-3, atol=1e-5
    )  # a store is float32
    with pytest.raises(ValueError, match="other loss"):
        ridge.stride("both", loss="binary_cross_entropy", feature_store=tmp_path / "store").fit()


def test_examples_come_and_go():
    ridge = Ridge(2)
    method = ridge.stride("both").fit().remove_examples([1, 5])
    method.add_examples((ridge.x_test, ridge.y_test))
    keep = [i for i in range(N) if i not in (1, 5)]
    data = TensorDataset(torch.cat([ridge.x[keep], ridge.x_test]), torch.cat([ridge.y[keep], ridge.y_test]))
    fresh = STRIDE(ridge.model, data, layers=["act"], loss="mse", operators=method.operators)
    test = ridge.x_test, ridge.y_test
    torch.testing.assert_close(method.influence(test), fresh.influence(test), rtol=1e-8, atol=1e-12)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"operators": ClosedForm(residuals="temperature")}, "`residuals` must be .*loss='mse'.*no temp"),
            ({"operators": ClosedForm(temperature=2.0)}, "`temperature` must be None for loss='mse'"),
            ({"operators": "trained"}, r"`operators` must be ClosedForm\(...\) for a loss other than"),
            ({"response": "margin"}, "`response` must be one of 'output', 'loss'; got 'margin'"),
        ],
    )
    def test_what_is_not_defined(self, options, message):
        ridge = Ridge()
        with pytest.raises(ValueError, match=message):
            STRIDE(ridge.model, TensorDataset(ridge.x, ridge.y), loss="mse", **options).fit()

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (
                torch.zeros(N),
                r"`train_dataset` must hold labels of shape \(n, 3\) .*'mse'.*class indices",
            ),
            (torch.zeros(N, 2), r"must hold labels of shape \(n, 3\).*got shape \(40, 2\)"),
            (torch.full((N, 3), float("nan")), "must hold finite labels; got NaN or infinity in row 0"),
        ],
    )
    def test_labels_of_another_shape(self, labels, message):
        ridge = Ridge(3)
        with pytest.raises(ValueError, match=message):
            STRIDE(ridge.model, TensorDataset(ridge.x, labels), loss="mse").fit()

    def test_targets(self):
        method, test = Ridge(3).stride(), (Ridge(3).x_test, Ridge(3).y_test)
        with pytest.raises(ValueError, match=r"`target` must hold output indices in \[0, 3\); got \[3, 3, "):
            method.influence(test, target=3)
        with pytest.raises(ValueError, match="`target` must be 'label' or output indices for loss='mse'"):
            method.influence(test, target="predicted")

    def test_sequences(self):
        with pytest.raises(ValueError, match=r"`model` must return outputs of shape .*n_outputs\).*sequence"):
            MSE().logits(torch.zeros(2, 3, 4))

    def test_class_indices_point_to_the_loss_of_a_regression(self):
        ridge = Ridge(3)
        with pytest.raises(ValueError, match="loss='mse'"):
            STRIDE(ridge.model, TensorDataset(ridge.x, ridge.y), loss=CrossEntropy()).fit()
        with pytest.raises(ValueError, match="loss='mse'"):
            STRIDE(ridge.model, TensorDataset(ridge.x, ridge.y[:, 0]), loss=CrossEntropy()).fit()


def test_names():
    assert loss_of("mse") == MSE()


@pytest.mark.parametrize("curvature", ["identity", "eigenvalue-corrected", "gauss-newton"])
def test_with_weights_too_scores_are_the_exact_changes(curvature):
    """`1/2 sum_i omega_i |y_i - phi_i B|^2 + W lambda / 2 |B|^2`, solved with and without each example."""
    ridge, omega = Ridge(2), torch.rand(N, generator=torch.Generator().manual_seed(1)).double() * 3
    omega[0] = 0
    h = ridge.hidden(torch.cat([ridge.x, ridge.x_test]))
    scale = 1 / ((omega * h[:N].square().sum(1)).sum() / omega.sum()).sqrt()
    phi, phi_test = torch.cat([h * scale, torch.ones(len(h), 1).double()], 1).split([N, N_TEST])
    second = (omega[:, None] * phi).T @ phi / omega.sum()
    penalty = ridge.damping * second.diagonal().mean() * torch.eye(H + 1).double()

    def solved(weights: Tensor) -> Tensor:
        weighted = (weights[:, None] * phi).T / omega.sum()
        return torch.linalg.solve(weighted @ phi + penalty, weighted @ ridge.y)

    every = solved(omega)
    others = [solved(omega.clone().index_fill_(0, torch.tensor([i]), 0.0)) for i in range(N)]
    method = ridge.stride(curvature=curvature, batch=Batch(sample_weight=omega))
    wanted = torch.stack([(phi_test @ (every - other)).sum(1) for other in others], 1)
    found = method.influence((ridge.x_test, ridge.y_test))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-11)
    left_out = torch.stack([ridge.y[i] - phi[i] @ other for i, other in enumerate(others)])
    torch.testing.assert_close(method.mislabel_scores(), left_out.norm(dim=1))
