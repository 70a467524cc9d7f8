from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.influence import (
    DataInfluence,
    NaiveInfluenceFunction,
    SimilarityInfluence,
    TracInCP,
    TracInCPFast,
    TracInCPFastRandProj,
)
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from captum.influence._core.similarity_influence import cosine_similarity, euclidean_distance
from flat_options import arguments
from planted import (
    MLP,
    BatchNormCNN,
    Fails,
    HuggingFaceLike,
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
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, Batch
from stride_captum.adapters import TracIn
from stride_captum.adapters.captum_influence import CaptumInfluence, NoIndex, ResidualLoss, keep_weights
from stride_captum.losses import BinaryCrossEntropy, CrossEntropy
from stride_captum.residuals import tempered_residuals
from stride_captum.responses import RESPONSES, response_gradient, response_value

# Of Captum's own objects, which are the oracles here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Build = Callable[[Any, Any], Any]
Planted = tuple[nn.Module, TensorDataset, TensorDataset]


def last_layer(model: nn.Module) -> nn.Module:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def builder(kind: str, sum_loss: Any, each_loss: Any, load: Any = keep_weights, **more: Any) -> Build:
    """How one of Captum's classes is made, with a loss over a batch and one per example."""
    one = {"checkpoint": "", "checkpoints_load_func": load, "batch_size": 24, "loss_fn": each_loss}
    one |= {"hessian_reg": 1.0, "projection_dim": None}
    many = {"checkpoints": [""], "checkpoints_load_func": load, "batch_size": 10, "loss_fn": sum_loss}
    builds: dict[str, Build] = {
        "TracInCP": lambda m, t: TracInCP(m, t, **{**many, "loss_fn": each_loss}, **more),
        "TracInCP batched": lambda m, t: TracInCP(m, t, **many, sample_wise_grads_per_batch=True, **more),
        "TracInCPFast": lambda m, t: TracInCPFast(m, last_layer(m), t, **many, **more),
        "TracInCPFastRandProj": lambda m, t: TracInCPFastRandProj(
            m, last_layer(m), t, **many, nearest_neighbors=NoIndex(), **more
        ),
        "projected": lambda m, t: TracInCPFastRandProj(
            m, last_layer(m), t, **many, nearest_neighbors=NoIndex(), projection_dim=4, **more
        ),
        "NaiveInfluenceFunction": lambda m, t: NaiveInfluenceFunction(m, t, **one, **more),
        "ArnoldiInfluenceFunction": lambda m, t: ArnoldiInfluenceFunction(
            m, t, **one, arnoldi_dim=30, **more
        ),
    }
    return builds[kind]


KINDS = [
    "TracInCP",
    "TracInCP batched",
    "TracInCPFast",
    "TracInCPFastRandProj",
    "projected",
    "NaiveInfluenceFunction",
    "ArnoldiInfluenceFunction",
]


def with_residuals(kind: str) -> Build:
    return builder(kind, ResidualLoss("sum"), ResidualLoss("none"))


def with_cross_entropy(kind: str) -> Build:
    return builder(kind, *(nn.CrossEntropyLoss(reduction=kind) for kind in ("sum", "none")))


def similarity(layer: str = "relu2", **options: Any) -> Build:
    return lambda m, t: SimilarityInfluence(m, layer, t, "not used", batch_size=7, **options)


@pytest.fixture
def exact() -> Planted:
    """A trained MLP, 24 training and 7 test examples in float64."""
    model, train, test = trained(MLP, n_train=24)
    sets = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, test)]
    return model.double(), *sets


