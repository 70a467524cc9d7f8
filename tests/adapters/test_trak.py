from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from method_calls import count_rows
from planted import MLP, N_CLASSES, BatchNormCNN, Items, built, planted_classes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import Batch
from stride_captum.adapters import trak
from stride_captum.adapters.gradients import method as gradients
from stride_captum.adapters.gradients.count_sketch import count_sketch, random_places
from stride_captum.adapters.trak import TRAK

N = 14


def problem(build: Any = MLP) -> tuple[Any, TensorDataset, TensorDataset]:
    model = built(build).double()
    data = [planted_classes(n, build.shape, seed).tensors for n, seed in ((N, 0), (3, 1))]
    train, test = (TensorDataset(x.double(), y) for x, y in data)
    return model.eval(), train, test


def margin(logits: Tensor, label: int) -> Tensor:
    """log p / (1 - p), as in the paper."""
    p = logits.softmax(-1)[label]
    return torch.log(p / (1 - p))


def sketch_matrix(places: Tensor, k: int) -> Tensor:
    """S, `(n_parameters, k)`: one 1 or -1 in each row."""
    matrix = torch.zeros(len(places), k, dtype=torch.float64)
    for row, place in enumerate(places.tolist()):
        matrix[row, place % k] = 1 if place < k else -1
    return matrix


class Reference:
    """The formula of the paper, one example at a time, with S written out."""

    def __init__(self, model: Any, train: TensorDataset, k: int, damping: float, seed: int) -> None:
        self.model, self.parameters = model, list(model.parameters())
        n_parameters = sum(p.numel() for p in self.parameters)
        width = min(k, n_parameters)
        self.sketch = sketch_matrix(random_places(n_parameters, k, seed), width)
        x, y = train.tensors
        self.phi = torch.stack([self.projected_margin(a, int(b)) for a, b in zip(x, y, strict=True)])
        kernel = self.phi.T @ self.phi
        scale = kernel.trace() / min(len(kernel), len(x))
        self.inverse = torch.linalg.inv(kernel + damping * scale * torch.eye(width))
        self.doubt = 1 - model(x).softmax(1).gather(1, y[:, None]).squeeze(1).detach()

    def projected(self, response: Tensor) -> Tensor:
        found = torch.autograd.grad(response, self.parameters)
        return torch.cat([g.flatten() for g in found]) @ self.sketch

    def projected_margin(self, x: Tensor, label: int) -> Tensor:
        return self.projected(margin(self.model(x[None])[0], label))

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        rows = [self.projected_margin(a, int(b)) for a, b in zip(x, y, strict=True)]
        return torch.stack(rows) @ self.inverse @ self.phi.T * self.doubt


@pytest.mark.parametrize("build", [MLP, BatchNormCNN])
@pytest.mark.parametrize(("k", "damping"), [(11, 0.3), (11, 0.0), (10_000, 0.3)])
def test_scores_are_those_of_the_definition(build, k, damping):
    model, train, test = problem(build)
    method = TRAK(model, train, projection_dim=k, damping=damping, seed=4, batch_size=5)
    reference = Reference(model, train, k, damping, seed=4)
    torch.testing.assert_close(method.influence(test.tensors), reference.scores(*test.tensors))


@pytest.mark.parametrize("residuals", ["training", "temperature"])
def test_the_kernel_is_of_margins_whatever_the_residuals_are(residuals):
    model, train, test = problem()
    x, y = train.tensors
    method = TRAK(model, train, projection_dim=11, residuals=residuals, temperature=2.5)
    reference = Reference(model, train, 11, 1.0, seed=0)
    logits = model(x)
    vectors = F.one_hot(y, N_CLASSES) - (logits / (1 if residuals == "training" else 2.5)).softmax(1).detach()
    columns = torch.stack(
        [reference.projected((model(a[None])[0] * v).sum()) for a, v in zip(x, vectors, strict=True)]
    )
    rows = torch.stack(
        [reference.projected_margin(a, int(b)) for a, b in zip(*test.tensors, strict=True)],
    )
    wanted = rows @ reference.inverse @ columns.T
    torch.testing.assert_close(method.influence(test.tensors), wanted)
    norms = [(side @ reference.inverse * side).sum(1).sqrt() for side in (rows, columns)]
    cosine = wanted / norms[0][:, None] / norms[1]
    torch.testing.assert_close(method.influence(test.tensors, normalize="cosine"), cosine)


