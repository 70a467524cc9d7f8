from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from planted import (
    MLP,
    BatchNormCNN,
    HuggingFaceLike,
    ListOfDicts,
    OneLogit,
    TwoInputs,
    built,
    examples,
    planted_classes,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, STRIDEConfig
from stride_captum.adapters.gradients import GradientMethod
from stride_captum.adapters.per_example_gradients import chosen_parameters, example_gradients, flat
from stride_captum.residuals import match_temperature, mean_residual, tempered_residuals
from stride_captum.responses import RESPONSES, response_gradient, response_value

N = 5


class PlainProducts(GradientMethod):
    """M is the identity."""


class Weighted(GradientMethod):
    """M is a diagonal that depends on the residuals."""

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> Any:
        return 1 + residuals.abs().mean() + torch.arange(self._n_parameters(model)) % 3

    def _precondition(self, kernel: Any, sides: Tensor) -> Tensor:
        return sides * kernel

    def _n_parameters(self, model: nn.Module) -> int:
        return sum(p.numel() for p in chosen_parameters(model, self.layers).values())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(model: nn.Module, names: list[str], batch: Any, vectors: Tensor) -> Tensor:
    """Per-example gradients as autograd gives them, one example at a time."""
    wanted = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for i, vector in enumerate(vectors):
        with torch.enable_grad():
            logits = examples(batch)[i : i + 1].logits(model)
            gradients = torch.autograd.grad((logits * vector).sum(), wanted, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def vectors_for(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        logits = examples(batch).logits(model)
    return torch.randn(logits.shape, generator=generator(), dtype=logits.dtype)


def mlp_batch() -> tuple[nn.Module, Any]:
    return built(MLP).double(), (torch.randn(N, 6, generator=generator(1)).double(), torch.zeros(N).long())


def cnn_batch() -> tuple[nn.Module, Any]:
    model, train, _ = trained(BatchNormCNN, n_train=20, steps=3)
    return model.double().eval(), (train.tensors[0][:N].double(), train.tensors[1][:N])


def two_inputs_batch() -> tuple[nn.Module, Any]:
    x = torch.randn(2, N, 6, generator=generator(1)).double()
    return built(TwoInputs).double(), (x[0], x[1], torch.zeros(N).long())


def two_inputs_by_name() -> tuple[nn.Module, Any]:
    model, (first, second, labels) = two_inputs_batch()
    return model, {"second": second, "labels": labels, "first": first}


def hugging_face_batch() -> tuple[nn.Module, Any]:
    batch = ListOfDicts(N)[:]
    return built(HuggingFaceLike).double(), {**batch, "attention_mask": batch["attention_mask"].double()}


def one_logit_batch() -> tuple[nn.Module, Any]:
    batch = mlp_batch()[1]
    return built(lambda: OneLogit(squeeze=True)).double(), batch


def without_labels() -> tuple[nn.Module, Any]:
    model, (x, _) = mlp_batch()
    return model, (x,)


class Shift(nn.Module):
    """A network with an argument that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return self.fc(x * scale)


def shared_argument() -> tuple[nn.Module, Any]:
    _, (x, y) = mlp_batch()
    return built(Shift).double(), (x, torch.tensor(2.0).double(), y)


BATCHES = [
    mlp_batch,
    cnn_batch,
    two_inputs_batch,
    two_inputs_by_name,
    hugging_face_batch,
    one_logit_batch,
    without_labels,
    shared_argument,
]


class TestExampleGradients:
    @pytest.mark.parametrize("make", BATCHES)
    def test_are_those_of_a_loop_of_autograd(self, make):
        model, batch = make()
        model.eval()
        vectors, parameters = vectors_for(model, batch), chosen_parameters(model, None)
        found = example_gradients(model, parameters, examples(batch), vectors)
        assert list(found) == list(parameters)
        assert all(found[name].shape == (N, *p.shape) for name, p in parameters.items())
        wanted = loop(model, list(parameters), batch, vectors)
        torch.testing.assert_close(flat(found), wanted, rtol=1e-11, atol=1e-12)

    def test_of_a_tied_weight_are_the_sum_over_its_uses(self):
        model, batch = (
            built(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))).double(),
            None,
        )
        model[2].weight = model[0].weight
        batch = (torch.randn(N, 6, generator=generator(1)).double(), torch.zeros(N).long())
        vectors, parameters = vectors_for(model, batch), chosen_parameters(model, None)
        assert list(parameters) == ["0.weight", "0.bias", "2.bias"]
        found = flat(example_gradients(model, parameters, examples(batch), vectors))
        torch.testing.assert_close(found, loop(model, list(parameters), batch, vectors))

    def test_leave_no_gradient_and_no_graph(self):
        model, batch = mlp_batch()
        found = example_gradients(
            model, chosen_parameters(model, None), examples(batch), vectors_for(model, batch)
        )
        assert all(p.grad is None for p in model.parameters())
        assert not any(g.requires_grad for g in found.values())

    def test_of_a_model_that_vmap_cannot_run_are_refused(self):
        class LooksAtValues(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (2 if x.sum() > 0 else 1)

        model, batch = built(LooksAtValues).double(), mlp_batch()[1]
        with pytest.raises(
            ValueError, match=r"`model` must run under torch.func.vmap, which .* gradients need"
        ):
            example_gradients(
                model, chosen_parameters(model, None), examples(batch), torch.ones(N, 3).double()
            )

    def test_errors_of_the_model_itself_are_not_renamed(self):
        model, (x, y) = mlp_batch()
        with pytest.raises(RuntimeError, match="shape"):
            example_gradients(
                model, chosen_parameters(model, None), examples((x[:, :4], y)), torch.ones(N, 3).double()
            )


class TestChosenParameters:
    def test_are_all_but_the_frozen_ones(self):
        model = built(MLP)
        model.fc1.weight.requires_grad_(False)
        assert list(chosen_parameters(model, None)) == [
            "fc1.bias",
            *(f"fc{i}.{kind}" for i in (2, 3) for kind in ("weight", "bias")),
        ]

    def test_are_all_where_all_are_frozen(self):
        assert len(chosen_parameters(built(MLP).requires_grad_(False), None)) == 6

    def test_are_those_of_the_layers_frozen_or_not(self):
        model = built(MLP)
        model.fc1.requires_grad_(False)
        assert list(chosen_parameters(model, ["fc3", "fc1"])) == [
            "fc1.weight",
            "fc1.bias",
            "fc3.weight",
            "fc3.bias",
        ]

    def test_of_a_shared_module_are_found_by_either_name(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2)})
        model["b"] = model["a"]
        assert list(chosen_parameters(model, ["b"])) == ["a.weight", "a.bias"]

    def test_a_misspelt_layer_is_refused_with_the_nearest_name(self):
        with pytest.raises(
            ValueError, match=r"`layers` must name submodules of `model`; got 'fc9'. Nearest: 'fc3'"
        ):
            chosen_parameters(built(MLP), ["fc9"])

    def test_layers_without_parameters_are_refused(self):
        with pytest.raises(ValueError, match=r"`layers` must have parameters; got none"):
            chosen_parameters(built(MLP), ["relu1"])
        with pytest.raises(ValueError, match=r"`model` must have parameters; got none"):
            chosen_parameters(nn.ReLU(), None)


@pytest.fixture
def exact() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A trained MLP and its data in float64."""
    model, train, test = trained(MLP)
    double = [TensorDataset(x.double(), y) for x, y in (train.tensors, test.tensors)]
    return model.double(), *double


def all_gradients(model: nn.Module, dataset: TensorDataset, vectors: Tensor) -> Tensor:
    return loop(model, [name for name, _ in model.named_parameters()], dataset.tensors, vectors)


class TestScores:
    @pytest.mark.parametrize("response", RESPONSES)
    def test_are_products_of_gradients(self, exact, response):
        model, train, test = exact
        x, y = test.tensors
        with torch.no_grad():
            residuals = tempered_residuals(model(train.tensors[0]), train.tensors[1])
        right = all_gradients(model, train, residuals)
        left = torch.stack([self._gradient(model, x[i], y[i], response) for i in range(len(x))])
        found = PlainProducts(model, train, batch_size=7).influence((x, y), response=response)
        torch.testing.assert_close(found, left @ right.T, rtol=1e-9, atol=1e-12)

    @staticmethod
    def _gradient(model: nn.Module, x: Tensor, y: Tensor, response: str) -> Tensor:
        with torch.enable_grad():
            value = response_value(model(x[None]), y[None], response)
            gradients = torch.autograd.grad(value.sum(), list(model.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    @pytest.mark.parametrize("residuals", ["training", "temperature", "leave-one-out", "both"])
    def test_take_the_residuals_of_stride(self, exact, residuals):
        model, train, test = exact
        options = {"residuals": residuals, "temperature": 3.0}
        method = PlainProducts(model, train, **options).fit()
        stride = STRIDE(model, train, config=STRIDEConfig(**options)).fit()
        wanted = stride._states[0].operators.residuals
        torch.testing.assert_close(method._states[0].residuals, wanted, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            vectors = response_gradient(model(test.tensors[0]), test.tensors[1], "margin")
        products = all_gradients(model, test, vectors) @ all_gradients(model, train, wanted).T
        torch.testing.assert_close(method.influence(test.tensors), products, rtol=1e-9, atol=1e-12)

    def test_residuals_belong_to_the_weights_of_each_checkpoint(self, exact):
        model, train, test = exact
        states = [built(MLP, seed).double().state_dict() for seed in (1, 2)]
        parts = []
        for state in states:
            other = copy.deepcopy(model)
            other.load_state_dict(state)
            parts.append(PlainProducts(other, train, residuals="both").influence(test.tensors))
        found = PlainProducts(model, train, residuals="both", checkpoints=states).influence(test.tensors)
        torch.testing.assert_close(found, sum(parts) / 2, rtol=1e-9, atol=1e-12)

    def test_a_frozen_layer_takes_no_part(self, exact):
        model, train, test = exact
        wanted = PlainProducts(model, train, layers=["fc2", "fc3"]).influence(test.tensors)
        model.fc1.requires_grad_(False)
        method = PlainProducts(model, train)
        torch.testing.assert_close(method.influence(test.tensors), wanted)
        assert method.parameters_ == [f"fc{i}.{kind}" for i in (2, 3) for kind in ("weight", "bias")]

    def test_layers_add_up(self, exact):
        model, train, test = exact
        parts = [PlainProducts(model, train, layers=[f"fc{i}"]).influence(test.tensors) for i in (1, 2, 3)]
        torch.testing.assert_close(PlainProducts(model, train).influence(test.tensors), sum(parts))

    def test_the_kernel_stands_between_the_gradients(self, exact):
        model, train, test = exact
        method = Weighted(model, train)
        scores = method.influence(test.tensors)
        state = method._states[0]
        with torch.no_grad():
            vectors = response_gradient(model(test.tensors[0]), test.tensors[1], "margin")
        left = all_gradients(model, test, vectors) * state.kernel
        torch.testing.assert_close(scores, left @ all_gradients(model, train, state.residuals).T)

    def test_the_memory_budget_bounds_the_examples_at_a_time(self, exact):
        model, train, test = exact
        size = 8 * sum(p.numel() for p in model.parameters())
        seen = []

        class Counts(PlainProducts):
            def _gradients(self, model: nn.Module, batch: Any, vectors: Tensor) -> Any:
                seen.append(len(vectors))
                return super()._gradients(model, batch, vectors)

        wanted = PlainProducts(model, train).influence(test.tensors)
        for rows in (1, 3, 5):
            seen.clear()
            method = Counts(model, train, memory_budget=4 * size * rows)
            torch.testing.assert_close(method.influence(test.tensors), wanted)
            method.self_influence()
            assert max(seen) == rows
        assert Counts(model, train, memory_budget=1)._max_rows() == 1

    def test_a_layer_counts_for_the_budget_as_itself(self, exact):
        model, train, _ = exact
        whole, last = (PlainProducts(model, train, layers=x, memory_budget="64KiB") for x in (None, ["fc3"]))
        assert whole._max_rows() == 2**16 // (4 * 8 * sum(p.numel() for p in model.parameters()))
        assert last._max_rows() == 2**16 // (4 * 8 * (15 + 3))


class TestNorms:
    @pytest.mark.parametrize("method", [PlainProducts, Weighted])
    @pytest.mark.parametrize("residuals", ["training", "both"])
    def test_the_cosine_divides_by_the_norms_of_both_sides(self, exact, method, residuals):
        model, train, test = exact
        found = method(model, train, residuals=residuals)
        scores, cosine = (found.influence(test.tensors, normalize=x) for x in (None, "cosine"))
        state = found._states[0]
        weights = 1.0 if state.kernel is None else state.kernel
        with torch.no_grad():
            vectors = response_gradient(model(test.tensors[0]), test.tensors[1], "margin")
        left = (all_gradients(model, test, vectors).square() * weights).sum(1).sqrt()
        right = (all_gradients(model, train, state.residuals).square() * weights).sum(1).sqrt()
        torch.testing.assert_close(cosine, scores / left[:, None] / right, rtol=1e-9, atol=1e-12)

    def test_the_cosine_of_an_example_with_itself_is_one(self, exact):
        model, train, _ = exact
        found = Weighted(model, train).influence(train.tensors, response="loss", normalize="cosine")
        torch.testing.assert_close(found.diagonal(), -torch.ones(len(train)).double())

    def test_each_checkpoint_has_its_own(self, exact):
        model, train, test = exact
        states = [built(MLP, seed).double().state_dict() for seed in (1, 2)]
        options = {"normalize": "cosine"}
        parts = [
            PlainProducts(model, train, checkpoints=[s], **options).influence(test.tensors) for s in states
        ]
        found = PlainProducts(model, train, checkpoints=states, **options).influence(test.tensors)
        torch.testing.assert_close(found, sum(parts) / 2)


class TestSelfInfluence:
    @pytest.mark.parametrize("method", [PlainProducts, Weighted])
    @pytest.mark.parametrize("residuals", ["training", "temperature", "leave-one-out", "both"])
    def test_is_the_effect_on_the_own_loss(self, exact, method, residuals):
        model, train, _ = exact
        found = method(model, train, residuals=residuals, temperature=3.0)
        wanted = -found.influence(train.tensors, response="loss").diagonal()
        torch.testing.assert_close(found.self_influence(), wanted)
        assert float(wanted.max()) > 0

    def test_is_the_squared_norm_of_the_loss_gradient_as_published(self, exact):
        model, train, _ = exact
        with torch.no_grad():
            residuals = tempered_residuals(model(train.tensors[0]), train.tensors[1])
        wanted = all_gradients(model, train, residuals).square().sum(1)
        torch.testing.assert_close(PlainProducts(model, train).self_influence(), wanted)

    @pytest.mark.parametrize("residuals", ["training", "temperature"])
    def test_of_other_inputs_is_that_of_them_as_training_examples(self, exact, residuals):
        model, train, test = exact
        options = {"residuals": residuals, "temperature": 2.5}
        wanted = PlainProducts(model, test, **options).self_influence()
        torch.testing.assert_close(
            PlainProducts(model, train, **options).self_influence(test.tensors), wanted
        )

    @pytest.mark.parametrize("residuals", ["leave-one-out", "both"])
    def test_of_other_inputs_needs_residuals_that_they_have(self, exact, residuals):
        model, train, test = exact
        with pytest.raises(
            ValueError, match=rf"`residuals` must be 'training' or 'temperature' .*; got '{residuals}'"
        ):
            PlainProducts(model, train, residuals=residuals).self_influence(test.tensors)


class TestOptions:
    def test_held_out_data_set_the_temperature(self, exact):
        model, train, _ = exact
        held_out = planted_classes(30, seed=5, noise=1.5)
        held_out = TensorDataset(held_out.tensors[0].double(), held_out.tensors[1])
        method = PlainProducts(model, train, residuals="temperature", held_out=held_out).fit()
        with torch.no_grad():
            target = mean_residual(model(held_out.tensors[0]), held_out.tensors[1])
            logits = model(train.tensors[0])
        temperature = match_temperature(logits, train.tensors[1], target)
        assert temperature > 1.1
        assert method._states[0].temperature == pytest.approx(temperature)
        wanted = tempered_residuals(logits, train.tensors[1], temperature)
        torch.testing.assert_close(method._states[0].residuals, wanted)

    def test_a_given_temperature_wins_over_held_out_data(self, exact):
        model, train, test = exact
        method = PlainProducts(model, train, residuals="temperature", temperature=7.0, held_out=test).fit()
        assert method._states[0].temperature == 7.0

    def test_unknown_residuals_are_refused(self, exact):
        model, train, _ = exact
        with pytest.raises(
            ValueError, match=r"`residuals` must be one of .*; got 'trainin'. Nearest: 'training'"
        ):
            PlainProducts(model, train, residuals="trainin")

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_a_temperature_that_is_not_positive_is_refused(self, exact, temperature):
        model, train, _ = exact
        with pytest.raises(ValueError, match=r"`temperature` must be positive, or None; got"):
            PlainProducts(model, train, temperature=temperature)

    def test_logits_that_are_not_finite_are_refused(self, exact):
        model, train, _ = exact
        x, y = (t.clone() for t in train.tensors)
        x[9] = float("nan")
        with pytest.raises(ValueError, match=r"finite logits; got NaN or infinity for training example 9"):
            PlainProducts(model, TensorDataset(x, y)).fit()

    def test_a_misspelt_layer_is_refused_by_fit(self, exact):
        model, train, _ = exact
        with pytest.raises(ValueError, match=r"`layers` must name submodules .*; got 'fc4'"):
            PlainProducts(model, train, layers=["fc4"]).fit()

    def test_columns_cannot_be_scored_without_their_examples(self, exact):
        model, train, _ = exact
        with pytest.raises(NotImplementedError, match="score batches of training examples"):
            PlainProducts(model, train)._scores(None, None, slice(0, 1))
