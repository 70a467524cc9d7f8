from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.influence import TracInCP
from flat_options import arguments
from planted import (
    MLP,
    BatchNormCNN,
    Fails,
    HuggingFaceLike,
    Items,
    ListOfDicts,
    OneLogit,
    TwoInputs,
    built,
    expect_untouched,
    planted_classes,
    trained,
    unusual,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import CaptumInfluence
from stride_captum.adapters.tracin import TracIn
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading
from stride_captum.residuals import tempered_residuals
from stride_captum.responses import RESPONSES, response_gradient

Planted = tuple[nn.Module, TensorDataset, TensorDataset]


def products(
    model: nn.Module,
    names: list[str],
    train: Any,
    test: Any,
    response: str = "margin",
    residuals: Tensor | None = None,
) -> Tensor:
    """Products of gradients that autograd gives, one example at a time; `train` and `test` are batches."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    wanted = [dict(model.named_parameters())[name] for name in names]

    train, test = (ExampleBatch(batch, Reading()) for batch in (train, test))

    def gradients(batch: ExampleBatch, vectors: Tensor) -> Tensor:
        rows = []
        for i, vector in enumerate(vectors):
            logits = batch[i : i + 1].logits(model)
            found = torch.autograd.grad((logits * vector).sum(), wanted, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    with torch.no_grad():
        left, right = test.logits(model), train.logits(model)
        if residuals is None:
            residuals = tempered_residuals(right, train.labels)
        vectors = response_gradient(left, test.labels, response)
    return gradients(test, vectors) @ gradients(train, residuals).T


def all_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def in_double(planted: Planted) -> Planted:
    model, *sets = planted
    return model.double().eval(), *(TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in sets)


def untrained(build: Callable[[], nn.Module], shape: tuple[int, ...], n_classes: int = 3) -> Planted:
    """A network with its initial weights, 10 training and 4 test examples, in float64."""
    train, test = (planted_classes(n, shape, seed) for n, seed in ((10, 1), (4, 2)))
    sets = [TensorDataset(d.tensors[0].double(), d.tensors[1] % n_classes) for d in (train, test)]
    return built(build).double().eval(), *sets


@pytest.fixture
def mlp() -> Planted:
    return in_double(trained(MLP))


@pytest.fixture
def cnn() -> Planted:
    return in_double(trained(BatchNormCNN, n_train=12, steps=3))


class Conv(nn.Module):
    """One convolution of any kind, ReLU in place and a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(2, 4, 3, **options), nn.ReLU(True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.relu(self.conv(x))).flatten(1))


class Tokens(nn.Module):
    """A linear layer on `(n, t, d)`, or on the same numbers with another first dimension."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.first, self.last, self.layout = nn.Linear(6, 5), nn.Linear(5, 3), layout
        if layout == "a learned query":
            self.query = nn.Parameter(torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.layout == "tokens first":
            return self.last(self.first(x.transpose(0, 1)).tanh().mean(0))
        if self.layout == "flat":
            return self.last(self.first(x.flatten(0, 1)).tanh().view(n, t, 5).mean(1))
        if self.layout == "a learned query":
            return self.last((x.mean(1) * self.first(self.query)[:, 0]).tanh()[:, :5])
        if self.layout == "mean of logits":
            return self.last(self.first(x).tanh()).mean(1)
        return self.last(self.first(x).tanh().mean(1))


class Recurrent(nn.Module):
    """A recurrent layer before a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.last = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(x)[0][:, -1])


class Twice(nn.Module):
    """One module that is used twice, or two that share their weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6) if tied else self.a
        self.b.weight = self.a.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).tanh()).tanh())


class Scaled(nn.Module):
    """A network with a parameter of its own after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).tanh()) * self.scale


