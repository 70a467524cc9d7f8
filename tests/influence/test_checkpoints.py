"""Checkpoints as trainers leave them: each is loaded right, or refused in a sentence that names the file."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import MLP, BatchNormCNN, built, expect_untouched, planted_classes, trained
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stride_captum import STRIDE, ClosedForm
from stride_captum.adapters import TRAK, Similarity, TracIn
from stride_captum.influence.checkpoints.averages import weighted_sum
from stride_captum.influence.checkpoints.checkpoint import (
    checkpoint_list,
    load_checkpoint,
    warn_of_equal,
)
from stride_captum.influence.checkpoints.load_functions import learning_rate_of, load_with

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """Weights of other values than those of the models that they are loaded into."""
    return built(MLP, 7).state_dict()


def same(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def loaded(checkpoint: Any, model: nn.Module | None = None) -> nn.Module:
    model = built(MLP) if model is None else model
    assert load_checkpoint(model, checkpoint) == 1.0
    return model


def behind(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def optimizer_state() -> dict[str, Any]:
    model = built(MLP)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


class TestWhereTheStateDictIs:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda s: s,
            lambda s: OrderedDict(s),
            lambda s: {"model": s, "optimizer": optimizer_state(), "epoch": 3},
            lambda s: {"net": s},
            lambda s: {"weights": s, "lr": 0.1},
            lambda s: {"state_dict": behind("model.", s), "optimizer_states": [optimizer_state()]},
            lambda s: {"state_dict": {**behind("model.", s), "loss.weight": torch.ones(3)}, "epoch": 1},
            lambda s: {"model": s, "ema": {k: v for k, v in s.items() if k != "fc3.bias"}},
            lambda s: behind("module.", s),
            lambda s: behind("_orig_mod.", s),
            lambda s: behind("module._orig_mod.", s),
            lambda s: behind("_orig_mod.module.model.", s),
            lambda s: {key.replace("fc2.", "fc2._orig_mod."): value for key, value in s.items()},
        ],
    )
    @pytest.mark.parametrize("kind", ["mapping", "file"])
    def test_it_is_found(self, tmp_path, state, wrap, kind):
        checkpoint = wrap(state)
        if kind == "file":
            torch.save(checkpoint, tmp_path / "a.pt")
            checkpoint = tmp_path / "a.pt"
        assert same(loaded(checkpoint), state)

    @pytest.mark.slow
    def test_the_model_may_be_the_one_that_is_wrapped(self, state):
        for model in (nn.DataParallel(built(MLP)), torch.compile(built(MLP))):
            loaded(state, model)
            assert same(model.module if isinstance(model, nn.DataParallel) else model._orig_mod, state)

    @pytest.mark.parametrize(
        ("wrap", "names"),
        [
            (lambda s: {"model": s, "model_ema": s}, "'model' and 'model_ema'"),
            (lambda s: {"ema": s, "best": behind("module.", s)}, r"'ema' and 'best' \(module\.\*\)"),
            (
                lambda s: {**behind("generator.", s), **behind("critic.", s)},
                r"'critic\.\*' and 'generator\.\*'",
            ),
        ],
    )
    def test_two_that_fit_are_refused(self, state, wrap, names):
        with pytest.raises(
            ValueError, match=rf"hold one set of weights that fits `model`; got a state dict with {names}"
        ):
            loaded(wrap(state))

    def test_a_prefix_that_only_ends_like_another_is_another(self, state):
        model = nn.ModuleDict({"part": built(MLP)})
        with pytest.raises(ValueError, match="must hold the weights of `model`"):
            loaded(behind("mypart.", state), model)

    def test_weights_that_two_modules_share_are_saved_once(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
                self.head.weight = self.embedding.weight

        weight = torch.randn(5, 3)
        save_file({"embedding.weight": weight}, tmp_path / "model.safetensors")
        model = loaded(tmp_path / "model.safetensors", Tied())
        assert torch.equal(model.head.weight, weight)
        assert model.head.weight is model.embedding.weight

    def test_empty_buffers_and_extra_states_share_nothing(self):
        class Extra(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(2, 2)
                for name in ("first", "second"):
                    self.register_buffer(name, torch.empty(0))

            def get_extra_state(self):
                return {"steps": 3}

            def set_extra_state(self, state):
                pass

        whole = Extra().state_dict()
        for key in ("second", "_extra_state"):
            kept = {name: value for name, value in whole.items() if name != key}
            with pytest.raises(ValueError, match=rf"`checkpoint` must hold the weights of `model`.*{key}"):
                load_checkpoint(Extra(), kept)

    def test_what_a_module_did_not_have_yet_is_filled_in_by_torch(self):
        state = built(BatchNormCNN, 7).state_dict()
        model = built(BatchNormCNN)
        old = {key: value for key, value in state.items() if "num_batches" not in key}
        load_checkpoint(model, old)
        assert same(model, {**state, "bn1.num_batches_tracked": torch.tensor(0)})

    def test_averaged_checkpoints_have_counters_that_are_floats(self):
        state = built(BatchNormCNN, 7).state_dict()
        model = built(BatchNormCNN)
        load_checkpoint(model, {key: value * 1.0 for key, value in state.items()})
        assert same(model, state)

    def test_half_precision_is_cast(self, state):
        half = {key: value.half() for key, value in state.items()}
        assert same(loaded(half), {key: value.half().float() for key, value in state.items()})


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda s: built(nn.Linear.__call__ if False else lambda: nn.Linear(3, 2)).state_dict(),
                "weight",
            ),
            (lambda s: {**s, "fc1.weight": torch.ones(8, 7)}, r"fc1\.weight of shape \(8, 7\), not \(8, 6\)"),
            (lambda s: {k: v for k, v in s.items() if k != "fc3.bias"}, r"without fc3\.bias\."),
            (lambda s: {**s, "fc4.bias": torch.ones(2)}, r"with fc4\.bias\."),
            (lambda s: {**s, "fc1.weight": s["fc1.weight"].to(torch.int8)}, "type integer, not float"),
            (lambda s: optimizer_state(), "with the state of an optimizer"),
            (lambda s: {}, "with nothing in it"),
            (lambda s: {"epoch": 3, "loss": 0.1}, "with epoch, loss"),
        ],
    )
    def test_weights_of_another_model_change_nothing(self, state, change, match):
        model = built(MLP)
        with (
            expect_untouched(model),
            pytest.raises(ValueError, match=rf"`checkpoint` must hold the weights of `model`; got .*{match}"),
        ):
            load_checkpoint(model, change(state))

    @pytest.mark.parametrize("given", [3, None, nn.Linear(2, 2), [1]])
    def test_neither_a_state_dict_nor_a_path(self, given):
        with pytest.raises(TypeError, match="`checkpoint` must be a state dict or a path; got"):
            load_checkpoint(built(MLP), given)

    @pytest.mark.parametrize(
        ("write", "match"),
        [
            (lambda path, s: path.write_bytes(b""), "which is empty"),
            (lambda path, s: path.write_bytes(b"some words"), "which is none. Leave it out"),
            (lambda path, s: path.write_bytes(b"\0\0\0"), "which is none"),
            (lambda path, s: (torch.save(s, path), os.truncate(path, 900)), "which is cut off or damaged"),
            (lambda path, s: torch.save(built(MLP), path), r"Python objects \(.*MLP\) beside tensors"),
            (
                lambda path, s: torch.save({"state_dict": s, "hyper_parameters": Path("x")}, path),
                r"Python objects \(pathlib.*\) beside tensors. Save `model.state_dict\(\)` alone",
            ),
            (
                lambda path, s: torch.save(built(MLP), path, _use_new_zipfile_serialization=False),
                "Python objects",
            ),
            (lambda path, s: path.write_bytes(pickle.dumps(os.getcwd)), "Python objects"),
        ],
    )
    def test_files_that_are_no_weights_are_named(self, tmp_path, state, write, match):
        path = tmp_path / "epoch.pt"
        write(path, state)
        with pytest.raises(
            ValueError, match=rf"`checkpoint` must be a file of weights, .* got '{path}', .*{match}"
        ):
            load_checkpoint(built(MLP), str(path))

    def test_a_script_is_named(self, tmp_path):
        with pytest.warns(FutureWarning):
            torch.jit.save(torch.jit.script(built(MLP)), tmp_path / "script.pt")
        with pytest.raises(ValueError, match=r"script\.pt', which holds Python objects beside tensors"):
            load_checkpoint(built(MLP), tmp_path / "script.pt")

    @pytest.mark.parametrize("content", [[1, 2], torch.ones(3), 5])
    def test_files_without_a_state_dict_are_named(self, tmp_path, content):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"must hold a state dict; got '.*a\.pt', which holds a"):
            load_checkpoint(built(MLP), tmp_path / "a.pt")

    def test_safetensors_that_are_cut_off_are_named(self, tmp_path, state):
        for name in ("a.safetensors", "without-ending"):
            save_file(state, tmp_path / name)
            assert same(loaded(tmp_path / name), state)
            os.truncate(tmp_path / name, 900)
            with pytest.raises(ValueError, match=f"{name}', which is cut off or damaged"):
                load_checkpoint(built(MLP), tmp_path / name)

    def test_a_file_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"must name a file or folder that exists; got '.*gone\.pt'"):
            load_checkpoint(built(MLP), tmp_path / "gone.pt")

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil()))
        torch.save({"state_dict": Evil()}, tmp_path / "torch.pt")
        for name in ("plain.pkl", "torch.pt"):
            with pytest.raises(ValueError, match=f"{name}', which holds Python objects"):
                load_checkpoint(built(MLP), tmp_path / name)
        assert not (tmp_path / "ran").exists()

    def test_the_model_of_a_method_is_put_back(self, planted, tmp_path, state):
        model, train, _ = planted
        torch.save(state, tmp_path / "1.pt")
        torch.save({**state, "fc1.weight": torch.ones(1)}, tmp_path / "2.pt")
        with expect_untouched(model), pytest.raises(ValueError, match=r"2\.pt' with fc1\.weight of shape"):
            STRIDE(model, train, checkpoints=tmp_path).fit()


class TestFolders:
    def names(self, folder: Path) -> list[str]:
        return [os.path.relpath(path, folder) for path in checkpoint_list(folder)]

    def touch(self, folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).touch()

    def test_files_come_in_natural_order(self, tmp_path):
        self.touch(tmp_path, "epoch=10-step=3.ckpt", "epoch=2-step=20.ckpt", "epoch=2-step=3.ckpt")
        assert self.names(tmp_path) == ["epoch=2-step=3.ckpt", "epoch=2-step=20.ckpt", "epoch=10-step=3.ckpt"]

    def test_what_trainers_leave_beside_them_is_skipped(self, tmp_path):
        self.touch(tmp_path, "README.md", "LICENSE", ".DS_Store", "config.json", "trainer_state.json")
        self.touch(tmp_path, "optimizer.pt", "optimizer_2.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
        self.touch(tmp_path, "rng_state_0.pth", "random_states_0.pkl", "training_args.bin", "hparams.yaml")
        self.touch(tmp_path, "events.out.tfevents.17.host.1.0", "log.txt", "x.pt.0123.part", "runs/event")
        self.touch(tmp_path, "optimal.pt", "scheduler_net.pth", "last", "2.weights")
        assert self.names(tmp_path) == ["2.weights", "last", "optimal.pt", "scheduler_net.pth"]

    def test_hugging_face_folders(self, tmp_path, state):
        for step in (10, 2, 1):
            folder = tmp_path / f"checkpoint-{step}"
            self.touch(folder, "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json")
            self.touch(folder, "training_args.bin", "tf_model.h5", "pytorch_model.bin")
            save_file({key: value + step for key, value in state.items()}, folder / "model.safetensors")
        self.touch(tmp_path, "runs/event", "README.md")
        assert self.names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-10"]
        for path, step in zip(checkpoint_list(str(tmp_path)), (1, 2, 10), strict=True):
            assert same(loaded(path), {key: value + step for key, value in state.items()})
        assert self.names(tmp_path / "checkpoint-2") == ["model.safetensors"]

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_a_model_in_several_files(self, tmp_path, state, kind):
        stem, keys = {"safetensors": "model", "bin": "pytorch_model"}[kind], list(state)
        places = {key: f"{stem}-0000{1 + i % 2}-of-00002.{kind}" for i, key in enumerate(keys)}
        for name in set(places.values()):
            part = {key: state[key] for key in keys if places[key] == name}
            (save_file if kind == "safetensors" else torch.save)(part, tmp_path / name)
        index = tmp_path / f"{stem}.{kind}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert self.names(tmp_path) == [index.name]
        for path in (tmp_path, index):
            assert same(loaded(path), state)
        (tmp_path / places[keys[0]]).unlink()
        with pytest.raises(ValueError, match=rf"exists; got '.*{places[keys[0]]}'"):
            loaded(index)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("", "an index without a whole 'weight_map'"),
            ("[]", "an index without a whole 'weight_map'"),
            ('{"weight_map": {"a": 3}}', "an index without a whole 'weight_map'"),
            ('{"weight_map": {"a": "../a.bin"}}', r"an index that names '\.\./a\.bin' outside its folder"),
        ],
    )
    def test_an_index_that_is_damaged_is_named(self, tmp_path, content, match):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json', {match}"):
            loaded(tmp_path)

    def test_a_folder_with_files_and_folders_is_refused(self, tmp_path):
        self.touch(tmp_path, "checkpoint-5/model.safetensors", "model.safetensors")
        match = r"got '.*' with both \(model.safetensors, checkpoint-5, ...\). Give the list"
        with pytest.raises(ValueError, match=match):
            checkpoint_list(tmp_path)

    def test_a_folder_without_weights_says_what_it_has(self, tmp_path):
        self.touch(tmp_path, "config.json", "a.txt", "b.txt", "version_0/checkpoints/1.ckpt", "z.log")
        match = (
            r"`checkpoints` must hold at least one checkpoint; got none in '.*', which has a\.txt, b\.txt, "
        )
        with pytest.raises(ValueError, match=match + r"config\.json and 2 more"):
            checkpoint_list(tmp_path)

    def test_a_folder_in_a_list_must_hold_one_model(self, tmp_path):
        self.touch(tmp_path, "a.pt", "b.pt")
        with pytest.raises(ValueError, match=r"one file of weights in the folder .* got a\.pt, b\.pt"):
            load_checkpoint(built(MLP), tmp_path)

    @pytest.mark.parametrize("given", [3, torch.ones(2), nn.Linear(2, 2)])
    def test_no_list(self, given):
        with pytest.raises(TypeError, match="must be a list of state dicts or paths, or a folder"):
            checkpoint_list(given)


def copies_through_data(model: nn.Module, state: State) -> None:
    for key, parameter in model.named_parameters():
        parameter.data.copy_(state[key])


class TestLoadFunctions:
    @pytest.mark.parametrize(
        "load",
        [
            lambda m, c: m.load_state_dict(c),
            lambda m, c: m.load_state_dict(c, strict=False),
            lambda m, c: m.load_state_dict(c, assign=True),
            copies_through_data,
            load_checkpoint,
        ],
    )
    @pytest.mark.parametrize("seed", [7, 0])
    def test_every_way_of_loading_counts_also_of_the_same_weights(self, load, seed):
        model, state = built(MLP), built(MLP, seed).state_dict()
        calls = []
        assert load_with(lambda m, c: calls.append(1) or load(m, c), model, state) == 1.0
        assert same(model, state)
        assert len(calls) == (2 if seed == 0 and load is copies_through_data else 1)

    @pytest.mark.parametrize(
        "load",
        [
            lambda m, c: m.load_state_dict(torch.load(c), strict=False),
            lambda m, c: 0.1,
            lambda m, c: None,
        ],
    )
    def test_a_function_that_loads_nothing_is_refused(self, tmp_path, state, load):
        torch.save(behind("module.", state), tmp_path / "a.pt")
        model = built(MLP)
        values = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError,
            match=r"`checkpoints_load_func` must load the checkpoint into the model that it is given; got a "
            r"model whose parameters are as before, for '.*a\.pt'. strict=False loads nothing",
        ):
            load_with(load, model, tmp_path / "a.pt")
        assert same(model, values)

    def test_a_function_that_loads_a_part_is_warned_about(self, state):
        model, part = built(MLP), {key: value for key, value in state.items() if "fc1" in key}
        rest = {key: value.clone() for key, value in model.state_dict().items() if "fc1" not in key}
        with pytest.warns(
            UserWarning, match=r"left 4 of 6 trainable parameters as they were for a state dict: fc2\.weight"
        ):
            load_with(lambda m, c: m.load_state_dict(c, strict=False), model, part)
        assert same(model, {**part, **rest})
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("fc1" in key)
        assert load_with(lambda m, c: m.load_state_dict(c, strict=False), model, part) == 1.0

    def test_an_error_at_the_second_call_leaves_no_changed_values(self):
        model, calls = built(MLP), []
        values = copy.deepcopy(model.state_dict())

        def load(model: nn.Module, checkpoint: Any) -> None:
            calls.append(checkpoint)
            if len(calls) == 2:
                raise RuntimeError("not again")

        with pytest.raises(RuntimeError, match="not again"):
            load_with(load, model, "a.pt")
        assert same(model, values)

    def test_a_model_without_parameters(self):
        assert load_with(lambda m, c: 0.5, nn.ReLU(), "a.pt") == 0.5

    @pytest.mark.parametrize(
        ("returned", "rate"),
        [
            (None, 1),
            (0.1, 0.1),
            (0, 0),
            (2, 2),
            (torch.tensor(0.5), 0.5),
            (torch.tensor([0.5]), 0.5),
            (np.float32(0.5), 0.5),
            (np.array(2), 2),
        ],
    )
    def test_learning_rates(self, returned, rate):
        found = learning_rate_of(returned, "a.pt")
        assert type(found) is float
        assert found == rate

    def test_the_model_and_what_torch_returns_say_nothing_of_it(self, state):
        model = built(MLP)
        assert learning_rate_of(model, "a.pt", model) == 1.0
        assert learning_rate_of(model.load_state_dict(state), "a.pt") == 1.0

    @pytest.mark.parametrize("returned", ["0.1", True, np.True_, [0.1], torch.ones(2), {"lr": 0.1}])
    def test_other_things_are_refused(self, returned):
        match = r"`checkpoints_load_func` must return the learning rate at 'a\.pt', or None; got"
        with pytest.raises(TypeError, match=match):
            learning_rate_of(returned, "a.pt")

    def test_another_model_is_refused_with_the_remedy(self):
        match = r"or None; got MLP\. Load into the model that it is given: model\.load_state_dict\("
        with pytest.raises(TypeError, match=match):
            load_with(lambda m, c: copy.deepcopy(m), built(MLP), "a.pt")

    @pytest.mark.parametrize("returned", [-0.1, float("nan"), float("inf"), torch.tensor(-1)])
    def test_numbers_out_of_range_are_refused(self, returned):
        with pytest.raises(ValueError, match="must return the learning rate at a state dict, or None; got"):
            learning_rate_of(returned, {})


class TestEqualWeights:
    def test_two_paths_with_the_same_weights_are_warned_about(self):
        with pytest.warns(UserWarning, match=r"checkpoints 'b\.pt' and 'last\.pt' have the same weights"):
            warn_of_equal(["a.pt", Path("b.pt"), "last.pt"], ["1", "2", "2"])

    def test_others_are_not(self, recwarn):
        warn_of_equal(["a.pt", "b.pt", "a.pt"], ["1", "2", "1"])
        warn_of_equal([{}, {}], ["1", "1"])
        assert len(recwarn) == 0


class TestStateDictOfTheModelItself:
    """`model.state_dict()` holds the parameters: the next checkpoint must not be loaded over it."""

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_batches_of_a_query_have_the_scores_of_one(self, planted, wrapped):
        model, train, test = planted
        own = {"state_dict": model.state_dict()} if wrapped else model.state_dict()
        other = trained(MLP, seed=3)[0].state_dict()
        tempered = ClosedForm(residuals="temperature", temperature=2.0)
        method = STRIDE(model, train, checkpoints=[own, other], operators=tempered)
        alone = STRIDE(model, train, operators=tempered), _of(other, train, tempered)
        wanted = (alone[0].influence(test) + alone[1].influence(test)) / 2
        torch.testing.assert_close(method.influence(test), wanted)
        torch.testing.assert_close(method.influence(DataLoader(test, 2)), wanted)
        assert method.checkpoints[1] is other

    def test_it_is_what_it_was_when_the_method_was_built(self, planted):
        model, train, test = copy.deepcopy(planted[0]), planted[1], planted[2]
        wanted = STRIDE(model, train).influence(test)
        method = STRIDE(model, train, checkpoints=[model.state_dict()])
        with torch.no_grad():
            model.fc1.weight.add_(1)
        torch.testing.assert_close(method.influence(test), wanted)


def _of(weights, train, operators):
    model = built(MLP)
    model.load_state_dict(weights)
    return STRIDE(model, train, operators=operators)


class TestUnitDeviation:
    """Scores of each checkpoint have unit standard deviation, test point by test point, before the mean."""

    @pytest.fixture
    def planted(self):
        states = [built(MLP, seed).state_dict() for seed in (1, 2, 3)]
        for name in states[1]:
            states[1][name] *= 3  # scores of another size
        return built(MLP), planted_classes(40), planted_classes(6, seed=9), states

    @pytest.mark.slow
    @pytest.mark.parametrize("cls", [STRIDE, TracIn, TRAK])
    @pytest.mark.parametrize("budget", ["256MiB", 4 * 6 * 4 * 16])
    def test_it_is_the_mean_of_scaled_scores(self, planted, cls, budget):
        model, train, test, states = planted
        options = (
            {} if cls is not STRIDE else {"operators": ClosedForm(residuals="temperature", temperature=2)}
        )
        method = cls(model, train, checkpoints=states, memory_budget=budget, **options)
        found = method.influence(test.tensors, normalize="deviation")
        wanted = torch.zeros(6, 40)
        for state in states:
            scores = cls(model, train, checkpoints=[state], **options).influence(test.tensors)
            wanted += scores / scores.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(found, wanted * method._weights[0], rtol=1e-4, atol=1e-5)
        best = method.influence(test.tensors, 5, normalize="deviation")
        torch.testing.assert_close(best.influence_scores, found.topk(5).values)

    def test_scores_without_spread_are_zero(self, planted):
        model, train, test, _ = planted

        class Constant(Similarity):
            def score_columns(self, state, prepared, columns):
                return torch.full((6, columns.stop - columns.start), 0.1)

        assert not Constant(model, train).influence(test.tensors, normalize="deviation").any()


class TestScoresOfEach:
    @pytest.fixture
    def planted(self):
        return trained(MLP)

    def test_a_response_that_does_not_exist_is_refused_before_the_fit(self, planted):
        model, train, test = planted
        method = STRIDE(model, train)
        with pytest.raises(ValueError, match="`response` must be"):
            method.checkpoint_scores(test.tensors, response="nonsense")
        assert method._states is None

    def test_without_checkpoints_they_are_those_of_the_model(self, planted):
        model, train, test = planted
        for budget in ("256MiB", 4 * 7 * 4 * 5):
            method = STRIDE(model, train, memory_budget=budget)
            found = method.checkpoint_scores(DataLoader(test, batch_size=4), response="logit", target=1)
            wanted = method.influence(test.tensors, response="logit", target=1)
            torch.testing.assert_close(found, wanted[None])
            assert method.query_seconds_ > 0

    def test_a_normalization_that_needs_more_is_refused(self):
        with pytest.raises(ValueError, match=r"`normalize` must be None or 'deviation'; got 'cosine'"):
            weighted_sum(torch.ones(2, 3, 4), [0.5, 0.5], "cosine")


class TestChangedAfterTheFit:
    """Scores of weights that are gone are never mixed with those that are there."""

    MATCH = "`checkpoints` must have the weights that the method was fitted on; got other weights in"

    @pytest.mark.slow
    @pytest.mark.parametrize("cls", [STRIDE, TracIn, TRAK])
    def test_a_file_that_is_written_again(self, planted, tmp_path, cls):
        model, train, test = planted
        path = tmp_path / "last.pt"
        torch.save(built(MLP, 1).state_dict(), path)
        method = cls(model, train, checkpoints=[path, built(MLP, 3).state_dict()])
        before = method.influence(test.tensors)
        torch.save(built(MLP, 2).state_dict(), path)
        for ask in (
            lambda: method.influence(test.tensors),
            lambda: method.self_influence(test.tensors),
            lambda: method.influence(test.tensors, 3),
        ):
            with pytest.raises(ValueError, match=f"{self.MATCH} .*last.pt"):
                ask()
        torch.save(built(MLP, 1).state_dict(), path)
        assert torch.equal(method.influence(test.tensors), before)
        torch.save(built(MLP, 2).state_dict(), path)
        wanted = cls(model, train, checkpoints=[path, built(MLP, 3).state_dict()]).influence(test.tensors)
        assert torch.equal(method.fit().influence(test.tensors), wanted)

    def test_a_state_dict_in_place(self, planted):
        model, train, test = planted
        state = built(MLP, 1).state_dict()
        method = STRIDE(model, train, checkpoints=[state]).fit()
        method.influence(test.tensors)
        next(iter(state.values())).add_(1)
        with pytest.raises(ValueError, match=self.MATCH):
            method.compute_intermediate_quantities(test.tensors)
        with pytest.raises(ValueError, match=self.MATCH):
            method.remove_examples([0])

    def test_the_rest_of_the_model_where_a_checkpoint_holds_a_part(self, planted):
        train, test = planted[1:]
        model = built(MLP, 1)
        model.fc1.requires_grad_(False)
        model.fc3.requires_grad_(False)
        state = built(MLP, 2).state_dict()
        part = {key: value for key, value in state.items() if key.startswith("fc2")}

        def load(network, weights):
            network.load_state_dict(weights, strict=False)
            return 1.0

        method = STRIDE(model, train, checkpoints=[part], checkpoints_load_func=load).fit()
        with torch.no_grad():
            model.fc1.weight.mul_(2)
        with pytest.raises(ValueError, match=self.MATCH):
            method.influence(test.tensors)

    def test_another_list(self, planted):
        model, train, test = planted
        method = STRIDE(model, train, checkpoints=[built(MLP, 1).state_dict()]).fit()
        method.checkpoints = [built(MLP, 2).state_dict()]
        with pytest.raises(ValueError, match=self.MATCH):
            method.influence(test.tensors)
