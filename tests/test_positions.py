"""Examples with several positions: tokens and pixels, against dense formulas and by laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE, Batch, ClosedForm, Features, reliability
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    ClassRandom,
    ClassSimilarity,
    DiagonalEKFAC,
    KNNShapley,
    Random,
    Similarity,
    TracIn,
)
from stride_captum.adapters.gradients.dense_sides import weights_of_rows
from stride_captum.closed_form.memory import position_bytes
from stride_captum.data.batch import ExampleBatch
from stride_captum.data.reading import Reading
from stride_captum.influence.estimate import Estimate
from stride_captum.losses import MSE, BinaryCrossEntropy, CrossEntropy
from stride_captum.losses.positions import channels_last, position_rows
from stride_captum.losses.summed_positions import SummedPositions
from stride_captum.positions import Positions, joined
from stride_captum.responses import response_gradient, response_value
from stride_captum.score_agreement import feature_halves

N_TRAIN, N_TEST, LENGTH, N_TOKENS, N_CLASSES = 24, 7, 6, 11, 4
IGNORED = -100
CURVATURES = ["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"]


class Tagger(nn.Module):
    """Tokens to one row of logits for each; what stands before a token changes its features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_TOKENS, 8)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, N_CLASSES)

    def features(self, tokens: Tensor) -> list[Tensor]:
        first = self.embedding(tokens)
        second = torch.tanh(self.hidden(first))
        return [first, second + second.cumsum(1) / 10]

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.embedding(tokens)
        second = torch.tanh(self.hidden(first))
        return self.head(second + second.cumsum(1) / 10)


class ByTime(Tagger):
    """The same, with layers that see (positions, examples, features)."""

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.embedding(tokens.T)
        second = torch.tanh(self.hidden(first))
        return self.head(second + second.cumsum(0) / 10).transpose(0, 1)


class Segmenter(nn.Module):
    """Images to logits for each pixel, through maps of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, 3, padding=1, stride=2)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.tanh(self.second(torch.tanh(self.first(images))))
        return self.head(F.interpolate(maps, scale_factor=2))


@pytest.fixture(autouse=True)
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def tagged():
    """A model, training tokens and labels with ignored ones, and test tokens and labels."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, n: int) -> Tensor:
        return torch.randint(high, (n, LENGTH), generator=generator)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Tagger()
    x, y = draw(N_TOKENS, N_TRAIN), draw(N_CLASSES, N_TRAIN)
    y[:, 0], y[3], y[5, 2:] = IGNORED, IGNORED, IGNORED
    tests = draw(N_TOKENS, N_TEST), draw(N_CLASSES, N_TEST)
    tests[1][2, 3:] = IGNORED
    return model, TensorDataset(x, y), tests


def fitted(model, train, form="rows", residuals="temperature", **options):
    operators = ClosedForm(residuals=residuals, form=form, **options.pop("operators", {}))
    return STRIDE(model, train, operators=operators, batch_size=7, **options)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to a share of the largest."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


class Dense:
    """The formulas, with every pair of positions written out, for a `Tagger` at temperature T."""

    def __init__(self, model, train, tests, temperature=2.0, damping=0.3, weights=None):
        x, y = train.tensors
        counted, asked = y != IGNORED, tests[1] != IGNORED
        with torch.no_grad():
            layers, others = model.features(x), model.features(tests[0])
            z, self.z = model(x)[counted], model(tests[0])[asked]
        omega = torch.ones(len(z)) if weights is None else weights[counted]
        self.weight = omega.sum()
        rows = [layer[counted] for layer in layers]
        scale = [((r.square().sum(1) * omega).sum() / self.weight) ** -0.5 for r in rows]
        self.phi = self._with_constant([r * s for r, s in zip(rows, scale, strict=True)])
        self.phi_test = self._with_constant([o[asked] * s for o, s in zip(others, scale, strict=True)])
        self.p = (z / temperature).softmax(1)
        self.residuals = F.one_hot(y[counted], N_CLASSES) - self.p
        self.omega, self.damping = omega, damping
        self.examples = torch.arange(len(x)).repeat_interleave(counted.sum(1))
        self.tests = torch.arange(len(tests[0])).repeat_interleave(asked.sum(1))
        self.gradients = response_gradient(self.z, tests[1][asked], "margin")
        self.shape = len(tests[0]), len(x)

    @staticmethod
    def _with_constant(parts):
        return torch.cat([*parts, torch.ones(len(parts[0]), 1)], 1)

    def kronecker(self):
        a = (self.phi * self.omega[:, None]).T @ self.phi / self.weight
        a += self.damping * a.diagonal().mean() * torch.eye(len(a))
        p = self.p * self.omega[:, None]
        sigma = torch.diag(p.sum(0) / self.weight) - p.T @ self.p / self.weight
        sigma += self.damping * sigma.trace() / (N_CLASSES - 1) * torch.eye(N_CLASSES)
        features = self.phi_test @ torch.linalg.solve(a, self.phi.T)
        outputs = self.gradients @ torch.linalg.solve(sigma, self.residuals.T)
        return self.summed(features * outputs * self.omega)

    def gauss_newton(self):
        d, c = self.phi.shape[1], N_CLASSES
        hessians = torch.diag_embed(self.p) - self.p[:, :, None] * self.p[:, None, :]
        f = torch.einsum("i,id,ie,iab->daeb", self.omega, self.phi, self.phi, hessians).reshape(d * c, d * c)
        f = f / self.weight
        sigma = (hessians * self.omega[:, None, None]).sum(0) / self.weight
        a = (self.phi * self.omega[:, None]).T @ self.phi / self.weight
        f += self.damping * a.diagonal().mean() * sigma.trace() / (c - 1) * torch.eye(d * c)
        left = (self.phi_test[:, :, None] * self.gradients[:, None, :]).flatten(1)
        right = (self.phi[:, :, None] * (self.residuals * self.omega[:, None])[:, None, :]).flatten(1)
        return self.summed(left @ torch.linalg.solve(f, right.T))

    def summed(self, pairs):
        pairs = pairs / self.weight
        by_test = torch.zeros(self.shape[0], pairs.shape[1]).index_add_(0, self.tests, pairs)
        return torch.zeros(self.shape[0], self.shape[1]).index_add_(1, self.examples, by_test)