class OutOfOrder(nn.Module):
    """The last layer is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.hidden = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x).tanh())


IMAGE, TOKENS, FLAT = (2, 6, 6), (3, 6), (6,)
NETWORKS = {
    "an MLP": (MLP, FLAT, True),
    "a convolution": (Conv, IMAGE, True),
    "a strided convolution": (lambda: Conv(stride=2, padding=1), IMAGE, True),
    "a dilated convolution without bias": (lambda: Conv(dilation=2, bias=False), IMAGE, True),
    "a grouped convolution": (lambda: Conv(groups=2), IMAGE, False),
    "a convolution padded to the same size": (lambda: Conv(padding="same"), IMAGE, False),
    "a convolution padded by reflection": (lambda: Conv(padding=1, padding_mode="reflect"), IMAGE, False),
    "BatchNorm": (BatchNormCNN, IMAGE, False),
    "a linear layer on tokens": (lambda: Tokens("examples first"), TOKENS, True),
    "a linear layer on tokens first": (lambda: Tokens("tokens first"), TOKENS, False),
    "a linear layer on flattened tokens": (lambda: Tokens("flat"), TOKENS, False),
    "a linear layer on a learned query": (lambda: Tokens("a learned query"), TOKENS, False),
    "a recurrent layer": (Recurrent, TOKENS, False),
    "a weight with a norm of its own": (lambda: weight_norm(nn.Linear(6, 3)), FLAT, False),
    "a module used twice": (Twice, FLAT, True),
    "tied weights": (lambda: Twice(tied=True), FLAT, False),
    "a parameter of its own": (Scaled, FLAT, False),
    "a last layer that is defined first": (OutOfOrder, FLAT, True),
    "one linear layer": (lambda: nn.Linear(6, 3), FLAT, True),
}


class TestNotFast:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_scores_are_products_of_all_gradients(self, name):
        build, shape, batched = NETWORKS[name]
        model, train, test = untrained(build, shape)
        method = TracIn(model, train, batch_size=4)
        found = method.influence(test.tensors)
        assert method.parameters_ == all_names(model)
        assert method.batched_ == batched
        wanted = products(model, all_names(model), train.tensors, test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    def test_as_many_tokens_as_examples_do_not_hide_the_layout(self):
        model, train, test = untrained(lambda: Tokens("tokens first"), (3, 6))
        train, test = (TensorDataset(*(t[:3] for t in d.tensors)) for d in (train, test))
        found = TracIn(model, train).influence(test.tensors)
        wanted = products(model, all_names(model), train.tensors, test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    def test_the_weights_of_batch_norm_are_not_skipped(self, cnn):
        model, train, test = cnn
        rest = [name for name in all_names(model) if not name.startswith("bn")]
        with_them = products(model, all_names(model), train.tensors, test.tensors)
        without = products(model, rest, train.tensors, test.tensors)
        assert not torch.allclose(with_them, without)
        torch.testing.assert_close(TracIn(model, train).influence(test.tensors), with_them)
        only = TracIn(model, train, layers=["bn1"]).influence(test.tensors)
        torch.testing.assert_close(only, with_them - without)

    @pytest.mark.parametrize("frozen", ["fc1", "fc2.bias", "fc3.weight"])
    def test_frozen_parameters_take_no_part(self, mlp, frozen):
        model, train, test = mlp
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        rest = [name for name in all_names(model) if not name.startswith(frozen)]
        method = TracIn(model, train)
        wanted = products(model, rest, train.tensors, test.tensors)
        torch.testing.assert_close(method.influence(test.tensors), wanted)
        assert method.parameters_ == rest

    def test_captum_itself_fails_with_a_frozen_parameter(self, mlp):
        model, train, test = mlp
        model.fc1.bias.requires_grad_(False)
        loss = nn.CrossEntropyLoss(reduction="none")
        theirs = TracInCP(model, train, [""], lambda model, path: 1.0, loss_fn=loss)
        with pytest.raises(RuntimeError, match="does not require grad"):
            theirs.influence(test.tensors)

    def test_a_network_that_is_all_frozen_takes_part_as_a_whole(self, mlp):
        model, train, test = mlp
        wanted = TracIn(model, train).influence(test.tensors)
        torch.testing.assert_close(TracIn(model.requires_grad_(False), train).influence(test.tensors), wanted)

    def test_scores_are_those_of_captum_on_the_log_probability(self, mlp):
        model, train, test = mlp
        loss = nn.CrossEntropyLoss(reduction="none")
        theirs = TracInCP(copy.deepcopy(model), train, [""], lambda *_: 1.0, loss_fn=loss, batch_size=16)
        wanted = theirs.influence(test.tensors)
        found = TracIn(model, train).influence(test.tensors, response="log-probability")
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class TestFast:
    @pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith("of its own")])
    def test_scores_are_products_of_the_last_weight(self, name):
        build, shape, _ = NETWORKS[name]
        model, train, test = untrained(build, shape)
        last = "last" if name == "a last layer that is defined first" else None
        method = TracIn(model, train, fast=True, batch_size=4, layers=last and [last])
        found = method.influence(test.tensors)
        [weight] = method.parameters_
        assert weight.endswith("weight")
        assert dict(model.named_parameters())[weight].shape[0] == 3
        wanted = products(model, [weight], train.tensors, test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    def test_the_bias_is_ignored_and_the_documentation_says_so(self, mlp):
        model, train, test = mlp
        whole = TracIn(model, train, layers=["fc3"]).influence(test.tensors)
        fast = TracIn(model, train, fast=True).influence(test.tensors)
        bias = products(model, ["fc3.bias"], train.tensors, test.tensors)
        assert float(bias.abs().max()) > 0
        torch.testing.assert_close(fast + bias, whole, rtol=1e-9, atol=1e-12)
        assert "without its bias" in (TracIn.__doc__ or "")

    @pytest.mark.parametrize(
        ("build", "shape", "layers"),
        [
            (Scaled, FLAT, None),
            (OutOfOrder, FLAT, None),
            (lambda: Tokens("mean of logits"), TOKENS, None),
            (lambda: weight_norm(nn.Linear(6, 3)), FLAT, None),
            (MLP, FLAT, ["fc2"]),
        ],
    )
    def test_a_layer_whose_outputs_are_not_those_of_the_model_is_refused(self, build, shape, layers):
        model, train, _ = untrained(build, shape)
        with pytest.raises(
            ValueError,
            match=r"`layers` must name the Linear layer, with a weight, .* fast=True; .* Leave `fast` out",
        ):
            TracIn(model, train, fast=True, layers=layers).fit()

    def test_more_than_one_layer_is_refused(self, mlp):
        model, train, _ = mlp
        with pytest.raises(ValueError, match=r"`layers` must name the one last layer with fast=True; got"):
            TracIn(model, train, fast=True, layers=["fc2", "fc3"])

    def test_a_model_without_a_linear_layer_is_refused(self, mlp):
        _, train, _ = mlp
        with pytest.raises(ValueError, match=r"`model` must end in a Linear layer with fast=True; got one"):
            TracIn(nn.Sequential(nn.ReLU()), train, fast=True)


class Named(nn.Module):
    """Two inputs by name, the last of which alone decides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.fc(second + 0 * first)