@pytest.mark.parametrize("kind", KINDS)
class TestOfALoss:
    def theirs(self, planted: Planted, kind: str) -> tuple[Any, Planted]:
        with torch.random.fork_rng():
            return with_cross_entropy(kind)(copy.deepcopy(planted[0]), planted[1]), planted

    @pytest.mark.slow
    def test_with_their_loss_scores_are_theirs(self, exact, kind):
        theirs, (model, train, test) = self.theirs(exact, kind)
        ours = CaptumInfluence(model, train, build=with_cross_entropy(kind), answers="log-probability")
        wanted = theirs.influence(test.tensors, k=None).detach()
        torch.testing.assert_close(ours.influence(test.tensors), wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.influence(test.tensors, response="loss"), -wanted, rtol=1e-12, atol=0)

    @pytest.mark.slow
    def test_with_residuals_the_log_probability_is_theirs(self, exact, kind):
        theirs, (model, train, test) = self.theirs(exact, kind)
        ours = CaptumInfluence(model, train, build=with_residuals(kind))
        found = ours.influence(test.tensors, response="log-probability")
        wanted = theirs.influence(test.tensors, k=None).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))

    @pytest.mark.slow
    def test_every_response_has_its_gradient(self, exact, kind):
        """Products are linear in the gradient of the response: those of the logits give all."""
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_residuals(kind))
        x, y = test.tensors
        basis = torch.stack([ours.influence((x, y), response="logit", target=c) for c in range(3)])
        with torch.no_grad():
            logits = model(x)
        for response in RESPONSES:
            weights = response_gradient(logits, y, response)
            wanted = torch.einsum("cnt,nc->nt", basis, weights)
            found = ours.influence((x, y), response=response)
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11 * float(basis.abs().max()))

    @pytest.mark.slow
    def test_self_influence_is_the_effect_on_the_own_loss(self, exact, kind):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_residuals(kind))
        own = ours.self_influence()
        wanted = -ours.influence(train.tensors, response="loss").diagonal()
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))
        assert bool((own >= 0).all())
        assert ours.self_influence(test.tensors).shape == (7,)

    @pytest.mark.slow
    def test_self_influence_with_other_residuals_has_the_loss_on_one_side(self, exact, kind):
        model, train, _ = exact
        ours = CaptumInfluence(model, train, build=with_residuals(kind), residuals="both")
        wanted = -ours.influence(train.tensors, response="loss").diagonal()
        found = ours.self_influence()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))

    @pytest.mark.slow
    def test_the_cosine_of_an_example_with_itself_is_one(self, exact, kind):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_residuals(kind))
        own = ours.influence(train.tensors, response="loss", normalize="cosine").diagonal()
        assert bool((own - -1).abs().lt(1e-9).logical_or(ours.self_influence() == 0).all())
        assert float(ours.influence(test.tensors, normalize="cosine").abs().max()) <= 1 + 1e-9

    def test_the_same_class_raises_the_margin(self, exact, kind):
        model, train, test = exact
        scores = CaptumInfluence(model, train, build=with_residuals(kind)).influence(test.tensors)
        same = test.tensors[1][:, None] == train.tensors[1]
        assert float(scores[same].mean()) > max(0.0, float(scores[~same].mean()))

    @pytest.mark.slow
    def test_top_k_is_ours(self, exact, kind):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_residuals(kind))
        scores = ours.influence(test.tensors)
        for proponents in (True, False):
            top = ours.influence(test.tensors, 4, proponents)
            values = scores.topk(4, dim=1, largest=proponents).values
            assert torch.equal(top.influence_scores, values)
            assert torch.equal(scores.gather(1, top.indices), values)

    @pytest.mark.slow
    def test_no_warning_of_captum_comes_through(self, exact, kind):
        model, train, test = exact
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = CaptumInfluence(model, train, build=with_residuals(kind))
            ours.influence(test.tensors, normalize="cosine")
            ours.self_influence()

    @pytest.mark.slow
    def test_the_model_comes_back(self, kind):
        model, train, test = trained(MLP, n_train=24)
        with expect_untouched(unusual(model)):
            ours = CaptumInfluence(model, Fails(train), build=with_residuals(kind), batch_size=5)
            ours.influence(test.tensors)
            ours.influence(DataLoader(Fails(test), batch_size=3), 4, False, normalize="cosine")
            ours.self_influence()
            ours.subset_influence(test.tensors, [[0, 1], [2]])
        assert not any(vars(parameter) for parameter in model.parameters())