class TestClosedForm:
    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_it_is_the_dense_formula(self, tagged, form):
        method = fitted(*tagged[:2], form)
        same(method.influence(tagged[2]), Dense(*tagged).kronecker(), 1e-12)
        assert method.layers_ == ["hidden:input", "head:input"]
        assert method.operators_.form == form

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_gauss_newton_is_dense_too(self, tagged, form):
        method = fitted(*tagged[:2], form, operators={"curvature": "gauss-newton"})
        same(method.influence(tagged[2]), Dense(*tagged).gauss_newton(), 1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("curvature", CURVATURES)
    @pytest.mark.parametrize("residuals", ["training", "temperature", "leave-one-out", "both"])
    def test_both_forms_are_one(self, tagged, curvature, residuals):
        options = {"residuals": residuals, "operators": {"curvature": curvature}}
        rows, matrix = (fitted(*tagged[:2], form, **dict(options)) for form in ("rows", "matrix"))
        for normalize in (None, "cosine"):
            same(
                rows.influence(tagged[2], normalize=normalize),
                matrix.influence(tagged[2], normalize=normalize),
            )
        same(rows.self_influence(), matrix.self_influence())
        same(rows.mislabel_scores(), matrix.mislabel_scores())

    def test_products_of_pairs_are_products_of_matrices(self, tagged, monkeypatch):
        method = fitted(*tagged[:2]).fit()
        operators = type(method.operators_)
        found = []
        for pairs in (True, False):
            monkeypatch.setattr(operators, "_by_pairs", lambda self, *a, pairs=pairs: pairs)
            found.append(method.influence(tagged[2]))
        same(*found, 1e-12)

    def test_blocks_change_nothing(self, tagged):
        whole = fitted(*tagged[:2]).influence(tagged[2])
        same(fitted(*tagged[:2], memory_budget=4096).influence(tagged[2]), whole, 1e-12)
        loader = DataLoader(TensorDataset(*tagged[2]), batch_size=2)
        same(fitted(*tagged[:2]).influence(loader), whole, 1e-12)

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_self_influence_is_a_diagonal(self, tagged, form):
        method = fitted(*tagged[:2], form)
        own = method.self_influence()
        same(own, -method.influence(tagged[1].tensors, response="loss").diagonal())
        assert own[3] == 0
        assert own.min() >= 0

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_an_example_points_to_itself(self, tagged, form):
        method = fitted(*tagged[:2], form, residuals="training")
        cosine = -method.influence(tagged[1].tensors, response="loss", normalize="cosine")
        diagonal = torch.cat([cosine.diagonal()[:3], cosine.diagonal()[4:]])
        same(diagonal, torch.ones(N_TRAIN - 1))
        assert cosine.abs().max() < 1 + 1e-9
        assert (cosine[3] == 0).all()
        assert (cosine[:, 3] == 0).all()

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_vectors_multiply_to_scores(self, tagged, form):
        method = fitted(*tagged[:2], form)
        test = method.compute_intermediate_quantities(tagged[2])
        train = method.compute_intermediate_quantities([5, 0, 3], side="train")
        same(test @ train.T, method.influence(tagged[2])[:, [5, 0, 3]], 1e-12)

    def test_auto_takes_what_is_smaller(self, tagged):
        # 6 rows of 20 + 4 numbers, or 21 x 4 of a matrix
        assert fitted(*tagged[:2], "auto").fit().operators_.form == "matrix"
        few = TensorDataset(tagged[1].tensors[0][:, :2], tagged[1].tensors[1][:, 1:3])
        assert fitted(tagged[0], few, "auto").fit().operators_.form == "rows"

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["rows", "matrix"])
    @pytest.mark.parametrize("budget", [2**14, 2**28])
    @pytest.mark.parametrize(("repeats", "residuals"), [(5, "both"), (40, "both"), (40, "temperature")])
    def test_the_bytes_that_a_fit_keeps_are_those_that_were_counted(
        self, tagged, form, budget, repeats, residuals
    ):
        model, train, tests = tagged
        many = TensorDataset(*(part.repeat(repeats, 1) for part in train.tensors))
        torch.set_default_dtype(torch.float32)
        method = fitted(model.float(), many, form, residuals=residuals, memory_budget=budget).fit()
        method.influence(tests)
        positions = method.operators_.positions
        assert len(positions.examples) == positions.n_rows  # kept from the first sum over positions on
        counted = position_bytes(
            method.operators,
            len(many),
            positions.n_rows,
            [8, 12],
            N_CLASSES,
            in_memory=True,
            memory_budget=budget,
        )
        assert counted.form == form
        rows = method.operators_.rows
        parts = [method.operators_, positions, rows, rows.curvature, rows.curvature.inverse, rows.moments]
        kept = [*parts, *filter(None, [rows.head]), *([rows._residuals] if form == "rows" else [])]
        tensors = [t for t in tree_leaves([vars(part) for part in kept]) if torch.is_tensor(t)]
        measured = sum({t.data_ptr(): t.nbytes for t in tensors if len(t)}.values())
        assert counted.kept == pytest.approx(measured, rel=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize(("length", "form"), [(2, "rows"), (LENGTH, "matrix")])
    def test_its_bytes_are_counted_with_the_number_of_positions(self, tagged, length, form, monkeypatch):
        seconds = {"fit_seconds": 1.0, "query_seconds": 1.0, "fit_bytes": 0, "query_bytes": 0}
        monkeypatch.setattr(
            "stride_captum.closed_form.position_estimate.from_small_runs",
            lambda method, n_test, k: Estimate(
                n_train=len(method.train_dataset), n_test=n_test, k=k, **seconds, disk_bytes=0, basis="runs"
            ),
        )
        model, train, _ = tagged
        model, few = model.float(), [part[:, :length] for part in train.tensors]
        few[1] = few[1].clamp_min(0)
        torch.set_default_dtype(torch.float32)
        methods = [
            fitted(model, TensorDataset(*(part.repeat(n, 1) for part in few)), "auto") for n in (2, 40)
        ]
        found = [method.estimate(n_test=5) for method in methods]
        for method, estimate in zip(methods, found, strict=True):
            n = len(method.train_dataset)
            counted = position_bytes(method.operators, n, n * length, [8, 12], N_CLASSES, in_memory=True)
            assert counted.form == method.fit().operators_.form == form
            assert f"{length} positions an example in the form '{form}'" in estimate.basis
            assert counted.kept < estimate.fit_bytes < 6 * counted.kept + 2**21
            assert 4 * 5 * n < estimate.query_bytes
        more = len(methods[1].train_dataset) - len(methods[0].train_dataset)
        each = 4 * (length * 4 * (8 + 12 + N_CLASSES) + 2 * (8 + 12 + 1) * N_CLASSES)
        grown = (found[1].query_bytes - found[0].query_bytes) / (more * each)
        assert (grown > 0.9) if form == "rows" else (grown < 0.5)  # matrices are not made again

    @pytest.mark.slow
    def test_an_estimate_leaves_a_store_alone(self, tagged, tmp_path):
        for curvature in ("kronecker", "eigenvalue-corrected"):
            method = fitted(*tagged[:2], feature_store=tmp_path / "store", operators={"curvature": curvature})
            assert method.estimate(n_test=5).fit_seconds > 0
            assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_projected_features(self, tagged, form):
        """A projection to as many dimensions as there are is a rotation, up to its own error."""
        model, train, tests = tagged
        wanted = fitted(model, train, form, features=Features(projection="pca", projection_width=11))
        scores = wanted.influence(tests)
        assert wanted.projection_error_ < 0.1
        exact = fitted(model, train, form).influence(tests)
        assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > 0.9

    def test_saved_and_loaded(self, tagged, tmp_path):
        for form in ("rows", "matrix"):
            method = fitted(*tagged[:2], form)
            scores = method.influence(tagged[2])
            method.save(tmp_path / "method")
            again = STRIDE.load(tmp_path / "method", *tagged[:2])
            assert torch.equal(again.influence(tagged[2]), scores)
            assert torch.equal(again.self_influence(), method.self_influence())


class TestLeftOut:
    def test_a_head_without_the_example(self, tagged):
        """Residuals of each position are those of a ridge regression that has not seen its example."""
        method = fitted(*tagged[:2], residuals="leave-one-out").fit()
        dense = Dense(*tagged)
        h = torch.cat([dense.phi[:, :8], dense.phi[:, -1:]], 1)  # the head reads all layers but the last
        y = F.one_hot(tagged[1].tensors[1][tagged[1].tensors[1] != IGNORED], N_CLASSES).double()
        for example in (0, 5, 9):
            inside = dense.examples == example
            a = h.T @ h / len(h)
            ridge = 0.1 * a.diagonal().mean() * torch.eye(len(a))
            others = h[~inside]
            weights = torch.linalg.solve(others.T @ others / len(h) + ridge, others.T @ y[~inside] / len(h))
            found = method.operators_.rows.ridge_head.without_example[inside]
            same(found, y[inside] - h[inside] @ weights, 1e-9)

    def test_mislabel_scores_are_means_over_positions(self, tagged):
        method = fitted(*tagged[:2]).fit()
        left_out = method.operators_.rows.ridge_head.without_example.norm(dim=1)
        same(method.mislabel_scores(), method.operators_.positions.mean(left_out))


class TestLaws:
    @pytest.mark.parametrize("form", ["rows", "matrix"])
    @pytest.mark.parametrize("residuals", ["temperature", "both"])
    def test_padding_changes_nothing(self, tagged, form, residuals):
        model, train, tests = tagged
        x, y = (F.pad(part, (0, 4), value=v) for part, v in zip(train.tensors, (0, IGNORED), strict=True))
        padded = tuple(F.pad(part, (0, 3), value=v) for part, v in zip(tests, (5, IGNORED), strict=True))
        method = fitted(model, TensorDataset(x, y), form, residuals=residuals)
        same(method.influence(padded), fitted(model, train, form, residuals=residuals).influence(tests))
        assert (
            (method.influence(padded, per_position=True)[:, LENGTH:] == 0).all() if form == "rows" else True
        )

    @pytest.mark.parametrize("residuals", ["training", "temperature"])
    def test_the_positions_of_one_example_over_two_add_up(self, tagged, residuals):
        model, train, tests = tagged
        x, y = train.tensors
        first, second = y.clone(), y.clone()
        first[0, 3:], second[0, :3] = IGNORED, IGNORED
        split = TensorDataset(torch.cat([x, x[:1]]), torch.cat([first, second[:1]]))
        scores = fitted(model, split, residuals=residuals).influence(tests)
        whole = fitted(model, train, residuals=residuals).influence(tests)
        same(torch.cat([scores[:, :1] + scores[:, -1:], scores[:, 1:-1]], 1), whole)

    def test_an_ignored_label_is_a_weight_of_0(self, tagged):
        model, train, tests = tagged
        x, y = train.tensors
        ignored = y.clone()
        ignored[:, 4] = IGNORED
        weights = torch.ones(y.shape)
        weights[:, 4] = 0
        options = Batch(sample_weight=weights)
        same(
            fitted(model, train, batch=options).influence(tests),
            fitted(model, TensorDataset(x, ignored)).influence(tests),
        )

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    @pytest.mark.parametrize("residuals", ["temperature", "both"])
    def test_a_position_of_weight_0_in_the_data_is_ignored_on_both_sides(self, tagged, form, residuals):
        """Those of other test points and training examples, too; a test point of weight 0 is asked."""
        model, train, tests = tagged
        generator = torch.Generator().manual_seed(4)
        parts = []
        for x, y in (train.tensors, tests):
            w = torch.randint(0, 3, y.shape, generator=generator).double()
            w[1] = 0
            parts.append(((x, w, y), (x, w, y.masked_fill(w == 0, IGNORED))))
        made = [
            fitted(model, TensorDataset(*d), form, residuals, batch=Batch(sample_weight=1)) for d in parts[0]
        ]
        for name in ("influence", "self_influence"):
            same(*(getattr(method, name)(test) for method, test in zip(made, parts[1], strict=True)))
        same(*(m.influence(t, per_position=True) for m, t in zip(made, parts[1], strict=True)))
        same(*(m.compute_intermediate_quantities(t) for m, t in zip(made, parts[1], strict=True)))
        same(*(m.self_influence() for m in made))
        same(*(m.mislabel_scores() for m in made))
        same(*(m.influence(parts[1][0], normalize="cosine") for m in made))
        assert made[0].coverage_.equal(made[1].coverage_)
        assert not made[0].coverage_[1]
        x, w, y = parts[1][0]
        same(made[0].influence((x, torch.zeros(N_TEST), y)), made[0].influence((x, torch.ones(y.shape), y)))
        with pytest.raises(ValueError, match="`sample_weight` must hold one for each example"):
            made[0].influence((x, w[:, 1:], y))

    @pytest.mark.parametrize("soft", [False, True])
    def test_a_class_of_weight_0_is_ignored_where_nothing_is_smoothed(self, soft):
        weight = [1.0, 0.0, 2.0, 0.0]
        y = torch.tensor([[0, 1, IGNORED], [3, 2, 9]])
        wanted = [[True, False, False], [False, True, True]]
        if soft:
            y = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]], [[0, 1.0, 0, 0], [0, 0, 1.0, 0]]])
            wanted = [[True, False], [False, True]]
        assert CrossEntropy(weight=weight).counted(y).tolist() == wanted
        assert CrossEntropy(weight=weight, label_smoothing=0.1).counted(y).sum() == (4 if soft else 5)

    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_weights_are_in_the_dense_formula(self, tagged, form):
        weights = torch.rand(N_TRAIN, LENGTH, generator=torch.Generator().manual_seed(3))
        method = fitted(*tagged[:2], form, batch=Batch(sample_weight=weights))
        same(method.influence(tagged[2]), Dense(*tagged, weights=weights).kronecker(), 1e-12)

    def test_a_weight_of_an_example_is_that_of_its_positions(self, tagged):
        weights = torch.rand(N_TRAIN, generator=torch.Generator().manual_seed(3))
        each = weights[:, None].expand(-1, LENGTH)
        found = [
            fitted(*tagged[:2], batch=Batch(sample_weight=w)).influence(tagged[2]) for w in (weights, each)
        ]
        same(*found)

    def test_one_position_is_an_example_without(self, tagged):
        model, train, tests = tagged
        x, y = train.tensors[0][:, :1], train.tensors[1][:, 1:2].clamp_min(0)
        one = fitted(model, TensorDataset(x, y)).influence((tests[0][:, :1], tests[1][:, :1]))

        class Single(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tagger = model

            def forward(self, tokens: Tensor) -> Tensor:
                return self.tagger(tokens)[:, 0]

        plain = fitted(Single(), TensorDataset(x, y[:, 0])).influence((tests[0][:, :1], tests[1][:, 0]))
        same(one, plain)

    def test_time_first_layers_are_recognized(self, tagged):
        model, train, tests = tagged
        other = ByTime()
        other.load_state_dict(model.state_dict())
        same(fitted(other, train).influence(tests), fitted(model, train).influence(tests))

    def test_classes_may_stand_first(self, tagged):
        model, train, tests = tagged

        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tagger = model

            def forward(self, tokens: Tensor) -> Tensor:
                return self.tagger(tokens).transpose(1, 2)

        wanted = fitted(model, train).influence(tests)
        same(fitted(First(), train, loss=CrossEntropy(class_dim=1)).influence(tests), wanted)
        with pytest.raises(ValueError, match=r"labels of shape \(3, 4\) .*class_dim"):
            fitted(First(), train).fit()


class TestSplitScores:
    @pytest.mark.parametrize("form", ["rows", "matrix"])
    def test_scores_of_test_positions_add_up(self, tagged, form):
        method = fitted(*tagged[:2], form)
        split = method.influence(tagged[2], per_position=True)
        assert split.shape == (N_TEST, LENGTH, N_TRAIN)
        same(split.sum(1), method.influence(tagged[2]), 1e-12)
        assert (split[2, 3:] == 0).all()
        alone = tagged[2][0], torch.full_like(tagged[2][1], IGNORED)
        alone[1][:, 4] = tagged[2][1][:, 4]
        same(split[:, 4], method.influence(alone), 1e-12)

    def test_scores_of_training_positions_add_up(self, tagged):
        method = fitted(*tagged[:2])
        scores = method.influence(tagged[2])
        for example in (0, 5, 7):
            split = method.positions_of(tagged[2], example)
            same(split.sum(1), scores[:, example], 1e-12)
            ignored = tagged[1].tensors[1][example] == IGNORED
            assert (split[:, ignored[: split.shape[1]]] == 0).all()

    def test_what_has_no_meaning_is_refused(self, tagged):
        method = fitted(*tagged[:2], "matrix")
        for options, name in (({"k": 3}, "k"), ({"aggregate": True}, "aggregate")):
            with pytest.raises(ValueError, match=f"`{name}` must be .* with per_position=True"):
                method.influence(tagged[2], per_position=True, **options)
        with pytest.raises(ValueError, match="`normalize` must be None with per_position=True"):
            method.influence(tagged[2], per_position=True, normalize="cosine")
        with pytest.raises(ValueError, match="`form` must be 'rows'"):
            method.positions_of(tagged[2], 0)
        with pytest.raises(ValueError, match="`normalize` must be None in the constructor for positions_of"):
            fitted(*tagged[:2], normalize="cosine").positions_of(tagged[2], 0)
        thresholded = fitted(*tagged[:2], operators={"threshold": 0.01})
        with pytest.raises(ValueError, match=r"`threshold` must be 0 for scores of positions.*got 0.01"):
            thresholded.influence(tagged[2], per_position=True)
        with pytest.raises(ValueError, match=r"`threshold` must be 0 for scores of positions.*got 0.01"):
            thresholded.positions_of(tagged[2], 0)
        with pytest.raises(ValueError, match="`per_position` must be a method"):
            Random(*tagged[:2]).influence(tagged[2], per_position=True)


class TestQueries:
    def test_targets_of_examples_are_those_of_their_positions(self, tagged):
        method = fitted(*tagged[:2])
        inputs, targets = tagged[2][0], torch.arange(N_TEST) % N_CLASSES
        labels = targets[:, None].expand(-1, LENGTH)
        same(method.influence((inputs,), target=targets), method.influence((inputs, labels)))
        predicted = tagged[0](inputs).argmax(2)
        same(method.influence((inputs,), target="predicted"), method.influence((inputs, predicted)))

    @pytest.mark.parametrize("response", ["logit", "probability", "log-probability", "loss"])
    def test_a_response_is_a_sum_over_positions(self, tagged, response):
        method = fitted(*tagged[:2])
        parts = []
        for t in range(LENGTH):
            alone = torch.full_like(tagged[2][1], IGNORED)
            alone[:, t] = tagged[2][1][:, t]
            parts.append(method.influence((tagged[2][0], alone), response=response))
        same(sum(parts), method.influence(tagged[2], response=response), 1e-12)

    def test_padding_is_not_asked_without_labels(self, tagged):
        model, train, tests = tagged

        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tagger = model

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                return self.tagger(input_ids * attention_mask)

        class Dicts(Dataset):
            def __len__(self) -> int:
                return N_TRAIN

            def __getitem__(self, i: int) -> dict[str, Tensor]:
                x, y = train[i]
                return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}

        mask = torch.ones_like(tests[0])
        mask[:, 4:] = 0
        method = fitted(Masked(), Dicts())
        batch = {"input_ids": tests[0], "attention_mask": mask}
        short = {key: part[:, :4] for key, part in batch.items()}
        same(method.influence(batch, target="predicted"), method.influence(short, target="predicted"))

    def test_the_temperature_is_matched_to_held_out_positions(self, tagged):
        model, train, tests = tagged
        for parameter in model.head.parameters():
            parameter.data.mul_(20)
        method = fitted(model, train, held_out=TensorDataset(*tests)).fit()
        x, y = train.tensors
        counted, asked = y != IGNORED, tests[1] != IGNORED
        with torch.no_grad():
            z, z_test = model(x)[counted], model(tests[0])[asked]

        def doubt(z, y, temperature=1.0):
            return float(1 - (z / temperature).softmax(1).gather(1, y[:, None]).mean())

        wanted = doubt(z_test, tests[1][asked])
        if doubt(z, y[counted]) < wanted:
            assert doubt(z, y[counted], method.temperature_) == pytest.approx(wanted, rel=1e-3)
        else:
            assert method.temperature_ == 1

    def test_checkpoints_are_averaged(self, tagged):
        model, train, tests = tagged
        other = Tagger()
        both = STRIDE(
            model,
            train,
            checkpoints=[model.state_dict(), other.state_dict()],
            operators=ClosedForm(temperature=2.0, residuals="temperature"),
        )
        alone = [fitted(each, train).influence(tests) for each in (model, other)]
        same(both.influence(tests), sum(alone) / 2)
        same(both.influence(tests, per_position=True).sum(1), sum(alone) / 2)


