"""What holds for single methods beside the laws of `stride_captum.conformance`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import MLP, N_TEST, N_TRAIN, Fails, built, loader, planted_classes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.adapters import ClassRandom, ClassSimilarity, Random, Similarity
from stride_captum.conformance import CHECKS, run_check

TRAINED = {"operators": "trained", "n_subsets": 12, "rank": 4, "iterations": 20}
KEPT_BY_TRAINED = [
    "a_second_call_gives_the_same_bits",
    "a_new_object_gives_the_same_bits",
    "groups_score_the_sum_of_their_members",
    "the_top_k_are_the_best_of_all",
]


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to a fraction of the largest of each row."""
    assert found.shape == wanted.shape
    largest = wanted.abs().amax(-1, keepdim=True)
    assert bool(((found - wanted).abs() <= tolerance * largest).all())


# 12 responses hardly determine 48 weights: rounding moves the Lasso along a flat bottom.
@pytest.mark.parametrize(("recovery", "tolerance"), [("ridge", 1e-5), ("lasso", 2e-2)])
class TestFewerSubsetsThanExamples:
    @pytest.mark.slow
    @pytest.mark.parametrize("law", KEPT_BY_TRAINED)
    def test_laws_that_rounding_does_not_touch(self, recovery, tolerance, law):
        config = arguments(**TRAINED, recovery=recovery)
        assert run_check(CHECKS[law], partial(STRIDE, **config)) == "pass"

    @pytest.mark.slow
    def test_a_test_point_scores_as_in_any_other_batch(self, planted, recovery, tolerance):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        method = STRIDE(model, train, **arguments(**TRAINED, recovery=recovery))
        scores = method.influence((x, y))
        if recovery == "ridge":
            # Scores come from changes of logits, which are rounded as logits are.
            rounding = torch.finfo(torch.float32).eps * float(model(x).detach().abs().max())
            tolerance = rounding / float(scores.abs().amax(1).min())
        alone = torch.cat([method.influence((x[i : i + 1], y[i : i + 1])) for i in range(N_TEST)])
        close(alone, scores, tolerance)
        close(method.influence(loader(planted[2], 2)), scores, tolerance)
        order = [4, 2, 6, 0, 1, 3, 5]
        close(method.influence((x[order], y[order])), scores[order], tolerance)

    @pytest.mark.slow
    def test_nan_in_a_test_point_is_in_its_row_only(self, planted, recovery, tolerance):
        model, train, (x, y) = planted[0], planted[1], planted[2].tensors
        method = STRIDE(model, train, **arguments(**TRAINED, recovery=recovery))
        wanted, spoilt = method.influence((x, y)), x.clone()
        spoilt[2] = float("nan")
        scores, others = method.influence((spoilt, y)), [i for i in range(N_TEST) if i != 2]
        assert bool(scores[2].isnan().all())
        close(scores[others], wanted[others], tolerance)


trained_stride = partial(STRIDE, **arguments(**TRAINED))


class TestNaN:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("method", [STRIDE, trained_stride, Similarity, ClassSimilarity])
    def test_activations_of_the_training_set_are_refused_with_a_reason(self, planted, method, value):
        model, (x, y) = planted[0], planted[1].tensors
        spoilt = x.clone()
        spoilt[7, 2] = value
        with pytest.raises(
            ValueError, match="`train_dataset` must give finite activations; got NaN or infinity"
        ):
            method(model, TensorDataset(spoilt, y)).fit()

    @pytest.mark.parametrize("method", [STRIDE, trained_stride])
    def test_weights_that_make_the_logits_nan_are_blamed_on_the_logits(self, planted, method):
        model = built(MLP)
        model.fc3.bias.data[1] = float("nan")
        with pytest.raises(ValueError, match=r"must (give finite logits|return logits without NaN); got NaN"):
            method(model, planted[1]).fit()


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
        method = STRIDE(model, train, operators=ClosedForm(residuals="training"))
        cosine = method.influence(test, normalize="cosine")
        assert float(cosine.abs().max()) <= 1 + 1e-5
        own = method.influence(train, response="loss", normalize="cosine").diagonal()
        torch.testing.assert_close(own, -torch.ones(N_TRAIN), atol=1e-4, rtol=0)

    def test_self_influence_of_the_training_set_as_other_data_is_the_same_without_leave_one_out(
        self, planted
    ):
        model, train, _ = planted
        method = STRIDE(model, train, operators=ClosedForm(residuals="training"))
        own = method.self_influence()
        assert float(own.min()) >= 0
        close(method.self_influence(train), own, 1e-5)

    def test_self_influence_differs_from_the_thresholded_effect_by_the_threshold_at_most(self, planted):
        model, train, _ = planted
        method = STRIDE(model, train, operators=ClosedForm(threshold=0.02))
        effect = method.influence(train, response="loss", target="label").diagonal()
        assert float((method.self_influence() + effect).abs().max()) <= 0.02 * (1 + 1e-5)

    def test_groups_hold_training_indices(self, planted):
        with pytest.raises(ValueError, match=r"`groups\[1\]` must hold places in \[0, 48\); got 48"):
            STRIDE(*planted[:2]).subset_influence(planted[2].tensors, [[0], [48]])

    def test_losses_and_log_probabilities_are_opposites(self, planted):
        method = STRIDE(*planted[:2])
        loss = method.influence(planted[2], response="loss")
        close(method.influence(planted[2], response="log-probability"), -loss, 1e-5)

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
        assert repr(method) == "STRIDE(operators='closed-form', not fitted)"
        with pytest.raises(ValueError, match=r"`layers_` must be read after fit\(\)"):
            method.layers_  # noqa: B018
        assert repr(method.fit()) == "STRIDE(operators='closed-form', n_train=48, layers=['relu2'])"
