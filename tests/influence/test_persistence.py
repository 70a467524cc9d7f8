from __future__ import annotations

import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import (
    METHODS,
    MLP,
    BatchNormCNN,
    Fails,
    built,
    expect_untouched,
    planted_classes,
    trained,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from stride_captum import STRIDE, Checkpoint, ClosedForm, InfluenceMethod
from stride_captum.adapters import TRAK, Random, Similarity
from stride_captum.data.reading import Batch
from stride_captum.influence import persistence
from stride_captum.influence.persistence import saved_as
from stride_captum.losses import CrossEntropy
from stride_captum.system import saved_files

TRAINED = {"operators": "trained", "subsets": "partition", "n_subsets": 8, "rank": 4, "iterations": 5}
CONFIGS = {
    "closed-form": arguments(),
    "kronecker": arguments(curvature="kronecker", residuals="temperature", temperature=2.0),
    "eigenvalue-corrected": arguments(curvature="eigenvalue-corrected", normalize="cosine"),
    "gauss-newton": arguments(curvature="gauss-newton"),
    "trained": arguments(**TRAINED),
    "per-subset": arguments(**TRAINED, encoder="per-subset", recovery="ridge"),
    "representation": arguments(**TRAINED, steering="representation", select="penultimate"),
}


def same_bits(found: InfluenceMethod, wanted: InfluenceMethod, test: TensorDataset) -> None:
    assert torch.equal(found.influence(test.tensors), wanted.influence(test.tensors))
    a, b = found.influence(test.tensors, 3, False), wanted.influence(test.tensors, 3, False)
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(found.self_influence(), wanted.self_influence())
    assert torch.equal(found.mislabel_scores(), wanted.mislabel_scores())


@contextmanager
def no_pass_over_the_training_set(
    cls: type[InfluenceMethod], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    def refuse(*args: Any) -> None:
        raise AssertionError("the training set was read")

    with monkeypatch.context() as patch:
        patch.setattr(cls, "fit_checkpoint", refuse)
        yield


class TestRoundTrip:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", CONFIGS)
    def test_stride_gives_the_same_bits(self, planted, tmp_path, monkeypatch, name):
        model, train, test = planted
        saved = STRIDE(model, train, **CONFIGS[name], batch_size=9).fit()
        saved.save(tmp_path / "method")
        with no_pass_over_the_training_set(STRIDE, monkeypatch):
            loaded = STRIDE.load(tmp_path / "method", model, train)
            same_bits(loaded, saved, test)
        assert (loaded.operators, loaded.features) == (saved.operators, saved.features)
        assert loaded.layers_ == saved.layers_
        assert loaded.batch_size == 9
        assert (loaded.n_train_, loaded.fit_seconds_) == (48, saved.fit_seconds_)
        assert torch.equal(loaded.coverage_, saved.coverage_)
        if name in ("trained", "per-subset", "representation"):
            assert all(
                torch.equal(loaded.history_[key].nan_to_num(-1), value.nan_to_num(-1))
                for key, value in saved.history_.items()
            )
        else:
            assert loaded.temperature_ == saved.temperature_

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_gives_the_same_bits(self, planted, tmp_path, monkeypatch, method):
        model, train, test = planted
        options = {} if method is STRIDE else {"response": "loss", "target": "predicted"}
        saved = method(model, train, **options).fit()
        saved.save(str(tmp_path / "method"))
        with no_pass_over_the_training_set(method, monkeypatch):
            same_bits(method.load(str(tmp_path / "method"), model, train), saved, test)

    def test_options_of_a_method_are_kept(self, planted, tmp_path):
        model, train, test = planted
        saved = Random(model, train, seed=5).fit()
        saved.save(tmp_path / "method")
        same_bits(Random.load(tmp_path / "method", model, train), saved, test)

    def test_a_second_generation_is_the_same(self, planted, tmp_path):
        model, train, test = planted
        saved = STRIDE(model, train, layers=["relu2"]).fit()
        saved.save(tmp_path / "first")
        STRIDE.load(tmp_path / "first", model, train).save(tmp_path / "second")
        same_bits(STRIDE.load(tmp_path / "second", model, train), saved, test)
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()

    def test_double_precision_stays_double(self, planted, tmp_path):
        model, (x, y) = built(MLP).double(), planted[1].tensors
        train, test = TensorDataset(x.double(), y), TensorDataset(x[:3].double(), y[:3])
        saved = STRIDE(model, train).fit()
        saved.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, train)
        assert loaded.influence(test.tensors).dtype == torch.float64
        same_bits(loaded, saved, test)

    def test_methods_from_features(self, tmp_path):
        train = planted_classes(20)
        logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
        saved = STRIDE.from_features(train.tensors[0], logits, train.tensors[1]).fit()
        saved.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", saved.model, saved.train_dataset)
        batch = (train.tensors[0][:3], logits[:3], train.tensors[1][:3])
        assert torch.equal(loaded.influence(batch), saved.influence(batch))

    def test_nothing_else_changes(self, planted, tmp_path):
        model = trained(BatchNormCNN, n_train=12, steps=1)[0].train()
        train = planted_classes(12, BatchNormCNN.shape)
        method = STRIDE(model, Fails(train), **arguments(**TRAINED)).fit()
        with expect_untouched(model):
            method.save(tmp_path / "method")
            STRIDE.load(tmp_path / "method", model, Fails(train))


@saved_as("test.own-state")
@dataclass
class OwnState:
    total: Tensor
    note: Any


@dataclass
class Unregistered:
    total: Tensor


NOTE = {
    "a": [1, None, 0.1, True],
    "pair": (1, ("x", [2])),
    3: {None: "none", 0.5: "half"},
    "b.c": torch.tensor([1.0]),
    "b": {"c": torch.tensor([2.0])},
}


class OwnMethod(Similarity):
    """A method from outside the package, with a state of its own."""

    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> OwnState:
        self.n_train_ = 48
        return OwnState(sum(b.first_tensor.sum(0) for b in self.train_batches(False)), NOTE)

    def prepare_query(self, state: OwnState, model: nn.Module, batch: Any, ask: Any) -> Tensor:
        return batch.first_tensor @ state.total

    def score_columns(self, state: OwnState, prepared: Tensor, columns: slice) -> Tensor:
        return prepared[:, None].expand(-1, columns.stop - columns.start)


class TestMethodsFromOutside:
    def test_their_state_is_kept(self, planted, tmp_path):
        model, train, test = planted
        saved = OwnMethod(model, train).fit()
        saved.save(tmp_path / "method")
        loaded = OwnMethod.load(tmp_path / "method", model, train)
        note = loaded._states[0].note
        tensors = note.pop("b.c"), note.pop("b")["c"]
        assert note == {key: NOTE[key] for key in ("a", "pair", 3)}
        assert [tensor.item() for tensor in tensors] == [1.0, 2.0]
        assert torch.equal(loaded.influence(test.tensors), saved.influence(test.tensors))

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            (object(), r"`states.0.note.a` must be a tensor, a dataclass.*; got object"),
            ({1}, r"`states.0.note.a` must be a tensor, a dataclass.*; got set"),
            (torch.eye(2).to_sparse(), r"`states.0.note.a` must be a dense tensor to be saved"),
            ({(1, 2): 3}, r"`a key of states.0.note.a` must be a plain value to be saved; got tuple"),
            (
                Unregistered(torch.ones(1)),
                r"`states.0.note.a` must be of a class that is registered to be saved; got Unregistered. "
                r'Decorate it with @saved_as\("your_package.its_name"\)',
            ),
        ],
    )
    def test_what_cannot_be_saved_is_named(self, planted, tmp_path, value, match):
        saved = OwnMethod(*planted[:2]).fit()
        saved._states[0].note = {"a": value}
        with pytest.raises(TypeError, match=match):
            saved.save(tmp_path / "method")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        "name", ["os:path", "antigravity", "test.unknown", "stride_captum.errors:bad_value"]
    )
    def test_a_class_that_is_not_registered_is_refused_and_nothing_is_imported(
        self, planted, tmp_path, monkeypatch, name
    ):
        OwnMethod(*planted[:2]).fit().save(tmp_path / "method")
        rewritten(tmp_path / "method", lambda d: d["states"]["list"][0].update({"class": name}))

        def refuse(*args: Any, **options: Any) -> None:
            raise AssertionError(f"an import of {args[0]}")

        with monkeypatch.context() as patch:
            for importer in ("importlib.import_module", "builtins.__import__"):
                # What is imported already may be asked for again.
                patch.setattr(importer, guarded(importer, refuse))
            with pytest.raises(ValueError, match=rf"objects of registered classes; got one of '{name}'\."):
                OwnMethod.load(tmp_path / "method", *planted[:2])

    def test_names_are_those_of_one_dataclass_each(self):
        with pytest.raises(ValueError, match=r"must be one that no other class has; got 'test\.own-state'"):
            saved_as("test.own-state")(Unregistered)
        with pytest.raises(TypeError, match="`cls` must be a dataclass; got type"):
            saved_as("test.plain")(TestMethodsFromOutside)
        assert saved_as("test.own-state")(OwnState) is OwnState


