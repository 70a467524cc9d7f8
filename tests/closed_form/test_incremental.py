"""Examples that are added or removed give what a refit gives, without the model seeing the others again."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from flat_options import arguments
from planted import (
    MLP,
    HuggingFaceLike,
    Items,
    ListOfDicts,
    built,
    expect_untouched,
    loader,
    planted_classes,
    trained,
)
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from stride_captum import STRIDE, Checkpoint, Features, result_rows

CURVATURES = ("identity", "kronecker", "eigenvalue-corrected", "gauss-newton")
REMOVED = [0, 17, 41, 5]
KEPT = [i for i in range(48) if i not in REMOVED]


class Counting(nn.Module):
    """Counts the examples that go through the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, *inputs):
        self.seen += len(inputs[0])
        return self.model(*inputs)


def of_half(x, y, steps):
    """Weights of a model that has learned some examples by heart, more or less."""
    model = built(MLP, seed=steps)
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return model.state_dict()


def some(dataset, rows):
    return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))


def in_double(planted):
    _, train, test = planted
    x, y = test.tensors
    return (
        built(MLP, seed=3).double(),
        TensorDataset(train.tensors[0].double(), train.tensors[1]),
        (x.double(), y),
    )


def answers(method, batch):
    return {
        "dense": method.influence(batch),
        "loss": method.influence(batch, response="loss"),
        "cosine": method.influence(batch, normalize="cosine"),
        "self": method.self_influence()[None],
        "others": method.self_influence(batch)[None],
        "mislabel": method.mislabel_scores()[None],
    }


def same(found, wanted, batch, tolerance):
    assert (found.n_train_, found.temperature_) == (wanted.n_train_, pytest.approx(wanted.temperature_))
    assert torch.equal(found.coverage_, wanted.coverage_)
    ours, theirs = answers(found, batch), answers(wanted, batch)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        error = (ours[name] - value).abs() / value.abs().amax(1, keepdim=True)
        assert float(error.max()) < tolerance, name
    assert torch.equal(found.influence(batch, 3).indices, wanted.influence(batch, 3).indices)


