"""Weights of classes and of positions where an example has several, against dense formulas and by laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_captum import Batch, Checkpoint
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn
from stride_captum.losses import CrossEntropy

N_TRAIN, N_TEST, LENGTH, WIDTH, N_CLASSES, IGNORED = 9, 4, 5, 3, 4, -100
WEIGHT = torch.tensor([1.0, 2.0, 0.25, 6.0], dtype=torch.float64)
#: Of positions, some of them 0, in one example all.
GIVEN = (torch.arange(N_TRAIN * LENGTH, dtype=torch.float64).reshape(N_TRAIN, LENGTH) * 7 % 5) / 2
GIVEN[6] = 0


class Tagger(nn.Module):
    """`(n, P, 3)` to `(n, P, 4)`.

    Args:
        mixing: Whether a position reads those before it.
        by_time: Whether layers see positions before examples.
    """

    def __init__(self, mixing: bool = False, by_time: bool = False) -> None:
        super().__init__()
        self.mixing, self.by_time = mixing, by_time
        self.inner, self.outer = nn.Linear(WIDTH, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x.transpose(0, 1) if self.by_time else x))
        if self.mixing:
            h = h + h.cumsum(0 if self.by_time else 1) / 5
        z: Tensor = self.outer(h)
        return z.transpose(0, 1) if self.by_time else z


def tagger(**options: bool) -> Tagger:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Tagger(**options).double().eval()


@pytest.fixture(scope="module")
def data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """A training set with ignored labels, and test points."""
    generator = torch.Generator().manual_seed(0)
    shape = N_TRAIN + N_TEST, LENGTH
    x = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(N_CLASSES, shape, generator=generator)
    y[1, 3:], y[4, 0] = IGNORED, IGNORED
    return TensorDataset(x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])


#: Each with labels of the Fisher matrix that are given, so that nothing is drawn.
METHODS = [
    (TRAK, {"projection_dim": 64, "damping": 0.5}),
    (DiagonalEKFAC, {"fisher": "exact"}),
    (DiagonalEKFAC, {"fisher": "empirical", "dense": "diagonal"}),
    (EKFAC, {"fisher": "empirical"}),
    (EKFAC, {"fisher": "empirical", "strategy": "kfac"}),
    (EKFAC, {"fisher": "empirical", "strategy": "diagonal"}),
]


def made(
    method: Any, model: nn.Module, train: Any, weight: Any = WEIGHT, given: Any = None, **options: Any
) -> Any:
    if method is EKFAC:
        pytest.importorskip("kronfluence")
    options = {"loss": CrossEntropy(weight=weight), "batch_size": 4, **options}
    return method(model, train, batch=Batch(sample_weight=given), **options)


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert wanted.any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


class Dense:
    """Every position of every example written out: inputs a, output gradients of all outputs, r and omega.

    Args:
        model: The network.
        x: Inputs.
        y: Labels.
        given: Weights of the positions; None for 1.
        temperature: T of the residuals of the training side.
    """

    def __init__(
        self, model: Tagger, x: Tensor, y: Tensor, given: Tensor | None = None, temperature: float = 1.0
    ) -> None:
        given = torch.ones(y.shape, dtype=torch.float64) if given is None else given
        self.counted = (y != IGNORED) & (given > 0)
        labels = y.clamp_min(0)
        self.given = given * self.counted
        self.weight = (self.given.sum(1) / self.counted.sum(1).clamp_min(1)).sum()
        self.omega = self.given * WEIGHT[labels]
        z = model(x).detach()
        self.tempered = F.one_hot(labels, N_CLASSES) - (z / temperature).softmax(2)
        self.p = z.softmax(2)
        self.e = F.one_hot(labels, N_CLASSES).double()
        self.r = (self.e - self.p) * self.counted[..., None]
        h = torch.tanh(model.inner(x)).detach()
        ones = torch.ones(*y.shape, 1, dtype=torch.float64)
        self.inputs = {"inner": torch.cat([x, ones], 2), "outer": torch.cat([h, ones], 2)}
        self.slope, self.last = 1 - h**2, model.outer.weight.detach()

    def back(self, vectors: Tensor) -> dict[str, Tensor]:
        """Gradients of `<z, v>` with respect to the outputs of both layers, `(n, P, n_out)`."""
        return {"inner": (vectors @ self.last) * self.slope, "outer": vectors}

    def gradients(self, vectors: Tensor) -> dict[str, Tensor]:
        """Of the examples, with the bias as last column, `(n, n_out, n_in + 1)`."""
        back = self.back(vectors)
        return {name: torch.einsum("npo,npi->noi", back[name], a) for name, a in self.inputs.items()}

    def flat(self, vectors: Tensor) -> Tensor:
        return torch.cat([g.flatten(1) for g in self.gradients(vectors).values()], 1)

    @property
    def margins(self) -> Tensor:
        """Gradients of the margin: the residual over 1 - p_y."""
        return self.r / (self.e * (1 - self.p)).sum(2, keepdim=True)

    @property
    def weighed(self) -> Tensor:
        return self.tempered * self.omega[..., None]


def both(data: Any, model: Tagger, given: Tensor | None = None, options: Any = ()) -> tuple[Dense, Dense]:
    train, test = data
    temperature = 2.0 if "residuals" in options else 1.0
    return Dense(model, *train.tensors, given, temperature), Dense(model, *test)


#: Weights of positions, and residuals.
SETTINGS = [(None, {}), (GIVEN, {}), (GIVEN, {"residuals": "temperature", "temperature": 2.0})]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "options"), SETTINGS)
def test_trak(data, given, options):
    model = tagger()
    train, test = both(data, model, given, options)
    phi = train.flat(train.margins * train.omega.sqrt()[..., None])
    gram = phi.T @ phi
    damped = gram + 0.5 * gram.trace() / train.weight * torch.eye(len(gram)).to(gram)
    wanted = test.flat(test.margins) @ torch.linalg.solve(damped, train.flat(train.weighed).T)
    method = made(TRAK, model, data[0], given=given, projection_dim=1000, damping=0.5, **options)
    same(method.influence(data[1]), wanted)
    own = (train.flat(train.r) * torch.linalg.solve(damped, train.flat(train.weighed).T).T).sum(1)
    same(method.self_influence(), own)


@pytest.mark.slow
@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("dense", ["kronecker", "diagonal"])
@pytest.mark.parametrize(("given", "options"), SETTINGS)
@pytest.mark.parametrize("relative", [False, True])
def test_diagonal_ekfac(data, dense, by_time, given, options, relative):
    train, test = both(data, tagger(), given, options)
    draws = []  # sqrt(omega p_c) (e_c - p) of one position and one class each
    for t in range(LENGTH):
        for c in range(N_CLASSES):
            vector = torch.zeros_like(train.p)
            vector[:, t] = (torch.eye(N_CLASSES)[c] - train.p[:, t]) * train.p[:, t, c, None].sqrt()
            draws.append(vector * train.omega.sqrt()[..., None])
    left, right = test.gradients(test.margins), train.gradients(train.weighed)
    wanted = torch.zeros(N_TEST, N_TRAIN, dtype=torch.float64)
    for name, inputs in train.inputs.items():
        a = inputs[..., :-1]
        squares = sum(train.gradients(v)[name].square().sum(0) for v in draws) / train.weight
        g = sum(torch.einsum("npo,npq->oq", b, b) for b in (train.back(v)[name] for v in draws))
        g = g / train.weight
        mean = torch.einsum("np,npi,npj->ij", train.omega, a, a) / train.omega.sum()
        weights = torch.kron(g, mean) if dense == "kronecker" else torch.diag(squares[:, :-1].flatten())
        for columns, matrix in ((slice(-1), weights), (slice(-1, None), torch.diag(squares[:, -1]))):
            unit = matrix.diagonal().mean() if relative else 1.0
            damped = matrix + 0.1 * unit * torch.eye(len(matrix)).to(matrix)
            sides = (side[name][:, :, columns].flatten(1) for side in (left, right))
            wanted += next(sides) @ torch.linalg.solve(damped, next(sides).T) / train.weight
    options = {"fisher": "exact", "dense": dense, "relative": relative, **options}
    method = made(DiagonalEKFAC, tagger(by_time=by_time), data[0], given=given, **options)
    same(method.influence(data[1]), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize(("given", "options"), SETTINGS)
@pytest.mark.parametrize("damping", [None, 0.05])
def test_ekfac(data, strategy, given, options, damping):
    model = tagger()
    train, test = both(data, model, given, options)
    root = train.r * train.omega.sqrt()[..., None]
    left, right, terms = test.gradients(test.margins), train.gradients(train.weighed), train.gradients(root)
    wanted = torch.zeros(N_TEST, N_TRAIN, dtype=torch.float64)
    for name, a in train.inputs.items():
        b = train.back(root)[name]
        value_a, q_a = torch.linalg.eigh(
            torch.einsum("np,npi,npj->ij", train.omega, a, a) / train.omega.sum()
        )
        value_b, q_b = torch.linalg.eigh(torch.einsum("npo,npq->oq", b, b) / train.given.sum())
        q, values = torch.kron(q_b, q_a), torch.kron(value_b, value_a)
        if strategy == "diagonal":
            q = torch.eye(len(q)).to(q)
        if strategy != "kfac":
            values = (terms[name].flatten(1) @ q).square().sum(0) / train.weight
        inverse = q @ torch.diag(1 / (values + (damping or 0.1 * values.mean()))) @ q.T
        wanted += left[name].flatten(1) @ inverse @ right[name].flatten(1).T / train.weight
    options = {"fisher": "empirical", "strategy": strategy, "damping": damping, **options}
    method = made(EKFAC, model, data[0], given=given, **options)
    same(method.influence(data[1]), wanted)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("by_time", [False, True])
class TestLaws:
    @pytest.mark.slow
    def test_a_class_of_weight_0_is_ignored(self, data, method, options, mixing, by_time):
        model, (train, test) = tagger(mixing=mixing, by_time=by_time), data
        x, y = train.tensors
        weight = [1.0, 2.0, 0.0, 3.0]
        left_out = TensorDataset(x, torch.where(y == 2, IGNORED, y))
        found, wanted = (made(method, model, t, weight, **options) for t in (train, left_out))
        same(found.influence(test), wanted.influence(test))

    @pytest.mark.slow
    def test_one_weight_for_all_changes_nothing(self, data, method, options, mixing, by_time):
        model, (train, test) = tagger(mixing=mixing, by_time=by_time), data
        found, wanted = (made(method, model, train, w, **options) for w in ([3.0] * N_CLASSES, None))
        same(found.influence(test), wanted.influence(test))

    @pytest.mark.slow
    def test_the_order_of_rows_changes_nothing(self, data, method, options, mixing, by_time):
        train, test = data
        plain = made(method, tagger(mixing=mixing), train, **options)
        found = made(method, tagger(mixing=mixing, by_time=by_time), train, **options)
        same(found.influence(test), plain.influence(test))

    @pytest.mark.slow
    def test_self_influence_is_the_loss_on_both_sides(self, data, method, options, mixing, by_time):
        found = made(method, tagger(mixing=mixing, by_time=by_time), data[0], **options)
        every = -found.influence(data[0].tensors, response="loss").diagonal()
        same(found.self_influence(), every)
        if method is not TRAK:  # which weighs them by its own labels alone
            same(found.self_influence(data[0].tensors), every)

    @pytest.mark.slow
    def test_one_position_is_an_example(self, data, method, options, mixing, by_time):
        class Single(nn.Module):
            def __init__(self, whole: Tagger) -> None:
                super().__init__()
                self.whole = whole

            def forward(self, x: Tensor) -> Tensor:
                return self.whole(x[:, None])[:, 0]

        model, ((x, y), test) = tagger(mixing=mixing, by_time=by_time), (data[0].tensors, data[1])
        x, y = x[:, :1], y[:, :1].clamp_min(0)
        weight = WEIGHT / WEIGHT[y].mean()  # TRAK's damping is that of the sum of the weights
        found = made(method, model, TensorDataset(x, y), weight, **options)
        plain = made(method, Single(model), TensorDataset(x[:, 0], y[:, 0]), weight, **options)
        asked = test[0][:, :1], test[1][:, :1].clamp_min(0)
        same(found.influence(asked), plain.influence(tuple(part[:, 0] for part in asked)))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 9])
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_batches_change_nothing(data, method, options, mixing, batch_size):
    model, (train, test) = tagger(mixing=mixing), data
    found = made(method, model, train, **options)
    found.batch_size = batch_size
    same(found.influence(test), made(method, model, train, **options).influence(test))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [(TracIn, {}), (DiagonalEKFAC, {"fisher": "exact"})])
def test_the_positions_of_one_example_over_two_add_up(data, method, options):
    """Where positions have terms of their own in F: it is exact, and positions do not read each other."""
    model, (train, test) = tagger(), data
    x, y = train.tensors
    first, second = y.clone(), y[:1].clone()
    first[0, 2:], second[0, :2] = IGNORED, IGNORED
    split = TensorDataset(torch.cat([x, x[:1]]), torch.cat([first, second]))
    whole = made(method, model, train, **options).influence(test)
    found = made(method, model, split, **options).influence(test)
    same(found[:, 0] + found[:, -1], whole[:, 0])
    same(found[:, 1:-1], whole[:, 1:])


KINDS = ("training", "temperature", "leave-one-out", "both")
#: A method of each kind, with an absolute damping that no scale of the weights takes along.
ABSOLUTE = [
    (TracIn, {}),
    (TRAK, {"projection_dim": 64, "damping": 0.5}),
    (DiagonalEKFAC, {"fisher": "exact", "relative": False}),
    (EKFAC, {"fisher": "empirical", "damping": 0.01}),
]
#: The same with a damping in units of the Fisher matrix.
RELATIVE = [
    (TracIn, {}),
    (TRAK, {"projection_dim": 5, "damping": 0.5}),
    (DiagonalEKFAC, {"fisher": "exact"}),
    (EKFAC, {"fisher": "empirical"}),
]


class Read(nn.Module):
    """A tagger behind another layer, whose output the ridge head of out-of-sample residuals reads."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first, self.tagger = nn.Linear(WIDTH, WIDTH), tagger(mixing=True)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.tagger(self.first(x))
        return z


