"""Examples with several positions as one row of outputs, for methods that read one row an example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from stride_captum import STRIDE, Batch, Checkpoint, ClosedForm
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn
from stride_captum.losses import MSE, CrossEntropy
from stride_captum.losses.summed_positions import SummedPositions

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

    @pytest.mark.slow
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

    @pytest.mark.slow
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


def segmenter() -> nn.Module:
    """Maps of two channels to three classes for each pixel, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()


def classes(*shape: int, seed: int = 3, n_classes: int = 3) -> Tensor:
    """Class indices."""
    return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))


class TestLabelsThatDoNotFit:
    FITS = r"must hold labels of shape \(\d, 3, 4\) for outputs of shape \(\d, 3, 3, 4\); got shape "

    @pytest.mark.parametrize("method", [*METHODS, STRIDE])
    @pytest.mark.parametrize("soft", [False, True])
    def test_a_transposed_map_is_refused(self, method, soft):
        x, y = draw(6, 2, 3, 4), classes(6, 3, 4)
        if soft:
            y = F.one_hot(y, 3).double().movedim(-1, 1)
        turned = y.transpose(-1, -2).contiguous()
        shape = r"\(\d, 3, 4, 3\)" if soft else r"\(\d, 4, 3\)"
        with pytest.raises(ValueError, match=f"`train_dataset` {self.FITS}{shape}"):
            made(method, segmenter(), x, turned).fit()
        with pytest.raises(ValueError, match=f"`inputs` {self.FITS}{shape}"):
            made(method, segmenter(), x, y).influence((x, turned))

    @pytest.mark.parametrize(("loss", "soft"), [("mse", False), ("mse", True), ("cross_entropy", True)])
    @pytest.mark.parametrize("method", [TracIn, STRIDE])
    def test_numbers_for_another_number_of_positions_are_refused(self, method, loss, soft):
        x, n_outputs = draw(6, 4, 3), 3 if soft else 1
        y = torch.full((6, 5, n_outputs) if soft else (6, 5), 1 / n_outputs, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"`train_dataset` must hold labels of shape \(\d, 4\) for"):
            made(method, network(n_outputs), x, y, loss=loss).fit()

    def test_maps_of_another_form_are_refused(self):
        x, y = draw(6, 2, 3, 4), classes(6, 3, 4)
        method = made(TracIn, segmenter(), x, y)
        with pytest.raises(
            ValueError, match=r"`model` must give outputs of the shape \(3, 3, 4\).*\(3, 4, 3\)"
        ):
            method.influence((x.transpose(2, 3), y.transpose(1, 2)))

    @pytest.mark.parametrize("shape", [(6, 12), (6, 3, 4), (6, 4, 3)])
    def test_positions_in_any_form_where_that_of_the_outputs_is_not_known(self, shape):
        loss = SummedPositions(position=CrossEntropy(), n_positions=12, n_outputs=3)
        assert loss.labels(classes(*shape), 36, "labels").shape == (6, 12)

    @pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6,)])
    def test_another_number_of_positions_is_always_refused(self, shape):
        loss = SummedPositions(position=MSE(), n_positions=4, n_outputs=3)
        with pytest.raises(ValueError, match="`labels` must hold labels for 4 positions of each example"):
            loss.labels(draw(*shape), 12, "labels")


