from __future__ import annotations

from typing import Any

import pytest
import torch
from method_calls import count_rows
from planted import (
    MLP,
    N_CLASSES,
    BatchNormCNN,
    Items,
    built,
    examples,
    expect_untouched,
    planted_classes,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import Batch
from stride_captum.adapters import diagonal_ekfac
from stride_captum.adapters.diagonal_ekfac import DiagonalEKFAC
from stride_captum.adapters.gradients import method as gradients
from stride_captum.adapters.gradients.dense_sides import dense_layers, dense_sides
from stride_captum.adapters.gradients.fisher import fisher_sample, fisher_vectors

N, N_FISHER, SEED = 14, 9, 3


def float64(n: int, shape: tuple[int, ...], seed: int = 0) -> TensorDataset:
    x, y = planted_classes(n, shape, seed).tensors
    return TensorDataset(x.double(), y)


def problem(build: Any) -> tuple[Any, TensorDataset, TensorDataset]:
    """A network in float64 with running statistics that are not those of its start, and data."""
    model = built(build).double()
    train, test = float64(N, build.shape), float64(3, build.shape, seed=1)
    model.train()(train.tensors[0])
    return model.eval(), train, test


class Reference:
    """The definition: one example at a time, F written out as a matrix, and inverted."""

    def __init__(self, model: nn.Module, train: TensorDataset) -> None:
        self.model, (self.x, self.y) = model, train.tensors
        self.names = [name for name, _ in model.named_parameters()]
        self.logits = model(self.x).detach()
        self.p = self.logits.softmax(1)
        self.residuals = F.one_hot(self.y, N_CLASSES) - self.p

    def gradient(self, x: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """J^T v by parameter."""
        response = (self.model(x[None])[0] * vector).sum()
        found = torch.autograd.grad(response, list(self.model.parameters()))
        return dict(zip(self.names, found, strict=True))

    def draws(self, fisher: str) -> list[tuple[int, Tensor, float]]:
        """Example, `e_c - p` and weight of each term of F."""
        chosen, uniforms = fisher_sample(N, N_FISHER, SEED)
        found = []
        for i, u in zip(chosen.tolist(), uniforms.tolist(), strict=True):
            if fisher == "empirical":
                weights = F.one_hot(self.y[i], N_CLASSES).double()
            elif fisher == "exact":
                weights = self.p[i]
            else:
                reached, c = float(self.p[i, 0]), 0
                while reached <= u:
                    c += 1
                    reached += float(self.p[i, c])
                weights = F.one_hot(torch.tensor(c), N_CLASSES).double()
            for c in range(N_CLASSES):
                if weights[c] > 0:
                    found.append((i, F.one_hot(torch.tensor(c), N_CLASSES) - self.p[i], float(weights[c])))
        return found

    def fisher_matrix(self, name: str, dense: str, fisher: str) -> Tensor:
        draws = self.draws(fisher)
        if dense == "kronecker" and name.endswith("weight") and name.startswith("fc"):
            layer = self.model.get_submodule(name.removesuffix(".weight"))
            seen: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _, args, out: seen.append(args[0][0].detach()))
            left, right = 0, 0
            for i, vector, weight in draws:
                gradient = self.gradient(self.x[i], vector)
                a, b = seen.pop(), gradient[name.replace("weight", "bias")]
                torch.testing.assert_close(torch.outer(b, a), gradient[name])
                left, right = left + weight * torch.outer(b, b), right + weight * torch.outer(a, a)
            handle.remove()
            return torch.kron(left / N_FISHER, right / N_FISHER)
        total = sum(w * self.gradient(self.x[i], v)[name].flatten() ** 2 for i, v, w in draws)
        return torch.diag(total / N_FISHER)

    def scores(
        self, test: Tensor, vectors: Tensor, residuals: Tensor, damping: float, relative: bool, *how: str
    ) -> Tensor:
        rows = [self.gradient(x, v) for x, v in zip(test, vectors, strict=True)]
        columns = [self.gradient(x, r) for x, r in zip(self.x, residuals, strict=True)]
        total = torch.zeros(len(rows), N, dtype=torch.float64)
        for name in self.names:
            matrix = self.fisher_matrix(name, *how)
            eps = damping * (matrix.diagonal().mean() if relative else 1)
            inverse = torch.linalg.inv(matrix + eps * torch.eye(len(matrix)))
            left, right = (torch.stack([g[name].flatten() for g in side]) for side in (rows, columns))
            total += left @ inverse @ right.T / N
        return total


@pytest.mark.slow
@pytest.mark.parametrize("build", [MLP, BatchNormCNN])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize(
    ("dense", "damping", "relative"), [("kronecker", 0.2, True), ("diagonal", 0.01, False)]
)
def test_scores_are_those_of_the_definition(build, fisher, dense, damping, relative):
    model, train, test = problem(build)
    x, y = test.tensors
    method = DiagonalEKFAC(
        model,
        train,
        damping=damping,
        relative=relative,
        dense=dense,
        fisher=fisher,
        n_fisher=N_FISHER,
        seed=SEED,
        batch_size=4,
    )
    reference = Reference(model, train)

    def wanted(x: Tensor, vectors: Tensor) -> Tensor:
        return reference.scores(x, vectors, reference.residuals, damping, relative, dense, fisher)

    vectors = F.one_hot(y, N_CLASSES).double()
    torch.testing.assert_close(method.influence((x, y), response="logit"), wanted(x, vectors))
    own = wanted(train.tensors[0], reference.residuals).diagonal()
    torch.testing.assert_close(method.self_influence(), own)


def test_other_residuals_change_the_training_side_only():
    model, train, test = problem(MLP)
    x, y = test.tensors
    reference = Reference(model, train)
    residuals = F.one_hot(train.tensors[1], N_CLASSES) - (reference.logits / 2.5).softmax(1)
    method = DiagonalEKFAC(
        model, train, n_fisher=N_FISHER, seed=SEED, residuals="temperature", temperature=2.5
    )
    vectors = F.one_hot(y, N_CLASSES).double()
    wanted = reference.scores(x, vectors, residuals, 0.1, True, "kronecker", "sampled")
    torch.testing.assert_close(method.influence((x, y), response="logit"), wanted)


# The labels of F.


def test_every_label_is_drawn_as_often_as_it_is_predicted():
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    many = logits.expand(10_000, -1)
    (found,) = fisher_vectors("sampled", many, torch.zeros(10_000, dtype=torch.int64), uniforms)
    shares = (found > 0).double().mean(0)
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=1e-4)