class TestWeights:
    weights = torch.linspace(0, 3, 24)

    @pytest.mark.parametrize("kind", ["TracInCP", "TracInCPFast"])
    @pytest.mark.parametrize(
        "options", [{"batch": Batch(sample_weight=weights)}, {"loss": CrossEntropy(weight=[1, 2, 5])}]
    )
    def test_they_stand_on_the_training_side_alone(self, exact, kind, options):
        model, train, test = exact
        found = CaptumInfluence(model, train, build=with_residuals(kind), **options)
        if kind == "TracInCP":
            wanted = TracIn(model, train, **options)
            torch.testing.assert_close(found.influence(test.tensors), wanted.influence(test.tensors))
            torch.testing.assert_close(found.self_influence(), wanted.self_influence())
        own = -found.influence(train.tensors, response="loss").diagonal()
        torch.testing.assert_close(found.self_influence(), own, rtol=1e-6, atol=1e-9 * float(own.max()))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", [{"batch": Batch(sample_weight=weights)}, {"loss": CrossEntropy(weight=[1, 2, 5])}]
    )
    def test_what_would_not_see_them_refuses_them(self, exact, options):
        model, train, _ = exact
        build = with_cross_entropy("TracInCP")
        with pytest.raises(ValueError, match="`sample_weight` must be None for answers='log-probability'"):
            CaptumInfluence(model, train, build=build, answers="log-probability", **options)
        for kind in ("NaiveInfluenceFunction", "ArnoldiInfluenceFunction"):
            with pytest.raises(ValueError, match=f"`sample_weight` must be None for {kind}, .* Hessian"):
                CaptumInfluence(model, train, build=with_residuals(kind), **options).fit()

    def test_what_would_not_see_those_of_labels_refuses_them(self, exact):
        model, train, _ = exact
        loss = BinaryCrossEntropy(pos_weight=2.0)
        several = TensorDataset(train.tensors[0], nn.functional.one_hot(train.tensors[1]).double())
        options = {"loss": loss, "build": builder("NaiveInfluenceFunction", None, ResidualLoss(loss=loss))}
        with pytest.raises(ValueError, match=r"and so must .* `pos_weight`: its Hessian"):
            CaptumInfluence(model, several, **options).fit()

    def test_a_similarity_does_not_depend_on_them(self, exact):
        model, train, test = exact
        plain, weighed = (
            CaptumInfluence(model, train, build=similarity(), answers="similarity", batch=batch)
            for batch in (None, Batch(sample_weight=self.weights))
        )
        assert torch.equal(weighed.influence(test.tensors), plain.influence(test.tensors))