class TestTargets:
    """A target is one index for all test points, or one for each."""

    MUST = r"`target` must hold one class or output for each test point, shape \(n,\); got shape "

    @pytest.mark.parametrize("method", [*METHODS, STRIDE])
    def test_a_column_is_one_for_each_test_point(self, method):
        x, y, target = draw(6, 4, 3), classes(6, 4), torch.tensor([2, 0])
        fitted = made(method, network(3), x, y)
        test = (x[:2], y[:2])
        wanted = fitted.influence(test, target=target)
        same(fitted.influence(test, target=target[:, None]), wanted, 1e-12)
        same(fitted.influence((x[:1], y[:1]), target=torch.tensor([[2]])), wanted[:1], 1e-8)

    @pytest.mark.parametrize("method", [TracIn, STRIDE])
    @pytest.mark.parametrize("shape", [(2, 4), (2, 2), (1, 2), (2, 1, 1)])
    def test_several_for_a_test_point_are_refused(self, method, shape):
        x, y = draw(6, 4, 3), classes(6, 4)
        got = str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=self.MUST + got):
            made(method, network(3), x, y).influence((x[:2], y[:2]), target=classes(*shape))

    @pytest.mark.parametrize("method", [TracIn, STRIDE])
    @pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy", "cross_entropy"])
    def test_rows_refuse_them_too(self, method, loss):
        x = draw(6, 3)
        y = classes(6) if loss == "cross_entropy" else (draw(6, 3, seed=4) > 0).double()
        fitted, test = made(method, network(3), x, y, loss=loss), (x[:2], y[:2])
        for target in (torch.tensor([[2, 0]]), torch.tensor([[2, 0], [1, 1]])):
            with pytest.raises(ValueError, match=self.MUST):
                fitted.influence(test, target=target)
        column = fitted.influence(test, target=torch.tensor([[2], [0]]))
        same(column, fitted.influence(test, target=torch.tensor([2, 0])), 1e-12)


class TestTemperature:
    """Of positions, as STRIDE has it: the mean is over labels that count, each with its weight."""

    @pytest.fixture
    def problem(self):
        """A model that fits its training labels but for one, and held-out data where it is often wrong."""
        model = network(3)
        with torch.no_grad():
            model[2].weight.mul_(6)
            x, held = draw(8, 4, 3), draw(40, 4, 3, seed=5)
            y, y_held = model(x).argmax(-1), model(held).argmax(-1)
        y[2, 0] = (y[2, 0] + 1) % 3
        y_held[:8] = (y_held[:8] + 1) % 3
        y[0, 1:], y_held[9, :3], y_held[10] = -100, -100, -100
        return model, x, y, TensorDataset(held, y_held)

    @staticmethod
    def of_both(model: nn.Module, method: Any, x: Tensor, y: Tensor, **options: Any) -> tuple[float, float]:
        """T of a gradient method and of STRIDE; neither is at the end of its range."""
        fitted = made(method, model, x, y, residuals="temperature", **options).fit()
        wanted = STRIDE(model, TensorDataset(x, y), **options).fit().temperature_
        assert 1.01 < wanted < 50
        return fitted._states[-1].temperature, wanted

    @pytest.mark.parametrize("method", METHODS)
    def test_examples_without_a_label_do_not_count(self, problem, method):
        model, x, y, held = problem
        found, wanted = self.of_both(model, method, x, y, held_out=held)
        assert found == pytest.approx(wanted, rel=1e-9)
        x, y = torch.cat([x, x[:4]]), torch.cat([y, torch.full((4, 4), -100)])
        longer, _ = self.of_both(model, method, x, y, held_out=held)
        assert longer == pytest.approx(wanted, rel=1e-9)

    def test_classes_and_examples_count_with_their_weights(self, problem):
        model, x, y, held = problem
        plain, _ = self.of_both(model, TracIn, x, y, held_out=held)
        options = {
            "batch": Batch(sample_weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0])),
            "loss": CrossEntropy(weight=[1.0, 3.0, 0.2]),
        }
        for some in (["batch"], ["loss"], ["batch", "loss"]):
            found, wanted = self.of_both(
                model, TracIn, x, y, held_out=held, **{key: options[key] for key in some}
            )
            assert found == pytest.approx(wanted, rel=1e-9)
            assert abs(found / plain - 1) > 1e-3

    def test_matched_to_examples_that_a_checkpoint_has_not_seen(self, problem):
        model, x, y, _ = problem
        y[6:, :2] = (y[6:, :2] + 1) % 3
        seen = Checkpoint(model.state_dict(), seen=range(6))
        found, wanted = self.of_both(model, TracIn, x, y, checkpoints=[seen])
        assert found == pytest.approx(wanted, rel=1e-9)

    def test_of_several_checkpoints(self, problem):
        model, x, y, _ = problem
        y[2, 0] = model(x)[2, 0].argmax()  # all are right, and the model is sure of them
        sure = {key: part * (5 if key.startswith("2.") else 1) for key, part in model.state_dict().items()}
        both = [sure, sure]
        found, wanted = self.of_both(model, TracIn, x, y, checkpoints=both)
        assert found == pytest.approx(wanted, rel=1e-9)

    @pytest.mark.parametrize("method", [TracIn, TRAK])
    def test_nothing_to_match_to_is_refused(self, problem, method):
        model, x, y, held = problem
        with pytest.raises(ValueError, match="`train_dataset` must hold a label that counts, with a weight"):
            made(method, model, x, torch.full_like(y, -100), residuals="temperature", held_out=held).fit()