def test_the_sampled_fisher_tends_to_the_exact_one():
    model, train, _ = problem(MLP)
    again = TensorDataset(*(t.repeat(150, *[1] * (t.ndim - 1)) for t in train.tensors))
    scales = [
        DiagonalEKFAC(model, again, n_fisher=len(again), dense="diagonal", fisher=fisher).fit()._states[0]
        for fisher in ("sampled", "exact")
    ]
    sampled, exact = (torch.cat([s.flatten() for s in state.kernel.scales.values()]) for state in scales)
    assert float((sampled / exact - 1).abs().max()) < 0.2


def test_the_largest_random_number_draws_the_last_class():
    logits = torch.zeros(1, 3)
    (found,) = fisher_vectors("sampled", logits, torch.tensor([0]), torch.tensor([1 - 2**-24]))
    assert int(found.argmax()) == 2


def test_the_sample_has_the_size_that_is_asked_for_and_a_seed_of_its_own():
    chosen, uniforms = fisher_sample(100, 30, seed=0)
    assert len(chosen.unique()) == len(uniforms) == 30
    assert not torch.equal(chosen, fisher_sample(100, 30, seed=1)[0])
    assert fisher_sample(5, 30, seed=0)[0].tolist() == [0, 1, 2, 3, 4]


# Work and memory.


@pytest.mark.parametrize("dense", ["kronecker", "diagonal"])
def test_gradients_are_taken_of_as_many_examples_as_the_budget_holds(monkeypatch, dense):
    model, train, test = problem(BatchNormCNN)
    wanted = DiagonalEKFAC(model, train, dense=dense)
    scores, own = wanted.influence(test.tensors), wanted.self_influence()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = count_rows(monkeypatch, gradients, diagonal_ekfac)
    method = DiagonalEKFAC(model, train, dense=dense, memory_budget=4 * 5 * size)
    torch.testing.assert_close(method.influence(test.tensors), scores)
    torch.testing.assert_close(method.self_influence(), own)
    assert max(rows) == 5


