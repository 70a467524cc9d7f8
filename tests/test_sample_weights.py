"""Weights of examples and classes, and soft labels: laws for every loss and curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, Batch, ClosedForm, RandomSubsets, Trained
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    ClassSimilarity,
    ConfidentLearning,
    DiagonalEKFAC,
    KNNShapley,
    Similarity,
    TracIn,
)
from stride_captum.features.store import FeatureStore
from stride_captum.influence.query import Query
from stride_captum.losses import BinaryCrossEntropy, CrossEntropy
from stride_captum.responses import response_gradient

N, N_TEST, D, H, C = 30, 5, 5, 6, 3
KINDS = ["training", "temperature", "leave-one-out", "both"]
CURVATURES = ["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"]
LOSSES = ["cross_entropy", "binary_cross_entropy", "mse"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = Net().double().eval()
    x, x_test = torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
    scores = torch.randn(N, C).double()
    labels = {
        "cross_entropy": scores.argmax(1),
        "binary_cross_entropy": (scores > 0).double(),
        "mse": scores,
    }
    return model, x, labels, x_test, {name: y[:N_TEST].roll(1, 0) for name, y in labels.items()}


def stride(model, x, y, loss, kind="both", curvature="kronecker", weights=None):
    batch = None if weights is None else Batch(sample_weight=weights)
    operators = ClosedForm(residuals=kind, curvature=curvature)
    data = TensorDataset(x, y)
    return STRIDE(model, data, layers=["fc1:input", "act"], loss=loss, operators=operators, batch=batch)


def kinds_of(loss, kinds):
    return [kind for kind in kinds if loss != "mse" or kind != "temperature"]


CASES = [(loss, kind, name) for loss in LOSSES for name in CURVATURES for kind in kinds_of(loss, KINDS)]
#: Left-out residuals of what is there twice are of one that has seen the other.
SEEN = [case for case in CASES if case[1] in ("training", "temperature")]


def close(found: Tensor, wanted: Tensor, curvature: str) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=(1e-7 if curvature == "gauss-newton" else 1e-11) * scale
    )


@pytest.mark.parametrize(("loss", "kind", "curvature"), CASES)
class TestOne:
    @pytest.mark.slow
    def test_a_weight_of_one_changes_no_bit(self, problem, loss, kind, curvature):
        model, x, labels, xt, yt = problem
        plain = stride(model, x, labels[loss], loss, kind, curvature)
        ones = stride(model, x, labels[loss], loss, kind, curvature, torch.ones(N))
        for response in plain.loss.responses:
            found = ones.influence((xt, yt[loss]), response=response)
            assert found.equal(plain.influence((xt, yt[loss]), response=response))
        assert ones.self_influence().equal(plain.self_influence())
        assert ones.mislabel_scores().equal(plain.mislabel_scores())

    def test_a_weight_of_zero_is_removal(self, problem, loss, kind, curvature):
        model, x, labels, xt, yt = problem
        keep, weights = torch.arange(4, N), torch.ones(N)
        weights[:4] = 0
        found = stride(model, x, labels[loss], loss, kind, curvature, weights)
        wanted = stride(model, x[keep], labels[loss][keep], loss, kind, curvature)
        scores = found.influence((xt, yt[loss]))
        close(scores[:, keep], wanted.influence((xt, yt[loss])), curvature)
        assert not scores[:, :4].any()
        close(found.self_influence()[keep], wanted.self_influence(), curvature)
        close(found.mislabel_scores()[keep], wanted.mislabel_scores(), curvature)

    def test_all_weights_times_a_number_change_nothing(self, problem, loss, kind, curvature):
        model, x, labels, xt, yt = problem
        weights = torch.rand(N).double() + 0.5
        one, three = (
            stride(model, x, labels[loss], loss, kind, curvature, w) for w in (weights, 3 * weights)
        )
        close(three.influence((xt, yt[loss])), one.influence((xt, yt[loss])), curvature)
        close(
            three.influence((xt, yt[loss]), normalize="cosine"),
            one.influence((xt, yt[loss]), normalize="cosine"),
            curvature,
        )


@pytest.mark.parametrize(("loss", "kind", "curvature"), SEEN)
def test_a_weight_of_two_is_a_duplicate(problem, loss, kind, curvature):
    model, x, labels, xt, yt = problem
    twice, weights = torch.cat([torch.arange(N), torch.arange(3)]), torch.ones(N)
    weights[:3] = 2
    found = stride(model, x, labels[loss], loss, kind, curvature, weights)
    wanted = stride(model, x[twice], labels[loss][twice], loss, kind, curvature)
    scores = wanted.influence((xt, yt[loss]))
    sums = scores[:, :N].clone()
    sums[:, :3] += scores[:, N:]
    close(found.influence((xt, yt[loss])), sums, curvature)
    own = wanted.self_influence()
    both = own[:N].clone()
    both[:3] += own[N:]
    close(found.self_influence(), both, curvature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", CURVATURES)
class TestSoftLabels:
    @pytest.mark.slow
    def test_one_hot_labels_are_hard_labels(self, problem, kind, curvature):
        model, x, labels, xt, yt = problem
        y, test = labels["cross_entropy"], yt["cross_entropy"]
        hot, hot_test = (nn.functional.one_hot(a, C).double() for a in (y, test))
        hard = stride(model, x, y, "cross_entropy", kind, curvature)
        soft = stride(model, x, hot, "cross_entropy", kind, curvature)
        for response in hard.loss.responses:
            wanted = hard.influence((xt, test), response=response)
            for labels_of_test in (test, hot_test):
                close(soft.influence((xt, labels_of_test), response=response), wanted, curvature)
        close(soft.self_influence(), hard.self_influence(), curvature)
        close(soft.mislabel_scores(), hard.mislabel_scores(), curvature)

    def test_class_weights_are_weights_of_examples(self, problem, kind, curvature):
        model, x, labels, xt, yt = problem
        y, test = labels["cross_entropy"], (xt, yt["cross_entropy"])
        w = torch.tensor([0.5, 2.0, 1.0]).double()
        found = stride(model, x, y, CrossEntropy(weight=w), kind, curvature)
        wanted = stride(model, x, y, "cross_entropy", kind, curvature, w[y])
        close(found.influence(test), wanted.influence(test), curvature)
        close(found.self_influence(), wanted.self_influence(), curvature)

    def test_smoothing_is_a_soft_label(self, problem, kind, curvature):
        model, x, labels, xt, yt = problem
        y, test = labels["cross_entropy"], (xt, yt["cross_entropy"])
        soft = 0.8 * nn.functional.one_hot(y, C).double() + 0.2 / C
        found = stride(model, x, y, CrossEntropy(label_smoothing=0.2), kind, curvature)
        wanted = stride(model, x, soft, "cross_entropy", kind, curvature)
        close(found.influence(test), wanted.influence(test), curvature)
        close(found.self_influence(), wanted.self_influence(), curvature)


class TestGradientsOfTorch:
    """What the loss says against `nn.CrossEntropyLoss`, term by term."""

    z = torch.randn(8, C, generator=torch.Generator().manual_seed(3)).double()
    hard = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])

    @pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.5]])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("soft", [False, True])
    def test_residuals(self, weight, smoothing, soft):
        y = torch.rand(8, C, generator=torch.Generator().manual_seed(4)).double() if soft else self.hard
        y = y / y.sum(1, keepdim=True) if soft else y
        loss, z = CrossEntropy(weight=weight, label_smoothing=smoothing), self.z.clone().requires_grad_()
        w = None if weight is None else torch.tensor(weight).double()
        losses = nn.functional.cross_entropy(z, y, w, reduction="none", label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        omega = loss.weights(y)
        omega = torch.ones(8).double() if omega is None else omega
        torch.testing.assert_close(-omega[:, None] * loss.residuals(self.z, y), gradient)
        torch.testing.assert_close(omega * loss.values(self.z, y), losses.detach())
        torch.testing.assert_close(loss.response_gradient(self.z, y, "loss"), -loss.residuals(self.z, y))

    def test_other_responses_are_about_the_likeliest_class(self):
        y = torch.tensor([[0.2, 0.7, 0.1]]).double()
        asked = CrossEntropy().asked(self.z[:1], y, "label", "margin")
        assert asked.tolist() == [1]
        found = CrossEntropy().response_gradient(self.z[:1], asked, "margin")
        torch.testing.assert_close(found, response_gradient(self.z[:1], torch.tensor([1]), "margin"))

    def test_a_sure_one_hot_label_keeps_its_digits(self):
        z = torch.tensor([[60.0, 0.0]]).double()
        soft = CrossEntropy().residuals(z, torch.tensor([[1.0, 0.0]]).double())
        torch.testing.assert_close(soft, CrossEntropy().residuals(z, torch.tensor([0])), rtol=1e-14, atol=0)


def test_trained_operators_take_no_distributions_over_classes(problem):
    model, x, labels, *_ = problem
    soft = nn.functional.one_hot(labels["cross_entropy"], C).double()
    with pytest.raises(ValueError, match=r"`operators` must be ClosedForm\(...\) for labels that are distr"):
        STRIDE(model, TensorDataset(x, soft), operators=Trained(subsets=RandomSubsets(9))).fit()


def test_weights_of_1_change_nothing_of_trained_operators(planted):
    model, train, test = planted
    operators = Trained(subsets=RandomSubsets(9), iterations=5)
    ones = Batch(sample_weight=torch.ones(len(train)))
    plain = STRIDE(model, train, operators=operators).influence(test.tensors)
    found = STRIDE(model, train, operators=operators, batch=ones).influence(test.tensors)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))


def test_trained_operators_answer_for_soft_labels_of_test_points(problem):
    model, x, labels, xt, _ = problem
    operators = Trained(subsets=RandomSubsets(9), iterations=20)
    method = STRIDE(model, TensorDataset(x, labels["cross_entropy"]), operators=operators).fit()
    hard, soft = torch.arange(N_TEST) % C, torch.rand(N_TEST, C).double().softmax(1)

    def asked(y: Tensor) -> Tensor:
        rows = method._points
        with method._session() as network:
            query = Query("loss", "label")
            points = rows(method._states[0], network, method._example_batch((xt, y), "inputs"), query)
        return method.operators_.subset_responses(points)

    def of_class(c: int) -> Tensor:
        return asked(torch.full((N_TEST,), c))

    wanted = sum(soft[:, c, None] * of_class(c) for c in range(C))
    torch.testing.assert_close(asked(soft), wanted)
    one_hot = nn.functional.one_hot(hard, C).double()
    found = method.influence((xt, one_hot), response="loss")
    torch.testing.assert_close(found, method.influence((xt, hard), response="loss"))


class TestWhereWeightsStand:
    def test_a_part_of_a_dict_or_a_place_in_a_tuple(self, problem):
        model, x, labels, xt, yt = problem
        y, w, test = labels["mse"], torch.rand(N).double(), yt["mse"]
        wanted = stride(model, x, y, "mse", weights=w).influence((xt, test))
        options = {"layers": ["fc1:input", "act"], "loss": "mse"}
        place = STRIDE(model, TensorDataset(x, w, y), batch=Batch(sample_weight=1), **options)
        assert place.influence((xt, torch.ones(N_TEST), test)).equal(wanted)
        items = [{"x": a, "w": b, "labels": c} for a, b, c in zip(x, w, y, strict=True)]
        named = STRIDE(Named(model), Items(items), batch=Batch(sample_weight="w"), **options)
        named.layers = ["net.fc1:input", "net.act"]
        torch.testing.assert_close(named.influence({"x": xt, "labels": test}), wanted, rtol=1e-12, atol=1e-15)

    @pytest.mark.slow
    def test_batches_and_the_store_change_nothing(self, problem, tmp_path):
        model, x, labels, xt, yt = problem
        y, w, test = labels["cross_entropy"], torch.rand(N).double(), (xt, yt["cross_entropy"])
        wanted = stride(model, x, y, "cross_entropy", weights=w).influence(test)
        options = {"layers": ["fc1:input", "act"], "batch": Batch(sample_weight=w), "batch_size": 7}
        found = STRIDE(model, TensorDataset(x, y), **options)
        torch.testing.assert_close(found.influence(test), wanted, rtol=1e-10, atol=1e-14)
        for _ in range(2):  # filled, then read
            found = STRIDE(model, TensorDataset(x, y), feature_store=tmp_path / "store", **options)
            torch.testing.assert_close(found.influence(test).double(), wanted, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("part", [False, True])
    def test_a_whole_store_that_checks_no_examples_keeps_the_weights(self, problem, tmp_path, part):
        model, x, labels, xt, yt = problem
        y, w, test = labels["cross_entropy"], torch.rand(N).double(), (xt, yt["cross_entropy"])
        wanted = stride(model, x, y, "cross_entropy", weights=w).influence(test)
        data = TensorDataset(x, w, y) if part else TensorDataset(x, y)
        asked = (xt, torch.ones(N_TEST), test[1]) if part else test
        for check in (True, False):
            found = STRIDE(
                model,
                data,
                layers=["fc1:input", "act"],
                batch=Batch(sample_weight=1 if part else w),
                feature_store=FeatureStore(tmp_path / "store", check_examples=check),
            )
            torch.testing.assert_close(found.influence(asked).double(), wanted, rtol=1e-3, atol=1e-6)

    def test_examples_that_go_take_their_weights_along(self, problem):
        model, x, labels, xt, yt = problem
        y, w, test = labels["mse"], torch.rand(N).double() + 0.1, (xt, yt["mse"])
        found = stride(model, x, y, "mse", weights=w).fit().remove_examples([0, 4])
        keep = [i for i in range(N) if i not in (0, 4)]
        wanted = stride(model, x[keep], y[keep], "mse", weights=w[keep])
        torch.testing.assert_close(found.influence(test), wanted.influence(test), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.fit().influence(test), wanted.influence(test))
        with pytest.raises(ValueError, match="`sample_weight` must be a part of the batch"):
            found.add_examples((xt, yt["mse"]))

    def test_examples_that_come_bring_their_weights_along(self, problem):
        model, x, labels, xt, yt = problem
        y, w, test = labels["mse"], torch.rand(N).double() + 0.1, (xt, torch.ones(N_TEST), yt["mse"])
        options = {"layers": ["fc1:input", "act"], "loss": "mse", "batch": Batch(sample_weight=1)}
        found = STRIDE(model, TensorDataset(x[:20], w[:20], y[:20]), **options)
        found.fit().add_examples((x[20:], w[20:], y[20:]))
        wanted = STRIDE(model, TensorDataset(x, w, y), **options).influence(test)
        torch.testing.assert_close(found.influence(test), wanted, rtol=1e-8, atol=1e-12)

    def test_a_saved_method_wants_the_same_weights(self, problem, tmp_path):
        model, x, labels, xt, yt = problem
        y, w, test = labels["mse"], torch.rand(N).double(), (xt, yt["mse"])
        method = stride(model, x, y, "mse", weights=w).fit()
        method.save(tmp_path / "method")
        data = TensorDataset(x, y)
        loaded = STRIDE.load(tmp_path / "method", model, data, batch=Batch(sample_weight=w))
        assert loaded.influence(test).equal(method.influence(test))
        with pytest.raises(ValueError, match="`batch` must be as for the saved method"):
            STRIDE.load(tmp_path / "method", model, data, batch=Batch(sample_weight=w + 1))
        with pytest.raises(ValueError, match="`train_dataset` must"):
            STRIDE.load(tmp_path / "method", model, data, batch=Batch(sample_weight=w.flip(0)))

    def test_the_cosine_does_not_see_a_weight(self, problem):
        model, x, labels, *_ = problem
        method = stride(model, x, labels["mse"], "mse", "training", weights=torch.rand(N).double() + 0.5)
        own = method.influence((x, labels["mse"]), response="loss", normalize="cosine").diagonal()
        torch.testing.assert_close(own, -torch.ones(N).double())

    def test_a_place_from_the_end_is_one_of_the_training_set(self, problem, tmp_path):
        network, x, labels, xt, yt = problem
        y, w, test = labels["mse"], torch.rand(N).double() + 0.1, yt["mse"]
        model, shift, more = Shifted(network), torch.randn(N, D).double(), torch.randn(N_TEST, D).double()
        train = TensorDataset(x, shift, w, y)
        options = {"layers": ["net.fc1:input", "net.act"], "loss": "mse"}
        front, end = ({**options, "batch": Batch(sample_weight=place)} for place in (2, -2))
        wanted = STRIDE(model, train, **front).influence((xt, more, test))
        fitted = STRIDE(model, train, **end)
        assert fitted.influence((xt, more, torch.ones(N_TEST), test)).equal(wanted)
        assert fitted.influence((xt, more, test)).equal(wanted)
        fitted.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, train, batch=end["batch"])
        assert loaded.influence((xt, more, test)).equal(wanted)
        without = TensorDataset(x, w, y)
        wanted = STRIDE(model, without, **front | {"batch": Batch(sample_weight=1)}).influence((xt, test))
        fitted = STRIDE(model, without, **end)
        assert fitted.influence((xt, test)).equal(wanted)
        with pytest.raises(ValueError, match="`sample_weight` must be a key or place in a batch"):
            fitted.add_examples((xt.abs(), test))

    @pytest.mark.parametrize(
        ("weights", "error", "message"),
        [
            (
                torch.full((N,), -1.0),
                ValueError,
                "must hold weights that are numbers .* 0; got -1.0",
            ),
            (torch.ones(N, 2, 2), ValueError, r"must hold weights of shape \(n,\), .* \(30, 2, 2\)"),
            (object(), TypeError, "must hold a weight for each training example"),
        ],
    )
    def test_weights_that_are_none(self, weights, error, message):
        with pytest.raises(error, match=f"`sample_weight` {message}"):
            Batch(sample_weight=weights)

    @pytest.mark.parametrize("method", [STRIDE, TracIn, Similarity])
    def test_labels_are_no_weights(self, problem, method):
        model, x, labels, *_ = problem
        train = TensorDataset(x, labels["cross_entropy"])
        for key in (-1, 1):
            with pytest.raises(ValueError, match=f"`sample_weight` must be .* not of its labels; got {key}"):
                method(model, train, batch=Batch(sample_weight=key)).fit()

    def test_weights_that_do_not_fit(self, problem):
        model, x, labels, *_ = problem
        with pytest.raises(ValueError, match=r"`sample_weight` must hold one for each .*; got 7"):
            stride(model, x, labels["mse"], "mse", weights=torch.ones(7))
        with pytest.raises(ValueError, match=f"must hold one for each of {N} training examples; got {N + 1}"):
            stride(model, x, labels["mse"], "mse", weights=torch.ones(N + 1))
        rows = list(zip(x, labels["mse"], strict=True))
        found = STRIDE(model, Stream(rows), loss="mse", batch=Batch(sample_weight=torch.ones(N + 1)))
        with pytest.raises(ValueError, match=f"must hold one for each of {N} training examples; got {N + 1}"):
            found.fit()
        with pytest.raises(ValueError, match="`sample_weight` must be above 0 for one training example"):
            stride(model, x, labels["mse"], "mse", weights=torch.zeros(N)).fit()


class Shifted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.net(x if shift is None else x + shift)


class Named(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Items(torch.utils.data.Dataset):
    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (TracIn, {}),
        (DiagonalEKFAC, {"fisher": "exact"}),
        (DiagonalEKFAC, {"fisher": "exact", "dense": "diagonal"}),
        (TRAK, {}),
        (EKFAC, {}),
        (EKFAC, {"fisher": "empirical", "strategy": "kfac"}),
        (EKFAC, {"strategy": "diagonal"}),
        (EKFAC, {"damping": 0.01}),
        (TracIn, {"residuals": "both"}),
    ],
)
class TestBaselines:
    def scores(self, method, options, problem, loss, rows, weights=None):
        model, x, labels, xt, yt = problem
        if method is EKFAC:
            pytest.importorskip("kronfluence")
        batch = None if weights is None else Batch(sample_weight=weights)
        data = TensorDataset(x[rows], labels[loss][rows])
        fitted = method(model, data, loss=loss, batch=batch, **options)
        return fitted.influence((xt, yt[loss])), fitted.self_influence()

    @pytest.mark.slow
    def test_a_weight_of_zero_is_removal(self, problem, loss, method, options):
        keep, every, weights = torch.arange(4, N), torch.arange(N), torch.ones(N)
        weights[:4] = 0
        found, own = self.scores(method, options, problem, loss, every, weights)
        wanted, wanted_own = self.scores(method, options, problem, loss, keep)
        assert not found[:, :4].any()
        scale = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(found[:, keep], wanted, rtol=0, atol=scale)
        torch.testing.assert_close(own[keep], wanted_own, rtol=0, atol=1e-6 * float(wanted_own.abs().max()))

    @pytest.mark.slow
    def test_a_weight_of_two_is_a_duplicate(self, problem, loss, method, options):
        if options.get("residuals") == "both":
            pytest.skip("left-out residuals of a duplicate have seen the other")
        twice, every, weights = torch.cat([torch.arange(N), torch.arange(3)]), torch.arange(N), torch.ones(N)
        weights[:3] = 2
        found, _ = self.scores(method, options, problem, loss, every, weights)
        wanted, _ = self.scores(method, options, problem, loss, twice)
        wanted[:, :3] += wanted[:, N:]
        torch.testing.assert_close(found, wanted[:, :N], rtol=0, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "options", [{"batch": Batch(sample_weight=torch.ones(N))}, {"loss": CrossEntropy(weight=[1, 2, 3])}]
)
@pytest.mark.parametrize("method", [KNNShapley, ConfidentLearning])
def test_methods_that_count_every_example_once_refuse_weights(problem, method, options):
    model, x, labels, *_ = problem
    must = f"`sample_weight` must be None for {method.__name__}, and so must the weights of classes"
    with pytest.raises(ValueError, match=must):
        method(model, TensorDataset(x, labels["cross_entropy"]), **options)


@pytest.mark.parametrize("method", [Similarity, ClassSimilarity])
def test_similarities_do_not_depend_on_weights(problem, method):
    model, x, labels, xt, yt = problem
    data, test = TensorDataset(x, labels["cross_entropy"]), (xt, yt["cross_entropy"])
    weighed = method(model, data, batch=Batch(sample_weight=torch.rand(N)))
    assert weighed.influence(test).equal(method(model, data).influence(test))


class TestClassWeightsThatAreNone:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": [1.0, -1.0]}, "`weight` must hold numbers of at least 0"),
            ({"label_smoothing": 1.5}, "`label_smoothing` must be a number from 0 to 1; got 1.5"),
        ],
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            CrossEntropy(**options)

    def test_kinds(self):
        with pytest.raises(TypeError, match="`weight` must hold a number for each class"):
            CrossEntropy(weight=object())

    def test_as_many_as_classes(self, problem):
        model, x, labels, *_ = problem
        with pytest.raises(ValueError, match="`weight` must hold one for each of 3 classes; got 2"):
            stride(model, x, labels["cross_entropy"], CrossEntropy(weight=[1.0, 2.0])).fit()

    def test_of_hundreds_of_classes(self):
        labels = torch.arange(300)
        assert CrossEntropy(weight=torch.ones(300)).labels(labels, 300, "labels").equal(labels)

    def test_distributions(self, problem):
        model, x, *_ = problem
        with pytest.raises(ValueError, match=r"must hold class indices \(n,\), or distributions \(n, 3\)"):
            stride(model, x, torch.ones(N, C), "cross_entropy").fit()


def test_losses_are_saved_with_their_options(problem, tmp_path):
    model, x, labels, xt, yt = problem
    loss = CrossEntropy(weight=(0.5, 2.0, 1.0), label_smoothing=0.1)
    method = stride(model, x, labels["cross_entropy"], loss).fit()
    method.save(tmp_path / "method")
    loaded = STRIDE.load(tmp_path / "method", model, TensorDataset(x, labels["cross_entropy"]))
    assert loaded.loss == loss
    test = xt, yt["cross_entropy"]
    assert loaded.influence(test).equal(method.influence(test))
    data = TensorDataset(x, labels["cross_entropy"])
    with pytest.raises(ValueError, match="`options` must leave what has been fitted"):
        STRIDE.load(tmp_path / "method", model, data, loss=BinaryCrossEntropy())


@pytest.mark.parametrize("method", [STRIDE, TracIn, DiagonalEKFAC, EKFAC])
@pytest.mark.parametrize("positions", [False, True])
def test_class_weights_count_in_the_self_influence_of_other_examples(method, positions):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(9, 4, 3, dtype=torch.float64, generator=generator)
    y = torch.arange(36).reshape(9, 4) % 3
    if not positions:
        x, y = x[:, 0], y[:, 0]
    if method is EKFAC:
        pytest.importorskip("kronfluence")
    options = {"operators": ClosedForm(residuals="training")} if method is STRIDE else {}
    found = method(model, TensorDataset(x, y), loss=CrossEntropy(weight=[1.0, 5.0, 0.0]), **options)
    torch.testing.assert_close(found.self_influence((x, y)), found.self_influence())
    plain = method(model, TensorDataset(x, y), **options)
    assert not torch.allclose(plain.self_influence(), found.self_influence())