@pytest.mark.parametrize("residuals", ["training", "both"])
def test_self_influence_is_minus_the_effect_on_the_own_loss(residuals):
    model, train, _ = problem()
    method = TRAK(model, train, projection_dim=11, residuals=residuals)
    effect = method.influence(train.tensors, response="loss").diagonal()
    torch.testing.assert_close(method.self_influence(), -effect)


@pytest.mark.slow
@pytest.mark.parametrize("residuals", ["training", "both"])
@pytest.mark.parametrize("weights", [None, [0.0, 2.0, 0.5, 1.0, 3.0] + [1.0] * (N - 5)])
def test_damping_is_set_anew_without_another_fit(monkeypatch, residuals, weights):
    model, train, test = problem()
    batch = None if weights is None else Batch(sample_weight=torch.tensor(weights))
    options = {"projection_dim": 11, "residuals": residuals, "batch": batch}
    options["checkpoints"] = [model.state_dict()] * 2

    def answers(method: TRAK) -> list[Tensor]:
        scores = [method.influence(test.tensors, normalize=how) for how in (None, "cosine")]
        return [*scores, method.self_influence()]

    wanted = answers(TRAK(model, train, damping=0.3, **options))
    method = TRAK(model, train, damping=2.0, **options)
    before = answers(method)
    rows = count_rows(monkeypatch, gradients)
    method.damping = 0.3
    assert rows == []
    found = answers(method)
    assert rows == [len(test)] * 4  # the test points of two queries at two checkpoints
    for one, other, old in zip(found, wanted, before, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, old)
    with pytest.raises(ValueError, match="`damping` must be a number of at least 0; got -1"):
        method.damping = -1
    assert all(map(torch.equal, answers(method), found))


def test_an_unsafe_damping_is_refused_where_it_is_set_anew():
    model, train, test = problem()
    method = TRAK(model, train, projection_dim=N + 1)
    before = method.influence(test.tensors)
    with pytest.raises(ValueError, match=r"`damping` must be at least \S+ for scores .*; got 0\.0"):
        method.damping = 0.0
    assert method.damping == 1.0
    assert torch.equal(method.influence(test.tensors), before)


# The projection.


def test_inner_products_are_kept_in_the_mean_and_their_variance_is_bounded():
    """Over all the places that 3 parameters can have."""
    k, generator = 2, torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    found = []
    for places in itertools.product(range(2 * k), repeat=3):
        left, right = count_sketch({"w": torch.stack([u, v])}, torch.tensor(places), k)
        found.append(left @ right)
    products = torch.stack(found)
    torch.testing.assert_close(products.mean(), u @ v)
    bound = ((u @ u) * (v @ v) + (u @ v) ** 2) / k
    assert 0 < float(products.var(correction=0)) <= float(bound)


def test_the_sketch_is_the_product_with_its_matrix():
    k, n = 5, 24
    places = random_places(n, k, seed=0)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "a": torch.randn(3, 4, 2, dtype=torch.float64, generator=generator),
        "b": torch.randn(3, 16, dtype=torch.float64, generator=generator),
    }
    wanted = torch.cat([g.flatten(1) for g in parts.values()], 1) @ sketch_matrix(places, k)
    torch.testing.assert_close(count_sketch(parts, places, k), wanted)