def guarded(name: str, refuse: Any) -> Any:
    original = {"builtins": builtins, "importlib": importlib}[name.split(".")[0]].__dict__[name.split(".")[1]]

    def find(module: str, *args: Any, **options: Any) -> Any:
        known = module in sys.modules or (args and isinstance(args[0], dict))
        return original(module, *args, **options) if known else refuse(module)

    return find


def rewritten(path: Path, change: Any, right: bool = True) -> None:
    """Change the description of a file, with the right checksum or the old one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    checksum, _, text = metadata["stride_captum"].partition(" ")
    description = json.loads(text)
    found = change(description)
    text = found if isinstance(found, str) else json.dumps(description)
    checksum = saved_files.checksum(text, tensors) if right else checksum
    save_file(tensors, path, {"stride_captum": f"{checksum} {text}"})


class TestRefusals:
    @pytest.fixture
    def saved(self, planted, tmp_path) -> Path:
        STRIDE(*planted[:2]).fit().save(tmp_path / "method")
        return tmp_path / "method"

    def test_a_method_that_is_not_fitted(self, planted, tmp_path):
        with pytest.raises(
            ValueError, match=r"`method` must be fitted before it is saved.*Call fit\(\) first"
        ):
            STRIDE(*planted[:2]).save(tmp_path / "method")
        assert os.listdir(tmp_path) == []

    def test_other_weights(self, planted, saved):
        model = built(MLP)
        model.load_state_dict(planted[0].state_dict())
        STRIDE.load(saved, model, planted[1])
        model.fc1.bias.data[0] += 1e-6
        with pytest.raises(
            ValueError, match="`model` must have the weights of the saved method; got other weights"
        ):
            STRIDE.load(saved, model, planted[1])

    def test_weights_that_changed_between_fit_and_save(self, planted, tmp_path):
        model, train, _ = trained(MLP, steps=1)
        method = STRIDE(model, train).fit()
        model.fc1.bias.data += 1
        method.save(tmp_path / "method")
        with pytest.raises(ValueError, match="`model` must have the weights of the saved method"):
            STRIDE.load(tmp_path / "method", model, train)

    def test_other_data(self, planted, saved):
        model, train, _ = planted
        x, y = train.tensors
        changed = x.clone()
        changed[37, 2] += 1e-6
        for other in (
            TensorDataset(changed, y),
            TensorDataset(x, y.roll(1)),
            TensorDataset(x[:-1], y[:-1]),
            Subset(train, range(47, -1, -1)),
            DataLoader(Subset(train, range(47, -1, -1))),
        ):
            with pytest.raises(ValueError, match=r"must (be the data|hold the 48 examples) of the saved"):
                STRIDE.load(saved, model, other)
        STRIDE.load(saved, model, TensorDataset(x.clone(), y.clone()))
        STRIDE.load(saved, model, DataLoader(train, batch_size=5))

    def test_another_class(self, planted, saved):
        match = r"`path` must hold a Similarity; got '.*method' with a STRIDE. Call STRIDE.load"
        with pytest.raises(ValueError, match=match):
            Similarity.load(saved, *planted[:2])

    def test_options_that_were_fitted(self, planted, saved):
        for options in ({"layers": ["fc1"]}, arguments(damping=1.0)):
            with pytest.raises(
                ValueError, match=f"`options` must leave what has been fitted.*; got '{next(iter(options))}'"
            ):
                STRIDE.load(saved, *planted[:2], **options)
        assert STRIDE.load(saved, *planted[:2], batch_size=3).batch_size == 3

    def test_options_that_are_given_win_over_saved_defaults(self, planted, tmp_path):
        target = torch.tensor([1] * 7)
        TRAK(*planted[:2], response="loss", target=target).fit().save(tmp_path / "method")
        loaded = TRAK.load(tmp_path / "method", *planted[:2])
        assert loaded.response == "loss"
        assert torch.equal(loaded.target, target)
        assert TRAK.load(tmp_path / "method", *planted[:2], response="logit").response == "logit"

    def test_the_loss_is_kept_and_cannot_be_another(self, planted, tmp_path):
        model, train, test = planted
        probabilities = nn.Sequential(model, nn.Softmax(1))
        said = CrossEntropy(outputs="probabilities")
        saved = STRIDE(probabilities, train, loss=said).fit()
        saved.save(tmp_path / "method")
        for options in ({}, {"loss": said}):
            loaded = STRIDE.load(tmp_path / "method", probabilities, train, **options)
            assert loaded.loss == said
            same_bits(loaded, saved, test)
        for other in (CrossEntropy(outputs="logits"), "cross_entropy"):
            with pytest.raises(ValueError, match=r"`options` must leave what has been fitted .*; got 'loss'"):
                STRIDE.load(tmp_path / "method", probabilities, train, loss=other)

    def test_how_a_batch_is_read_must_be_said_again(self, planted, tmp_path):
        model, train, test = planted

        def twice(model: nn.Module, batch: Any) -> Tensor:
            return 2 * model(batch[0])

        said = Batch(forward=twice, label_key=-1)
        saved = STRIDE(model, train, batch=said).fit()
        saved.save(tmp_path / "method")
        same_bits(STRIDE.load(tmp_path / "method", model, train, batch=said), saved, test)
        match = r"`batch` must be as for the saved method \(forward=a function, label_key=-1\); got "
        with pytest.raises(ValueError, match=match + r"the default\. Pass the same batch="):
            STRIDE.load(tmp_path / "method", model, train)
        with pytest.raises(ValueError, match=match + "forward=a function"):
            STRIDE.load(tmp_path / "method", model, train, batch=Batch(forward=twice))

    def test_what_to_do_about_changes_is_one_of_three(self, planted, saved):
        with pytest.raises(ValueError, match="`changed` must be one of 'refuse', 'update', 'ignore'"):
            STRIDE.load(saved, *planted[:2], changed="updated")

    def test_a_model_that_changes_after_loading(self, planted, saved):
        model = built(MLP)
        model.load_state_dict(planted[0].state_dict())
        loaded = STRIDE.load(saved, model, planted[1])
        model.fc1.bias.data[0] += 1
        with pytest.raises(ValueError, match="`model` must have the weights that the method was fitted on"):
            loaded.influence(planted[2].tensors)


class TestDamage:
    """A file that is not as it was written is refused in one sentence that names it."""

    @pytest.fixture
    def path(self, planted, tmp_path) -> Path:
        STRIDE(*planted[:2], layers=["relu2"]).fit().save(tmp_path / "method")
        return tmp_path / "method"

    def refused(self, planted, path: Path, what: str) -> None:
        must = "`path` must name a whole file that `save` has written; got "
        with pytest.raises(ValueError, match=f"{must}'{path}', which {what}. Fit, and save it again"):
            STRIDE.load(path, *planted[:2])

    @pytest.mark.slow
    def test_a_flipped_bit_anywhere(self, path):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        bits = [*range(0, 8 * header, 17), *range(8 * header, 8 * len(content), 61)]
        assert len(bits) > 2000
        for bit in bits:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="`path` must name a whole file"):
                saved_files.read_file(path, persistence._PARTS)

    def test_more_or_less_of_it(self, planted, path):
        content = path.read_bytes()
        for length in (1, 7, 8, 9, 500, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            self.refused(planted, path, "is cut off, damaged or of another kind")
        path.write_bytes(content + b"!")
        self.refused(planted, path, "is cut off, damaged or of another kind")

    def test_what_is_no_such_file(self, planted, path, tmp_path):
        path.write_bytes(b"")
        self.refused(planted, path, "is empty")
        path.write_text("not a method, but long enough to be one")
        self.refused(planted, path, "is cut off, damaged or of another kind")
        save_file({"a": torch.zeros(1)}, path)
        self.refused(planted, path, "has no description of a method")
        self.refused(planted, tmp_path, "is a folder")
        with pytest.raises(FileNotFoundError, match="nothing"):
            STRIDE.load(tmp_path / "nothing", *planted[:2])

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '"text"'])
    def test_a_broken_description(self, planted, path, text):
        rewritten(path, lambda description: text)
        self.refused(planted, path, "has a broken description")

    def test_a_changed_description(self, planted, path):
        rewritten(path, lambda description: description.update(batch=3), right=False)
        self.refused(planted, path, "is damaged: its checksum differs")

    def test_another_format(self, planted, path):
        rewritten(path, lambda description: description.update(format=2), right=False)
        self.refused(planted, path, "is in format 2, where this version reads format 3")
        save_file({"a": torch.zeros(1)}, path, {"stride_captum": '{"format": 1, "class": "STRIDE"}'})
        self.refused(planted, path, "is in format 1, where this version reads format 3")

    @pytest.mark.parametrize("part", persistence._PARTS)
    def test_a_description_without_a_part(self, planted, path, part):
        rewritten(path, lambda description: description.pop(part) and None)
        self.refused(planted, path, f"has a description without {part}")

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d["settings"].clear(),
            lambda d: d["states"]["list"][0]["fields"].pop("taps") and None,
            lambda d: d["states"]["list"][0]["fields"].update(more={"value": 1}),
            lambda d: d["states"].update(list=[{"tensor": "gone", "order": []}]),
            lambda d: d["states"].update(list=[{"tensor": "states.0.operators.labels", "order": [0, 1]}]),
            lambda d: d.update(states=3),
        ],
    )
    def test_a_description_that_does_not_fit(self, planted, path, change):
        rewritten(path, change)
        self.refused(planted, path, "has a description that does not fit its tensors")

    @pytest.mark.parametrize(
        "change", [lambda d: d.pop("digests_"), lambda d: d.update(digests_={"value": 1})]
    )
    def test_no_digests(self, planted, path, change):
        def without(description: Any) -> None:
            learned = dict(description["learned"]["dict"])
            change(learned)
            description["learned"]["dict"] = list(learned.items())

        rewritten(path, without)
        self.refused(planted, path, "has no digests of the training set")


class TestCheckpoints:
    def test_the_same_are_accepted_and_others_refused(self, planted, tmp_path):
        model, train, test = planted
        states = [built(MLP, seed).state_dict() for seed in (1, 2)]
        saved = STRIDE(model, train, checkpoints=states).fit()
        saved.save(tmp_path / "method")
        same_bits(STRIDE.load(tmp_path / "method", model, train, checkpoints=states), saved, test)
        same_bits(STRIDE.load(tmp_path / "method", built(MLP, 9), train, checkpoints=states), saved, test)
        for others in (states[::-1], states[:1], [states[0], model.state_dict()]):
            with pytest.raises(ValueError, match="`checkpoints` must have the weights of the saved method"):
                STRIDE.load(tmp_path / "method", model, train, checkpoints=others)
        with pytest.raises(
            ValueError, match=r"`model` must have .* Pass the same `checkpoints`, if there were any"
        ):
            STRIDE.load(tmp_path / "method", model, train)

    def test_what_they_have_seen_is_kept(self, planted, tmp_path):
        model, train = planted[:2]
        states = [built(MLP, 1).state_dict(), built(MLP, 2).state_dict()]
        halves = [range(0, 48, 2), range(1, 48, 2)]
        checkpoints = [Checkpoint(state, seen=half) for state, half in zip(states, halves, strict=True)]
        method = STRIDE(model, train, checkpoints=checkpoints).fit()
        method.save(tmp_path / "m")
        for given in (checkpoints, states, [checkpoints[0], states[1]]):
            found = STRIDE.load(tmp_path / "m", model, train, checkpoints=given)
            assert torch.equal(found.mislabel_scores(), method.mislabel_scores())
            assert [list(c.seen) for c in found.checkpoints] == [list(half) for half in halves]
        mask = [i % 2 == 0 for i in range(48)]
        for given in ([Checkpoint(state) for state in states], [Checkpoint(states[0], seen=mask), states[1]]):
            found = STRIDE.load(tmp_path / "m", model, train, checkpoints=given)
            assert torch.equal(found.mislabel_scores(), method.mislabel_scores())
        masked = [Checkpoint(states[0], seen=mask), checkpoints[1]]
        STRIDE(model, train, checkpoints=masked).fit().save(tmp_path / "masked")
        found = STRIDE.load(tmp_path / "masked", model, train, checkpoints=states)
        assert torch.equal(found.mislabel_scores(), method.mislabel_scores())
        other = [Checkpoint(state, seen=range(10)) for state in states]
        with pytest.raises(ValueError, match="`checkpoints` must have seen the examples that those of the"):
            STRIDE.load(tmp_path / "m", model, train, checkpoints=other)


class TestWeightsByNumber:
    @pytest.mark.parametrize("size", [1024, 16])
    def test_they_are_compared_whatever_the_batches(self, planted, tmp_path, size):
        model, train, test = planted
        x, y = train.tensors
        weights = torch.linspace(0.5, 2, 48)
        method = STRIDE(model, train, batch=Batch(sample_weight=weights)).fit()
        method.save(tmp_path / "m")

        def load(data, given):
            batch = Batch(sample_weight=given)
            return STRIDE.load(tmp_path / "m", model, data, batch=batch, batch_size=size)

        assert torch.equal(load(train, weights).influence(test.tensors), method.influence(test.tensors))
        changed = x.clone()
        changed[3] += 5
        with pytest.raises(ValueError, match=r"other inputs in 1 of 48 examples \(rows 3\)"):
            load(TensorDataset(changed, y), weights)
        with pytest.raises(ValueError, match="`train_dataset` must be the data of the saved method"):
            load(train, weights.flip(0))

    def test_given_features_have_them_too(self, planted):
        model, train, test = planted
        x, y = train.tensors
        tx, ty = test.tensors
        with torch.no_grad():
            z, tz = model(x), model(tx)
        many = torch.tensor([0] * 5 + list(range(1, 48)))  # a weight of 5 is five copies
        weights = torch.ones(48)
        weights[0] = 5
        copies = STRIDE.from_features(x[many], z[many], y[many], operators=ClosedForm(residuals="training"))
        weighed = STRIDE.from_features(
            x, z, y, batch=Batch(sample_weight=weights), operators=ClosedForm(residuals="training")
        )
        found, wanted = (m.influence((tx, tz, ty)) for m in (weighed, copies))
        torch.testing.assert_close(found[:, 1:], wanted[:, 5:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[:, 0], 5 * wanted[:, 0], rtol=1e-4, atol=1e-5)
        for wrong in (Batch(sample_weight=1), Batch(sample_weight=torch.ones(7))):
            with pytest.raises(ValueError, match="`sample_weight` must be a tensor of shape"):
                STRIDE.from_features(x, z, y, batch=wrong)


class TestWhereItIsWritten:
    def test_a_folder_is_refused(self, planted, tmp_path):
        method = STRIDE(*planted[:2]).fit()
        with pytest.raises(ValueError, match=f"`path` must name a file; got the folder '{tmp_path}'"):
            method.save(tmp_path)
        assert os.listdir(tmp_path) == []

    def test_folders_on_the_way_are_made(self, planted, tmp_path):
        STRIDE(*planted[:2]).fit().save(tmp_path / "new" / "folder" / "method")
        assert os.listdir(tmp_path / "new" / "folder") == ["method"]

    def test_an_error_names_the_path(self, planted, tmp_path, monkeypatch):
        method = STRIDE(*planted[:2]).fit()
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="file/method'"):
            method.save(tmp_path / "file" / "method")

        def full(tensors: Any, path: Path, metadata: Any) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(saved_files, "save_file", full)
        with pytest.raises(OSError, match=f"'{tmp_path / 'method'}' was not written: .*No space left"):
            method.save(tmp_path / "method")
        assert os.listdir(tmp_path) == ["file"]


class TestAtomicWrite:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, planted, tmp_path, monkeypatch):
        model, train, test = planted
        method = STRIDE(model, train).fit()
        method.save(tmp_path / "method")

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            Path(path).write_bytes(b"half a file")
            raise OSError("no space left")

        monkeypatch.setattr(saved_files, "save_file", half)
        with pytest.raises(OSError, match="no space left"):
            method.save(tmp_path / "method")
        assert os.listdir(tmp_path) == ["method"]
        same_bits(STRIDE.load(tmp_path / "method", model, train), method, test)

    def test_an_old_file_is_replaced(self, planted, tmp_path):
        model, train, _ = planted
        for damping in (0.1, 0.5):
            STRIDE(model, train, operators=ClosedForm(damping=damping)).fit().save(tmp_path / "method")
        assert STRIDE.load(tmp_path / "method", model, train).operators.damping == 0.5
        assert os.listdir(tmp_path) == ["method"]