class TestAnExplicitSolve:
    def test_naive_influence_is_the_newton_step(self, exact):
        """Of a linear model, whose Hessian is positive definite on what the gradients span."""
        _, train, test = exact
        model, damping = built(lambda: nn.Linear(6, 3)).double(), 0.1
        names = dict(model.named_parameters())

        def flat_gradient(value: Tensor) -> Tensor:
            return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(names.values()))])

        def total(weight: Tensor, bias: Tensor) -> Tensor:
            logits = functional_call(model, {"weight": weight, "bias": bias}, train.tensors[0])
            return F.cross_entropy(logits, train.tensors[1], reduction="sum")

        blocks = hessian(total, (names["weight"].detach(), names["bias"].detach()))
        rows = [torch.cat([b.reshape(n, -1) for b in row], 1) for row, n in zip(blocks, (18, 3), strict=True)]
        curvature = torch.cat(rows) + damping * torch.eye(21).double()

        def stacked(dataset: TensorDataset, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            pairs = zip(*dataset.tensors, strict=True)
            return torch.stack([flat_gradient(value(model(x[None]), y[None]).sum()) for x, y in pairs])

        left = stacked(test, lambda z, y: response_value(z, y, "margin"))
        right = stacked(train, lambda z, y: -F.cross_entropy(z, y))
        wanted = left @ torch.linalg.solve(curvature, right.T)
        options = {"loss_fn": ResidualLoss(), "hessian_reg": damping, "projection_dim": None}

        def build(m: Any, t: Any) -> Any:
            return NaiveInfluenceFunction(m, t, "", keep_weights, batch_size=24, **options)

        found = CaptumInfluence(model, train, build=build).influence(test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)

    @pytest.mark.slow
    def test_the_score_is_the_change_when_the_example_is_counted_twice(self, exact):
        """Of the margin, for the minimizer of the penalised loss of a linear model, to first order."""
        _, train, test = exact
        x, y = train.tensors
        damping, weight = 1.0, 1e-4

        def minimize(weights: Tensor) -> Tensor:
            theta = torch.zeros(3, 6).double()

            def loss(theta: Tensor) -> Tensor:
                losses = F.cross_entropy(x @ theta.T, y, reduction="none")
                return (weights * losses).sum() + damping / 2 * theta.square().sum()

            for _ in range(20):
                curvature = hessian(loss, theta).reshape(18, 18)
                gradient = torch.func.grad(loss)(theta).flatten()
                theta = theta - torch.linalg.solve(curvature, gradient).view(3, 6)
            return theta

        model = nn.Linear(6, 3, bias=False).double()
        model.weight.data = minimize(torch.ones(24).double())

        def build(m: Any, t: Any) -> Any:
            options = {"loss_fn": ResidualLoss(), "hessian_reg": damping, "projection_dim": None}
            return NaiveInfluenceFunction(m, t, "", keep_weights, batch_size=24, **options)

        scores = CaptumInfluence(model, train, build=build).influence(test.tensors)
        for i in (0, 5, 11):
            more = torch.ones(24).double()
            more[i] += weight
            moved = response_value(test.tensors[0] @ minimize(more).T, test.tensors[1], "margin")
            with torch.no_grad():
                change = moved - response_value(model(test.tensors[0]), test.tensors[1], "margin")
            torch.testing.assert_close(change / weight, scores[:, i], rtol=1e-3, atol=1e-6)


class TestOfASimilarity:
    def theirs(self, planted: Planted, folder: Path, **options: Any) -> tuple[Tensor, Tensor]:
        """What Captum itself gives, which works with two layers and batches of one size only."""
        model, train, test = planted
        layers = ["relu1", "relu2"]
        theirs = SimilarityInfluence(model, layers, train, str(folder), batch_size=8, **options)
        found: tuple[Tensor, Tensor] = theirs.influence(test.tensors[0], top_k=8)["relu2"]
        return found

    @pytest.mark.parametrize(
        ("metric", "direction", "sign"), [(cosine_similarity, "max", 1), (euclidean_distance, "min", -1)]
    )
    def test_the_best_are_theirs(self, exact, tmp_path, metric, direction, sign):
        model, train, test = exact
        options = {"similarity_metric": metric, "similarity_direction": direction}
        indices, values = self.theirs(exact, tmp_path, **options)
        ours = CaptumInfluence(model, train, build=similarity(**options), answers="similarity", sign=sign)
        top = ours.influence(test.tensors, 8)
        assert torch.equal(top.indices, indices)
        torch.testing.assert_close(top.influence_scores, sign * values)

    def test_scores_are_those_of_the_metric_in_every_column(self, exact):
        model, train, test = exact
        with torch.no_grad():
            left, right = (
                F.normalize(model.relu2(model.fc2(model.relu1(model.fc1(d.tensors[0])))))
                for d in (test, train)
            )
        ours = CaptumInfluence(model, train, build=similarity(), answers="similarity")
        torch.testing.assert_close(ours.influence(test.tensors), left @ right.T)

    def test_every_response_has_the_same_scores_but_the_loss(self, exact):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=similarity(), answers="similarity")
        wanted = ours.influence(test.tensors)
        for response in RESPONSES:
            found = ours.influence(test.tensors, response=response)
            assert torch.equal(found, -wanted if response == "loss" else wanted)
        torch.testing.assert_close(ours.self_influence(), torch.ones(24).double())

    def test_activations_of_another_model_are_not_read(self, exact, tmp_path):
        model, train, test = exact
        build = lambda m, t: SimilarityInfluence(m, "relu2", t, str(tmp_path), batch_size=8)  # noqa: E731
        first, second = (
            CaptumInfluence(m, train, build=build, answers="similarity").influence(test.tensors)
            for m in (model, built(MLP, 3).double())
        )
        assert not torch.allclose(first, second)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_its_folder_goes_with_it(self, exact):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=similarity(), answers="similarity")
        ours.influence(test.tensors)
        folder = Path(ours._states[0].kernel.activation_dir)
        assert folder.exists()
        del ours
        gc.collect()
        assert not folder.exists()

    def test_more_than_one_layer_is_refused(self, exact):
        model, train, _ = exact
        build = similarity(["relu1", "relu2"])
        with pytest.raises(
            ValueError, match=r"`build` must name one layer for SimilarityInfluence; got \['relu1'"
        ):
            CaptumInfluence(model, train, build=build, answers="similarity").fit()

    def test_more_than_one_input_is_refused(self):
        train = TensorDataset(*(planted_classes(9, seed=seed).tensors[0] for seed in (1, 2)), torch.zeros(9))
        ours = CaptumInfluence(built(TwoInputs), train, build=similarity("left"), answers="similarity")
        with pytest.raises(ValueError, match=r"`inputs` must hold one tensor beside the labels .*; got 2"):
            ours.influence(train[:3])

    def test_the_model_comes_back(self):
        model, train, test = trained(MLP, n_train=24)
        with expect_untouched(unusual(model)):
            ours = CaptumInfluence(model, Fails(train), build=similarity(), answers="similarity")
            ours.influence(test.tensors)
            ours.influence(DataLoader(Fails(test), batch_size=3), 4, False)
            ours.self_influence()
            ours.subset_influence(test.tensors, [[0, 1], [2]])