@pytest.mark.parametrize("fast", [False, True])
class TestBoth:
    def names(self, model: nn.Module, fast: bool) -> list[str]:
        return [all_names(model)[-2]] if fast else all_names(model)

    @pytest.mark.parametrize("response", RESPONSES)
    def test_every_response(self, mlp, fast, response):
        model, train, test = mlp
        found = TracIn(model, train, fast=fast).influence(test.tensors, response=response)
        wanted = products(model, self.names(model, fast), train.tensors, test.tensors, response)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("residuals", ["temperature", "leave-one-out", "both"])
    def test_every_kind_of_residuals(self, mlp, fast, residuals):
        model, train, test = mlp
        config = arguments(residuals=residuals, temperature=3.0)
        vectors = STRIDE(model, train, **config).fit()._states[0].operators.residuals
        found = TracIn(model, train, fast=fast, residuals=residuals, temperature=3.0).influence(test.tensors)
        names = self.names(model, fast)
        wanted = products(model, names, train.tensors, test.tensors, residuals=vectors)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("squeeze", [False, True])
    def test_a_binary_network_with_one_logit(self, fast, squeeze):
        model, train, test = untrained(lambda: OneLogit(squeeze), FLAT, n_classes=2)
        found = TracIn(model, train, fast=fast).influence(test.tensors)
        wanted = products(model, self.names(model, fast), train.tensors, test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    def test_two_inputs(self, fast):
        model, train, test = untrained(TwoInputs, (2, 6))
        train, test = (TensorDataset(*d.tensors[0].unbind(1), d.tensors[1]) for d in (train, test))
        found = TracIn(model, train, fast=fast).influence(test.tensors)
        wanted = products(model, self.names(model, fast), train.tensors, test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    def test_dicts_and_token_ids(self, fast):
        model, train, test = built(HuggingFaceLike).eval(), ListOfDicts(11, seed=1), ListOfDicts(4, seed=2)
        found = TracIn(model, train, fast=fast, batch_size=4).influence(test[:])
        wanted = products(model, self.names(model, fast), train[:], test[:])
        torch.testing.assert_close(found, wanted)

    def test_dicts_whose_keys_come_in_another_order(self, fast):
        model, train, test = untrained(Named, (2, 6))

        def example(d: TensorDataset, rows: Any, names: list[str]) -> dict[str, Tensor]:
            x, y = d.tensors
            parts = {"first": x[rows, 0], "second": x[rows, 1], "labels": y[rows]}
            return {name: parts[name] for name in names}

        items = [example(train, i, ["labels", "first", "second"]) for i in range(10)]
        every = slice(None)
        batch = example(test, every, ["second", "labels", "first"])
        found = TracIn(model, Items(items), fast=fast).influence(batch)
        whole = example(train, every, ["first", "second", "labels"])
        wanted = products(model, self.names(model, fast), whole, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [1, 5, 100])
    def test_a_loader_and_its_batches_change_nothing(self, mlp, fast, size):
        model, train, test = mlp
        wanted = TracIn(model, train, fast=fast).influence(test.tensors)
        loader = DataLoader(train, batch_size=size)
        found = TracIn(model, loader, fast=fast).influence(DataLoader(test, batch_size=2))
        torch.testing.assert_close(found, wanted)

    def test_the_cosine_divides_by_the_norms_of_both_sides(self, mlp, fast):
        model, train, test = mlp
        method = TracIn(model, train, fast=fast)
        scores = method.influence(train.tensors, response="loss", normalize="cosine")
        torch.testing.assert_close(scores.diagonal(), -torch.ones(len(train)).double())
        names, cosine = self.names(model, fast), method.influence(test.tensors, normalize="cosine")
        raw = products(model, names, train.tensors, test.tensors)
        with torch.no_grad():
            vectors = response_gradient(model(test.tensors[0]), test.tensors[1], "margin")
        left = products(model, names, test.tensors, test.tensors, residuals=vectors).diagonal().sqrt()
        right = products(model, names, train.tensors, train.tensors, "loss").diagonal().neg().sqrt()
        torch.testing.assert_close(cosine * left[:, None] * right, raw, rtol=1e-9, atol=1e-12)

    def test_self_influence_is_the_squared_norm_of_the_gradient(self, mlp, fast):
        model, train, _ = mlp
        names = self.names(model, fast)
        wanted = -products(model, names, train.tensors, train.tensors, "loss").diagonal()
        torch.testing.assert_close(TracIn(model, train, fast=fast).self_influence(), wanted)

    @pytest.mark.slow
    def test_a_saved_method_needs_no_fit(self, mlp, fast, tmp_path):
        model, train, test = mlp
        method = TracIn(model, train, fast=fast, residuals="both").fit()
        method.save(tmp_path / "tracin")
        loaded = TracIn.load(tmp_path / "tracin", model, train)
        assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))


