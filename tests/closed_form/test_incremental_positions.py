"""Examples with several positions that come, go or change give what a refit gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_captum import STRIDE, Batch, Checkpoint, ClosedForm, Features
from stride_captum.conformance.toy_problems import IGNORED, MLP, posed_with, trained
from stride_captum.losses import CrossEntropy

FORMS = ["rows", "matrix"]
REMOVED = [0, 17, 41, 5]
KEPT = [i for i in range(48) if i not in REMOVED]


@pytest.fixture(scope="module")
def tokens():
    """In float64; examples have other numbers of labels, and one has none."""
    with posed_with("positions"):
        model, *data = trained(MLP)
    train, test = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in data)
    y = train.tensors[1]
    y[3], y[17, 1:], y[30, :1] = IGNORED, IGNORED, IGNORED
    return model.double(), train, test.tensors


def some(dataset, rows):
    return TensorDataset(*(tensor[rows] for tensor in dataset.tensors))


def answers(method, test) -> dict[str, Tensor]:
    rows = method.operators_.form == "rows"
    return {
        "scores": method.influence(test),
        "loss": method.influence(test, response="loss"),
        "cosine": method.influence(test, normalize="cosine"),
        "positions": method.influence(test, per_position=True).flatten(1),
        "positions of an example": method.positions_of(test, 4) if rows else torch.ones(1, 1),
        "self-influence": method.self_influence()[None],
        "of others": method.self_influence(test)[None],
        "mislabel": method.mislabel_scores()[None],
    }


def same(found, wanted, test, tolerance=1e-10):
    assert (found.n_train_, found.temperature_) == (wanted.n_train_, pytest.approx(wanted.temperature_))
    assert torch.equal(found.coverage_, wanted.coverage_)
    ours, theirs = answers(found, test), answers(wanted, test)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        largest = value.abs().amax(1, keepdim=True)
        assert float(((ours[name] - value).abs() / largest.where(largest > 0, 1.0)).max()) < tolerance, name
    assert torch.equal(found.influence(test, 3).indices, wanted.influence(test, 3).indices)


@pytest.mark.parametrize("form", FORMS)
class TestEqualToARefit:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("residuals", "curvature"),
        [
            ("temperature", "kronecker"),
            ("both", "kronecker"),
            ("leave-one-out", "identity"),
            ("both", "eigenvalue-corrected"),
            ("temperature", "gauss-newton"),
        ],
    )
    def test_added_and_removed(self, tokens, form, residuals, curvature):
        model, train, test = tokens
        options = {"operators": ClosedForm(form=form, residuals=residuals, curvature=curvature)}
        tolerance = 1e-8 if curvature == "gauss-newton" else 1e-10
        method = STRIDE(model, some(train, slice(0, 40)), batch_size=7, **options).fit()
        method.add_examples(some(train, slice(40, 48)))
        same(method, STRIDE(model, train, **options).fit(), test, tolerance)
        method.remove_examples(REMOVED)
        same(method, STRIDE(model, some(train, KEPT), **options).fit(), test, tolerance)

    def test_in_float32(self, tokens, form):
        with posed_with("positions"):
            model, train, test = trained(MLP)
        options = {"operators": ClosedForm(form=form)}
        method = STRIDE(model, some(train, slice(0, 40)), **options).fit()
        method.add_examples(some(train, slice(40, 48)).tensors).remove_examples(torch.tensor(REMOVED))
        same(method, STRIDE(model, some(train, KEPT), **options).fit(), test.tensors, 1e-5)

    def test_examples_without_a_label_come_and_go(self, tokens, form):
        model, train, test = tokens
        options = {"operators": ClosedForm(form=form)}
        method = STRIDE(model, train, **options).fit()
        without = TensorDataset(train.tensors[0][:2], torch.full_like(train.tensors[1][:2], IGNORED))
        longer = TensorDataset(*map(torch.cat, zip(train.tensors, without.tensors, strict=True)))
        same(method.add_examples(without), STRIDE(model, longer, **options).fit(), test)
        fewer = some(train, [i for i in range(48) if i != 3])
        same(method.remove_examples([3, 48, 49]), STRIDE(model, fewer, **options).fit(), test)

    def test_weights_of_classes_and_positions(self, tokens, form):
        model, train, test = tokens
        x, y = train.tensors
        w = torch.rand(y.shape, generator=torch.Generator().manual_seed(0))
        w[2, 1] = 0
        options = {
            "operators": ClosedForm(form=form),
            "loss": CrossEntropy(weight=[1.0, 2.0, 0.5]),
            "batch": Batch(sample_weight=1),
        }
        weighed, test = TensorDataset(x, w, y), (test[0], torch.ones(test[1].shape), test[1])
        method = STRIDE(model, some(weighed, slice(0, 40)), **options).fit()
        method.add_examples(some(weighed, slice(40, 48))).remove_examples(REMOVED)
        same(method, STRIDE(model, some(weighed, KEPT), **options).fit(), test)
        by_number = {**options, "batch": Batch(sample_weight=w)}
        method = STRIDE(model, train, **by_number).fit().remove_examples(REMOVED)
        wanted = STRIDE(model, some(weighed, KEPT), **options).fit()
        torch.testing.assert_close(method.influence((test[0], test[2])), wanted.influence(test))

    @pytest.mark.slow
    def test_checkpoints_that_have_seen_a_part(self, tokens, form):
        model, train, test = tokens
        states = [model.state_dict(), {name: 0.5 * part for name, part in model.state_dict().items()}]
        seen = [list(range(0, 20)), list(range(18, 40))]

        def fitted(rows, seen):
            checkpoints = [Checkpoint(s, seen=part) for s, part in zip(states, seen, strict=True)]
            options = {"checkpoints": checkpoints, "operators": ClosedForm(form=form)}
            return STRIDE(model, some(train, rows), **options).fit()

        method = fitted(slice(0, 40), seen).add_examples(some(train, slice(40, 48)))
        same(method, fitted(slice(0, 48), seen), test)
        moved = [[KEPT.index(i) for i in part if i in KEPT] for part in seen]
        same(method.remove_examples(REMOVED), fitted(KEPT, moved), test)

    def test_held_out_data_and_a_projection(self, tokens, form):
        model, train, test = tokens
        options = {
            "operators": ClosedForm(form=form),
            "held_out": some(train, slice(5, 15)),
            "features": Features(projection="random", projection_width=4),
        }
        method = STRIDE(model, some(train, slice(0, 40)), **options).fit()
        method.add_examples(some(train, slice(40, 48)))
        same(method, STRIDE(model, train, **options).fit(), test)

    def test_changed_examples_have_other_numbers_of_labels(self, tokens, form, tmp_path):
        model, train, test = tokens
        options = {"operators": ClosedForm(form=form)}
        STRIDE(model, train, **options).fit().save(tmp_path / "method")
        x, y = (part.clone() for part in train.tensors)
        y[3], y[40], y[7, 0], x[9] = 1, IGNORED, IGNORED, 0.25
        changed = TensorDataset(x, y)
        found = STRIDE.load(tmp_path / "method", model, changed, changed="update")
        same(found, STRIDE(model, changed, **options).fit(), test)

    def test_changed_twice_saved_and_loaded(self, tokens, form, tmp_path):
        model, train, test = tokens
        options = {"operators": ClosedForm(form=form), "feature_store": tmp_path / "store"}
        single = model.float()
        train = TensorDataset(train.tensors[0].float(), train.tensors[1])
        test = test[0].float(), test[1]
        try:
            method = STRIDE(single, train, **options).fit()
            method.remove_examples(REMOVED)
            wanted = STRIDE(single, some(train, KEPT), operators=options["operators"]).fit()
            same(method, wanted, test, 1e-5)
            method.save(tmp_path / "method")
            loaded = STRIDE.load(tmp_path / "method", single, method.train_dataset)
            assert loaded.influence(test).equal(method.influence(test))
            ours = loaded.remove_examples([1]).influence(test)
            assert ours.equal(method.remove_examples([1]).influence(test))
        finally:
            model.double()


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x):
        self.seen += len(x)
        return self.model(x)


@pytest.mark.parametrize(("form", "added", "removed"), [("rows", 8, 0), ("matrix", 48, 44)])
def test_who_goes_through_the_model(tokens, form, added, removed):
    """Rows are updated; matrices are made of all examples again."""
    model, train, _ = tokens
    counting = Counting(model)
    options = {"operators": ClosedForm(form=form), "layers": ["model.fc2"]}
    method = STRIDE(counting, some(train, slice(0, 40)), **options).fit()
    counting.seen = 0
    method.add_examples(some(train, slice(40, 48)))
    assert counting.seen == added
    method.remove_examples(REMOVED)
    assert counting.seen == added + removed


class Lengths(Dataset):
    """Examples of other lengths, which a loader pads."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def padded(examples):
    x, y = zip(*examples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(x, batch_first=True), pad(y, batch_first=True, padding_value=IGNORED)


@pytest.mark.parametrize("form", FORMS)
def test_examples_of_other_lengths(tokens, form):
    model, train, test = tokens
    lengths = [1 + i % train.tensors[1].shape[1] for i in range(48)]
    every = [(x[:n], y[:n]) for (*_, x, y), n in zip(train, lengths, strict=True)]

    def loader(rows):
        return DataLoader(Lengths([every[i] for i in rows]), 5, collate_fn=padded)

    options = {"operators": ClosedForm(form=form)}
    method = STRIDE(model, loader(range(40)), **options).fit().add_examples(loader(range(40, 48)))
    same(method.remove_examples(REMOVED), STRIDE(model, loader(KEPT), **options).fit(), test)


@pytest.mark.parametrize("form", FORMS)
class TestRefused:
    def unchanged(self, tokens, form, change, match):
        model, train, test = tokens
        method = STRIDE(model, train, operators=ClosedForm(form=form)).fit()
        before, digests = method.influence(test), method.digests_
        with pytest.raises(ValueError, match=match):
            change(method, *train.tensors)
        assert method.train_dataset is train
        assert method.digests_ is digests
        assert method.influence(test).equal(before)

    def test_no_label_is_left(self, tokens, form):
        model, train, _ = tokens
        x, y = train.tensors[0], torch.full_like(train.tensors[1], IGNORED)
        y[7, 1] = 0
        method = STRIDE(model, TensorDataset(x, y), operators=ClosedForm(form=form)).fit()
        with pytest.raises(ValueError, match="at least one label that is not ignored"):
            method.remove_examples([7])
        assert method.n_train_ == 48

    def test_another_shape(self, tokens, form):
        match = "`examples` must hold tensors whose rows have the shapes .* Pad positions to one length"
        self.unchanged(tokens, form, lambda m, x, y: m.add_examples((x[:3, :1], y[:3, :1])), match)

    def test_soft_labels(self, tokens, form):
        def change(method, x, y):
            method.add_examples((x[:3], nn.functional.one_hot(y[:3].clamp_min(0), 3).double()))

        self.unchanged(tokens, form, change, "`examples` must hold")


def test_examples_without_positions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(10, 4, 3)
    y = torch.arange(40).reshape(10, 4) % 2
    several, single = Lengths(list(zip(x, y, strict=True))), Lengths(list(zip(x[:, 0], y[:, 0], strict=True)))
    for first, second, match in (
        (several, single, "outputs with positions for every batch, or for none"),
        (single, several, "`layers` must give one row for each of the positions"),
    ):
        method = STRIDE(model, first, operators=ClosedForm(form="rows"), layers=["0", "1"]).fit()
        with pytest.raises(ValueError, match=match):
            method.add_examples(second)