class TestImages:
    @pytest.fixture
    def images(self):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Segmenter()
        x, y = (
            torch.randn(12, 1, 8, 8, generator=generator),
            torch.randint(3, (12, 8, 8), generator=generator),
        )
        return model, TensorDataset(x, y), (x[:3] + 0.1, y[:3])

    def test_maps_are_resized_to_the_labels(self, images):
        model, train, tests = images
        method = fitted(model, train, operators={"damping": 1.0})
        scores = method.influence(tests)
        assert scores.shape == (3, 12)
        assert method.layers_ == ["second:input", "head:input"]
        assert method.influence(tests, per_position=True).shape == (3, 64, 12)
        split = method.influence(tests, per_position=True)
        same(split.sum(1), scores, 1e-12)

    def test_a_finer_map_is_averaged_and_a_coarser_one_interpolated(self, images):
        from stride_captum.layers.pooling import Tap
        from stride_captum.layers.positions import at_positions

        tap = Tap("conv", True, 2, 1, 2, per_position=True)
        fine, coarse = torch.randn(3, 8, 4, 2), torch.randn(3, 2, 2, 2)
        found = at_positions(fine, (4, 4), tap).unflatten(1, (4, 4))
        same(found, fine.unflatten(1, (4, 2)).mean(2), 1e-12)
        wanted = F.interpolate(coarse.movedim(-1, 1), size=(4, 4), mode="bilinear")
        same(at_positions(coarse, (4, 4), tap), wanted.movedim(1, -1).flatten(1, 2), 1e-12)
        for shape in ((3, 5, 2), (3, 2)):
            with pytest.raises(ValueError, match=r"give one row for each of the positions \(4, 4\)"):
                at_positions(torch.randn(*shape), (4, 4), tap)

    @pytest.mark.parametrize("loss", [BinaryCrossEntropy(), MSE()])
    def test_losses_of_several_outputs(self, images, loss):
        model, train, tests = images
        y = (torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3)) > 0).double()
        method = STRIDE(
            model, TensorDataset(train.tensors[0], y), loss=loss, operators=ClosedForm(residuals="training")
        )
        scores = method.influence((tests[0], y[:3]))
        same(
            method.self_influence()[:3],
            -method.influence((train.tensors[0][:3], y[:3]), response="loss").diagonal(),
        )
        assert scores.shape == (3, 12)