def test_the_fisher_takes_gradients_of_its_sample_only(monkeypatch):
    model, train, _ = problem(MLP)
    rows = count_rows(monkeypatch, gradients, diagonal_ekfac)
    DiagonalEKFAC(model, train, n_fisher=N_FISHER, batch_size=4, dense="diagonal").fit()
    assert sum(rows) == N_FISHER
    rows.clear()
    DiagonalEKFAC(model, train, n_fisher=N_FISHER, dense="diagonal", fisher="exact").fit()
    assert sum(rows) == N_FISHER * N_CLASSES


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("dense", ["kronecker", "diagonal"])
def test_damping_is_set_anew_without_another_fit(monkeypatch, dense, relative):
    model, train, test = problem(BatchNormCNN)
    options = {"dense": dense, "relative": relative}

    def answers(method: DiagonalEKFAC) -> list[Tensor]:
        return [method.influence(test.tensors, normalize=how) for how in (None, "cosine")]

    wanted = answers(DiagonalEKFAC(model, train, damping=0.3, **options))
    method = DiagonalEKFAC(model, train, damping=2.0, **options)
    before = answers(method)
    rows = count_rows(monkeypatch, gradients, diagonal_ekfac)
    method.damping = 0.3
    assert rows == []
    found = answers(method)
    assert sum(rows) == 2 * len(test) + 3 * N  # queries, the norms of the training examples once
    for one, other, old in zip(found, wanted, before, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, old)
    with pytest.raises(ValueError, match="`damping` must be a positive number; got 0"):
        method.damping = 0
    assert method.damping == 0.3


def test_an_unsafe_damping_is_refused_where_it_is_set_anew():
    model, train, test = problem(MLP)
    method = DiagonalEKFAC(model, train)
    before = method.influence(test.tensors)
    with pytest.raises(ValueError, match=r"`damping` must be at least \S+ for scores .*; got 1e-30"):
        method.damping = 1e-30
    assert method.damping == 0.1
    assert torch.equal(method.influence(test.tensors), before)


def test_a_fit_leaves_the_model_as_it_was_also_after_an_exception():
    class Breaks(MLP):
        def forward(self, x: Tensor) -> Tensor:
            if self.fc3._forward_hooks:
                raise RuntimeError("in the middle of a forward pass")
            return super().forward(x)

    for build in (MLP, BatchNormCNN):
        model, train, _ = problem(build)
        model.requires_grad_(False)
        with expect_untouched(model):
            DiagonalEKFAC(model, train).fit()
    model = built(Breaks).double()
    with expect_untouched(model), pytest.raises(RuntimeError, match="in the middle"):
        DiagonalEKFAC(model, float64(N, (6,))).fit()


def test_a_saved_method_gives_the_same_scores(tmp_path):
    model, train, test = problem(BatchNormCNN)
    options = {"damping": 0.7, "relative": False, "fisher": "exact", "n_fisher": N_FISHER, "seed": 5}
    method = DiagonalEKFAC(model, train, dense="kronecker", **options).fit()
    method.save(tmp_path / "method")
    loaded = DiagonalEKFAC.load(tmp_path / "method", model, train)
    assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))
    assert {name: getattr(loaded, name) for name in options} == options


# Dense layers as networks use them.


class Sequences(nn.Module):
    """A Linear layer at 4 positions, followed by a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relu, self.outer = nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.relu(self.inner(x.unflatten(1, (4, 3)))).sum(1))


class CalledForEach(Sequences):
    """The same, with one call for each position."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.relu(self.inner(part)) for part in x.unflatten(1, (4, 3)).unbind(1)]
        return self.outer(torch.stack(parts).sum(0))


def test_sides_of_positions_add_up_to_the_gradient():
    model = built(Sequences).double()
    (x, y), vectors = float64(6, (12,)).tensors, torch.randn(6, N_CLASSES, dtype=torch.float64)
    sides = dense_sides(model, dense_layers(model, dict(model.named_parameters())), examples((x, y)), vectors)
    wanted = torch.autograd.grad((model(x) * vectors).sum(), [model.inner.weight, model.outer.weight])
    assert [len(sides[name][0]) for name in ("inner.weight", "outer.weight")] == [24, 6]
    for name, gradient in zip(("inner.weight", "outer.weight"), wanted, strict=True):
        a, b = sides[name]
        torch.testing.assert_close(b.T @ a, gradient)


def test_a_layer_that_is_called_often_is_one_with_many_positions():
    data, test = float64(N, (12,)), float64(3, (12,), seed=1)
    wanted = DiagonalEKFAC(built(Sequences).double(), data).influence(test.tensors)
    found = DiagonalEKFAC(built(CalledForEach).double(), data).influence(test.tensors)
    torch.testing.assert_close(found, wanted)


def test_equal_positions_give_the_kronecker_factors_of_one_input():
    """E[a a^T] is that of one position, E[b b^T] has one term for each."""
    model = built(Sequences).double()
    x = float64(N, (3,)).tensors[0]
    data = TensorDataset(x.repeat(1, 4), float64(N, (3,)).tensors[1])
    kernel = (
        DiagonalEKFAC(model, data, fisher="empirical", relative=False, damping=1e-3).fit()._states[0].kernel
    )
    layers = {model.inner: "inner.weight"}
    residuals = F.one_hot(data.tensors[1], N_CLASSES) - model(data.tensors[0]).softmax(1).detach()
    _, b = dense_sides(model, layers, examples(data.tensors), residuals)["inner.weight"]
    left, right = 4 * b[::4].T @ b[::4] / N, x.T @ x / N
    spectrum = torch.outer(torch.linalg.eigvalsh(left).clamp_min(0), torch.linalg.eigvalsh(right))
    torch.testing.assert_close(kernel.scales["inner.weight"], 1 / (N * (spectrum + 1e-3)))


