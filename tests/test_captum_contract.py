from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.influence import DataInfluence, TracInCPFast
from captum.influence._core.tracincp import KMostInfluentialResults
from planted import (
    METHODS,
    MLP,
    N_TEST,
    N_TRAIN,
    BatchNormCNN,
    HuggingFaceLike,
    ListOfDicts,
    TwoInputs,
    built,
    loader,
    planted_classes,
    trained,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_captum import STRIDE, InfluenceMethod
from stride_captum.checkpoints import load_checkpoint


@pytest.fixture(params=["float32", "float64"])
def setting(request, planted) -> tuple[nn.Module, TensorDataset, TensorDataset]:
    if request.param == "float32":
        return planted
    model = built(MLP).double()
    return model, *(TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in planted[1:])


@pytest.fixture
def tracin(setting, tmp_path) -> TracInCPFast:
    """Captum's own method on the same model and data."""
    model, train, _ = setting
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    loss = nn.CrossEntropyLoss(reduction="sum")
    return TracInCPFast(model, "fc3", train, [str(tmp_path / "checkpoint.pt")], loss_fn=loss, batch_size=16)


@pytest.mark.parametrize("method", METHODS)
class TestSameAnswerShapesAsCaptum:
    def test_it_is_a_data_influence_with_the_same_grammar(self, method):
        assert issubclass(method, DataInfluence)
        for name, n in (("influence", 5), ("self_influence", 4)):
            ours = list(inspect.signature(getattr(method, name)).parameters.values())
            theirs = list(inspect.signature(getattr(TracInCPFast, name)).parameters.values())
            assert [(p.name, p.kind) for p in ours[:n]] == [(p.name, p.kind) for p in theirs[:n]]
            assert [p.default for p in ours[1:n] if name != "inputs"][1:] == [p.default for p in theirs[1:n]][
                1:
            ]
            assert all(p.kind is p.KEYWORD_ONLY for p in ours[n:])

    def test_all_scores(self, setting, tracin, method):
        model, train, test = setting
        ours, theirs = method(model, train).influence(test.tensors), tracin.influence(test.tensors)
        assert type(ours) is type(theirs) is Tensor
        assert ours.shape == theirs.shape == (N_TEST, N_TRAIN)
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device

    @pytest.mark.parametrize("k", [1, 5, N_TRAIN, 10 * N_TRAIN])
    @pytest.mark.parametrize("proponents", [True, False])
    def test_top_k(self, setting, tracin, method, k, proponents):
        model, train, test = setting
        found = method(model, train)
        ours = found.influence(test.tensors, k, proponents, False)
        theirs = tracin.influence(test.tensors, k, proponents, False)
        assert type(ours) is type(theirs) is KMostInfluentialResults
        assert ours.indices.dtype == theirs.indices.dtype == torch.int64
        assert ours.indices.shape == theirs.indices.shape == (N_TEST, min(k, N_TRAIN))
        assert ours.influence_scores.shape == theirs.influence_scores.shape
        for result in (ours, theirs):
            steps = result.influence_scores.diff(dim=1)
            assert bool((steps <= 0).all()) if proponents else bool((steps >= 0).all())
        scores = found.influence(test.tensors)
        assert torch.equal(ours.influence_scores, scores.gather(1, ours.indices))
        assert torch.equal(
            ours.influence_scores,
            scores.sort(dim=1, descending=proponents).values[:, : ours.indices.shape[1]],
        )
        named = found.influence(inputs=test.tensors, k=k, proponents=proponents, show_progress=False)
        assert torch.equal(named.indices, ours.indices)

    def test_self_influence(self, setting, tracin, method):
        model, train, _ = setting
        found = method(model, train)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = tracin.self_influence(None, False, True)
        for ours in (found.self_influence(), found.self_influence(None, False, True)):
            assert type(ours) is Tensor
            assert ours.shape == theirs.shape == (N_TRAIN,)
        assert found.mislabel_scores().shape == (N_TRAIN,)

    def test_progress_is_shown_where_asked_for_and_only_there(self, planted, method, capsys):
        model, train, test = planted
        found = method(model, train)
        found.influence(test.tensors, None, True, False)
        found.self_influence(None, False)
        assert capsys.readouterr().err == ""
        found.influence(test.tensors, None, True, True)
        assert f"{method.__name__}: 100%" in capsys.readouterr().err
        found.fit(show_progress=True)
        assert f"fitting {method.__name__}: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
class TestKindsOfArguments:
    def test_a_loader_is_as_good_as_a_data_set(self, planted, method):
        model, train, test = planted
        wanted = method(model, train).influence(test.tensors)
        for source in (
            loader(train, 7),
            DataLoader(train, batch_size=7, num_workers=0),
            Items(train),
        ):
            torch.testing.assert_close(method(model, source).influence(test.tensors), wanted)

    def test_batches_loaders_and_data_sets_are_test_inputs(self, planted, method):
        model, train, test = planted
        found = method(model, train)
        wanted, top = found.influence(test.tensors), found.influence(test.tensors, 4)
        for inputs in (list(test.tensors), loader(test, 3), test, Items(test)):
            torch.testing.assert_close(found.influence(inputs), wanted)
            assert torch.equal(found.influence(inputs, 4).indices, top.indices)

    def test_a_batch_larger_than_what_is_scored_at_once(self, planted, method):
        model, train, _ = planted
        large = planted_classes(1500, seed=9)
        found = method(model, train)
        scores = found.influence(large.tensors)
        assert scores.shape == (1500, N_TRAIN)
        torch.testing.assert_close(scores[1100:1110], found.influence(large[1100:1110]))

    def test_two_inputs_and_dicts(self, method):
        x, y = planted_classes(20).tensors
        by_place = method(built(TwoInputs), TensorDataset(x, x.flip(1), y)).influence((x, x.flip(1), y))
        items = [{"first": a, "second": a.flip(0), "labels": b} for a, b in zip(x, y, strict=True)]
        by_name = method(built(TwoInputs), Items(items))
        batch = {"first": x, "second": x.flip(1), "labels": y}
        torch.testing.assert_close(by_name.influence(batch), by_place)
        torch.testing.assert_close(by_name.influence(Items(items)), by_place)
        torch.testing.assert_close(by_name.influence(loader(Items(items), 6)), by_place)

    def test_hugging_face_like_models_are_like_their_logits(self, method):
        class Logits(HuggingFaceLike):
            def forward(self, input_ids, attention_mask):
                return super().forward(input_ids, attention_mask).logits

        train, test = ListOfDicts(20), ListOfDicts(4, seed=1)
        wanted = method(built(Logits), train).influence(test)
        assert torch.equal(method(built(HuggingFaceLike), train).influence(test), wanted)

    def test_frozen_parameters_and_train_mode_change_nothing(self, method):
        model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
        wanted = method(model, train).influence(test.tensors)
        for parameter in model.conv1.parameters():
            parameter.requires_grad_(False)
        assert torch.equal(method(model.train(), train).influence(test.tensors), wanted)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert torch.equal(method(model, train).influence(test.tensors), wanted)

    def test_self_influence_of_the_training_set_by_name_or_by_loader(self, planted, method):
        model, train, _ = planted
        found = method(model, train)
        own = found.self_influence()
        assert torch.equal(found.self_influence(inputs=None, show_progress=False), own)
        assert torch.equal(found.self_influence(inputs_dataset=None), own)
        torch.testing.assert_close(method(model, loader(train, 7)).self_influence(), own)
        torch.testing.assert_close(method(model, train, batch_size=5).self_influence(), own)

    def test_the_first_use_fits_and_fit_returns_the_method(self, planted, method):
        model, train, test = planted
        found = method(model, train)
        assert found.fit() is found
        for use in (lambda m: m.influence(test.tensors), lambda m: m.influence(test.tensors, 2)):
            use(method(model, train))
        assert method(model, train).subset_influence(test.tensors, [[0, 1]]).shape == (N_TEST, 1)
        assert method(model, train).self_influence().shape == (N_TRAIN,)
        assert method(model, train).mislabel_scores().shape == (N_TRAIN,)
        found.influence(test.tensors)
        assert found.fit_seconds_ > 0
        assert found.query_seconds_ > 0
        assert found.n_train_ == N_TRAIN


class Items:
    """A map-style data set that is no `Dataset`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        return self.source[i]


class TestSelfInfluenceOfOtherInputs:
    def test_stride_takes_batches_loaders_and_captums_other_name(self, planted):
        model, train, test = planted
        method = STRIDE(model, train)
        own = method.self_influence(test.tensors)
        assert own.shape == (N_TEST,)
        torch.testing.assert_close(method.self_influence(loader(test)), own)
        assert torch.equal(method.self_influence(inputs_dataset=test.tensors), own)
        assert torch.equal(method.self_influence(test.tensors, False, True), own)

    @pytest.mark.parametrize("method", METHODS[1:])
    def test_others_say_that_they_cannot(self, planted, method):
        with pytest.raises(
            NotImplementedError, match=f"{method.__name__} gives the self-influence of training ex"
        ):
            method(*planted[:2]).self_influence(planted[2].tensors)


class TestRefusedArguments:
    @pytest.mark.parametrize("k", [0, -1, 2.0, True, "3"])
    def test_k(self, planted, k):
        with pytest.raises(
            ValueError, match="`k` must be an integer of at least 1, or None for all scores; got"
        ):
            STRIDE(*planted[:2]).influence(planted[2].tensors, k)

    def test_response_and_normalize(self, planted):
        method = STRIDE(*planted[:2])
        with pytest.raises(
            ValueError, match=r"`response` must be one of 'margin', .*; got 'margn'. Nearest: 'margin'"
        ):
            method.influence(planted[2].tensors, response="margn")
        with pytest.raises(ValueError, match="`normalize` must be None or 'cosine'; got 'l2'"):
            method.influence(planted[2].tensors, normalize="l2")

    @pytest.mark.parametrize("method", METHODS[1:])
    def test_arguments_of_the_constructor(self, planted, method):
        model, train, _ = planted
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module; got function"):
            method(lambda x: x, train)
        for wrong in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1; got"):
                method(model, train, batch_size=wrong)
        with pytest.raises(ValueError, match=r"`response` must be one of .*; got 'x'"):
            method(model, train, response="x")
        with pytest.raises(ValueError, match=r"`memory_budget` must be a .*number of bytes"):
            method(model, train, memory_budget="lots")
        with pytest.raises(TypeError, match="positional"):
            method(model, train, ["fc1"])

    def test_configs_and_seeds(self, planted):
        with pytest.raises(TypeError, match="`config` must be a STRIDEConfig; got dict"):
            STRIDE(*planted[:2], config={"damping": 1})
        for wrong in (-1, "a"):
            with pytest.raises(ValueError, match="`seed` must be an integer of at least 0; got"):
                METHODS[1](*planted[:2], seed=wrong)

    @pytest.mark.parametrize("method", METHODS[1:3])
    def test_methods_without_norms_have_no_cosine(self, planted, method):
        with pytest.raises(
            ValueError, match=f"`normalize` must be None for {method.__name__}, which has no norms"
        ):
            method(*planted[:2]).influence(planted[2].tensors, normalize="cosine")


class TestCheckpoints:
    @pytest.fixture
    def states(self) -> list[dict[str, Tensor]]:
        return [built(MLP, seed).state_dict() for seed in (1, 2, 10)]

    @pytest.fixture
    def wanted(self, planted, states) -> Tensor:
        return STRIDE(planted[0], planted[1], checkpoints=states).influence(planted[2].tensors)

    def scores(self, planted, checkpoints: Any, **options: Any) -> Tensor:
        return STRIDE(planted[0], planted[1], checkpoints=checkpoints, **options).influence(
            planted[2].tensors
        )

    def test_files_iterators_and_folders(self, planted, states, wanted, tmp_path):
        paths = []
        for i, state in zip((1, 2, 10), states, strict=True):
            paths.append(tmp_path / f"epoch-{i}.pt")
            torch.save(state, paths[-1])
        (tmp_path / "folder").mkdir()
        for given in (paths, [str(p) for p in paths], iter(paths), tuple(states), tmp_path, str(tmp_path)):
            assert torch.equal(self.scores(planted, given), wanted)
        assert STRIDE(*planted[:2], checkpoints=str(tmp_path)).checkpoints == [str(p) for p in paths]
        assert torch.equal(self.scores(planted, str(paths[0])), self.scores(planted, states[:1]))

    def test_wrapped_state_dicts_and_safetensors(self, planted, states, wanted, tmp_path):
        from safetensors.torch import save_file

        save_file(states[2], tmp_path / "2.safetensors")
        torch.save({"model_state_dict": states[1], "epoch": 3}, tmp_path / "1.pt")
        mixed = [{"state_dict": states[0]}, tmp_path / "1.pt", str(tmp_path / "2.safetensors")]
        assert torch.equal(self.scores(planted, mixed), wanted)

    def test_a_load_function_is_called_with_the_model_and_each_checkpoint(self, planted, states, wanted):
        seen = []

        def load(model: nn.Module, checkpoint: int) -> float:
            seen.append(checkpoint)
            model.load_state_dict(states[checkpoint])
            model.train()
            return 0.1

        assert torch.equal(self.scores(planted, [0, 1, 2], checkpoints_load_func=load), wanted)
        assert seen == [0, 1, 2] * 2

    def test_a_load_function_may_replace_parameters_and_return_nothing(self, planted, states, wanted):
        def load(model: nn.Module, state: dict[str, Tensor]) -> None:
            model.load_state_dict(state, assign=True)

        before = list(planted[0].parameters())
        assert torch.equal(self.scores(planted, states, checkpoints_load_func=load), wanted)
        assert all(a is b for a, b in zip(before, planted[0].parameters(), strict=True))

    def test_the_default_says_1(self, states):
        assert load_checkpoint(MLP(), states[0]) == 1.0

    def test_refusals(self, planted, states, tmp_path):
        with pytest.raises(ValueError, match="`checkpoints` must hold at least one checkpoint; got none"):
            STRIDE(*planted[:2], checkpoints=[])
        with pytest.raises(ValueError, match="`checkpoints` must hold at least one checkpoint; got none"):
            STRIDE(*planted[:2], checkpoints=tmp_path)
        with pytest.raises(
            ValueError, match=r"`checkpoints` must name a file or folder that exists; got '.*nothing'"
        ):
            STRIDE(*planted[:2], checkpoints=str(tmp_path / "nothing"))
        with pytest.raises(
            TypeError, match=r"`checkpoints` must be a list of state dicts.* Write \[state_dict\]"
        ):
            STRIDE(*planted[:2], checkpoints=states[0])

    def test_pickles_that_run_code_are_not_loaded(self, planted, tmp_path):
        torch.save({"weights": Path("x").exists}, tmp_path / "evil.pt")
        with pytest.raises(Exception, match="Weights only load failed"):
            STRIDE(*planted[:2], checkpoints=[tmp_path / "evil.pt"]).fit()


class TestThirdParties:
    def test_three_functions_make_a_method(self, planted):
        class Nearest(InfluenceMethod):
            """Minus the distance of the inputs."""

            def _fit_checkpoint(self, model, show_progress):
                x = torch.cat([batch[0] for batch in self._train_batches(show_progress)])
                self.n_train_ = len(x)
                return x

            def _prepare(self, state, model, batch, ask):
                return batch[0]

            def _scores(self, state, prepared, columns):
                return -torch.cdist(prepared, state[columns])

        model, train, test = planted
        method = Nearest(model, train, batch_size=5, memory_budget=16 * N_TEST * 7)
        wanted = -torch.cdist(test.tensors[0], train.tensors[0])
        torch.testing.assert_close(method.influence(test), wanted)
        assert torch.equal(method.influence(test, 1).indices, wanted.argmax(1, keepdim=True))
        torch.testing.assert_close(method.self_influence(), torch.zeros(N_TRAIN), atol=1e-3, rtol=0)
        sums = method.subset_influence(test, [[0, 5], [1]])
        torch.testing.assert_close(sums, torch.stack([wanted[:, [0, 5]].sum(1), wanted[:, 1]], 1))
        with pytest.raises(ValueError, match="`normalize` must be None for Nearest"):
            method.influence(test, normalize="cosine")

    def test_an_unfinished_method_cannot_be_built(self, planted):
        class Unfinished(InfluenceMethod):
            pass

        with pytest.raises(TypeError, match="abstract"):
            Unfinished(*planted[:2])
