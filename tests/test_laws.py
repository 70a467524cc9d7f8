"""Laws that hold for every method, each a sentence that a reader could have said."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from planted import METHODS, MLP, N_TEST, N_TRAIN, Fails, built, loader, planted_classes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, InfluenceMethod, STRIDEConfig
from stride_captum.adapters import ClassRandom, ClassSimilarity, Random, Similarity

CURVATURES = ("kronecker", "eigenvalue-corrected", "class-blocks", "gauss-newton")
TRAINED = {"operators": "trained", "n_subsets": 12, "rank": 4, "iterations": 20}


class Case:
    """A method with its options, which can be given a model, data, and other options."""

    def __init__(self, method: type[InfluenceMethod], config: dict[str, Any] | None = None) -> None:
        self.method, self.config = method, config
        # 12 responses hardly determine 48 weights: rounding moves the Lasso along a flat bottom.
        self.tolerance = 2e-2 if (config or {}).get("recovery") == "lasso" else 1e-5

    def __repr__(self) -> str:
        return self.method.__name__ + "".join(f"-{value}" for value in (self.config or {}).values())

    def __call__(
        self, model: nn.Module, train: Any, budget: int | str = "256MiB", **options: Any
    ) -> InfluenceMethod:
        if self.method is STRIDE:
            config = STRIDEConfig(memory_budget=budget, **(self.config or {}))
            return STRIDE(model, train, config=config, **options)
        return self.method(model, train, memory_budget=budget, **options)


CASES = [
    *(Case(method) for method in METHODS),
    *(Case(STRIDE, {"curvature": curvature}) for curvature in CURVATURES),
    Case(STRIDE, {"residuals": "training"}),
    Case(STRIDE, {"normalize": "cosine"}),
    Case(STRIDE, {"threshold": 0.02}),
    Case(STRIDE, {**TRAINED, "recovery": "ridge"}),
    Case(STRIDE, {**TRAINED, "recovery": "lasso"}),
]
CLOSED = [case for case in CASES if (case.config or {}).get("operators") != "trained"]


def close(found: Tensor, wanted: Tensor, scores: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Equal up to 1e-5 of the largest of each row, of `wanted` or of the scores that it is the sum of."""
    assert found.shape == wanted.shape
    largest = (wanted if scores is None else scores).abs().amax(-1, keepdim=True)
    assert bool(((found - wanted).abs() <= tolerance * largest).all())


@pytest.mark.parametrize("case", CASES, ids=repr)
class TestEveryMethod:
    def test_the_same_seed_gives_the_same_bits(self, planted, case):
        model, train, test = planted
        wanted = case(model, train)
        scores, own = wanted.influence(test.tensors), wanted.self_influence()
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        try:
            again = case(model, train)
            assert torch.equal(again.influence(test.tensors), scores)
            assert torch.equal(again.self_influence(), own)
        finally:
            torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
        assert torch.equal(wanted.influence(test.tensors), scores)
        assert torch.equal(wanted.fit().influence(test.tensors), scores)

    def test_a_test_point_alone_scores_as_in_a_batch(self, planted, case):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        method = case(model, train)
        scores = method.influence((x, y))
        alone = torch.cat([method.influence((x[i : i + 1], y[i : i + 1])) for i in range(N_TEST)])
        close(alone, scores, tolerance=case.tolerance)
        close(method.influence(loader(planted[2], 2)), scores, tolerance=case.tolerance)
        order = [4, 2, 6, 0, 1, 3, 5]
        close(method.influence((x[order], y[order])), scores[order], tolerance=case.tolerance)

    def test_groups_score_the_sum_of_their_members(self, planted, case):
        model, train, test = planted
        method = case(model, train)
        groups = [[0], range(N_TRAIN), [5, 3, 40], torch.arange(20), np.array([47, 0]), []]
        for ask in ({}, {"response": "loss", "target": "predicted"}):
            scores = method.influence(test.tensors, normalize=None, **ask)
            wanted = torch.stack([scores[:, list(group)].sum(1) for group in groups], 1)
            close(method.subset_influence(test.tensors, groups, **ask), wanted, scores)
            in_batches = method.subset_influence(loader(test, 3), groups, **ask)
            torch.testing.assert_close(in_batches, wanted, rtol=1e-3, atol=1e-3 * float(scores.abs().max()))
        with pytest.raises(
            ValueError, match=r"`subsets\[1\]` must hold training indices in \[0, 48\); got 48"
        ):
            method.subset_influence(test.tensors, [[0], [48]])

    def test_the_top_k_are_the_best_of_all(self, planted, case):
        model, train, test = planted
        method = case(model, train)
        scores = method.influence(test.tensors)
        for proponents in (True, False):
            top = method.influence(test.tensors, 6, proponents)
            wanted = scores.sort(dim=1, descending=proponents, stable=True)
            assert torch.equal(top.indices, wanted.indices[:, :6])
            assert torch.equal(top.influence_scores, wanted.values[:, :6])


