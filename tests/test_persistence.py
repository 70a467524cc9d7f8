from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import (
    METHODS,
    MLP,
    BatchNormCNN,
    Fails,
    ListOfDicts,
    built,
    expect_untouched,
    planted_classes,
    trained,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from stride_captum import STRIDE, InfluenceMethod, STRIDEConfig, persistence
from stride_captum.adapters import Random, Similarity
from stride_captum.persistence import data_fingerprint

TRAINED = {"operators": "trained", "subsets": "partition", "n_subsets": 8, "rank": 4, "iterations": 5}
CONFIGS = {
    "newton": STRIDEConfig(),
    "kronecker": STRIDEConfig(curvature="kronecker", residuals="temperature", temperature=2.0),
    "eigenvalue-corrected": STRIDEConfig(curvature="eigenvalue-corrected", normalize="cosine"),
    "class-blocks": STRIDEConfig(curvature="class-blocks", threshold=0.01, response="loss"),
    "gauss-newton": STRIDEConfig(curvature="gauss-newton"),
    "trained": STRIDEConfig(**TRAINED),
    "per-subset": STRIDEConfig(**TRAINED, encoder="per-subset", recovery="ridge"),
    "representation": STRIDEConfig(**TRAINED, steering="representation", feature_layers="penultimate"),
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
        patch.setattr(cls, "_fit_checkpoint", refuse)
        yield


class TestRoundTrip:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_stride_gives_the_same_bits(self, planted, tmp_path, monkeypatch, name):
        model, train, test = planted
        saved = STRIDE(model, train, config=CONFIGS[name], batch_size=9).fit()
        saved.save(tmp_path / "method")
        with no_pass_over_the_training_set(STRIDE, monkeypatch):
            loaded = STRIDE.load(tmp_path / "method", model, train)
            same_bits(loaded, saved, test)
        assert loaded.config == saved.config
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
        method = STRIDE(model, Fails(train), config=STRIDEConfig(**TRAINED)).fit()
        with expect_untouched(model):
            method.save(tmp_path / "method")
            STRIDE.load(tmp_path / "method", model, Fails(train))


@dataclass
class OwnState:
    total: Tensor
    note: Any


class OwnMethod(Similarity):
    """A method from outside the package, with a state of its own."""

    def _fit_checkpoint(self, model: nn.Module, show_progress: bool) -> OwnState:
        self.n_train_ = 48
        return OwnState(sum(batch[0].sum(0) for batch in self._train_batches(False)), {"a": [1, None, 0.1]})

    def _prepare(self, state: OwnState, model: nn.Module, batch: Any, ask: Any) -> Tensor:
        return batch[0] @ state.total

    def _scores(self, state: OwnState, prepared: Tensor, columns: slice) -> Tensor:
        return prepared[:, None].expand(-1, columns.stop - columns.start)


class TestMethodsFromOutside:
    def test_their_state_is_kept(self, planted, tmp_path):
        model, train, test = planted
        saved = OwnMethod(model, train).fit()
        saved.save(tmp_path / "method")
        loaded = OwnMethod.load(tmp_path / "method", model, train)
        assert loaded._states[0].note == {"a": [1, None, 0.1]}
        assert torch.equal(loaded.influence(test.tensors), saved.influence(test.tensors))

    def test_what_cannot_be_saved_is_named(self, planted, tmp_path):
        saved = OwnMethod(*planted[:2]).fit()
        saved._states[0].note = {"a": object()}
        with pytest.raises(TypeError, match=r"`states.0.note.a` must be a tensor, a dataclass.*; got object"):
            saved.save(tmp_path / "method")

    def test_classes_of_other_modules_are_not_looked_up(self, planted, tmp_path):
        model, train, _ = planted
        saved = OwnMethod(model, train).fit()
        for target in ("os:path", "subprocess:Popen", "stride_captum.errors:bad_value"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(persistence, "_encode", renamed(persistence._encode, target))
                saved.save(tmp_path / "method")
            with pytest.raises(
                ValueError, match=f"`path` must hold data classes of stride_captum only; got '{target}'"
            ):
                OwnMethod.load(tmp_path / "method", model, train)


def renamed(encode: Any, target: str) -> Any:
    def change(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: target if k == "dataclass" else change(v) for k, v in tree.items()}
        return [change(part) for part in tree] if isinstance(tree, list) else tree

    return lambda *args: change(encode(*args))


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
            DataLoader(train, sampler=range(47, -1, -1)),
        ):
            with pytest.raises(
                ValueError, match="`train_dataset` must be the data of the saved method; got other data"
            ):
                STRIDE.load(saved, model, other)
        STRIDE.load(saved, model, TensorDataset(x.clone(), y.clone()))
        STRIDE.load(saved, model, DataLoader(train, batch_size=5))

    def test_another_class(self, planted, saved):
        with pytest.raises(
            ValueError, match="`path` must hold a Similarity in format 3; got a STRIDE in format 3"
        ):
            Similarity.load(saved, *planted[:2])

    def test_options_that_were_fitted(self, planted, saved):
        for options in ({"layers": ["fc1"]}, {"config": STRIDEConfig(damping=1.0)}):
            with pytest.raises(
                ValueError, match=f"`options` must leave what has been fitted.*; got '{next(iter(options))}'"
            ):
                STRIDE.load(saved, *planted[:2], **options)
        assert STRIDE.load(saved, *planted[:2], batch_size=3).batch_size == 3

    def test_files_of_another_kind(self, planted, tmp_path):
        (tmp_path / "text").write_text("not a method")
        save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
        for name in ("text", "tensors"):
            with pytest.raises(
                ValueError, match="`path` must name a file that `save` has written; got .*" + name
            ):
                STRIDE.load(tmp_path / name, *planted[:2])
        with pytest.raises(FileNotFoundError):
            STRIDE.load(tmp_path / "nothing", *planted[:2])

    def test_a_model_that_changes_after_loading(self, planted, saved):
        model = built(MLP)
        model.load_state_dict(planted[0].state_dict())
        loaded = STRIDE.load(saved, model, planted[1])
        model.fc1.bias.data[0] += 1
        with pytest.raises(ValueError, match="`model` must have the weights that the method was fitted on"):
            loaded.influence(planted[2].tensors)


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


class TestAtomicWrite:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, planted, tmp_path, monkeypatch):
        model, train, test = planted
        method = STRIDE(model, train).fit()
        method.save(tmp_path / "method")

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            Path(path).write_bytes(b"half a file")
            raise OSError("no space left")

        monkeypatch.setattr(persistence, "save_file", half)
        with pytest.raises(OSError, match="no space left"):
            method.save(tmp_path / "method")
        assert os.listdir(tmp_path) == ["method"]
        same_bits(STRIDE.load(tmp_path / "method", model, train), method, test)

    def test_an_old_file_is_replaced(self, planted, tmp_path):
        model, train, _ = planted
        for damping in (0.1, 0.5):
            STRIDE(model, train, config=STRIDEConfig(damping=damping)).fit().save(tmp_path / "method")
        assert STRIDE.load(tmp_path / "method", model, train).config.damping == 0.5
        assert os.listdir(tmp_path) == ["method"]


class TestDataFingerprint:
    def test_every_kind_of_example_counts(self):
        class Items(list):
            pass

        class Picture:
            """As PIL's: an address in its repr, its pixels in the array interface."""

            def __init__(self, value: int) -> None:
                self.pixels = np.full(3, value)
                self.__array_interface__ = self.pixels.__array_interface__

        def prints(make: Any) -> set[str]:
            return {data_fingerprint(Items([make(i), make(0)])) for i in range(3)}

        for make in (
            lambda i: (torch.tensor(i), 0),
            lambda i: {"x": torch.tensor([i]), "labels": 1},
            lambda i: (np.array([i]), [0]),
            lambda i: (Picture(i), 0),
            lambda i: ("text", i),
            lambda i: (None, float(i)),
        ):
            assert len(prints(make)) == 3
            assert prints(make) == prints(make)

    def test_all_of_a_tensor_data_set_and_samples_of_others(self):
        x = torch.zeros(1000)
        prints = set()
        for i in (None, *range(0, 1000, 97)):
            changed = x.clone()
            if i is not None:
                changed[i] = 1
            prints.add(data_fingerprint(TensorDataset(changed)))
        assert len(prints) == 12
        assert data_fingerprint(ListOfDicts(100)) != data_fingerprint(ListOfDicts(101))
        assert data_fingerprint(ListOfDicts(100)) == data_fingerprint(ListOfDicts(100))

    def test_streams_are_unknown(self):
        class Stream(IterableDataset):
            def __len__(self) -> int:
                return 3

            def __iter__(self) -> Iterator[int]:
                return iter(range(3))

        assert (
            data_fingerprint(Stream())
            == data_fingerprint(DataLoader(Stream()))
            == "unknown: an iterable data set"
        )
