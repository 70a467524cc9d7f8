"""A saved method and a training set that has changed since: refused by row, or brought up to date."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import (
    MLP,
    HuggingFaceLike,
    ListOfDicts,
    built,
    expect_untouched,
    planted_classes,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import TRAK, ClassSimilarity, Random, TracIn
from stride_captum.influence import stale_data
from stride_captum.influence.stale_data import own_labels

N = 300
CHANGED = [3, 130, 131, 299]


class Pairs(Dataset):
    """Examples that only `__getitem__` gives; counts how many were read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.read = x, y, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        return self.x[i], self.y[i]


class Targets(Pairs):
    """As the data sets of torchvision keep their labels."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.targets, self.target_transform = y.tolist(), None

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        return self.x[i], self.targets[i]


class Stream(IterableDataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.x, self.y, strict=True))


def turned(x: Tensor, y: Tensor) -> DataLoader:
    """Gives the examples in order from a data set that holds them backwards."""
    backwards = TensorDataset(x.flip(0), y.flip(0))
    return DataLoader(Subset(backwards, range(len(x) - 1, -1, -1)), batch_size=7)


SOURCES = {
    "tensors": TensorDataset,
    "items": Pairs,
    "targets": Targets,
    "loader": lambda x, y: DataLoader(Pairs(x, y), batch_size=11),
    "another order": turned,
    "stream": Stream,
}


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return planted_classes(N, seed=1).tensors


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return built(MLP).eval()


@pytest.fixture(scope="module")
def test() -> tuple[Tensor, Tensor]:
    return planted_classes(5, seed=2).tensors


def relabeled(y: Tensor, rows: list[int] = CHANGED) -> Tensor:
    changed = y.clone()
    changed[rows] = (changed[rows] + 1) % 3
    return changed


def moved(x: Tensor, rows: list[int] = CHANGED) -> Tensor:
    changed = x.clone()
    changed[rows] += 1e-3
    return changed


def saved(method: Any, tmp_path: Any) -> Any:
    method.fit().save(tmp_path / "method")
    return tmp_path / "method"


class TestRefused:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", SOURCES)
    def test_rows_are_named_for_every_kind_of_data_set(self, tmp_path, model, data, kind):
        (x, y), source = data, SOURCES[kind]
        path = saved(STRIDE(model, source(x, y)), tmp_path)
        assert STRIDE.load(path, model, source(x.clone(), y.clone())).compared_ == "300 labels and inputs"
        match = "`train_dataset` must be the data of the saved method; got "
        rows = r"rows 3, 130, 131 and 1 more\)"
        with pytest.raises(ValueError, match=match + rf"other labels in 4 of 300 examples \({rows}"):
            STRIDE.load(path, model, source(x, relabeled(y)))
        with pytest.raises(ValueError, match=match + rf"other inputs in 4 of 300 examples \({rows}"):
            STRIDE.load(path, model, source(moved(x), y))
        both = rf"other labels in 1 of 300 examples \(rows 8\) and other inputs in 4 of 300 examples \({rows}"
        with pytest.raises(ValueError, match=match + both):
            STRIDE.load(path, model, source(moved(x), relabeled(y, [8])))

    @pytest.mark.parametrize("method", [TRAK, ClassSimilarity, Random, TracIn])
    def test_by_every_method(self, tmp_path, model, data, method):
        path = saved(method(model, Pairs(*data)), tmp_path)
        method.load(path, model, Pairs(*data))
        for changed in ("refuse", "update"):
            with pytest.raises(
                ValueError, match=r"other labels in 4 of 300.* Fit again: this method cannot take in single"
            ):
                method.load(path, model, Pairs(data[0], relabeled(data[1])), changed=changed)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", SOURCES)
    @pytest.mark.parametrize("changed", ["refuse", "update"])
    def test_another_length(self, tmp_path, model, data, kind, changed):
        (x, y), source = data, SOURCES[kind]
        path = saved(STRIDE(model, source(x, y)), tmp_path)
        for other in (source(x[1:], y[1:]), source(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))):
            match = r"must hold the 300 examples of the saved method; got (299|301)\. Fit again"
            with pytest.raises(ValueError, match=match):
                STRIDE.load(path, model, other, changed=changed)

    def test_another_order_is_called_so(self, tmp_path, model, data):
        path = saved(STRIDE(model, Pairs(*data)), tmp_path)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match=r"got the same examples in another order\. Fit again"):
            STRIDE.load(path, model, Pairs(data[0][order], data[1][order]))

    def test_dicts(self, tmp_path):
        model, examples = built(HuggingFaceLike).eval(), ListOfDicts(40)
        path = saved(STRIDE(model, DataLoader(examples, batch_size=8)), tmp_path)
        assert STRIDE.load(path, model, examples).compared_ == "40 labels and inputs"
        for name, kind in (("labels", "labels"), ("attention_mask", "inputs"), ("input_ids", "inputs")):
            other = copy.deepcopy(examples)
            getattr(other, name)[7] = 1 - getattr(other, name)[7].clamp(0, 1)
            with pytest.raises(ValueError, match=rf"other {kind} in 1 of 40 examples \(rows 7\)"):
                STRIDE.load(path, model, other)

    def test_data_that_changed_between_fit_and_save(self, tmp_path, model, data):
        source = TensorDataset(*(tensor.clone() for tensor in data))
        method = STRIDE(model, source).fit()
        source.tensors[1][CHANGED] = relabeled(data[1])[CHANGED]
        method.save(tmp_path / "method")
        with pytest.raises(ValueError, match="other labels in 4 of 300"):
            STRIDE.load(tmp_path / "method", model, source)

    def test_data_that_shrank_between_fit_and_save(self, tmp_path, model, data):
        """Of a method whose `fit` makes no pass of its own."""
        source = Pairs(*data)
        method = STRIDE(model, source).fit()
        method.digests_ = method._passes = None
        source.x, source.y = source.x[1:], source.y[1:]
        with pytest.raises(ValueError, match="must hold the 300 examples that the method was fitted on"):
            method.save(tmp_path / "method")

    def test_features_in_a_store(self, tmp_path, model, data):
        method = STRIDE(model, Pairs(*data), feature_store=tmp_path / "store")
        path = saved(method, tmp_path)
        STRIDE.load(path, model, Pairs(*data))
        for changed in ("refuse", "update"):
            with pytest.raises(ValueError, match=r"other labels in 4 of 300.* with another `feature_store`"):
                STRIDE.load(path, model, Pairs(data[0], relabeled(data[1])), changed=changed)


class TestIgnored:
    def test_nothing_is_read(self, tmp_path, model, data, test):
        method = STRIDE(model, Pairs(*data))
        path = saved(method, tmp_path)
        other = Pairs(moved(data[0]), relabeled(data[1]))
        loaded = STRIDE.load(path, model, other, changed="ignore")
        assert (other.read, loaded.compared_) == (0, "nothing, as asked")
        assert torch.equal(loaded.influence(test), method.influence(test))
        with pytest.raises(ValueError, match="must hold the 300 examples of the saved method; got 299"):
            STRIDE.load(path, model, Pairs(data[0][1:], data[1][1:]), changed="ignore")


class TestUpdated:
    """What `changed="update"` gives is what a refit on the changed data gives."""

    def same(self, found: STRIDE, wanted: STRIDE, batch: Any, tolerance: float) -> None:
        assert (found.n_train_, found.temperature_) == (N, pytest.approx(wanted.temperature_))
        for ours, theirs in (
            (found.influence(batch), wanted.influence(batch)),
            (found.influence(batch, normalize="cosine"), wanted.influence(batch, normalize="cosine")),
            (found.self_influence()[None], wanted.self_influence()[None]),
            (found.mislabel_scores()[None], wanted.mislabel_scores()[None]),
        ):
            error = (ours - theirs).abs() / theirs.abs().amax(1, keepdim=True)
            assert float(error.max()) < tolerance

    @pytest.mark.slow
    @pytest.mark.parametrize("curvature", ["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"])
    def test_in_float64(self, tmp_path, model, data, test, curvature):
        model, (x, y) = copy.deepcopy(model).double(), (data[0].double(), data[1])
        batch, config = (test[0].double(), test[1]), arguments(curvature=curvature)
        path = saved(STRIDE(model, Pairs(x, y), **config), tmp_path)
        other = Pairs(moved(x, [8, 299]), relabeled(y))
        loaded = STRIDE.load(path, model, other, changed="update")
        assert loaded.compared_ == "300 labels and inputs"
        tolerance = 1e-8 if curvature == "gauss-newton" else 1e-10
        self.same(loaded, STRIDE(model, other, **config).fit(), batch, tolerance)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["tensors", "items", "targets", "loader", "another order"])
    def test_only_what_changed_goes_through_the_model(self, tmp_path, model, data, test, kind):
        x, y = moved(data[0], [8]), relabeled(data[1])
        path = saved(STRIDE(model, SOURCES[kind](*data)), tmp_path)
        seen = []
        handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        loaded = STRIDE.load(path, model, SOURCES[kind](x, y), changed="update")
        handle.remove()
        assert sum(seen) == 5
        self.same(loaded, STRIDE(model, SOURCES[kind](x, y)).fit(), test, 1e-5)

    def test_what_is_saved_again_is_up_to_date(self, tmp_path, model, data, test):
        other = Pairs(moved(data[0], [8]), relabeled(data[1]))
        path = saved(STRIDE(model, Pairs(*data)), tmp_path)
        loaded = STRIDE.load(path, model, other, changed="update")
        loaded.save(path)
        again = STRIDE.load(path, model, other)
        assert torch.equal(again.influence(test), loaded.influence(test))
        with pytest.raises(ValueError, match="other labels in 4 of 300"):
            STRIDE.load(path, model, Pairs(moved(data[0], [8]), data[1]))

    def test_nothing_has_changed(self, tmp_path, model, data, test):
        for method in (STRIDE, TRAK):
            fitted = method(model, Pairs(*data))
            path = saved(fitted, tmp_path)
            loaded = method.load(path, model, Pairs(*data), changed="update")
            assert torch.equal(loaded.influence(test), fitted.influence(test))

    def test_checkpoints_and_random_projections(self, tmp_path, model, data, test):
        options = {
            "checkpoints": [model.state_dict(), built(MLP, 3).state_dict()],
            **arguments(projection="random", projection_width=4),
        }
        path = saved(STRIDE(model, Pairs(*data), **options), tmp_path)
        other = Pairs(data[0], relabeled(data[1]))
        with expect_untouched(model):
            loaded = STRIDE.load(path, model, other, checkpoints=options["checkpoints"], changed="update")
        self.same(loaded, STRIDE(model, other, **options).fit(), test, 1e-5)

    def test_a_feature_that_only_the_old_example_had(self, tmp_path):
        """The difference of its two sums in float32 would be a rounding error of 1e8."""
        generator = torch.Generator().manual_seed(0)
        features, labels = torch.randn(N, 130, generator=generator), torch.arange(N) % 3
        logits = torch.randn(N, 3, generator=generator)
        features[:, 7] *= 1e-3
        before = features.clone()
        before[5, 7] = 3e4
        method = STRIDE.from_features(before, logits, labels)
        path = saved(method, tmp_path)
        data = TensorDataset(features, logits, labels)
        loaded = STRIDE.load(path, method.model, data, changed="update")
        wanted = STRIDE.from_features(features, logits, labels).fit()
        self.same(loaded, wanted, (features[:4], logits[:4], labels[:4]), 1e-5)
        energy = loaded._states[0].operators.moments.gram[7, 7]
        assert float(energy) == pytest.approx(float(features[:, 7].double().square().sum()), rel=1e-6)

    @pytest.mark.parametrize(
        "config",
        [
            arguments(operators="trained", subsets="partition", n_subsets=4, rank=2, iterations=1),
            arguments(projection="pca", projection_width=4),
        ],
    )
    def test_operators_that_depend_on_all_examples_are_refused(self, tmp_path, model, data, config):
        path = saved(STRIDE(model, Pairs(*data), **config), tmp_path)
        STRIDE.load(path, model, Pairs(*data), changed="update")
        with pytest.raises(ValueError, match=r"other labels in 4 of 300 .*cannot take in single examples"):
            STRIDE.load(path, model, Pairs(data[0], relabeled(data[1])), changed="update")

    def test_a_stream_is_refused(self, tmp_path, model, data):
        path = saved(STRIDE(model, Stream(*data)), tmp_path)
        match = (
            "`train_dataset` must have a length, and examples .* for changed='update'; got Stream. Fit again"
        )
        with pytest.raises(ValueError, match=match):
            STRIDE.load(path, model, Stream(data[0], relabeled(data[1])), changed="update")

    def test_a_label_out_of_range_is_refused(self, tmp_path, model, data):
        path = saved(STRIDE(model, Pairs(*data)), tmp_path)
        y = data[1].clone()
        y[4] = 9
        with pytest.raises(ValueError, match="`train_dataset` must hold"):
            STRIDE.load(path, model, Pairs(data[0], y), changed="update")


class Augmented(Pairs):
    """Adds noise; only to some of the examples, and then at random."""

    share = 1.0

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + torch.randn_like(x) * (torch.rand(()) < self.share), y


class NowAndThen(Augmented):
    share = 0.1


class RandomStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        return ((x + torch.randn_like(x), y) for x, y in super().__iter__())


@pytest.mark.filterwarnings("ignore:.*gives other inputs when an example is read again")
class TestInputsThatCannotBeCompared:
    @pytest.mark.slow
    @pytest.mark.parametrize("source", [Augmented, NowAndThen, RandomStream])
    def test_random_augmentation(self, tmp_path, model, data, source):
        method = STRIDE(model, source(*data)).fit()
        path = tmp_path / "method"
        with expect_untouched(model):
            method.save(path)
        torch.rand(1)
        with expect_untouched(model):
            loaded = STRIDE.load(path, model, source(*data))
        said = "300 labels, not the inputs, which differ from one reading to the next"
        assert loaded.compared_ == said
        with pytest.raises(ValueError, match=r"got other labels in 4 of 300 examples \(rows 3, 130, 131 "):
            STRIDE.load(path, model, source(data[0], relabeled(data[1])))

    def test_they_are_updated_where_their_labels_changed(self, tmp_path, model, data):
        path = saved(STRIDE(model, Augmented(*data)), tmp_path)
        other = Augmented(data[0], relabeled(data[1]))
        torch.rand(1)
        loaded = STRIDE.load(path, model, other, changed="update")
        assert torch.equal(loaded._states[0].operators.labels, other.y)
        loaded.save(path)
        torch.rand(1)
        assert "not the inputs" in STRIDE.load(path, model, other).compared_

    def test_padding_to_the_longest_of_a_batch(self, tmp_path):
        def padded(batch: list[Any]) -> Any:
            width = max(len(ids) for ids, _ in batch)
            rows = [torch.nn.functional.pad(ids, (0, width - len(ids))) for ids, _ in batch]
            return {
                "input_ids": torch.stack(rows),
                "attention_mask": (torch.stack(rows) > 0).float(),
                "labels": torch.tensor([label for _, label in batch]),
            }

        texts = [(torch.arange(1, 2 + i % 5), i % 3) for i in range(20)]
        model = built(HuggingFaceLike).eval()

        def loader(size: int, examples: list[Any] = texts) -> DataLoader:
            return DataLoader(examples, batch_size=size, collate_fn=padded)

        path = saved(STRIDE(model, loader(4)), tmp_path)
        assert STRIDE.load(path, model, loader(4)).compared_ == "20 labels and inputs"
        said = "20 labels, not the inputs, which depend on the batch that they come in"
        assert STRIDE.load(path, model, loader(3)).compared_ == said
        other = list(texts)
        other[6] = (torch.tensor([9, 9]), 0)
        with pytest.raises(ValueError, match=r"other inputs in 1 of 20 examples \(rows 6\)"):
            STRIDE.load(path, model, loader(4, other))
        other[6] = (texts[6][0], 2)
        with pytest.raises(ValueError, match=r"other labels in 1 of 20 examples \(rows 6\)"):
            STRIDE.load(path, model, loader(3, other))


class FromSamples(Targets):
    """As torchvision's ImageFolder: the labels stand in `samples`, and a copy of them in `targets`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.samples = list(zip(x, y.tolist(), strict=True))

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        return self.samples[i]