def test_places_and_signs_are_drawn_evenly_and_by_seed():
    places = random_places(40_000, 4, seed=0)
    counts = torch.bincount(places, minlength=8)
    assert len(counts) == 8
    assert float((counts / 5_000 - 1).abs().max()) < 0.1
    assert torch.equal(places, random_places(40_000, 4, seed=0))
    assert not torch.equal(places, random_places(40_000, 4, seed=1))


def test_nothing_is_projected_where_there_are_coordinates_enough():
    u = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(count_sketch({"w": u}, random_places(6, 6, seed=0), 6), u)


# Work and memory.


def test_a_query_does_not_read_the_training_set():
    class Counted(Items):
        reads = 0

        def __getitem__(self, i: int) -> Any:
            self.reads += 1
            return super().__getitem__(i)

    model, train, test = problem()
    method = TRAK(model, (counted := Counted(train)), projection_dim=11).fit()
    counted.reads = 0
    method.influence(test.tensors)
    method.influence(test.tensors, 3, normalize="cosine")
    method.self_influence()
    assert counted.reads == 0


@pytest.mark.parametrize(("residuals", "gradients_an_example"), [("training", 1), ("temperature", 2)])
def test_a_fit_takes_one_gradient_an_example_and_another_for_other_residuals(
    monkeypatch, residuals, gradients_an_example
):
    model, train, _ = problem()
    rows = count_rows(monkeypatch, gradients)
    TRAK(model, train, residuals=residuals, batch_size=5).fit()
    assert sum(rows) == gradients_an_example * N


@pytest.mark.parametrize("residuals", ["training", "temperature"])
def test_a_fit_takes_two_gradients_of_an_example_with_positions(monkeypatch, residuals):
    model, x, y = TestExamplesThatCountForNothing.draw()
    rows = count_rows(monkeypatch, gradients)
    TRAK(model, TensorDataset(x, y), residuals=residuals).fit()
    assert rows == [8, 8]


def test_the_kernel_is_applied_to_test_points_for_their_norms_alone(monkeypatch):
    model, train, test = problem()
    method, sizes = TRAK(model, train).fit(), []
    original = trak._applied
    monkeypatch.setattr(trak, "_applied", lambda *given: sizes.append(len(given[1])) or original(*given))
    method.influence(test.tensors)
    assert sizes == []
    method.influence(test.tensors, normalize="cosine")
    assert sizes == [len(test)]


def test_gradients_are_taken_of_as_many_examples_as_the_budget_holds(monkeypatch):
    model, train, test = problem(BatchNormCNN)
    wanted = TRAK(model, train, residuals="temperature").influence(test.tensors)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = count_rows(monkeypatch, gradients)
    method = TRAK(model, train, residuals="temperature", memory_budget=4 * 5 * size)
    torch.testing.assert_close(method.influence(test.tensors), wanted)
    assert max(rows) == 5


def test_a_saved_method_gives_the_same_scores(tmp_path):
    model, train, test = problem()
    method = TRAK(model, train, projection_dim=11, damping=0.7, seed=5, residuals="temperature").fit()
    method.save(tmp_path / "method")
    loaded = TRAK.load(tmp_path / "method", model, train)
    assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))
    assert torch.equal(loaded.self_influence(), method.self_influence())
    assert (loaded.projection_dim, loaded.damping, loaded.seed) == (11, 0.7, 5)