class TestResiduals:
    @pytest.mark.parametrize("kind", ["TracInCP", "TracInCPFastRandProj"])
    @pytest.mark.parametrize("residuals", ["temperature", "leave-one-out", "both"])
    def test_stand_for_the_training_losses(self, exact, kind, residuals):
        model, train, test = exact
        config = arguments(residuals=residuals, temperature=3.0)
        vectors = STRIDE(model, train, **config).fit()._states[0].operators.residuals
        ours = CaptumInfluence(model, train, build=with_residuals(kind), residuals=residuals, temperature=3.0)
        found = ours.influence(test.tensors)
        torch.testing.assert_close(ours._states[0].residuals, vectors)
        theirs = ours._states[0].kernel.train_dataloader
        torch.testing.assert_close(torch.cat([batch[-1] for batch in theirs]), vectors)
        assert not torch.allclose(
            found, CaptumInfluence(model, train, build=with_residuals(kind)).influence(test.tensors)
        )

    def test_the_loss_has_the_gradient_and_the_curvature_of_the_cross_entropy(self):
        generator = torch.Generator().manual_seed(0)
        z, y = torch.randn(4, 3, generator=generator).double(), torch.tensor([0, 2, 1, 1])
        vectors = tempered_residuals(z, y)

        def wanted(z: Tensor) -> Tensor:
            return F.cross_entropy(z, y, reduction="sum")

        def found(z: Tensor) -> Tensor:
            return ResidualLoss("sum")(z, vectors)

        torch.testing.assert_close(torch.func.grad(found)(z), torch.func.grad(wanted)(z))
        torch.testing.assert_close(hessian(found, z), hessian(wanted, z))
        other = torch.randn(4, 3, generator=generator).double()
        torch.testing.assert_close(torch.func.grad(lambda z: ResidualLoss("sum")(z, other))(z), -other)
        torch.testing.assert_close(ResidualLoss()(z, other).sum(), ResidualLoss("sum")(z, other))

    def test_another_reduction_is_refused(self):
        with pytest.raises(ValueError, match=r"`reduction` must be one of 'none', 'sum'; got 'mean'"):
            ResidualLoss("mean")