def three_checkpoints() -> list[dict[str, Tensor]]:
    return [built(MLP, seed).double().state_dict() for seed in (1, 2, 3)]


@pytest.mark.parametrize("fast", [False, True])
class TestCheckpoints:
    rates = (0.3, 0.2, 0.05)

    def wanted(self, planted: Planted, fast: bool, rates: Any) -> Tensor:
        """Equation 8: the sum over checkpoints of the learning rate times the products there."""
        model, train, test = planted
        total = torch.zeros(())
        for state, rate in zip(three_checkpoints(), rates, strict=True):
            other = copy.deepcopy(model)
            other.load_state_dict(state)
            names = ["fc3.weight"] if fast else all_names(model)
            total = total + rate * products(other, names, train.tensors, test.tensors)
        return total

    @pytest.mark.slow
    def test_learning_rates_weigh_them(self, mlp, fast):
        model, train, test = mlp
        method = TracIn(model, train, fast=fast, checkpoints=three_checkpoints(), learning_rates=self.rates)
        wanted = self.wanted(mlp, fast, self.rates)
        torch.testing.assert_close(method.influence(test.tensors), wanted, rtol=1e-9, atol=1e-12)
        own = sum(
            rate * TracIn(model, train, fast=fast, checkpoints=[state]).self_influence()
            for state, rate in zip(three_checkpoints(), self.rates, strict=True)
        )
        torch.testing.assert_close(method.self_influence(), own)

    def test_the_function_that_loads_them_may_know_the_rates(self, mlp, fast):
        model, train, test = mlp
        states = list(zip(three_checkpoints(), self.rates, strict=True))

        def load(model: nn.Module, checkpoint: Any) -> float:
            model.load_state_dict(checkpoint[0])
            return checkpoint[1]

        method = TracIn(model, train, fast=fast, checkpoints=states, checkpoints_load_func=load)
        wanted = self.wanted(mlp, fast, self.rates)
        torch.testing.assert_close(method.influence(test.tensors), wanted, rtol=1e-9, atol=1e-12)

    def test_the_rate_of_the_default_loader_is_one(self, mlp, fast):
        model, train, test = mlp
        found = TracIn(model, train, fast=fast, checkpoints=three_checkpoints()).influence(test.tensors)
        torch.testing.assert_close(found, self.wanted(mlp, fast, (1, 1, 1)), rtol=1e-9, atol=1e-12)
        assert "takes what `checkpoints_load_func` returns" in " ".join((TracIn.__doc__ or "").split())

    def test_as_many_rates_as_checkpoints(self, mlp, fast):
        model, train, _ = mlp
        with pytest.raises(
            ValueError, match=r"`learning_rates` must hold one for each of 3 checkpoints; got 2"
        ):
            TracIn(model, train, fast=fast, checkpoints=three_checkpoints(), learning_rates=[1, 2])
        with pytest.raises(ValueError, match=r"`learning_rates` must hold one for each of 1 checkpoints"):
            TracIn(model, train, fast=fast, learning_rates=[1, 2])

    def test_an_order_of_checkpoints_that_is_not_alphabetic_is_kept(self, mlp, fast):
        model, train, test = mlp
        states, rates = three_checkpoints(), list(self.rates)
        method = TracIn(model, train, fast=fast, checkpoints=states[::-1], learning_rates=rates[::-1])
        wanted = self.wanted(mlp, fast, self.rates)
        torch.testing.assert_close(method.influence(test.tensors), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("build", [BatchNormCNN, Conv])
@pytest.mark.parametrize("checkpoints", [False, True])
class TestTheModelComesBack:
    def planted(self, build: Callable[[], nn.Module], checkpoints: bool) -> tuple[Any, ...]:
        model, train, test = untrained(build, IMAGE)
        states = [built(build, seed).double().state_dict() for seed in (1, 2)] if checkpoints else None
        return unusual(model), train, test, states

    def attributes(self, model: nn.Module) -> list[list[str]]:
        return [sorted(vars(parameter)) for parameter in model.parameters()]

    @pytest.mark.slow
    def test_after_everything_that_it_can_do(self, fast, build, checkpoints):
        model, train, test, states = self.planted(build, checkpoints)
        before = self.attributes(model)
        with expect_untouched(model):
            method = TracIn(model, Fails(train), fast=fast, batch_size=4, checkpoints=states)
            method.influence(test.tensors)
            method.influence(DataLoader(Fails(test), batch_size=3), 4, False)
            method.influence(test.tensors, normalize="cosine")
            method.self_influence()
            method.subset_influence(test.tensors, [[0, 1], [2]])
        assert self.attributes(model) == before
        assert not any("sample_grad" in names for names in before)

    def test_after_an_exception_while_captum_reads_the_training_set(self, fast, build, checkpoints):
        model, train, test, states = self.planted(build, checkpoints)
        source = Fails(train)
        method = TracIn(model, source, fast=fast, batch_size=4, checkpoints=states).fit()
        before, source.at = self.attributes(model), 9
        with expect_untouched(model), pytest.raises(RuntimeError, match="a broken example"):
            method.influence(test.tensors)
        assert self.attributes(model) == before


class TestManners:
    @pytest.mark.parametrize("batched", [False, True])
    def test_parameters_that_are_not_used_add_nothing(self, mlp, batched):
        model, train, test = mlp
        wanted = TracIn(model, train).influence(test.tensors)
        model.spare = nn.Linear(2, 2).double() if batched else nn.PReLU(3).double()
        method = TracIn(model, train)
        torch.testing.assert_close(method.influence(test.tensors), wanted)
        assert "spare.weight" in method.parameters_
        assert method.batched_ == batched

    @pytest.mark.parametrize("size", [1, 2])
    def test_the_shortcut_is_looked_at_with_several_examples_where_batches_hold_one(self, size):
        model, train, test = untrained(lambda: Tokens("a learned query"), TOKENS)
        method = TracIn(model, train, batch_size=size, layers=["first"])
        wanted = products(model, ["first.weight", "first.bias"], train.tensors, test.tensors)
        torch.testing.assert_close(method.influence(test.tensors), wanted, rtol=1e-10, atol=1e-12)
        assert not method.batched_

    @pytest.mark.parametrize("at", [1, 7])
    def test_gradients_that_are_not_finite_are_refused_with_the_example(self, at):
        class Norms(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hidden, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                h = self.hidden(x)
                return self.last(h + h.norm(dim=1, keepdim=True).sqrt())

        model, train, test = untrained(Norms, FLAT)
        x, y = train.tensors
        x[at] = 0
        match = f"finite gradients; got NaN or infinity for example {at}"
        with pytest.raises(ValueError, match=match):
            TracIn(model, TensorDataset(x, y), batch_size=4).influence(test.tensors)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_one_test_point_with_nan_spoils_its_own_row_alone(self, mlp, frozen):
        model, train, test = mlp
        model.fc1.bias.requires_grad_(not frozen)
        method = TracIn(model, train)
        wanted, (x, y) = method.influence(test.tensors), test.tensors
        x = x.clone()
        x[2] = float("nan")
        found = method.influence((x, y))
        assert method.batched_ == (not frozen)
        assert bool(found[2].isnan().all())
        rest = [0, 1, 3, 4, 5, 6]
        torch.testing.assert_close(found[rest], wanted[rest])

    def test_no_warning_of_captum_comes_through(self, cnn):
        model, train, test = cnn
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for fast in (False, True):
                TracIn(model, DataLoader(train, batch_size=5), fast=fast).influence(test.tensors, 3)

    def test_top_k_is_ours(self, mlp):
        model, train, test = mlp
        method = TracIn(model, train)
        scores, top = method.influence(test.tensors), method.influence(test.tensors, 5)
        wanted = scores.topk(5, dim=1)
        assert torch.equal(top.indices, wanted.indices)
        assert torch.equal(top.influence_scores, wanted.values)
        assert torch.equal(method.influence(test.tensors), scores)

    def test_examples_of_the_same_class_raise_the_margin(self, mlp):
        model, train, test = mlp
        for fast in (False, True):
            scores = TracIn(model, train, fast=fast, residuals="both").influence(test.tensors)
            same = test.tensors[1][:, None] == train.tensors[1]
            assert float(scores[same].mean()) > 0 > float(scores[~same].mean())


class Masked(nn.Module):
    """Reads a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x, mask=None):
        return self.head(x if mask is None else x * mask)


class WithMask(Dataset):
    def __init__(self, n, seed=0):
        self.x, self.y = planted_classes(n, seed=seed).tensors

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {"x": self.x[i], "mask": torch.ones(6), "labels": self.y[i]}


def of_captum(model: nn.Module, train: Any) -> CaptumInfluence:
    def build(network: nn.Module, data: Any) -> TracInCP:
        loss = nn.CrossEntropyLoss(reduction="none")
        return TracInCP(network, data, [""], lambda model, checkpoint: 1.0, loss_fn=loss)

    return CaptumInfluence(model, train, build=build, answers="log-probability")


@pytest.mark.parametrize("method", [TracIn, of_captum], ids=["TracIn", "of Captum"])
class TestPartsByPosition:
    def test_a_part_that_test_points_lack_is_named(self, method):
        torch.manual_seed(0)
        model, train, tests = Masked().eval(), WithMask(20), WithMask(4, seed=9)
        batch = {"x": tests.x, "labels": tests.y}
        parts = r"`inputs` must have the parts of training examples, \['mask'\], \['x'\]"
        with pytest.raises(ValueError, match=parts):
            method(model, train).influence(batch)
        whole = method(model, train).influence({**batch, "mask": torch.ones(4, 6)})
        plain = method(model, planted_classes(20)).influence((tests.x, tests.y))
        torch.testing.assert_close(whole, plain)

    def test_one_part_may_have_any_name(self, method):
        model, train, test = trained(MLP)
        x, y = test.tensors

        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.network = model

            def forward(self, x):
                return self.network(x)

        found = method(Named().eval(), train).influence({"x": x, "labels": y})
        torch.testing.assert_close(found, method(Named().eval(), train).influence((x, y)))