def test_the_seed_chooses_the_projection():
    model, train, test = problem()
    scores = [TRAK(model, train, projection_dim=11, seed=seed).influence(test.tensors) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection_dim": 0}, "`projection_dim` must be an integer of at least 1; got 0"),
        ({"projection_dim": 2.5}, "`projection_dim` must be an integer of at least 1; got 2.5"),
        ({"damping": -1}, "`damping` must be a number of at least 0; got -1"),
        ({"damping": float("inf")}, "`damping` must be a number of at least 0; got inf"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TRAK(MLP(), planted_classes(4), **options)


def test_a_singular_kernel_without_damping_is_refused():
    model, train, _ = problem()
    with pytest.raises(
        ValueError, match=r"`damping` must be at least \S+ for scores .*; got 0\.0\. Or lower"
    ):
        TRAK(model, train, projection_dim=N + 1, damping=0.0).fit()
    # The 18 parameters of fc3 leave one of 13 coordinates empty.
    assert len((random_places(18, 13, seed=0) % 13).unique()) < 13
    with pytest.raises(ValueError, match="`damping` must be at least"):
        TRAK(model, train, layers=["fc3"], projection_dim=13, damping=0.0, seed=0).fit()


class TestExamplesThatCountForNothing:
    """Neither the kernel nor its damping sees examples of weight 0, or without a label."""

    @staticmethod
    def draw(n_positions: int | None = 4) -> tuple[nn.Module, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (8,) if n_positions is None else (8, n_positions)
        x = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, N_CLASSES)).double()
        return model, x, torch.randint(N_CLASSES, shape, generator=generator)

    @staticmethod
    def scores(model: nn.Module, x: Tensor, y: Tensor, test: Any, weights: Any = None) -> Tensor:
        batch = None if weights is None else Batch(sample_weight=torch.tensor(weights))
        return TRAK(model, TensorDataset(x, y), damping=0.5, batch=batch).influence(test)

    def test_examples_without_a_label(self):
        model, x, y = self.draw()
        test = x[:2], y[:2]
        wanted = self.scores(model, x, y, test)
        none = torch.full_like(y, -100)
        found = self.scores(model, torch.cat([x, x]), torch.cat([y, none]), test)
        assert not found[:, 8:].any()
        torch.testing.assert_close(found[:, :8], wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))

    def test_examples_without_a_label_that_have_a_weight(self):
        model, x, y = self.draw()
        test, weights = (x[:2], y[:2]), [1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0]
        wanted = self.scores(model, x, y, test, weights)
        none = torch.full_like(y, -100)
        found = self.scores(model, torch.cat([x, x]), torch.cat([y, none]), test, weights * 2)
        torch.testing.assert_close(found[:, :8], wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))

    @pytest.mark.parametrize("n_positions", [None, 4])
    def test_examples_of_weight_0(self, n_positions):
        model, x, y = self.draw(n_positions)
        test = x[:2], y[:2]
        wanted = self.scores(model, x, y, test)
        found = self.scores(model, torch.cat([x, x]), torch.cat([y, y]), test, [1.0] * 8 + [0.0] * 8)
        torch.testing.assert_close(found[:, :8], wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))

    def test_a_partly_labeled_example_counts_as_one(self):
        """Its damping is that of the definition, with as many eigenvalues as examples."""
        model, x, y = self.draw()
        y[3, 1:], y[5] = -100, -100
        made = TRAK(model, TensorDataset(x, y), damping=0.5).fit()
        inverse = torch.cholesky_inverse(made._states[0].kernel.factor)
        rows = []
        for one, label in zip(x, y, strict=True):
            z, counted = model(one), label != -100
            margins = [margin(row, int(c)) for row, c in zip(z[counted], label[counted], strict=True)]
            value = torch.stack([0 * z.sum(), *margins]).sum()
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())]))
        phi = torch.stack(rows)
        gram = phi.T @ phi
        wanted = torch.linalg.inv(gram + 0.5 * gram.trace() / 7 * torch.eye(len(gram)).to(gram))
        torch.testing.assert_close(inverse, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))

    @pytest.mark.parametrize("which", ["weights", "labels"])
    def test_a_training_set_of_them_alone_is_refused(self, which):
        model, x, y = self.draw()
        weights = [0.0] * 8 if which == "weights" else None
        labels = y if which == "weights" else torch.full_like(y, -100)
        with pytest.raises(ValueError, match="`train_dataset` must hold an example with a label that is not"):
            self.scores(model, x, labels, (x[:2], y[:2]), weights)