def answers(method: Any, test: Any) -> list[Tensor]:
    """Everything that a gradient method says, of training examples and of others."""
    found = [method.influence(test, response=response) for response in ("margin", "loss")]
    found += [method.influence(test, normalize="cosine"), method.influence(test, 3).influence_scores]
    found += [method.self_influence(), method.mislabel_scores()]
    return found if method.residuals in KINDS[2:] else [*found, method.self_influence(test)]


def same_answers(found: Any, wanted: Any, test: Any, other: Any = None, tolerance: float = 1e-9) -> None:
    expected = answers(wanted, test if other is None else other)
    for a, b in zip(answers(found, test), expected, strict=True):
        same(a, b, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("residuals", KINDS)
class TestWeightsOfPositions:
    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize(("method", "options"), ABSOLUTE)
    def test_one_for_all_of_an_example_is_its_own(self, data, method, options, residuals, zero):
        model, (train, test) = Read().double(), data
        own = torch.linspace(0.1, 3, N_TRAIN).double() * (torch.arange(N_TRAIN) != 3 * zero - 1)
        each = own[:, None].expand(-1, LENGTH)
        found, wanted = (
            made(method, model, train, given=w, residuals=residuals, **options) for w in (each, own)
        )
        same_answers(found, wanted, test)

    @pytest.mark.parametrize(("method", "options"), RELATIVE)
    def test_those_of_classes_are_class_weights(self, data, method, options, residuals):
        model, (train, test) = Read().double(), data
        own = WEIGHT[train.tensors[1].clamp_min(0)]
        options = {**options, "residuals": residuals}
        found, wanted = (
            made(method, model, train, None, own, **options),
            made(method, model, train, **options),
        )
        same(found.influence(test), wanted.influence(test))
        same(found.self_influence(), wanted.self_influence())

    @pytest.mark.parametrize(("method", "options"), ABSOLUTE)
    def test_0_is_an_ignored_label_on_both_sides(self, data, method, options, residuals):
        """In the data, where test points have weights too; nothing else of these counts."""
        model, ((x, y), (xt, yt)) = Read().double(), (data[0].tensors, data[1])
        given = torch.randint(3, yt.shape, generator=torch.Generator().manual_seed(5)).double()
        given[1] = 0
        weighed, ignored = (
            (TensorDataset(x, GIVEN, labels), (xt, w, others))
            for labels, w, others in (
                (y, given, yt),
                (y.masked_fill(GIVEN == 0, IGNORED), given + 1, yt.masked_fill(given == 0, IGNORED)),
            )
        )
        found, wanted = (
            made(method, model, train, given=1, residuals=residuals, **options)
            for train in (weighed[0], ignored[0])
        )
        same_answers(found, wanted, weighed[1], ignored[1])
        same(*(m.influence(m.train_dataset) for m in (found, wanted)))

    @pytest.mark.parametrize(("method", "options"), ABSOLUTE)
    def test_labels_of_weight_0_say_nothing(self, data, method, options, residuals):
        """Soft ones, which none can be ignored of."""
        model, ((x, y), (xt, yt)) = Read().double(), (data[0].tensors, data[1])
        given = torch.ones(yt.shape, dtype=torch.float64)
        given[:, 1] = 0
        soft = [F.one_hot(labels.clamp_min(0), N_CLASSES) * 0.7 + 0.3 / N_CLASSES for labels in (y, yt)]
        other = [
            torch.where(w[..., None] > 0, s, s.flip(2)) for s, w in zip(soft, (GIVEN, given), strict=True)
        ]
        options = {**options, "given": 1, "residuals": residuals}
        found, wanted = (
            made(method, model, TensorDataset(x, GIVEN, labels), None, **options)
            for labels in (soft[0], other[0])
        )
        same_answers(found, wanted, (xt, given, soft[1]), (xt, given, other[1]))

    @pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy"])
    @pytest.mark.parametrize(("method", "options"), ABSOLUTE)
    def test_positions_of_weight_0_behind_all_others_are_none(self, data, method, options, residuals, loss):
        if loss == "mse" and residuals == "temperature":
            pytest.skip("a regression has no temperature")
        model, ((x, y), (xt, yt)) = Read().double(), (data[0].tensors, data[1])
        labels = [F.one_hot(part.clamp_min(0), N_CLASSES).double() for part in (y, yt)]
        parts = (x, GIVEN + 0.5, labels[0]), (xt, torch.ones(yt.shape), labels[1])
        longer = [
            (F.pad(a, (0, 0, 0, 2), value=0.3), F.pad(w, (0, 2)), F.pad(b, (0, 0, 0, 2))) for a, w, b in parts
        ]
        options = {**options, "loss": loss, "given": 1, "residuals": residuals}
        found, wanted = (made(method, model, TensorDataset(*p), **options) for p in (longer[0], parts[0]))
        for response in ("loss", None):
            same(found.influence(longer[1], response=response), wanted.influence(parts[1], response=response))
        target = {"target": 1, "response": "output" if loss == "mse" else "logit"}
        same(found.influence(longer[1], **target), wanted.influence(parts[1], **target))
        same(found.self_influence(), wanted.self_influence())

    @pytest.mark.parametrize(("method", "options"), ABSOLUTE)
    def test_float32_and_files(self, data, method, options, residuals, tmp_path):
        (x, y), test = data[0].tensors, data[1]
        wide = made(method, Read().double(), data[0], given=GIVEN, residuals=residuals, **options)
        train, asked = TensorDataset(x.float(), y), (test[0].float(), test[1])
        options = {"given": GIVEN, "residuals": residuals, **options}
        narrow = made(method, Read().float(), train, **options)
        for a, b in zip(answers(narrow, asked), answers(wide, test), strict=True):
            same(a.double(), b.double(), 1e-3)
        narrow.save(tmp_path / "method")
        batch = Batch(sample_weight=GIVEN)
        loaded = method.load(tmp_path / "method", Read().float(), train, batch=batch)
        for a, b in zip(answers(loaded, asked), answers(narrow, asked), strict=True):
            assert a.equal(b)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [(TracIn, {}), (DiagonalEKFAC, {"fisher": "exact"})])