class Layouts(nn.Module):
    """Four rows an example, shown to a Linear layer in some layout."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.inner, self.outer, self.layout = nn.Linear(3, 5), nn.Linear(5, N_CLASSES), layout
        self.query = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 3))
        if self.layout == "flat":
            h = self.inner(x.flatten(0, 1)).unflatten(0, (len(x), 4))
        elif self.layout == "rows first":
            h = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "called by name":
            h = self.inner(input=x)
        elif self.layout == "a learned query":
            h = self.inner(self.query) * x.sum(2)[:, :2, None]
        else:
            h = self.inner(x)
        return self.outer(h.tanh().sum(1))


@pytest.mark.parametrize("layout", ["flat", "rows first", "called by name"])
def test_scores_do_not_depend_on_how_a_layer_sees_the_rows_of_an_example(layout):
    data, test = float64(N, (12,)), float64(3, (12,), seed=1)
    options = {"layers": ["inner", "outer"], "batch_size": 5}
    wanted = DiagonalEKFAC(built(lambda: Layouts("kept")).double(), data, **options).influence(test.tensors)
    model = built(lambda: Layouts(layout)).double()
    torch.testing.assert_close(DiagonalEKFAC(model, data, **options).influence(test.tensors), wanted)


def test_the_factors_of_a_layer_that_reads_what_all_examples_share_do_not_depend_on_batches():
    data, test = float64(N, (12,)), float64(3, (12,), seed=1)
    model = built(lambda: Layouts("a learned query")).double()
    options = {"layers": ["inner", "outer"], "fisher": "empirical", "relative": False, "damping": 1e-2}
    found = DiagonalEKFAC(model, data, **options).fit()
    torch.testing.assert_close(
        found.influence(test.tensors),
        DiagonalEKFAC(model, data, batch_size=1, **options).influence(test.tensors),
    )
    # E[b b^T] by hand: two rows an example, whose gradients belong to it alone.
    left = torch.zeros(5, 5).double()
    for x, y in zip(*data.tensors, strict=True):
        h = model.inner(model.query).detach().requires_grad_(True)
        logits = model.outer((h * x.view(4, 3).sum(1)[:2, None]).tanh().sum(0))
        residual = F.one_hot(y, N_CLASSES) - logits.detach().softmax(0)
        (b,) = torch.autograd.grad((logits * residual).sum(), h)
        left += b.T @ b / N
    right = (model.query.T @ model.query / 2).detach()
    spectrum = torch.outer(
        torch.linalg.eigvalsh(left).clamp_min(0), torch.linalg.eigvalsh(right).clamp_min(0)
    )
    torch.testing.assert_close(found._states[0].kernel.scales["inner.weight"], 1 / (N * (spectrum + 1e-2)))


class Norms(nn.Module):
    """Adds the root of a norm, whose gradient at 0 is infinite."""

    def __init__(self, of_layer: bool) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, N_CLASSES)
        self.of_layer = of_layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        rooted = h if self.of_layer else x @ self.fc.weight.T
        return self.head(h) + rooted.norm(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize("of_layer", [False, True])
@pytest.mark.parametrize("dense", ["kronecker", "diagonal"])
def test_gradients_that_are_not_finite_are_refused_with_the_example(dense, of_layer):
    x, y = float64(N, (6,)).tensors
    x = x.clone()
    x[8] = 0
    model = built(lambda: Norms(of_layer)).double()
    method = DiagonalEKFAC(model, TensorDataset(x, y), dense=dense, batch_size=5)
    with pytest.raises(ValueError, match="finite gradients; got NaN or infinity for example 8"):
        method.influence(float64(2, (6,)).tensors)


class Attention(nn.Module):
    """Its output projection is a Linear layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 4))
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_weights_that_are_used_without_their_layer_are_diagonal():
    data = float64(N, (12,))
    method = DiagonalEKFAC(built(Attention).double(), data).fit()
    assert list(method._states[0].kernel.bases) == ["head.weight"]
    assert bool(torch.isfinite(method.influence(data.tensors)).all())


class Tied(nn.Module):
    """Two layers with one weight."""

    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, N_CLASSES)
        self.fc2.weight = self.fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


