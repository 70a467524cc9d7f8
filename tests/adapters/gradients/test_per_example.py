from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import (
    MLP,
    BatchNormCNN,
    HuggingFaceLike,
    ListOfDicts,
    OneLogit,
    TwoInputs,
    built,
    examples,
    expect_untouched,
    planted_classes,
    scripted,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters.gradients.method import GradientMethod
from stride_captum.adapters.gradients.per_example import (
    chosen_parameters,
    example_gradients,
    flat,
    gradients_one_by_one,
)
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Batch, Reading
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


class Encoder(nn.Module):
    """Attention, whose eval mode has a shortcut without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.stack([x, x.flip(1)], 1)).mean(1))


def encoder_batch() -> tuple[nn.Module, Any]:
    return built(Encoder).double(), mlp_batch()[1]


class Checkpoints(MLP):
    """Computes its first layer again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.fc1, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        return self.fc3(self.fc2(h.relu()).relu())


def checkpointed_batch() -> tuple[nn.Module, Any]:
    return built(Checkpoints).double(), mlp_batch()[1]


BATCHES = [
    encoder_batch,
    checkpointed_batch,
    mlp_batch,
    cnn_batch,
    two_inputs_batch,
    two_inputs_by_name,
    hugging_face_batch,
    one_logit_batch,
    without_labels,
    shared_argument,
]


class Recurrent(nn.Module):
    """A recurrent layer of any kind."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unflatten(1, (2, 3)))[0][:, -1])


def recurrent(kind: type[nn.RNNBase]) -> tuple[nn.Module, Any]:
    return built(lambda: Recurrent(kind)).double(), mlp_batch()[1]


class LooksAtValues(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x[:, 0].sum() > 0 else 1)


class WritesToABuffer(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.last.copy_(x[:1])
        return super().forward(x)


class Words(MLP):
    """Reads numbers that are written out."""

    def forward(self, texts: list[str], scale: Tensor) -> Tensor:
        x = torch.tensor([[float(word) for word in text.split()] for text in texts]).to(scale)
        return super().forward(x) * scale[:, None]


def looks_at_values() -> tuple[nn.Module, Any]:
    return built(LooksAtValues).double(), mlp_batch()[1]


def writes_to_a_buffer() -> tuple[nn.Module, Any]:
    return built(WritesToABuffer).double(), mlp_batch()[1]


def texts() -> tuple[nn.Module, Any]:
    x, y = mlp_batch()[1]
    written = [" ".join(map(repr, row)) for row in x.tolist()]
    return built(Words).double(), (written, 1 + x[:, 0].abs(), y)


def arrays() -> tuple[nn.Module, Any]:
    class Arrays(MLP):
        def forward(self, x: Any) -> Tensor:
            return super().forward(torch.from_numpy(x))

    x, y = mlp_batch()[1]
    return built(Arrays).double(), (x.numpy(), y)


def as_torchscript() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)]
    return scripted(built(lambda: nn.Sequential(*layers)).double()), mlp_batch()[1]


ONE_BY_ONE = [
    lambda: recurrent(nn.RNN),
    lambda: recurrent(nn.GRU),
    lambda: recurrent(nn.LSTM),
    looks_at_values,
    writes_to_a_buffer,
    texts,
    arrays,
    as_torchscript,
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

    @pytest.mark.parametrize("make", ONE_BY_ONE)
    def test_of_a_model_that_vmap_cannot_run_are_taken_one_by_one(self, make):
        model, batch = make()
        vectors, parameters = vectors_for(model, batch), chosen_parameters(model, None)
        found = example_gradients(model, parameters, examples(batch), vectors)
        wanted = loop(model, list(parameters), batch, vectors)
        torch.testing.assert_close(flat(found), wanted, rtol=1e-11, atol=1e-12)
        assert float((wanted[0] - wanted[1]).abs().max()) > 0
        assert all(p.grad is None for p in model.parameters())
        assert not any(g.requires_grad for g in found.values())

    @pytest.mark.parametrize("make", [mlp_batch, lambda: recurrent(nn.GRU)])
    def test_of_frozen_parameters_leave_them_frozen(self, make):
        model, batch = make()
        wanted = loop(model, [name for name, _ in model.named_parameters()], batch, vectors_for(model, batch))
        parameters = chosen_parameters(model.requires_grad_(False), None)
        found = example_gradients(model, parameters, examples(batch), vectors_for(model, batch))
        torch.testing.assert_close(flat(found), wanted, rtol=1e-11, atol=1e-12)
        assert not any(p.requires_grad for p in model.parameters())

    def test_of_no_examples_are_none(self):
        model, (x, y) = mlp_batch()
        parameters = chosen_parameters(model, None)
        found = example_gradients(model, parameters, examples((x[:0], y[:0])), torch.zeros(0, 3).double())
        assert {name: tuple(g.shape) for name, g in found.items()} == {
            name: (0, *p.shape) for name, p in parameters.items()
        }

    def test_leave_no_dead_tensor_on_a_network_that_keeps_its_activations(self):
        class Keeps(MLP):
            def forward(self, x: Tensor) -> Tensor:
                self.seen, self.all = x, [*self.all, x]
                self.fc1.kept = self.fc1(x)
                self.history.append(x)
                return super().forward(x)

        model, batch = built(Keeps).double(), mlp_batch()[1]
        model.all, model.history, model.seen = [], [], None
        example_gradients(model, chosen_parameters(model, None), examples(batch), torch.ones(N, 3).double())
        assert (model.all, model.history, model.seen) == ([], [], None)
        assert not hasattr(model.fc1, "kept")

    def test_a_forward_of_the_users_is_given_the_network_itself(self):
        model, (x, y) = mlp_batch()
        reading = Reading(
            Batch(forward=lambda model, batch: model.fc3(model.fc1(batch["x"])[:, :5]), label_key="y")
        )
        batch = ExampleBatch({"x": x, "y": y}, reading)
        vectors, parameters = (
            torch.randn(N, 3, generator=generator()).double(),
            chosen_parameters(model, None),
        )
        found = flat(example_gradients(model, parameters, batch, vectors))
        plain = flat(gradients_one_by_one(model, parameters, batch, vectors))
        torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-12)
        assert float(found.abs().max()) > 0

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

    def test_no_layers_and_a_name_instead_of_a_list_are_refused(self):
        with pytest.raises(ValueError, match=r"`layers` must name at least one submodule; got an empty list"):
            chosen_parameters(built(MLP), [])
        with pytest.raises(TypeError, match=r"`layers` must be a list .*; got str. Write layers=\['fc1'\]"):
            chosen_parameters(built(MLP), "fc1")

    def test_complex_parameters_are_refused(self):
        model = built(MLP)
        model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"`model` must have real parameters; got the complex 'phase'"):
            chosen_parameters(model, None)
        model.phase.requires_grad_(False)
        assert "phase" not in chosen_parameters(model, None)

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
        stride = STRIDE(model, train, **arguments(**options)).fit()
        wanted = stride._states[0].operators.residuals
        torch.testing.assert_close(method._states[0].residuals, wanted, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            vectors = response_gradient(model(test.tensors[0]), test.tensors[1], "margin")
        products = all_gradients(model, test, vectors) @ all_gradients(model, train, wanted).T
        torch.testing.assert_close(method.influence(test.tensors), products, rtol=1e-9, atol=1e-12)

    def test_residuals_belong_to_the_weights_of_each_checkpoint(self, exact):
        model, train, test = exact
        states = [built(MLP, seed).double().state_dict() for seed in (1, 2)]
        options, parts = {"residuals": "both", "temperature": 2.0}, []
        for state in states:
            other = copy.deepcopy(model)
            other.load_state_dict(state)
            parts.append(PlainProducts(other, train, **options).influence(test.tensors))
        found = PlainProducts(model, train, checkpoints=states, **options).influence(test.tensors)
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

    @pytest.mark.slow
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
        assert Counts(model, train, memory_budget=1).max_rows() == 1

    def test_a_layer_counts_for_the_budget_as_itself(self, exact):
        model, train, _ = exact
        whole, last = (PlainProducts(model, train, layers=x, memory_budget="64KiB") for x in (None, ["fc3"]))
        assert whole.max_rows() == 2**16 // (4 * 8 * sum(p.numel() for p in model.parameters()))
        assert last.max_rows() == 2**16 // (4 * 8 * (15 + 3))


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

    @pytest.mark.slow
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
        temperature = match_temperature(partial(mean_residual, logits, train.tensors[1]), target)
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

    def test_gradients_that_are_not_finite_are_refused(self, exact):
        class Norms(MLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + (x @ self.fc1.weight.T).norm(dim=1, keepdim=True).sqrt()

        _, train, test = exact
        x, y = (t.clone() for t in train.tensors)
        x[9] = 0
        method = PlainProducts(built(Norms).double(), TensorDataset(x, y), batch_size=4)
        asks = [method.influence, partial(method.influence, normalize="cosine")]
        for ask in [*(partial(ask, test.tensors) for ask in asks), method.self_influence]:
            with pytest.raises(ValueError, match="finite gradients; got NaN or infinity for example 9"):
                ask()

    def test_empty_batches_are_passed_over(self, exact):
        model, train, test = exact
        wanted = PlainProducts(model, train).influence(test.tensors)
        x, y = train.tensors
        batches = [(x[:20], y[:20]), (x[:0], y[:0]), (x[20:], y[20:]), (x[:0], y[:0])]
        method = PlainProducts(model, DataLoader(batches, batch_size=None))
        torch.testing.assert_close(method.influence(test.tensors), wanted)
        rest = PlainProducts(model, DataLoader(batches[1:], batch_size=None))
        torch.testing.assert_close(rest.influence(test.tensors), wanted[:, 20:])

    def test_a_misspelt_layer_is_refused_by_fit(self, exact):
        model, train, _ = exact
        with pytest.raises(ValueError, match=r"`layers` must name submodules .*; got 'fc4'"):
            PlainProducts(model, train, layers=["fc4"]).fit()

    def test_columns_cannot_be_scored_without_their_examples(self, exact):
        model, train, _ = exact
        with pytest.raises(NotImplementedError, match="score batches of training examples"):
            PlainProducts(model, train).score_columns(None, None, slice(0, 1))


class Odd(MLP):
    """A network whose examples meet, or that passes no gradient on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "batch statistics":
            return self.fc3(self.norm(self.fc1(x)[:, :5]))
        if self.how == "centered":
            return super().forward(x - x.mean(0))
        if self.how == "dropout":
            return self.fc3(nn.functional.dropout(self.fc1(x)[:, :5], training=True))
        with torch.no_grad():
            return super().forward(x)


class TestModels:
    @pytest.mark.parametrize(
        ("how", "match"),
        [
            (
                "batch statistics",
                r"`model` must give an example the same outputs in every batch; .*BatchNorm",
            ),
            (
                "centered",
                r"`model` must give an example the same outputs in every batch; .*running",
            ),
            ("dropout", r"`model` must give an example the same outputs in every pass; .*dropout"),
            ("no_grad", "`model` must give logits that depend on the parameters .* torch.no_grad"),
        ],
    )
    def test_whose_gradients_mean_something_else_are_refused(self, exact, how, match):
        with (
            expect_untouched(model := built(lambda: Odd(how)).double()),
            pytest.raises(ValueError, match=match),
        ):
            PlainProducts(model, exact[1]).fit()

    def test_checkpoints_that_hide_gradients_are_refused(self, exact):
        model = built(lambda: Checkpoints(reentrant=True)).double()
        with (
            expect_untouched(model),
            pytest.raises(
                ValueError, match=r"`model` must give gradients .* none for 'fc1.weight', .*reentrant"
            ),
        ):
            PlainProducts(model, exact[1]).fit()

    def test_what_autograd_objects_to_is_said_with_the_remedy(self, exact):
        class Overwrites(MLP):
            def forward(self, x: Tensor) -> Tensor:
                h = self.fc1(x).relu()
                h += 1  # the backward pass of ReLU needs it
                return self.fc3(self.fc2(h).relu())

        model, (_, train, test) = built(Overwrites).double(), exact
        with pytest.raises(
            ValueError, match=r"`model` must be differentiable by autograd .* inplace .*`layers`"
        ):
            PlainProducts(model, train).fit()
        assert PlainProducts(model, train, layers=["fc3"]).influence(test.tensors).isfinite().all()

    def test_a_layer_that_is_not_used_is_no_reason_to_refuse(self, exact):
        model, train, test = exact
        wanted = PlainProducts(model, train).influence(test.tensors)
        model.spare = nn.Linear(2, 2).double()
        torch.testing.assert_close(PlainProducts(model, train).influence(test.tensors), wanted)

    def test_a_forward_that_calls_another_model_is_refused(self, exact):
        other, train, _ = exact
        batch = Batch(forward=lambda model, batch: other(batch[0]))
        with pytest.raises(ValueError, match=r"logits without a gradient .* Batch\(forward=...\)"):
            PlainProducts(built(MLP).double(), train, batch=batch).fit()

    def test_quantized_layers_are_refused(self):
        model, train, _ = trained(MLP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(model, {"fc2"}, torch.qint8)
        assert any(p.is_floating_point() for p in quantized.parameters())
        with pytest.raises(ValueError, match="`model` must be differentiable; got the quantized layer 'fc2'"):
            PlainProducts(quantized, train).fit()

    def test_the_autocast_of_the_caller_changes_nothing(self, exact):
        model, *data = trained(MLP)
        wanted = PlainProducts(model, data[0]).influence(data[1].tensors)
        with torch.autocast("cpu", torch.bfloat16):
            found = PlainProducts(model, data[0]).influence(data[1].tensors)
        assert torch.equal(found, wanted)

    @pytest.mark.parametrize("residuals", ["leave-one-out", "both"])
    def test_residuals_that_read_features_need_some(self, exact, residuals):
        class Bare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = nn.ParameterList([torch.ones(6, 3).double()])

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weights[0]

        model = Bare()
        with pytest.raises(
            ValueError, match="`residuals` must be 'training' or 'temperature' for a model in which no Linear"
        ):
            PlainProducts(model, exact[1], residuals=residuals).fit()