class TestData:
    def test_dicts_reach_captum_by_position(self):
        model, train, test = built(HuggingFaceLike).eval(), ListOfDicts(11, seed=1), ListOfDicts(4, seed=2)
        scores = [
            CaptumInfluence(model, train, build=with_residuals(kind), batch_size=4).influence(test[:])
            for kind in ("TracInCP", "TracInCPFast")
        ]
        assert scores[0].shape == (4, 11)
        head = CaptumInfluence(
            model, train, build=builder("TracInCP", None, ResidualLoss(), layers=["classifier"])
        )
        bias = _bias_products(model, train[:], test[:])
        torch.testing.assert_close(head.influence(test[:]), scores[1] + bias, rtol=1e-4, atol=1e-6)

    def test_two_inputs(self):
        model = built(TwoInputs).double()
        train, test = (planted_classes(n, (2, 6), seed) for n, seed in ((10, 1), (4, 2)))
        train, test = (TensorDataset(*d.tensors[0].double().unbind(1), d.tensors[1]) for d in (train, test))
        found = CaptumInfluence(
            model, train, build=with_cross_entropy("TracInCP"), answers="log-probability"
        ).influence(test.tensors)
        loss = nn.CrossEntropyLoss(reduction="none")
        wanted = TracInCP(copy.deepcopy(model), train, [""], keep_weights, loss_fn=loss, batch_size=10)
        torch.testing.assert_close(found, wanted.influence(test.tensors))

    def test_a_binary_network_with_one_logit(self):
        model = built(lambda: OneLogit(squeeze=False)).double()
        train, test = (planted_classes(n, seed=seed) for n, seed in ((10, 1), (4, 2)))
        train, test = (TensorDataset(d.tensors[0].double(), d.tensors[1] % 2) for d in (train, test))
        ours = CaptumInfluence(model, train, build=with_residuals("TracInCP"))
        x, y = train.tensors

        def gradients(x: Tensor, weights: Tensor) -> Tensor:
            rows = []
            for one, weight in zip(x, weights, strict=True):
                found = torch.autograd.grad(model(one[None]).sum() * weight, list(model.parameters()))
                rows.append(torch.cat([g.flatten() for g in found]))
            return torch.stack(rows)

        with torch.no_grad():
            residual = y - model(x).squeeze(1).sigmoid()
        signs = 2.0 * test.tensors[1] - 1
        wanted = gradients(test.tensors[0], signs) @ gradients(x, residual).T
        torch.testing.assert_close(ours.influence(test.tensors), wanted)

    def test_their_loss_may_want_labels_of_another_type(self):
        model = built(lambda: OneLogit(squeeze=False)).double()
        d = planted_classes(10, seed=1)
        train = TensorDataset(d.tensors[0].double(), (d.tensors[1] % 2).double()[:, None])

        def each(z: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(z, y, reduction="none").squeeze(1)

        ours = CaptumInfluence(model, train, build=builder("TracInCP", None, each), answers="log-probability")
        test = tuple(t[:4] for t in train.tensors)
        trick = CaptumInfluence(model, train, build=with_residuals("TracInCP"))
        for target in ("label", 1, "predicted"):
            torch.testing.assert_close(
                ours.influence(test, target=target),
                trick.influence(test, response="log-probability", target=target),
            )

    def test_targets_replace_the_labels_of_their_test_loss(self, exact):
        model, train, test = exact
        x, y = test.tensors
        ours = CaptumInfluence(model, train, build=with_cross_entropy("TracInCP"), answers="log-probability")
        other = (y + 1) % 3
        torch.testing.assert_close(ours.influence((x, y), target=other), ours.influence((x, other)))
        with torch.no_grad():
            predicted = model(x).argmax(1)
        torch.testing.assert_close(ours.influence((x,), target="predicted"), ours.influence((x, predicted)))

    def test_modes_and_frozen_parameters_change_nothing(self):
        model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
        wanted = CaptumInfluence(model, train, build=with_residuals("TracInCP")).influence(test.tensors)
        found = CaptumInfluence(unusual(model), train, build=with_residuals("TracInCP"))
        assert torch.equal(found.influence(test.tensors), wanted)

    def test_each_checkpoint_has_its_own_object(self, exact):
        model, train, test = exact
        states = [built(MLP, seed).double().state_dict() for seed in (1, 2)]
        build = with_residuals("TracInCPFastRandProj")
        parts = []
        for state in states:
            other = copy.deepcopy(model)
            other.load_state_dict(state)
            parts.append(CaptumInfluence(other, train, build=build).influence(test.tensors))
        found = CaptumInfluence(model, train, build=build, checkpoints=states).influence(test.tensors)
        torch.testing.assert_close(found, sum(parts) / 2)

    def test_checkpoints_that_captum_loads_do_not_touch_the_model(self, exact):
        model, train, test = exact
        states = [built(MLP, seed).double().state_dict() for seed in (1, 2)]
        rates = {0: 0.5, 1: 0.25}

        def load(model: nn.Module, index: int) -> float:
            model.load_state_dict(states[index])
            return rates[index]

        loss = nn.CrossEntropyLoss(reduction="none")
        build: Build = lambda m, t: TracInCP(m, t, iter([0, 1]), load, loss_fn=loss, batch_size=24)  # noqa: E731
        with expect_untouched(model):
            found = CaptumInfluence(model, train, build=build, answers="log-probability").influence(
                test.tensors
            )
        wanted = build(copy.deepcopy(model), train).influence(test.tensors)
        torch.testing.assert_close(found, wanted)


def _bias_products(model: nn.Module, train: Any, test: Any) -> Tensor:
    """The part of the products that the bias of the last layer has: mean over 5 positions of the mask."""
    with torch.no_grad():
        left, right = (model(d["input_ids"], d["attention_mask"]).logits for d in (test, train))
    return response_gradient(left, test["labels"], "margin") @ tempered_residuals(right, train["labels"]).T


class Transposed(DataInfluence):
    """Another library's method: `(n_train, n_test)`, and a positive score is an opponent."""

    def __init__(self, model: nn.Module, dataset: Any) -> None:
        self.network, self.dataset = model, dataset

    def influence(self, inputs: Any, k: int | None = None) -> Tensor:
        train, _ = zip(*self.dataset, strict=True)
        return -torch.stack(train) @ inputs[0].T


class Short(Transposed):
    def influence(self, inputs: Any, k: int | None = None) -> Tensor:
        return super().influence(inputs)[:-1]


class TestDeclarations:
    def test_orientation_and_sign_turn_the_scores(self, exact):
        model, train, test = exact
        options = {"answers": "similarity", "orientation": "train-test", "sign": -1}
        found = CaptumInfluence(model, train, build=Transposed, **options).influence(test.tensors)
        torch.testing.assert_close(found, test.tensors[0] @ train.tensors[0].T)

    @pytest.mark.parametrize(("build", "orientation"), [(Transposed, "test-train"), (Short, "train-test")])
    def test_scores_of_another_shape_are_refused(self, exact, build, orientation):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=build, answers="similarity", orientation=orientation)
        with pytest.raises(
            ValueError, match=r"`build` must make an object whose scores have the shape \(7, 24\); got shape"
        ):
            ours.influence(test.tensors)

    @pytest.mark.parametrize("answers", ["logit", "margin", "probability"])
    def test_one_test_loss_answers_one_response(self, exact, answers):
        model, train, test = exact

        def test_loss(logits: Tensor, labels: Tensor) -> Tensor:
            return -response_value(logits, labels, answers)

        loss = nn.CrossEntropyLoss(reduction="none")
        build: Build = lambda m, t: TracInCP(  # noqa: E731
            m, t, [""], keep_weights, loss_fn=loss, test_loss_fn=test_loss, batch_size=24
        )
        ours = CaptumInfluence(model, train, build=build, answers=answers)
        every = CaptumInfluence(model, train, build=with_residuals("TracInCP"))
        torch.testing.assert_close(
            ours.influence(test.tensors), every.influence(test.tensors, response=answers)
        )
        with pytest.raises(
            ValueError, match=rf"`response` must be '{answers}', which .*; got 'loss'. Build it"
        ):
            ours.influence(test.tensors, response="loss")
        with pytest.raises(ValueError, match=rf"`response` must be '{answers}', which .*; got 'loss'"):
            ours.self_influence()

    def test_a_loss_of_their_own_gives_self_influence_but_no_norms(self, exact):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_cross_entropy("TracInCP"), answers="loss", sign=-1)
        every = CaptumInfluence(model, train, build=with_residuals("TracInCP"))
        torch.testing.assert_close(ours.self_influence(), every.self_influence())
        with pytest.raises(NotImplementedError, match="of training examples only"):
            ours.self_influence(test.tensors)
        with pytest.raises(
            ValueError, match=r"`normalize` must be None for CaptumInfluence, which has no norms"
        ):
            ours.influence(test.tensors, normalize="cosine")

    def test_labels_are_needed_where_they_are_asked_for(self, exact):
        model, train, test = exact
        ours = CaptumInfluence(model, train, build=with_cross_entropy("TracInCP"), answers="loss")
        with pytest.raises(ValueError, match=r"`inputs` must carry labels"):
            ours.influence((test.tensors[0],))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"answers": "evry"}, r"`answers` must be one of 'every', .*; got 'evry'. Nearest: 'every'"),
            ({"sign": 0}, r"`sign` must be 1 or -1; got 0"),
            ({"orientation": "test"}, r"`orientation` must be one of .*; got 'test'"),
            ({"layers": ["fc1"]}, r"`layers` must be None; got \['fc1'\]. Give them to Captum's object"),
            (
                {"answers": "loss", "residuals": "both"},
                r"`residuals` must be 'training' unless answers='every'; got 'both'",
            ),
        ],
    )
    def test_a_wrong_declaration_is_refused(self, exact, options, message):
        model, train, _ = exact
        with pytest.raises(ValueError, match=message):
            CaptumInfluence(model, train, build=with_residuals("TracInCP"), **options)

    def test_losses_that_cannot_answer_every_response_are_refused(self, exact):
        model, train, _ = exact
        with pytest.raises(
            ValueError, match=r"`build` must use ResidualLoss with answers='every'; got another"
        ):
            CaptumInfluence(model, train, build=with_cross_entropy("TracInCP")).fit()
        one_side = builder(
            "TracInCP", None, ResidualLoss(), test_loss_fn=nn.CrossEntropyLoss(reduction="none")
        )
        with pytest.raises(ValueError, match=r"`build` must use ResidualLoss"):
            CaptumInfluence(model, train, build=one_side).fit()

    def test_checkpoints_that_captum_loads_are_refused_where_residuals_are_ours(self, exact):
        model, train, _ = exact
        build = builder("TracInCP", None, ResidualLoss(), load=lambda model, checkpoint: 1.0)
        with pytest.raises(ValueError, match=r"`build` must use keep_weights .* give the checkpoints to"):
            CaptumInfluence(model, train, build=build).fit()

    def test_an_object_on_another_model_is_refused(self, exact):
        model, train, _ = exact
        build = with_residuals("TracInCP")
        with pytest.raises(
            ValueError, match=r"`build` must give Captum's object the model that `build` is given"
        ):
            CaptumInfluence(model, train, build=lambda m, t: build(model, t)).fit()
        elsewhere = similarity()
        with pytest.raises(ValueError, match=r"`build` must give Captum's object the model"):
            CaptumInfluence(model, train, build=lambda m, t: elsewhere(model, t), answers="similarity").fit()

    def test_another_kind_of_object_is_refused(self, exact):
        model, train, _ = exact
        with pytest.raises(TypeError, match=r"`build` must return an object of captum.influence; got Linear"):
            CaptumInfluence(model, train, build=lambda m, t: m.fc1).fit()

    def test_it_cannot_be_saved(self, exact, tmp_path):
        model, train, _ = exact
        ours = CaptumInfluence(model, train, build=with_residuals("TracInCPFast")).fit()
        with pytest.raises(
            TypeError, match=r"`method` must hold nothing but tensors .* Fit it again instead"
        ):
            ours.save(tmp_path / "method")
        assert list(tmp_path.iterdir()) == []

    def test_there_is_no_index_to_search(self):
        with pytest.raises(NotImplementedError, match=r"ask CaptumInfluence.influence for the top k"):
            NoIndex().get_nearest_neighbors(torch.zeros(1, 1), 1)