@pytest.mark.parametrize("case", CLOSED, ids=repr)
class TestMethodsWithoutTraining:
    @pytest.mark.parametrize("batch_size", [1, 5, 1000])
    def test_the_batch_size_does_not_change_scores(self, planted, case, batch_size):
        model, train, test = planted
        wanted, found = case(model, train), case(model, train, batch_size=batch_size)
        close(found.influence(test.tensors), wanted.influence(test.tensors))
        close(found.influence(test), wanted.influence(test))
        close(found.self_influence(), wanted.self_influence())

    @pytest.mark.parametrize("columns", [1, 7, 40])
    def test_the_block_size_does_not_change_scores(self, planted, case, columns):
        model, train, test = planted
        wanted, found = case(model, train), case(model, train, budget=16 * N_TEST * columns)
        close(found.influence(test.tensors), wanted.influence(test.tensors))

    def test_permuting_the_training_set_permutes_the_columns(self, planted, case):
        if isinstance(case.method, type) and issubclass(case.method, Random):
            pytest.skip("these scores belong to the column, not to the example")
        model, (x, y), test = planted[0], planted[1].tensors, planted[2]
        order = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(0))
        wanted, found = case(model, planted[1]), case(model, TensorDataset(x[order], y[order]))
        close(found.influence(test.tensors), wanted.influence(test.tensors)[:, order])
        close(found.self_influence(), wanted.self_influence()[order])

    def test_self_influence_is_minus_the_effect_on_the_own_loss(self, planted, case):
        model, train, _ = planted
        method = case(model, train)
        effect = method.influence(train, response="loss", target="label", normalize=None).diagonal()
        threshold = (case.config or {}).get("threshold", 0)
        if threshold:  # self-influence is not thresholded
            assert float((method.self_influence() + effect).abs().max()) <= threshold * (1 + 1e-5)
        else:
            close(method.self_influence(), -effect)

    def test_checkpoints_are_averaged(self, planted, case):
        model, train, test = planted
        models = [built(MLP, seed) for seed in (1, 2)]
        alone = [case(one, train) for one in models]
        both = case(model, train, checkpoints=[one.state_dict() for one in models])
        for ask in (
            lambda m: m.influence(test.tensors),
            lambda m: m.influence(test.tensors, response="loss"),
            lambda m: m.self_influence(),
            lambda m: m.mislabel_scores(),
        ):
            close(ask(both), (ask(alone[0]) + ask(alone[1])) / 2)
        top = both.influence(test.tensors, 5)
        close(top.influence_scores, both.influence(test.tensors).topk(5).values)
        own = case(model, train, checkpoints=[model.state_dict()]).influence(test.tensors)
        close(own, case(model, train).influence(test.tensors))


@pytest.mark.parametrize("case", [c for c in CASES if not issubclass(c.method, Random)], ids=repr)
class TestNaN:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_activations_of_the_training_set_are_refused_with_a_reason(self, planted, case, value):
        model, (x, y) = planted[0], planted[1].tensors
        spoilt = x.clone()
        spoilt[7, 2] = value
        with pytest.raises(
            ValueError, match="`train_dataset` must give finite activations; got NaN or infinity"
        ):
            case(model, TensorDataset(spoilt, y)).fit()

    def test_weights_that_make_the_logits_nan_are_blamed_on_the_logits(self, planted, case):
        if case.method is not STRIDE:
            pytest.skip("does not look at the logits")
        model = built(MLP)
        model.fc3.bias.data[1] = float("nan")
        with pytest.raises(ValueError, match=r"must (give finite logits|return logits without NaN); got NaN"):
            case(model, planted[1]).fit()

    def test_in_a_test_point_it_is_never_hidden(self, planted, case):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        method = case(model, train)
        wanted = method.influence((x, y))
        spoilt = x.clone()
        spoilt[2] = float("nan")
        scores = method.influence((spoilt, y))
        # A method that keeps only some columns gives 0 for the others whatever the test point is.
        zero = (wanted == 0) if case.method is ClassSimilarity else torch.zeros_like(wanted, dtype=torch.bool)
        assert bool((scores[2].isnan() | zero[2]).all())
        others = [i for i in range(N_TEST) if i != 2]
        close(scores[others], wanted[others], tolerance=case.tolerance)
        top = method.influence((spoilt, y), 3)
        assert bool(top.influence_scores[2].isnan().all())
        assert top.indices[2].tolist() == scores[2].isnan().nonzero()[:3, 0].tolist()
        assert bool(method.subset_influence((spoilt, y), [[0], range(N_TRAIN)])[2, 1].isnan())