@pytest.mark.parametrize("residuals", ["training", "temperature"])
def test_a_weight_of_2_is_a_duplicate_of_the_position(data, method, options, residuals):
    """In another example, where positions have terms of their own in F and do not read each other."""
    model, ((x, y), test) = tagger(), (data[0].tensors, data[1])
    weights, again = torch.ones(y.shape), torch.full_like(y[:1], IGNORED)
    weights[2, 1:3], again[0, 1:3] = 2, y[2, 1:3]
    options = {"residuals": residuals, **options}
    found = made(method, model, data[0], given=weights, **options).influence(test)
    twice = TensorDataset(torch.cat([x, x[2:3]]), torch.cat([y, again]))
    wanted = made(method, model, twice, **options).influence(test)
    wanted[:, 2] += wanted[:, -1]
    same(found, wanted[:, :-1])


class TestTemperature:
    """Matched with the weights of positions, in the training set and in held-out data."""

    def fitted(self, data, given, **options):
        train = TensorDataset(data[0].tensors[0], *given, data[0].tensors[1])
        place = 1 if given else None
        options = {"weight": None, "given": place, "residuals": "temperature", **options}
        return made(TracIn, sure(), train, **options).fit()._states[-1].temperature

    def test_held_out(self, data):
        """A position of weight 0 is ignored there, one of weight 2 counts twice."""
        x, y = data[1]
        weights = torch.ones(y.shape)
        weights[:, 3:] = 0
        few = [(x, weights, y), (x, 1 + weights, y.masked_fill(weights == 0, IGNORED))]
        ones = torch.ones(N_TRAIN, LENGTH)
        found, wanted, every = (
            self.fitted(data, [ones], held_out=held) for held in (*few, (x, weights + 1, y))
        )
        assert found == pytest.approx(wanted, rel=1e-9)
        assert abs(every / found - 1) > 1e-3

    def test_training_set(self, data):
        """Halves of all but one example: as of whole examples, and as where that one counts twice."""
        held = data[1]
        weights = torch.ones(N_TRAIN, LENGTH)
        weights[1:] = 0.5
        (x, y) = data[0].tensors
        found = self.fitted(data, [weights], held_out=(held[0], torch.ones(held[1].shape), held[1]))
        twice = TensorDataset(torch.cat([x, x[:1]]), torch.cat([y, y[:1]])), held
        assert found == pytest.approx(self.fitted(twice, [], held_out=held), rel=1e-9)
        assert abs(found / self.fitted(data, [], held_out=held) - 1) > 1e-4

    def test_examples_that_a_checkpoint_has_not_seen(self, data):
        (x, y), model = data[0].tensors, sure()
        y = torch.where(torch.arange(N_TRAIN)[:, None] < 6, model(x).argmax(2), y)
        weights = torch.ones(N_TRAIN, LENGTH)
        weights[5:8, 2:] = 0
        seen = [Checkpoint(model.state_dict(), seen=range(6))]
        given = (TensorDataset(x, y), data[1]), (TensorDataset(x, y.masked_fill(weights == 0, IGNORED)), None)
        found = self.fitted(given[0], [weights], checkpoints=seen)
        assert found == pytest.approx(self.fitted(given[1], [], checkpoints=seen), rel=1e-9)
        assert abs(found / self.fitted(given[0], [], checkpoints=seen) - 1) > 1e-3