class TestRefused:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(24, dtype=torch.long), r"labels of shape \(3, 6\) for outputs of shape \(3, 6, 4\)"),
            (torch.zeros(24, 5, dtype=torch.long), "class_dim"),
            (torch.full((24, 6), 4), r"class indices in \[0, 4\)"),
            (torch.full((24, 6), IGNORED), "at least one label that is not ignored"),
        ],
    )
    def test_labels_that_do_not_fit(self, tagged, labels, message):
        with pytest.raises(ValueError, match=message):
            fitted(tagged[0], TensorDataset(tagged[1].tensors[0], labels)).fit()

    def test_what_does_not_take_positions(self, tagged, monkeypatch):
        model, train, _ = tagged
        monkeypatch.setattr(ClosedForm, "takes_positions", False)
        with pytest.raises(
            ValueError, match="`model` must give one row of outputs per example for operators="
        ):
            fitted(model, train).fit()

    @pytest.mark.parametrize("value", [0, True, "1"])
    def test_an_axis_that_is_none(self, value):
        with pytest.raises(ValueError, match="`class_dim` must be an axis"):
            CrossEntropy(class_dim=value)

    def test_five_axes_are_not_guessed(self):
        with pytest.raises(ValueError, match="`class_dim` must be given"):
            channels_last(torch.zeros(2, 3, 4, 4, 4), None)
        assert channels_last(torch.zeros(2, 3, 4, 5, 6), 1).shape == (2, 4, 5, 6, 3)
        with pytest.raises(ValueError, match="`class_dim` must be an axis"):
            channels_last(torch.zeros(2, 3, 4), 3)

    def test_weights_of_another_shape(self, tagged):
        weights = torch.ones(N_TRAIN, LENGTH + 1)
        with pytest.raises(ValueError, match="`sample_weight` must hold one for each example"):
            fitted(*tagged[:2], batch=Batch(sample_weight=weights)).fit()

    def test_values_that_are_not_finite_are_named_by_example(self, tagged):
        model, train, _ = tagged
        with torch.no_grad():
            model.embedding.weight[4] = torch.nan
        counted = train.tensors[1] != IGNORED
        seen = ((train.tensors[0] == 4).cumsum(1) > 0) & counted  # it spreads to what stands behind it
        first = int(seen.any(1).nonzero()[0])
        with pytest.raises(ValueError, match=rf"NaN or infinity for example {first}"):
            fitted(model, train, layers=["hidden:input", "head:input"]).fit()