class TestOutOfSample:
    """Residuals of a ridge head that has not seen any position of the example."""

    IGNORED = -100

    @pytest.fixture
    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        y = torch.randint(3, (9, 4), generator=torch.Generator().manual_seed(4))
        y[2, 1:], y[5] = self.IGNORED, self.IGNORED
        table = nn.Embedding(11, 3, _weight=draw(11, 3, seed=5))
        return nn.Sequential(table, network(3)), torch.arange(36).reshape(9, 4) % 11, y

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kind", ["leave-one-out", "both"])
    def test_one_position_is_an_example_without(self, problem, method, kind):
        model, x, _ = problem
        y, test = torch.arange(9)[:, None] % 3, (x[:2, :1], torch.tensor([[1], [2]]))
        together = made(method, model, x[:, :1], y, residuals=kind)
        rows = made(method, model, x[:, 0], y[:, 0], residuals=kind)
        same(together.influence(test), rows.influence((test[0][:, 0], test[1][:, 0])))
        same(together.self_influence(), rows.self_influence())

    #: Weights of examples and of positions, some of which count for nothing.
    WEIGHTS = (None, torch.linspace(0.5, 2, 9).double(), (torch.arange(36).reshape(9, 4) * 7 % 5).double())

    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_the_head_is_fitted_without_the_example(self, problem, weights):
        model, x, _ = problem
        y, batch = draw(9, 4, 3, seed=7), Batch(sample_weight=weights)
        method = made(TracIn, model, x, y, loss="mse", residuals="leave-one-out", batch=batch).fit()
        omega = torch.ones(9, 4).double() if weights is None else weights.reshape(9, -1).expand(9, 4)
        omega, total = omega[..., None], omega.sum()
        # The head reads all layers but the last.
        h = F.pad(model[0](x).detach(), (0, 1), value=1.0)
        h[..., :3] *= ((h[..., :3].square() * omega).sum() / total).rsqrt()
        second = h.flatten(0, 1).T @ (h * omega).flatten(0, 1) / total
        damping = 0.1 * second.diagonal().mean() * torch.eye(4).double()
        for i in range(9):
            others, wanted, w = (part[torch.arange(9) != i].flatten(0, 1) for part in (h, y, omega))
            head = torch.linalg.solve(
                others.T @ (others * w) / total + damping, others.T @ (wanted * w) / total
            )
            same(method._states[0].residuals[i].reshape(4, 3), omega[i] * (y[i] - h[i] @ head))

    @pytest.mark.parametrize("kind", ["leave-one-out", "both"])
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_they_are_those_of_stride(self, problem, kind, weights):
        model, x, y = problem
        loss, batch = CrossEntropy(weight=torch.tensor([1.0, 2.0, 0.5])), Batch(sample_weight=weights)
        method = made(TracIn, model, x, y, residuals=kind, temperature=2.0, loss=loss, batch=batch).fit()
        operators = ClosedForm(residuals=kind, temperature=2.0, form="rows")
        stride = STRIDE(model, TensorDataset(x, y), operators=operators, loss=loss, batch=batch).fit()
        rows = stride.operators_.rows._residuals
        found = method._states[0].residuals.reshape(9, 4, 3)
        same(found[y != self.IGNORED], rows.of(slice(None)) * rows.unit)
        assert bool((found[y == self.IGNORED] == 0).all())

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    def test_padding_changes_nothing(self, problem, method):
        model, x, y = problem
        more = F.pad(x, (0, 2), value=3), F.pad(y, (0, 2), value=self.IGNORED)
        test = x[:2], torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
        padded = F.pad(test[0], (0, 2)), F.pad(test[1], (0, 2), value=self.IGNORED)
        one = made(method, model, x, y, residuals="both").influence(test)
        same(made(method, model, *more, residuals="both").influence(padded), one)

    def test_no_label_at_all_is_refused(self, problem):
        model, x, y = problem
        with pytest.raises(ValueError, match="at least one label that is not ignored"):
            made(TRAK, model, x, torch.full_like(y, self.IGNORED), residuals="both").fit()