def sure() -> Tagger:
    """A tagger with more confidence in its outputs."""
    model = tagger()
    model.outer.weight.data.mul_(8)
    return model


@pytest.mark.parametrize(("method", "options"), RELATIVE)
def test_weights_of_another_shape_are_refused(data, method, options):
    (x, y), (xt, yt) = data[0].tensors, data[1]
    must = r"`sample_weight` must hold one for each example, or \(\d, 5\); got the shape \(\d, 4\)"
    with pytest.raises(ValueError, match=must):
        made(method, tagger(), data[0], given=GIVEN[:, 1:], **options).fit()
    fitted = made(method, tagger(), TensorDataset(x, GIVEN, y), given=1, **options)
    with pytest.raises(ValueError, match=must):
        fitted.influence((xt, torch.ones(N_TEST, LENGTH - 1), yt))


def test_weights_of_positions_are_refused_where_examples_have_one(data):
    (x, y), _ = data[0].tensors, data[1]
    train = TensorDataset(x[:, 0], y[:, 0].clamp_min(0))
    with pytest.raises(ValueError, match=r"must hold one for each example; got the shape \(\d, 5\)"):
        made(TracIn, tagger(), train, given=GIVEN).fit()


def test_weights_that_are_all_0_are_refused(data):
    with pytest.raises(ValueError, match=r"a label that is not ignored, .* weight above 0"):
        made(TRAK, tagger(), data[0], given=torch.zeros(N_TRAIN, LENGTH)).fit()