@pytest.mark.parametrize("form", ["rows", "matrix"])
def test_what_needs_one_row_an_example_says_so(tagged, form):
    method = fitted(*tagged[:2], form)
    match = "`model` must have one row of outputs per example .*; got several positions"
    with pytest.raises(ValueError, match=match):
        method.mislabel_scores(per_label=True)


class HalfTheFeatures(nn.Module):
    """A `Tagger` whose layer `some` has some of the features of its last hidden layer."""

    def __init__(self, model: Tagger, columns: Tensor) -> None:
        super().__init__()
        self.model, self.columns, self.some = model, columns, nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        self.some(self.model.features(tokens)[1][..., self.columns])
        return self.model(tokens)


class TestReliability:
    @pytest.mark.slow
    @pytest.mark.parametrize("residuals", ["both", "temperature"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_one_checkpoint_is_compared_by_halves_of_its_features(self, tagged, residuals, weighted):
        model, train, tests = tagged
        omega = torch.rand(N_TRAIN, LENGTH, generator=torch.Generator().manual_seed(3))
        batch = Batch(sample_weight=omega) if weighted else None
        options = {"residuals": residuals, "batch": batch, "operators": {"temperature": 3.0}}
        method = fitted(model, train, layers=["head:input"], **dict(options))
        agreements = []
        for split in range(2):
            halves = [
                fitted(HalfTheFeatures(model, columns), train, "matrix", layers=["some"], **dict(options))
                for columns in feature_halves([12], 5 + split)[0]
            ]
            pair = torch.stack([half.influence(tests) for half in halves], 1)
            agreements.append(torch.stack([torch.corrcoef(rows)[0, 1] for rows in pair]))
        r = torch.stack(agreements).mean(0).clamp(min=0)
        same(reliability(method, tests, n_splits=2, seed=5), 2 * r / (1 + r))
        assert float(r.std()) > 0.01

    def test_padding_changes_nothing(self, tagged):
        model, train, tests = tagged
        x, y = (F.pad(part, (0, 4), value=v) for part, v in zip(train.tensors, (0, IGNORED), strict=True))
        padded = tuple(F.pad(part, (0, 3), value=v) for part, v in zip(tests, (5, IGNORED), strict=True))
        wanted = reliability(fitted(model, train), tests)
        same(reliability(fitted(model, TensorDataset(x, y)), padded), wanted)

    @pytest.mark.parametrize("projection", [None, "random"])
    def test_operators_with_matrices_read_the_features_again(self, tagged, projection):
        model, train, tests = tagged
        omega = torch.rand(N_TRAIN, LENGTH, generator=torch.Generator().manual_seed(3))
        checkpoint = [{name: 1.1 * value for name, value in model.state_dict().items()}]
        features = Features(projection=projection, projection_width=5)
        options = {"features": features, "batch": Batch(sample_weight=omega), "checkpoints": checkpoint}
        by_rows, by_matrices = (
            reliability(fitted(model, train, form, **options), tests) for form in ("rows", "matrix")
        )
        same(by_matrices, by_rows)


class TestBaselines:
    METHODS = (TracIn, TRAK, DiagonalEKFAC, EKFAC)

    def made(self, method, model, train, **options):
        if method is EKFAC:
            pytest.importorskip("kronfluence")
        own = {TRAK: {"projection_dim": 200}, DiagonalEKFAC: {"fisher": "exact"}}.get(method, {})
        return method(model, train, layers=["hidden", "head"], **own, **options)

    @staticmethod
    def gradients(model, tokens, labels, margin):
        parameters = [*model.hidden.parameters(), *model.head.parameters()]
        rows = []
        for x, y in zip(tokens, labels, strict=True):
            counted = y != IGNORED
            z = model(x[None])[0][counted]
            value = response_value(z, y[counted], "margin" if margin else "log-probability").sum()
            found = torch.autograd.grad(value, parameters)
            rows.append(torch.cat([g.flatten() for g in found]))
        return torch.stack(rows)

    def test_tracin_multiplies_gradients_of_sums_over_positions(self, tagged):
        model, train, tests = tagged
        wanted = self.gradients(model, *tests, True) @ self.gradients(model, *train.tensors, False).T
        same(self.made(TracIn, model, train).influence(tests), wanted, 1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("residuals", ["training", "temperature"])
    def test_laws(self, tagged, method, residuals):
        made = self.made(method, *tagged[:2], residuals=residuals)
        scores = made.influence(tagged[2])
        assert (scores[:, 3] == 0).all()
        same(made.self_influence(), -made.influence(tagged[1].tensors, response="loss").diagonal(), 1e-8)
        parts = []
        for t in range(LENGTH):
            alone = torch.full_like(tagged[2][1], IGNORED)
            alone[:, t] = tagged[2][1][:, t]
            parts.append(made.influence((tagged[2][0], alone)))
        same(sum(parts), scores, 1e-8)

    @pytest.mark.parametrize("method", METHODS)
    def test_one_position_is_an_example_without(self, tagged, method):
        model, train, tests = tagged
        x, y = train.tensors[0][:, :1], train.tensors[1][:, 1:2].clamp_min(0)
        one = self.made(method, model, TensorDataset(x, y)).influence((tests[0][:, :1], tests[1][:, :1]))

        class Single(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tagger = model
                self.hidden, self.head = model.hidden, model.head

            def forward(self, tokens: Tensor) -> Tensor:
                return self.tagger(tokens)[:, 0]

        plain = self.made(method, Single(), TensorDataset(x, y[:, 0]))
        same(one, plain.influence((tests[0][:, :1], tests[1][:, 0])), 1e-8)

    @pytest.mark.parametrize("residuals", ["training", "temperature"])
    def test_class_weights_multiply_positions_of_the_training_side(self, tagged, residuals):
        model, train, tests = tagged
        weight = torch.tensor([1.0, 2.0, 10.0, 0.0])
        tests = tests[0], tests[1].masked_fill(tests[1] == 3, IGNORED)
        made = self.made(TracIn, model, train, loss=CrossEntropy(weight=weight), residuals=residuals)
        scores = made.influence(tests)
        same(made.self_influence(), -made.influence(train.tensors, response="loss").diagonal(), 1e-12)
        parts = []  # of one class after the other
        for c in range(N_CLASSES):
            labels = torch.where(train.tensors[1] == c, c, IGNORED)
            alone = self.made(TracIn, model, TensorDataset(train.tensors[0], labels), residuals=residuals)
            parts.append(weight[c] * alone.influence(tests))
        same(sum(parts), scores, 1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("method", [TracIn, TRAK])
    @pytest.mark.parametrize("target", [0, 1, "predicted", "label"])
    @pytest.mark.parametrize("response", ["margin", "loss"])
    def test_the_ignored_index_may_be_a_class(self, tagged, method, target, response):
        """It hides labels, not the class that a response is about."""
        model, train, tests = tagged
        sets, loss = [], CrossEntropy(ignore_index=0)
        for ignored in (0, IGNORED):
            rows = (train.tensors, tests)
            sets.append([(x, torch.where(y <= 0, ignored, y)) for x, y in rows])
        (train_0, test_0), (train_1, test_1) = sets
        options = {"residuals": "temperature"}
        found = self.made(method, model, TensorDataset(*train_0), loss=loss, held_out=test_0, **options)
        wanted = self.made(method, model, TensorDataset(*train_1), held_out=test_1, **options)
        asked = {"target": target, "response": response}
        scores = wanted.influence(test_1, **asked)
        same(found.influence(test_0, **asked), scores, 1e-12)
        assert scores.any()
        same(found.self_influence(test_0), wanted.self_influence(test_1), 1e-12)
        assert found._states[0].temperature == wanted._states[0].temperature

    FISHERS = (
        (DiagonalEKFAC, {"fisher": "exact"}),
        (DiagonalEKFAC, {"fisher": "exact", "dense": "diagonal"}),
        (EKFAC, {"fisher": "empirical"}),
        (EKFAC, {"fisher": "empirical", "strategy": "kfac"}),
        (EKFAC, {"fisher": "empirical", "strategy": "diagonal"}),
    )

    def with_fisher(self, method, model, train, options):
        if method is EKFAC:
            pytest.importorskip("kronfluence")
        return method(model, train, layers=["hidden", "head"], batch_size=7, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "options"), FISHERS)
    def test_ignored_positions_enter_no_side_of_the_fisher_matrix(self, tagged, method, options):
        model, train, tests = tagged
        x, y = train.tensors
        ignored = y.clone()
        ignored[:, 3:] = IGNORED
        other = x.clone()
        other[:, 3:] = (other[:, 3:] + 1) % N_TOKENS  # nothing that stands behind is read by what counts
        few = [TensorDataset(part, ignored) for part in (x, other)]
        asked = tests[0], tests[1].clone()
        asked[1][:, 3:] = IGNORED
        one, two = (self.with_fisher(method, model, data, options).influence(asked) for data in few[:2])
        same(one, two, 1e-8)
        short = self.with_fisher(method, model, TensorDataset(x[:, :3], ignored[:, :3]), options)
        same(short.influence(tuple(part[:, :3] for part in asked)), one, 1e-8)

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "options"), FISHERS)
    @pytest.mark.parametrize("network", [Tagger, ByTime])
    def test_padding_changes_no_score(self, tagged, method, options, network):
        plain, train, tests = tagged
        model = network()
        model.load_state_dict(plain.state_dict())
        x, y = (F.pad(part, (0, 4), value=v) for part, v in zip(train.tensors, (0, IGNORED), strict=True))
        padded = tuple(F.pad(part, (0, 4), value=v) for part, v in zip(tests, (5, IGNORED), strict=True))
        wanted = self.with_fisher(method, model, train, options)
        longer = self.with_fisher(method, model, TensorDataset(x, y), options)
        same(longer.influence(padded), wanted.influence(tests), 1e-8)
        same(longer.self_influence(), wanted.self_influence(), 1e-8)

    def test_labels_that_are_all_ignored_are_refused(self, tagged):
        pytest.importorskip("kronfluence")
        none = TensorDataset(tagged[1].tensors[0], torch.full((N_TRAIN, LENGTH), IGNORED))
        with pytest.raises(ValueError, match="`train_dataset` must have at least one label that is not ign"):
            EKFAC(tagged[0], none).fit()

    def test_a_prompt_stays_where_it_is_read(self, tagged):
        """The first position has no label, and all behind it read it; nothing reads the last two."""
        model, train, _ = tagged
        x, y = train.tensors[0][6:9], train.tensors[1][6:9].clone()
        y[:, 4:] = IGNORED
        loss = SummedPositions(position=CrossEntropy(), n_positions=LENGTH, n_outputs=N_CLASSES)
        width = LENGTH * N_CLASSES
        layers = {model.hidden: "hidden", model.head: "head"}
        batch = ExampleBatch((x, y), Reading(loss=loss))
        found = weights_of_rows(model, layers, batch, loss.position_weights(y), width)
        assert {name: (each == 1).reshape(3, -1).all(0).tolist() for name, each in found.items()} == {
            "hidden": [True] * 4 + [False] * 2,
            "head": [False] + [True] * 3 + [False] * 2,
        }
        assert weights_of_rows(model, layers, batch, torch.ones(3, LENGTH), width) == {}
        model.head.weight.data.zero_()  # a label stays where its unit is dead
        found = weights_of_rows(model, layers, batch, loss.position_weights(y), width)
        assert (found["hidden"] == 1).reshape(3, -1).all(0).tolist() == [False] + [True] * 3 + [False] * 2

    def test_controls_take_positions(self, tagged):
        for method in (Random, Similarity):
            assert method(*tagged[:2]).influence(tagged[2]).shape == (N_TEST, N_TRAIN)

    @pytest.mark.parametrize("method", [ClassRandom, ClassSimilarity, KNNShapley])
    def test_methods_that_compare_classes_are_refused(self, tagged, method):
        must = f"`model` must return one row of logits for each example for {method.__name__}, "
        with pytest.raises(ValueError, match=must):
            method(*tagged[:2]).fit()

    def test_examples_of_other_lengths_are_refused(self, tagged):
        model, train, tests = tagged
        method = self.made(TracIn, model, train)
        with pytest.raises(ValueError, match="`model` must give 6 positions for every example"):
            method.influence((tests[0][:, :4], tests[1][:, :4]))

    def test_saved_and_loaded(self, tagged, tmp_path):
        method = self.made(TRAK, *tagged[:2])
        scores = method.influence(tagged[2])
        method.save(tmp_path / "method")
        assert torch.equal(TRAK.load(tmp_path / "method", *tagged[:2]).influence(tagged[2]), scores)


class TestRowsOfPositions:
    def test_sums_spreads_and_places(self):
        positions = Positions(torch.tensor([2, 0, 3]))
        rows = torch.arange(5.0)[:, None]
        assert positions.sum(rows).flatten().tolist() == [1.0, 0.0, 9.0]
        assert positions.mean(rows).flatten().tolist() == [0.5, 0.0, 3.0]
        assert positions.spread(torch.tensor([7, 8, 9])).tolist() == [7, 7, 9, 9, 9]
        assert [positions.rows_of(s) for s in (slice(0, 1), slice(1, 3))] == [slice(0, 2), slice(2, 5)]
        assert positions.padded(rows).squeeze(2).tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
        assert torch.equal(positions.padded(rows)[positions.filled()], rows)

    def test_rows_stand_where_their_positions_are(self):
        kept = torch.tensor([[False, True, True, False], [True, False, False, True]])
        positions = Positions.of_mask(kept)
        assert positions.in_place(torch.tensor([1.0, 2, 3, 4]), 4).tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]
        both = joined([positions, positions.of(slice(1, 2))])
        assert both.counts.tolist() == [2, 2, 2]
        assert both.in_place(torch.tensor([1.0, 2, 3, 4, 5, 6]))[2].tolist() == [5, 0, 0, 6]

    @pytest.mark.parametrize("most", [1, 2, 3, 100])
    def test_blocks_hold_whole_examples(self, most):
        positions = Positions(torch.tensor([2, 0, 3, 1, 0, 1]))
        blocks = list(positions.blocks(most))
        assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(6))
        for block in blocks:
            n_rows = int(positions.counts[block].sum())
            assert n_rows <= most or block.stop - block.start == 1

    def test_rows_of_a_batch(self):
        outputs, labels = torch.randn(2, 3, 4), torch.tensor([[0, IGNORED, 1], [IGNORED, 2, 3]])
        found = position_rows(CrossEntropy(), outputs, labels, None, "inputs")
        assert torch.equal(found.outputs, outputs[labels != IGNORED])
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2, 3]
        other = position_rows(CrossEntropy(ignore_index=3), outputs, labels.clamp_min(0), None, "inputs")
        assert other.positions.counts.tolist() == [3, 2]