class TestEqualToARefit:
    @pytest.mark.slow
    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_in_float64(self, planted, curvature):
        model, train, batch = in_double(planted)
        # The solver of gauss-newton stops at 1e-10.
        tolerance, config = 1e-8 if curvature == "gauss-newton" else 1e-10, arguments(curvature=curvature)
        method = STRIDE(model, some(train, slice(0, 40)), **config).fit()
        method.add_examples(some(train, slice(40, 48)))
        same(method, STRIDE(model, train, **config).fit(), batch, tolerance)
        method.remove_examples(REMOVED)
        same(method, STRIDE(model, some(train, KEPT), **config).fit(), batch, tolerance)

    @pytest.mark.parametrize("residuals", ["training", "temperature", "leave-one-out", "both"])
    def test_in_float32(self, planted, residuals):
        model, train, test = planted
        config = arguments(residuals=residuals)
        method = STRIDE(model, some(train, slice(0, 40)), **config).fit()
        method.add_examples(some(train, slice(40, 48)).tensors).remove_examples(torch.tensor(REMOVED))
        same(method, STRIDE(model, some(train, KEPT), **config).fit(), test.tensors, 1e-5)

    def test_many_changes_one_after_the_other(self, planted):
        model, train, batch = in_double(planted)
        method = STRIDE(model, train).fit()
        order = list(range(48))
        for i in range(20):
            method.remove_examples([i])
            order.append(order.pop(i))
            method.add_examples(some(train, order[-1:]))
        same(method, STRIDE(model, some(train, order)).fit(), batch, 1e-10)

    def test_with_held_out_data_the_temperature_follows(self, planted):
        _, train, batch = in_double(planted)
        model = copy.deepcopy(planted[0]).double()
        x, y = planted_classes(30, seed=9, noise=2.0).tensors
        held_out = TensorDataset(x.double(), y)
        method = STRIDE(model, some(train, slice(0, 20)), held_out=held_out).fit()
        before = method.temperature_
        method.add_examples(some(train, slice(20, 48)))
        assert method.temperature_ != before
        same(method, STRIDE(model, train, held_out=held_out).fit(), batch, 1e-10)

    def test_checkpoints(self, planted):
        model, train, test = planted
        weights = [model.state_dict(), built(MLP).state_dict()]
        method = STRIDE(model, some(train, slice(0, 40)), checkpoints=weights).fit()
        with expect_untouched(model):
            method.add_examples(some(train, slice(40, 48)))
        same(method, STRIDE(model, train, checkpoints=weights).fit(), test.tensors, 1e-5)

    def test_checkpoints_that_have_seen_a_part(self, planted, tmp_path):
        model, train, test = planted
        x, y = train.tensors[0], torch.arange(48) * 7 % 4 % 3  # labels that say little of the inputs
        halves = [list(range(0, 20)), [*range(18, 40)]]
        states = [of_half(x[half], y[half], steps) for half, steps in zip(halves, (20, 40), strict=True)]

        def fitted(rows, halves):
            data = TensorDataset(x[rows], y[rows])
            checkpoints = [Checkpoint(s, seen=h) for s, h in zip(states, halves, strict=True)]
            return STRIDE(model, data, checkpoints=checkpoints).fit()

        def temperatures(method):
            return [state.operators.temperature for state in method._states]

        method, wanted = fitted(slice(0, 40), halves), fitted(slice(0, 48), halves)
        method.add_examples((x[40:], y[40:]))
        assert temperatures(method) == pytest.approx(temperatures(wanted), rel=1e-5)
        assert len(set(temperatures(method))) == 2
        torch.testing.assert_close(method.mislabel_scores(), wanted.mislabel_scores(), rtol=1e-4, atol=1e-5)

        moved = [[KEPT.index(i) for i in half if i in KEPT] for half in halves]
        wanted = fitted(KEPT, moved)
        method.remove_examples(REMOVED)
        assert temperatures(method) == pytest.approx(temperatures(wanted), rel=1e-5)
        assert [list(c.seen) for c in method.checkpoints] == moved
        torch.testing.assert_close(method.mislabel_scores(), wanted.mislabel_scores(), rtol=1e-4, atol=1e-5)
        same(method, wanted, test.tensors, 1e-4)

    def test_ids_go_and_come_with_their_examples(self, planted):
        class Named(TensorDataset):
            ids: ClassVar = ["new", "newer"]

        model, train, test = planted
        x, y = train.tensors
        method = STRIDE(model, train, ids=[f"image-{i}" for i in range(48)]).fit().remove_examples(REMOVED)
        assert method.ids == [f"image-{i}" for i in KEPT]
        assert method.add_examples(Named(x[:2], y[:2])).ids == [f"image-{i}" for i in KEPT] + ["new", "newer"]
        assert method.add_examples((x[:2], y[:2])).ids is None
        result_rows(method, method.influence(test, 1), as_frame=False)

    def test_a_change_that_fails_leaves_what_checkpoints_have_seen(self, planted):
        model, train, test = planted
        state = built(MLP, seed=1).state_dict()
        method = STRIDE(model, train, checkpoints=[Checkpoint(state, seen=range(4, 48))], ids=range(48)).fit()
        before = method.influence(test.tensors)
        with pytest.raises(ValueError, match="`seen` must leave out some training examples"):
            method.remove_examples([0, 1, 2, 3])
        assert method.influence(test.tensors).equal(before)
        assert list(method.checkpoints[0].seen) == list(range(4, 48))
        assert list(method.ids) == list(range(48))

    def test_features_without_a_model(self, planted):
        model, train, test = planted
        with torch.no_grad():
            rows = (train.tensors[0], model(train.tensors[0]), train.tensors[1])
            batch = (test.tensors[0], model(test.tensors[0]), test.tensors[1])
        method = STRIDE.from_features(*(part[:40] for part in rows)).fit()
        method.add_examples(tuple(part[40:] for part in rows)).remove_examples(REMOVED)
        wanted = STRIDE.from_features(*(part[KEPT] for part in rows)).fit()
        same(method, wanted, batch, 1e-5)
        same(method.fit(), wanted, batch, 1e-5)

    def test_a_feature_that_only_one_example_has(self):
        """The difference of its two sums in float32 would be a rounding error of 1e8."""
        generator = torch.Generator().manual_seed(0)
        features, labels = torch.randn(600, 130, generator=generator), torch.arange(600) % 3
        logits = torch.randn(600, 3, generator=generator)
        features[:, 7] *= 1e-3
        features[5, 7] = 3e4
        features[:, 9] = 0.0
        features[5, 9] = 2.0
        batch = (features[:4], logits[:4], labels[:4])
        method = STRIDE.from_features(features, logits, labels).fit().remove_examples([5])
        keep = [i for i in range(600) if i != 5]
        wanted = STRIDE.from_features(features[keep], logits[keep], labels[keep]).fit()
        same(method, wanted, batch, 1e-5)
        gram = method._states[0].operators.moments.gram
        assert float(gram[9].abs().max()) == 0.0
        assert float(gram[7, 7]) == pytest.approx(
            float(features[keep][:, 7].double().square().sum()), rel=1e-6
        )