class Masked(nn.Module):
    """Tokens to three classes for each, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 3).double()
        self.rows = network(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.rows(self.embedding(input_ids))


class Dicts(Dataset[Any]):
    """Examples as a dict, the last three of eight tokens of each being padding."""

    def __init__(self) -> None:
        self.ids = classes(6, 8, seed=7, n_classes=10)
        self.mask = torch.ones(6, 8, dtype=torch.long)
        self.mask[:, 5:] = 0
        self.labels = classes(6, 8).masked_fill(self.mask == 0, -100)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


class TestPaddingWithoutLabels:
    @pytest.mark.parametrize("method", [TracIn, TRAK, DiagonalEKFAC, STRIDE])
    @pytest.mark.parametrize("response", ["margin", "loss"])
    def test_a_target_is_not_asked_of_padding(self, method, response):
        data = Dicts()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = Masked()
        fitted = method(model, data)
        test = {"input_ids": data.ids[:2], "attention_mask": data.mask[:2]}
        labels = torch.full((2, 8), 2).masked_fill(data.mask[:2] == 0, -100)
        wanted = fitted.influence({**test, "labels": labels}, response=response)
        same(fitted.influence(test, target=2, response=response), wanted, 1e-6)
        unmasked = {**test, "attention_mask": torch.ones_like(data.mask[:2])}
        whole = fitted.influence(unmasked, target=2, response=response)
        assert float((whole - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())

    @pytest.mark.parametrize("method", [TracIn, STRIDE])
    def test_the_prediction_is_not_asked_of_padding(self, method):
        data = Dicts()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = Masked()
        with torch.no_grad():
            predicted = model(data.ids[:2]).argmax(-1).masked_fill(data.mask[:2] == 0, -100)
        fitted = method(model, data)
        test = {"input_ids": data.ids[:2], "attention_mask": data.mask[:2]}
        wanted = fitted.influence({**test, "labels": predicted})
        same(fitted.influence(test, target="predicted"), wanted, 1e-6)

    def test_numbers_are_not_asked_of_padding(self):
        """An output is not asked for where a mask says so, of losses with numbers as labels too."""
        loss = SummedPositions(position=MSE(), n_positions=3, n_outputs=2)
        mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
        z = draw(2, 6)
        asked = loss.asked(z, None, torch.tensor([0, 1]), "output", mask)
        gradients = loss.response_gradient(z, asked, "output").reshape(2, 3, 2)
        assert torch.equal(torch.stack([gradients[0, :, 0], gradients[1, :, 1]]), mask.double())
        assert gradients.sum() == 4
        other = loss.asked(z, None, torch.tensor([0, 1]), "output", mask[:, :2])  # of something else
        assert loss.response_gradient(z, other, "output").sum() == 6
