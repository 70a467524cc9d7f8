from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.influence import DataInfluence, TracInCP
from planted import (
    METHODS,
    MLP,
    N_TEST,
    N_TRAIN,
    HuggingFaceLike,
    ListOfDicts,
    built,
    loader,
    planted_classes,
)
from torch import Tensor, nn

from stride_captum import STRIDE, InfluenceMethod, Trained
from stride_captum.influence.checkpoints.checkpoint import load_checkpoint


@pytest.mark.parametrize("method", METHODS)
class TestTheGrammarOfCaptum:
    def test_it_is_a_data_influence_with_the_same_grammar(self, method):
        assert issubclass(method, DataInfluence)
        for name, n in (("influence", 6), ("self_influence", 4)):
            ours = list(inspect.signature(getattr(method, name)).parameters.values())
            theirs = list(inspect.signature(getattr(TracInCP, name)).parameters.values())
            assert [(p.name, p.kind) for p in ours[:n]] == [(p.name, p.kind) for p in theirs[:n]]
            assert [p.default for p in ours[1:n]] == [p.default for p in theirs[1:n]]
            assert all(p.kind is p.KEYWORD_ONLY for p in ours[n:])

    def test_options_are_given_by_name(self, method):
        first, second, *options = inspect.signature(method).parameters.values()
        assert (first.name, second.name) == ("model", "train_dataset")
        assert first.kind is second.kind is first.POSITIONAL_OR_KEYWORD
        assert all(option.kind in (option.KEYWORD_ONLY, option.VAR_KEYWORD) for option in options)

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
    def test_a_batch_larger_than_what_is_scored_at_once(self, planted, method):
        model, train, _ = planted
        large = planted_classes(1500, seed=9)
        found = method(model, train)
        scores = found.influence(large.tensors)
        assert scores.shape == (1500, N_TRAIN)
        torch.testing.assert_close(scores[1100:1110], found.influence(large[1100:1110]))

    def test_hugging_face_like_models_are_like_their_logits(self, method):
        class Logits(HuggingFaceLike):
            def forward(self, input_ids, attention_mask):
                return super().forward(input_ids, attention_mask).logits

        train, test = ListOfDicts(20), ListOfDicts(4, seed=1)
        wanted = method(built(Logits), train).influence(test)
        assert torch.equal(method(built(HuggingFaceLike), train).influence(test), wanted)

    def test_self_influence_of_the_training_set_by_name(self, planted, method):
        found = method(*planted[:2])
        own = found.self_influence()
        assert torch.equal(found.self_influence(inputs=None, show_progress=False), own)
        assert torch.equal(found.self_influence(inputs_dataset=None), own)
        assert torch.equal(found.self_influence(None, False, True), own)


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
        with pytest.raises(ValueError, match="`normalize` must be None, 'cosine' or 'deviation'; got 'l2'"):
            method.influence(planted[2].tensors, normalize="l2")

    def test_cosine_of_a_method_without_norms(self, planted):
        trained = STRIDE(*planted[:2], operators=Trained(iterations=2))
        with pytest.raises(
            ValueError, match=r"`normalize` must be None for operators=.trained.; got .cosine."
        ):
            trained.influence(planted[2].tensors, normalize="cosine")

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
        with pytest.raises(TypeError, match="with all others by name"):
            method(model, train, ["fc1"])

    def test_configs_and_seeds(self, planted):
        with pytest.raises(TypeError, match=r"`operators` must be ClosedForm\(...\), .*; got dict"):
            STRIDE(*planted[:2], operators={"damping": 1})
        with pytest.raises(TypeError, match=r"`features` must be Features\(...\); got dict"):
            STRIDE(*planted[:2], features={"max_width": 1})
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
        with pytest.raises(ValueError, match=r"which holds Python objects \(\S*getattr\) beside tensors"):
            STRIDE(*planted[:2], checkpoints=[tmp_path / "evil.pt"]).fit()


class TestThirdParties:
    def test_three_functions_make_a_method(self, planted):
        class Nearest(InfluenceMethod):
            """Minus the distance of the inputs."""

            def fit_checkpoint(self, model, show_progress):
                x = torch.cat([batch.first_tensor for batch in self.train_batches(show_progress)])
                self.n_train_ = len(x)
                return x

            def prepare_query(self, state, model, batch, query):
                return batch.first_tensor

            def score_columns(self, state, prepared, columns):
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