class TestWork:
    def test_only_new_examples_go_through_the_model(self, planted):
        model, train, _ = planted
        counting = Counting(model)
        method = STRIDE(counting, some(train, slice(0, 40)), layers=["model.fc2"]).fit()
        counting.seen = 0
        method.add_examples(some(train, slice(40, 43)))
        assert counting.seen == 3
        method.remove_examples([1, 2])
        assert counting.seen == 3
        assert method.n_train_ == 41

    def test_the_products_that_a_refit_takes_of_all_are_taken_of_the_changed(self, monkeypatch):
        from stride_captum.closed_form import moments

        taken = []
        whole = moments.add_gram_matrix
        monkeypatch.setattr(
            moments, "add_gram_matrix", lambda total, rows: taken.append(len(rows)) or whole(total, rows)
        )
        model, train, _ = trained(MLP, steps=1)
        method = STRIDE(model, train).fit()
        assert taken == [48]
        method.remove_examples([4])
        method.add_examples(some(train, slice(0, 2)))
        assert taken == [48, 1, 2]


class TestTrainingSet:
    """`train_dataset` follows, so that a refit, `save` and `load` see the same examples."""

    @pytest.mark.parametrize(
        "kind", [lambda d: d, Items, lambda d: loader(d, 7), lambda d: Subset(d, range(len(d)))]
    )
    def test_of_every_kind(self, planted, kind):
        model, train, test = planted
        first, second = kind(some(train, slice(0, 40))), kind(some(train, slice(40, 48)))
        method = STRIDE(model, first).fit().add_examples(second).remove_examples(REMOVED)
        changed = method.influence(test.tensors)
        scale = changed.abs().amax(1, keepdim=True)
        again = method.fit().influence(test.tensors)
        assert float(((again - changed).abs() / scale).max()) < 1e-5
        assert method.n_train_ == 44

    def test_dicts(self):
        examples = ListOfDicts(30)
        method = STRIDE(built(HuggingFaceLike), Subset(examples, range(25)))
        method.add_examples(Subset(examples, range(25, 30)))
        wanted = STRIDE(built(HuggingFaceLike), examples).influence(ListOfDicts(4, seed=1))
        assert torch.allclose(method.influence(ListOfDicts(4, seed=1)), wanted, atol=1e-5)
        assert isinstance(method.train_dataset, ConcatDataset)

    def test_saved_and_loaded_it_can_be_changed_again(self, planted, tmp_path):
        model, train, test = planted
        method = STRIDE(model, some(train, slice(0, 40))).add_examples(some(train, slice(40, 48)))
        method.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, train)
        assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))
        assert torch.equal(
            loaded.remove_examples(REMOVED).influence(test.tensors),
            method.remove_examples(REMOVED).influence(test.tensors),
        )