class Relabeled(Targets):
    """Gives other labels than its `targets`, as a wrapper for noisy labels may."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, torch.zeros_like(y))
        self.y = y

    def __getitem__(self, i: int) -> Any:
        return super().__getitem__(i)[0], self.y[i]


class MostlyTargets(Targets):
    """Looks at its `targets`, and changes some of them."""

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        return self.x[i], 0 if i % 2 else self.targets[i]


class TestLargeData:
    """All labels are compared, and the inputs of as many examples as the limit holds."""

    @pytest.fixture(autouse=True)
    def limit(self, monkeypatch) -> None:
        monkeypatch.setattr(stale_data, "INPUT_BYTES", 100 * 6 * 4)

    @pytest.mark.slow
    @pytest.mark.parametrize("source", [TensorDataset, Targets, FromSamples])
    @pytest.mark.parametrize("loader", [False, True])
    def test_labels_are_had_without_the_inputs(self, tmp_path, model, data, source, loader):
        def made(x: Tensor, y: Tensor) -> Any:
            return DataLoader(source(x, y), batch_size=16) if loader else source(x, y)

        path = saved(STRIDE(model, made(*data)), tmp_path)
        same = made(*data)
        assert STRIDE.load(path, model, same).compared_ == "300 labels and 100 inputs"
        if source is not TensorDataset:
            read = same.dataset.read if loader else same.read
            assert read == 100 + (16 if loader else 64)
        with pytest.raises(ValueError, match=r"other labels in 4 of 300 examples \(rows 3, 130, 131 "):
            STRIDE.load(path, model, made(data[0], relabeled(data[1])))
        seen = stale_data.spread_rows(N, 100).tolist()
        unseen = [i for i in range(N) if i not in seen]
        STRIDE.load(path, model, made(moved(data[0], unseen), data[1]))
        with pytest.raises(ValueError, match=r"other inputs in 2 of 300 examples \(rows 0, 299\)"):
            STRIDE.load(path, model, made(moved(data[0], [0, unseen[0], 299]), data[1]))

    def test_they_are_updated(self, tmp_path, model, data, test):
        path = saved(STRIDE(model, Targets(*data)), tmp_path)
        other = Targets(data[0], relabeled(data[1]))
        loaded = STRIDE.load(path, model, other, changed="update")
        wanted = STRIDE(model, other).influence(test)
        assert float((loaded.influence(test) - wanted).abs().max() / wanted.abs().max()) < 1e-5

    @pytest.mark.slow
    @pytest.mark.parametrize("source", [Pairs, Relabeled, MostlyTargets, Stream, turned])
    def test_all_is_read_where_labels_are_not_sure_to_be_those(self, tmp_path, model, data, source):
        path = saved(STRIDE(model, source(*data)), tmp_path)
        assert STRIDE.load(path, model, source(*data)).compared_ == "300 labels and inputs"
        y = relabeled(data[1], [130])
        with pytest.raises(ValueError, match=r"other labels in 1 of 300 examples \(rows 130\)"):
            STRIDE.load(path, model, source(data[0], y))

    def test_which_labels_are_a_data_sets_own(self, data):
        x, y = data
        for source in (TensorDataset(x, y), Targets(x, y), FromSamples(x, y), DataLoader(Targets(x, y))):
            assert torch.equal(own_labels(source), y)
        transformed, texts = Targets(x, y), Targets(x, y)
        transformed.target_transform = lambda label: label + 1
        texts.targets = ["a"] * N
        collated = DataLoader(Targets(x, y), collate_fn=lambda items: items)
        others = [TensorDataset(x), transformed, texts, collated, Relabeled(x, y), Pairs(x, y), Stream(x, y)]
        assert [own_labels(other) for other in others] == [None] * len(others)


class TestDigestsFollow:
    def test_examples_that_come_and_go(self, tmp_path, model, data, test):
        x, y = data
        method = STRIDE(model, TensorDataset(x[:290], y[:290])).fit()
        method.add_examples((x[290:], y[290:])).remove_examples([0, 7])
        kept = [i for i in range(N) if i not in (0, 7)]
        wanted = STRIDE(model, TensorDataset(x[kept], y[kept])).fit().digests_
        assert torch.equal(method.digests_.labels, wanted.labels)
        assert torch.equal(method.digests_.inputs, wanted.inputs)
        method.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, TensorDataset(x[kept], y[kept]))
        assert torch.equal(loaded.influence(test), method.influence(test))