def test_layers_that_share_a_weight_share_their_factors():
    model = built(Tied).double()
    (x, y), vectors = float64(6, (4,)).tensors, torch.randn(6, N_CLASSES, dtype=torch.float64)
    sides = dense_sides(model, dense_layers(model, dict(model.named_parameters())), examples((x, y)), vectors)
    a, b = sides["fc1.weight"]
    (wanted,) = torch.autograd.grad((model(x) * vectors).sum(), [model.fc1.weight])
    torch.testing.assert_close(b.T @ a, wanted)


def test_a_layer_without_influence_on_the_logits_takes_no_part():
    class Spare(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.spare(x)
            return super().forward(x)

    model, train, test = problem(Spare)
    scores = DiagonalEKFAC(model, train).influence(test.tensors)
    bare = MLP().double()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("spare")})
    torch.testing.assert_close(scores, DiagonalEKFAC(bare, train).influence(test.tensors))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0}, "`damping` must be a positive number; got 0"),
        ({"damping": float("nan")}, "`damping` must be a positive number; got nan"),
        ({"dense": "kron"}, "`dense` must be one of 'kronecker', 'diagonal'; got 'kron'"),
        ({"fisher": "true"}, "`fisher` must be one of 'sampled', 'exact', 'empirical'; got 'true'"),
        ({"n_fisher": 0}, "`n_fisher` must be an integer of at least 1; got 0"),
        ({"n_fisher": 0.5}, "`n_fisher` must be an integer of at least 1; got 0.5"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiagonalEKFAC(MLP(), planted_classes(4), **options)


def test_a_model_without_doubt_is_refused_unless_eps_is_absolute():
    model, train = built(MLP), Items(planted_classes(N))
    model.fc3.weight.data.zero_()
    model.fc3.bias.data = torch.tensor([0.0, 1e4, 0.0])
    with pytest.raises(
        ValueError, match="`fisher` must be above 0 somewhere; got 0 throughout from 'sampled'"
    ):
        DiagonalEKFAC(model, train).fit()
    scores = DiagonalEKFAC(model, train, relative=False).influence(planted_classes(2).tensors)
    assert bool(torch.isfinite(scores).all())


class OfPositions(nn.Module):
    """Rows of positions, `(n, P, 3)` to `(n, P, N_CLASSES)`, with positions or examples first inside."""

    def __init__(self, by_time: bool) -> None:
        super().__init__()
        self.by_time, self.inner, self.outer = by_time, nn.Linear(3, 5), nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1) if self.by_time else x
        z = self.outer(torch.tanh(self.inner(h)))
        return z.transpose(0, 1) if self.by_time else z


class Twice(nn.Module):
    """One layer that is called twice for an example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class TestWeightsOfSeveralRows:
    """Rows of a layer belong to their examples, in whatever order they come."""

    WEIGHTS = (1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 0.5, 2.0)

    @staticmethod
    def network(build: Any, *arguments: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return build(*arguments).double().eval()

    @staticmethod
    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(N_CLASSES, shape[:-1], generator=generator)

    @pytest.mark.slow
    @pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
    @pytest.mark.parametrize("batch_size", [4, 9])
    def test_positions_may_stand_before_examples(self, fisher, batch_size):
        x, y = self.draw(9, 5, 3)
        y[1, 3:], y[5, :2] = -100, -100
        batch = Batch(sample_weight=torch.tensor(self.WEIGHTS))
        plain, by_time = (
            DiagonalEKFAC(
                self.network(OfPositions, first),
                TensorDataset(x, y),
                fisher=fisher,
                batch=batch,
                batch_size=batch_size,
            ).influence((x[:3], y[:3]))
            for first in (False, True)
        )
        assert plain.any()
        torch.testing.assert_close(by_time, plain, rtol=0, atol=1e-9 * float(plain.abs().max()))

    @pytest.mark.parametrize("fisher", ["exact", "empirical"])
    def test_a_layer_may_be_called_twice(self, fisher):
        x, y = self.draw(9, 4)
        copies = torch.tensor([1, 2, 0, 1, 1, 3, 1, 1, 2])
        weighted = Batch(sample_weight=copies.double())
        rows = torch.arange(9).repeat_interleave(copies)
        model = self.network(Twice)
        found = DiagonalEKFAC(model, TensorDataset(x, y), fisher=fisher, batch=weighted).influence((x, y))
        repeated = DiagonalEKFAC(model, TensorDataset(x[rows], y[rows]), fisher=fisher).influence((x, y))
        wanted = torch.zeros_like(found).index_add_(1, rows, repeated)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