class TestControls:
    def test_seeds_and_test_points_and_columns_give_other_scores(self, planted):
        model, train, test = planted
        every = torch.cat([Random(model, train, seed=seed).influence(test.tensors) for seed in range(8)])
        assert len(every.unique()) > 0.99 * every.numel()

    def test_random_scores_are_standard_normal(self, planted):
        model, test = planted[0], planted_classes(20, seed=8)
        scores = Random(model, planted_classes(3000)).influence(test.tensors)
        assert abs(float(scores.mean())) < 5 / len(scores.flatten()) ** 0.5
        assert abs(float(scores.std()) - 1) < 0.02
        correlation = torch.corrcoef(scores).fill_diagonal_(0)
        assert float(correlation.abs().max()) < 5 / 3000**0.5

    def test_the_column_decides_whatever_the_size_of_the_training_set(self, planted):
        model, _, test = planted
        small, large = (Random(model, planted_classes(n)).influence(test.tensors) for n in (1500, 3000))
        assert torch.equal(large[:, :1500], small)

    def test_the_class_stands_above_all_others(self, planted):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        scores = ClassRandom(model, train).influence((x, y))
        same = y[:, None] == train.tensors[1]
        assert torch.equal(scores > 0, same)
        assert torch.equal(scores.abs(), Random(model, train).influence((x, y)).abs())
        assert torch.equal(ClassRandom(model, train).influence((x, y), response="loss"), -scores)

    def test_similarity_is_the_cosine_of_the_penultimate_features(self, planted):
        model, train, test = planted
        features = [nn.Sequential(*list(model.children())[:-1])(d.tensors[0]) for d in (test, train)]
        wanted = nn.functional.cosine_similarity(features[0][:, None], features[1][None], dim=-1)
        method = Similarity(model, train)
        torch.testing.assert_close(method.influence(test.tensors), wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(method.influence(test, normalize="cosine"), wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(method.influence(test, response="loss"), -wanted, atol=1e-6, rtol=0)
        same = test.tensors[1][:, None] == train.tensors[1]
        kept = ClassSimilarity(model, train).influence(test.tensors)
        torch.testing.assert_close(kept, wanted * same, atol=1e-6, rtol=0)

    def test_features_that_are_all_zero_are_like_nothing(self, planted):
        x, y = planted[1].tensors
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
        method = Similarity(model, TensorDataset(torch.cat([torch.zeros(1, 6), x]), torch.cat([y[:1], y])))
        for normalize in (None, "cosine"):
            scores = method.influence((x, y), normalize=normalize)
            assert bool((scores[:, 0] == 0).all())
            assert bool(torch.isfinite(scores).all())


class TestSTRIDE:
    def test_the_cosine_is_bounded_and_one_for_a_training_example_with_itself(self, planted):
        model, train, test = planted
        method = STRIDE(model, train, config=STRIDEConfig(residuals="training"))
        cosine = method.influence(test, normalize="cosine")
        assert float(cosine.abs().max()) <= 1 + 1e-5
        own = method.influence(train, response="loss", normalize="cosine").diagonal()
        torch.testing.assert_close(own, -torch.ones(N_TRAIN), atol=1e-4, rtol=0)

    def test_self_influence_of_the_training_set_as_other_data_is_the_same_without_leave_one_out(
        self, planted
    ):
        model, train, _ = planted
        method = STRIDE(model, train, config=STRIDEConfig(residuals="training"))
        own = method.self_influence()
        assert float(own.min()) >= 0
        close(method.self_influence(train), own)

    def test_losses_and_log_probabilities_are_opposites(self, planted):
        method = STRIDE(*planted[:2])
        loss = method.influence(planted[2], response="loss")
        close(method.influence(planted[2], response="log-probability"), -loss)

    def test_held_out_labels_set_the_temperature(self, planted):
        model, train, test = planted
        found = [STRIDE(model, train, held_out=h).fit() for h in (test, test.tensors, loader(test, 2))]
        assert (
            found[0].temperature_
            == pytest.approx(found[1].temperature_)
            == pytest.approx(found[2].temperature_)
        )
        assert found[0].temperature_ != STRIDE(model, train).fit().temperature_

    def test_one_pass_over_the_training_set_and_none_to_ask_again(self, planted):
        class Counted(Fails):
            reads = 0

            def __getitem__(self, i: int) -> Any:
                self.reads += 1
                return super().__getitem__(i)

        train = Counted(planted[1])
        method = STRIDE(planted[0], train, batch_size=N_TRAIN).fit()
        assert train.reads <= 2 * N_TRAIN  # the first batch is read a second time to choose the layers
        train.reads = 0
        method.influence(planted[2].tensors)
        method.influence(planted[2].tensors, 3)
        method.self_influence()
        method.mislabel_scores()
        assert train.reads == 0

    def test_its_words_for_itself(self, planted):
        method = STRIDE(*planted[:2], layers=["relu2"])
        assert repr(method) == "STRIDE(operators='newton', not fitted)"
        with pytest.raises(ValueError, match=r"`layers_` must be read after fit\(\)"):
            method.layers_  # noqa: B018
        assert repr(method.fit()) == "STRIDE(operators='newton', n_train=48, layers=['relu2'])"