class TestStore:
    """Features from a store are in memory once examples have come or gone; the store stays as it is."""

    def test_changed_saved_loaded_and_fitted_again(self, planted, tmp_path):
        model, train, test = planted
        counting, options = Counting(model), {"layers": ["model.fc2"], "feature_store": tmp_path / "store"}
        method = STRIDE(counting, train, **options).fit()
        counting.seen = 0
        method.remove_examples(REMOVED)
        assert counting.seen == 0
        same(method, STRIDE(model, some(train, KEPT), layers=["fc2"]).fit(), test.tensors, 1e-5)
        method.save(tmp_path / "method")
        kept = method.train_dataset
        loaded = STRIDE.load(tmp_path / "method", counting, kept)
        assert torch.equal(loaded.influence(test.tensors), method.influence(test.tensors))
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "method").read_bytes()
        with pytest.raises(ValueError, match="feature_store"):
            loaded.fit()
        other = STRIDE(counting, train, **options).fit()
        assert other.n_train_ == 48

    def test_given_features_that_are_projected_are_refused(self, planted):
        x, y = planted[1].tensors
        z = planted[0](x).detach()
        method = STRIDE.from_features(x, z, y, projection=Features(projection="random", projection_width=3))
        with pytest.raises(ValueError, match="`projection` must be None for adding or removing examples of"):
            method.fit().remove_examples([0])

    def test_principal_directions_depend_on_the_examples(self, planted):
        model, train, _ = planted
        config = arguments(projection="pca", projection_width=4)
        with pytest.raises(ValueError, match="`projection` must be None or 'random' for adding or removing"):
            STRIDE(model, train, **config).fit().remove_examples([0])

    def test_random_directions_do_not(self, planted):
        model, train, test = planted
        config = arguments(projection="random", projection_width=4)
        method = STRIDE(model, some(train, slice(0, 40)), **config).fit()
        method.add_examples(some(train, slice(40, 48)))
        same(method, STRIDE(model, train, **config).fit(), test.tensors, 1e-5)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


class TestErrors:
    @pytest.mark.parametrize(
        ("indices", "error", "message"),
        [
            ([], ValueError, "`indices` must name between 1 and 47 examples; got 0"),
            (range(48), ValueError, "`indices` must name between 1 and 47 examples; got 48"),
            ([3, 3], ValueError, "`indices` must hold every place once; got 3 twice"),
            (torch.ones(48, dtype=torch.bool), ValueError, "`indices` must name between 1 and 47 examples"),
        ],
    )
    def test_indices(self, planted, indices, error, message):
        model, train, test = planted
        method = STRIDE(model, train).fit()
        before = method.influence(test.tensors)
        with pytest.raises(error, match=message):
            method.remove_examples(indices)
        assert torch.equal(method.influence(test.tensors), before)

    @pytest.mark.parametrize("examples", [{"x": torch.ones(3)}, (), Endless(), [torch.ones(2, 6)]])
    def test_examples(self, planted, examples):
        model, train, _ = planted
        with pytest.raises(TypeError, match="`examples` must be a Dataset or DataLoader with a length"):
            STRIDE(model, train).add_examples(examples)

    def test_a_bad_example_changes_nothing(self, planted):
        model, train, test = planted
        method = STRIDE(model, train).fit()
        before = method.influence(test.tensors)
        for x, y in ((torch.full((1, 6), torch.nan), 0), (torch.ones(1, 6), 7)):
            with pytest.raises(ValueError, match="`train_dataset`"):
                method.add_examples((x, torch.tensor([y])))
        assert method.train_dataset is train
        assert torch.equal(method.influence(test.tensors), before)

    def test_other_weights(self, planted):
        model, train = built(MLP), planted[1]
        method = STRIDE(model, train).fit()
        with torch.no_grad():
            model.fc1.weight.add_(1)
        with pytest.raises(ValueError, match="`model` must have the weights that the method was fitted on"):
            method.remove_examples([0])

    def test_labels_of_another_kind(self, planted):
        model, train, test = planted
        x, y = train.tensors
        soft = nn.functional.one_hot(y, 3).float()
        rows = [test.tensors[0], test.tensors[1]]
        for labels, there, here in ((y, "class indices", "distrib"), (soft, "distributions", "class ind")):
            new = nn.functional.one_hot(rows[1], 3).float() if labels is y else rows[1]
            method = STRIDE(model, TensorDataset(x, labels)).fit()
            match = f"`examples` must hold labels of the kind .* fitted with, {there}.*; got {here}"
            with pytest.raises(ValueError, match=match):
                method.add_examples((rows[0], new))

    def test_trained_operators(self, planted):
        model, train, _ = planted
        config = arguments(operators="trained", subsets="partition", n_subsets=4, rank=2, iterations=1)
        with pytest.raises(ValueError, match=r"`operators` must be ClosedForm\(\) for adding or removing"):
            STRIDE(model, train, **config).fit().remove_examples([0])
