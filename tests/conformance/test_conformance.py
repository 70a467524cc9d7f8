from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from captum.influence import TracInCPFast
from captum.influence._core.tracincp import KMostInfluentialResults
from flat_options import arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stride_captum import STRIDE, InfluenceMethod, adapters
from stride_captum.conformance import (
    CHECKS,
    ConformanceReport,
    Subject,
    check,
    main,
    matrix,
    missing_extra,
    run_check,
    shipped,
)
from stride_captum.data.batch import ExampleBatch, is_batch
from stride_captum.data.reading import Reading
from stride_captum.influence.method import Query
from stride_captum.layers.activations import check_finite
from stride_captum.residuals import tempered_residuals
from stride_captum.responses import response_gradient


def stride(name: str, exceptions: dict[str, str] | None = None, **config: Any) -> Subject:
    return Subject(f"STRIDE-{name}", partial(STRIDE, **arguments(**config)), exceptions or {})


# One line a method: those that ship are in `shipped()`, other settings of them here.
METHODS = [
    *shipped(),
    stride("identity", curvature="identity"),
    stride("eigenvalue-corrected", curvature="eigenvalue-corrected"),
    stride("gauss-newton", curvature="gauss-newton"),
    stride("training-residuals", residuals="training"),
    stride("cosine", normalize="cosine"),
    stride(
        "threshold",
        {
            "examples_of_the_class_lower_its_loss": "effects on a small loss are below the threshold",
            "self_influence_is_minus_the_effect_on_the_own_loss": "self-influence has no threshold",
        },
        threshold=0.02,
    ),
    stride(
        "trained",
        {
            "permuting_the_training_set_permutes_the_columns": "subsets are drawn by index",
            "self_influence_is_not_negative": "60 responses estimate 48 weights with noise",
        },
        operators="trained",
        n_subsets=60,
        rank=4,
        iterations=10,
        learning_rate=0.1,
        fidelity_weight=0.1,
        linearity_weight=0.0,  # with it, 26 of 40 test points rise with their own class at these sizes
        recovery="ridge",
    ),
]


@pytest.fixture(scope="module")
def missing() -> dict[str, str | None]:
    """What each method says of an extra that is not installed."""
    return {subject.name: missing_extra(subject.build) for subject in METHODS}


#: Methods whose laws are quick; those of others are left to `make conformance`.
QUICK = {"Similarity", "ClassSimilarity", "KNNShapley", "ClassRandom", "Random"}


def speed_of(name):
    """The marks of a method's tests."""
    return [] if name == "STRIDE" else pytest.mark.slow if name in QUICK else pytest.mark.matrix


@pytest.mark.parametrize("law", CHECKS)
@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, marks=speed_of(s.name), id=s.name) for s in METHODS],
)
def test_every_method_keeps_every_law(subject, law, missing):
    if missing[subject.name]:
        pytest.skip(missing[subject.name])
    reason = subject.exceptions.get(law)
    outcome = run_check(CHECKS[law], subject.build, reason)
    assert outcome == ("pass" if reason is None else f"exception: {reason}")


def test_every_method_that_ships_is_checked():
    exported = {getattr(adapters, name) for name in adapters.__all__}
    methods = {m for m in exported if isinstance(m, type) and issubclass(m, InfluenceMethod)}
    builds = {getattr(subject.build, "func", subject.build) for subject in shipped()}
    # What CaptumInfluence keeps depends on the object that its `build` makes.
    assert methods - builds == {adapters.CaptumInfluence}
    assert STRIDE in builds


@pytest.mark.parametrize(
    "law",
    [
        "arguments_by_position_are_those_of_captum",
        "scores_have_the_shapes_and_dtypes_of_captum",
        "float64_models_give_float64_scores",
        "the_top_k_are_the_best_of_all",
    ],
)
def test_captums_own_method_keeps_the_laws_of_its_contract(law, tmp_path):
    def build(model: nn.Module, train: Any) -> TracInCPFast:
        torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
        loss, paths = nn.CrossEntropyLoss(reduction="sum"), [str(tmp_path / "checkpoint.pt")]
        return TracInCPFast(model, "fc3", train, paths, loss_fn=loss, batch_size=16)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather loop over checkpoints
        assert run_check(CHECKS[law], build) == "pass"


# That the suite can fail.


class Honest(InfluenceMethod):
    """`(<p, p_i> + 1) <g, e_y - p_i> / N` with the gradient g of the response: keeps every law."""

    def fit_checkpoint(self, model, show_progress):
        logits, residuals = [], []
        for batch in self.train_batches(show_progress):
            logits.append(self.batch_logits(model, batch))
            labels = self.train_labels(batch, logits[-1].shape[1])
            residuals.append(tempered_residuals(logits[-1], labels))
        every = torch.cat(logits)
        check_finite(every, "logits")
        self.n_train_ = len(every)
        return {"logits": every, "residuals": torch.cat(residuals)}

    def prepare_query(self, state, model, batch, query):
        logits = self.batch_logits(model, batch)
        return logits, response_gradient(logits, query.classes(logits, batch), query.response)

    def score_columns(self, state, prepared, columns):
        kernel = prepared[0].softmax(1) @ state["logits"][columns].softmax(1).T + 1
        return kernel * (prepared[1] @ state["residuals"][columns].T) / self.n_train_


class HasVectors(Honest):
    """The same scores, and the vectors whose products they are."""

    def query_vectors(self, state, prepared):
        return products(with_a_one(prepared[0]), prepared[1])

    def train_vectors(self, state, rows):
        return products(with_a_one(state["logits"][rows]), state["residuals"][rows]) / self.n_train_


def with_a_one(logits: Tensor) -> Tensor:
    return nn.functional.pad(logits.softmax(1), (0, 1), value=1.0)


def products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ni,nj->nij", a, b).flatten(1)


class HasTheWrongSign(Honest):
    def prepare_query(self, state, model, batch, query):
        logits, gradient = super().prepare_query(state, model, batch, query)
        return logits, -gradient if query.response == "margin" else gradient


class IsOffByOneInGroups(Honest):
    def subset_influence(self, inputs, groups, **ask):
        if self._states is None:
            self.fit()
        shifted = [[(int(i) + 1) % self.n_train_ for i in group] for group in groups]
        return super().subset_influence(inputs, shifted, **ask)


class LeavesEvalMode(Honest):
    def fit(self, show_progress=False):
        super().fit(show_progress)
        self.model.eval()
        return self


class HidesNaN(Honest):
    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns).nan_to_num()


class DependsOnTheBatchSize(Honest):
    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns) / self.batch_size


class DependsOnTheBlock(Honest):
    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns) / (columns.stop - columns.start)

    def batch_self_influence(self, state, model, batch, rows):
        prepared = self.prepare_query(state, model, batch, Query("loss", "label"))
        return -self.score_columns(state, prepared, slice(0, self.n_train_)).diagonal(rows.start)[
            : len(prepared[0])
        ]


class DrawsFromTheGlobalState(Honest):
    def fit(self, show_progress=False):
        with torch.random.fork_rng(devices=[]):
            self.factor_ = 1 + float(torch.rand(()))
        return super().fit(show_progress)

    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns) * self.factor_


class AddsCheckpointsUp(Honest):
    def combine_weights(self, learning_rates):
        return [1.0] * len(learning_rates)


class HasNoOpponents(Honest):
    def influence(self, inputs, k=None, proponents=True, show_progress=False, **ask):
        return super().influence(inputs, k, True, show_progress, **ask)


class BreaksTiesFromTheRight(Honest):
    def influence(self, inputs, k=None, proponents=True, show_progress=False, **ask):
        scores = super().influence(inputs, None, True, show_progress, **ask)
        if k is None or bool(scores.isnan().any()):
            return super().influence(inputs, k, proponents, show_progress, **ask)
        top = scores.flip(1).sort(dim=1, descending=proponents, stable=True)
        return KMostInfluentialResults(self.n_train_ - 1 - top.indices[:, :k], top.values[:, :k])


class RoundsToSinglePrecision(Honest):
    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns).float()


class ScoresThePlace(Honest):
    def score_columns(self, state, prepared, columns):
        place = torch.arange(columns.start, columns.stop).to(prepared[0])
        return super().score_columns(state, prepared, columns) * (1 + place / self.n_train_)


class DoublesSelfInfluence(Honest):
    def batch_self_influence(self, state, model, batch, rows):
        return 2 * super().batch_self_influence(state, model, batch, rows)


class SwallowsExceptions(Honest):
    def influence(self, inputs, *args, **ask):
        try:
            return super().influence(inputs, *args, **ask)
        except RuntimeError:
            return torch.zeros(0, self.n_train_)


class TakesShuffledLoaders(Honest):
    def __init__(self, model, train_dataset, **options):
        unwrapped = train_dataset.dataset if isinstance(train_dataset, DataLoader) else train_dataset
        super().__init__(model, unwrapped, **options)


class TrustsAStaleFit(Honest):
    def _check_unchanged(self):
        pass


class AnswersNothingWithNothing(Honest):
    def influence(self, inputs, *args, **ask):
        if is_batch(inputs) and len(ExampleBatch(inputs, Reading())) == 0:
            return torch.zeros(0, 0)
        return super().influence(inputs, *args, **ask)


class ForgetsTheCost(Honest):
    def influence(self, inputs, *args, **ask):
        found = super().influence(inputs, *args, **ask)
        self.query_seconds_ = 0.0
        return found


class ReturnsItsOwnTensor(Honest):
    _kept: Tensor

    def self_influence(self, *args, **options):
        if not hasattr(self, "_kept"):
            self._kept = super().self_influence(*args, **options)
        return self._kept

    def fit(self, show_progress=False):
        vars(self).pop("_kept", None)
        return super().fit(show_progress)


class ForgetsARowOfTheSum(Honest):
    def influence(self, inputs, k=None, proponents=True, show_progress=False, aggregate=False, **ask):
        if aggregate and k is None:
            return super().influence(inputs, None, proponents, show_progress, **ask)[1:].sum(0, keepdim=True)
        return super().influence(inputs, k, proponents, show_progress, aggregate, **ask)


class RanksOneRowForTheSum(Honest):
    def influence(self, inputs, k=None, proponents=True, show_progress=False, aggregate=False, **ask):
        found = super().influence(inputs, k, proponents, show_progress, aggregate and k is None, **ask)
        if aggregate and k is not None:
            return KMostInfluentialResults(found.indices[:1], found.influence_scores[:1])
        return found


class ScalesItsVectors(HasVectors):
    def query_vectors(self, state, prepared):
        return 2 * super().query_vectors(state, prepared)


class DoublesASinglePoint(Honest):
    def influence(self, inputs, *args, **ask):
        found = super().influence(inputs, *args, **ask)
        return 2 * found if isinstance(inputs, tuple) and len(inputs[0]) == 1 else found


class ForgetsASettingInItsFile(Honest):
    def fit(self, show_progress=False):
        self._factor = 2.0
        return super().fit(show_progress)

    def score_columns(self, state, prepared, columns):
        return getattr(self, "_factor", 1.0) * super().score_columns(state, prepared, columns)


class FollowsTheGradMode(Honest):
    def influence(self, *args, **ask):
        found = super().influence(*args, **ask)
        return found if torch.is_grad_enabled() else 2 * found


class FollowsTheModeOfTheModel(Honest):
    def influence(self, *args, **ask):
        found = super().influence(*args, **ask)
        return 2 * found if self.model.training and isinstance(found, Tensor) else found


class CountsParametersThatTrain(Honest):
    def score_columns(self, state, prepared, columns):
        n = sum(p.requires_grad for p in self.model.parameters())
        return n * super().score_columns(state, prepared, columns)


class NeedsAParameterThatTrains(Honest):
    def fit(self, show_progress=False):
        next(p for p in self.model.parameters() if p.requires_grad)
        return super().fit(show_progress)


class DropsTheLastBatchOfALoader(Honest):
    def __init__(self, model, train_dataset, **options):
        super().__init__(model, train_dataset, **options)
        if isinstance(train_dataset, DataLoader):
            few = DataLoader(train_dataset.dataset, train_dataset.batch_size, drop_last=True)
            super().__init__(model, few, **options)


class HasAnotherSignForDicts(Honest):
    def prepare_query(self, state, model, batch, query):
        logits, gradient = super().prepare_query(state, model, batch, query)
        return logits, -gradient if isinstance(batch.content, dict) else gradient


class HasAnotherSignForTwoInputs(Honest):
    def prepare_query(self, state, model, batch, query):
        logits, gradient = super().prepare_query(state, model, batch, query)
        return logits, -gradient if len(batch.content) > 2 else gradient


class HidesNaNOfTheTrainingSet(Honest):
    def fit_checkpoint(self, model, show_progress):
        logits, residuals = [], []
        for batch in self.train_batches(show_progress):
            logits.append(self.batch_logits(model, batch).nan_to_num())
            labels = self.train_labels(batch, logits[-1].shape[1])
            residuals.append(tempered_residuals(logits[-1], labels).nan_to_num())
        state = {"logits": torch.cat(logits), "residuals": torch.cat(residuals)}
        self.n_train_ = len(state["logits"])
        return state


class WritesToImagesThatItRanks(Honest):
    def influence(self, inputs, k=None, *args, **ask):
        found = super().influence(inputs, k, *args, **ask)
        if k is not None and isinstance(inputs, tuple) and inputs[0].ndim == 4:
            inputs[0].mul_(1.5)
        return found


class TakesTheModeByNameOnly(Honest):
    def self_influence(self, inputs=None, *, show_progress=False):
        return super().self_influence(inputs, show_progress)


class AnswersInDoublePrecision(Honest):
    def score_columns(self, state, prepared, columns):
        return super().score_columns(state, prepared, columns).double()


class HasTheWrongSignForTheLoss(Honest):
    def prepare_query(self, state, model, batch, query):
        logits, gradient = super().prepare_query(state, model, batch, query)
        return logits, -gradient if query.response == "loss" else gradient


class HidesWhereCheckpointsDiffer(Honest):
    def checkpoint_scores(self, inputs, *args, **ask):
        found = super().checkpoint_scores(inputs, *args, **ask)
        return found.mean(0).expand_as(found)


#: All laws that each broken method fails, and no other.
BROKEN = {
    HasTheWrongSign: {"examples_of_the_class_raise_its_margin"},
    IsOffByOneInGroups: {"groups_score_the_sum_of_their_members"},
    LeavesEvalMode: {"the_model_is_left_as_it_was"},
    HidesNaN: {"nan_in_a_test_point_is_never_hidden"},
    DependsOnTheBatchSize: {"the_batch_size_changes_rounding_only"},
    DependsOnTheBlock: {"the_block_size_changes_rounding_only"},
    DrawsFromTheGlobalState: {"a_new_object_gives_the_same_bits"},
    AddsCheckpointsUp: {"checkpoints_are_averaged"},
    HasNoOpponents: {"the_top_k_are_the_best_of_all"},
    BreaksTiesFromTheRight: {"ties_go_to_the_lower_index"},
    RoundsToSinglePrecision: {"float64_models_give_float64_scores"},
    ScoresThePlace: {"permuting_the_training_set_permutes_the_columns"},
    DoublesSelfInfluence: {"self_influence_is_minus_the_effect_on_the_own_loss"},
    SwallowsExceptions: {"the_model_is_left_as_it_was_after_an_exception"},
    TakesShuffledLoaders: {"a_shuffling_loader_is_refused"},
    TrustsAStaleFit: {"a_model_that_has_changed_is_refused"},
    AnswersNothingWithNothing: {"an_empty_input_is_refused"},
    ForgetsTheCost: {"the_cost_is_recorded"},
    ReturnsItsOwnTensor: {"a_second_call_gives_the_same_bits"},
    ForgetsARowOfTheSum: {"the_aggregate_is_the_sum_of_the_rows"},
    RanksOneRowForTheSum: {"the_aggregate_is_the_sum_of_the_rows"},
    ScalesItsVectors: {"products_of_vectors_are_scores"},
    DoublesASinglePoint: {"a_test_point_alone_scores_as_in_its_batch"},
    ForgetsASettingInItsFile: {"a_saved_method_gives_the_same_bits"},
    FollowsTheGradMode: {"the_grad_mode_of_the_caller_changes_nothing"},
    FollowsTheModeOfTheModel: {"train_mode_changes_nothing", "checkpoints_are_averaged"},
    CountsParametersThatTrain: {
        "frozen_parameters_change_nothing",
        "a_model_that_is_all_frozen_scores_as_before",
    },
    NeedsAParameterThatTrains: {"a_model_that_is_all_frozen_scores_as_before"},
    DropsTheLastBatchOfALoader: {"a_loader_scores_as_its_data_set"},
    HasAnotherSignForDicts: {"dict_batches_score_as_tuples", "two_inputs_score_as_one_that_holds_both"},
    HasAnotherSignForTwoInputs: {"two_inputs_score_as_one_that_holds_both"},
    HidesNaNOfTheTrainingSet: {"nan_in_a_training_example_is_never_hidden"},
    WritesToImagesThatItRanks: {"the_callers_tensors_are_not_written_to"},
    TakesTheModeByNameOnly: {"arguments_by_position_are_those_of_captum"},
    AnswersInDoublePrecision: {"scores_have_the_shapes_and_dtypes_of_captum"},
    HidesWhereCheckpointsDiffer: {"scores_of_checkpoints_add_up"},
    HasTheWrongSignForTheLoss: {"examples_of_the_class_lower_its_loss", "self_influence_is_not_negative"},
}


@pytest.mark.parametrize("honest", [Honest, HasVectors])
@pytest.mark.slow
def test_an_honest_method_of_a_few_functions_passes(honest):
    report = check(honest)
    assert report.failures == {}
    assert report.passed
    assert list(report.outcomes) == list(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_method_is_caught_by_exactly_its_laws(broken):
    assert set(check(broken).failures) == BROKEN[broken]


def test_every_law_catches_a_broken_method():
    assert set().union(*BROKEN.values()) == set(CHECKS)


# The report.


class TestReport:
    def test_exceptions_are_stated_and_needless_ones_are_seen(self, monkeypatch):
        keep(monkeypatch, "examples_of_the_class_raise_its_margin", "the_cost_is_recorded")
        excuse = {"examples_of_the_class_raise_its_margin": "for fun", "the_cost_is_recorded": "too dear"}
        report = check(HasTheWrongSign, exceptions=excuse)
        assert report.outcomes == {
            "examples_of_the_class_raise_its_margin": "exception: for fun",
            "the_cost_is_recorded": "needless exception: too dear",
        }
        assert report.needless_exceptions == {"the_cost_is_recorded": "too dear"}
        assert not report.passed
        assert check(HasTheWrongSign, exceptions=dict(list(excuse.items())[:1])).passed

    def test_a_failure_says_what_was_found_or_raised(self, monkeypatch):
        keep(monkeypatch, "examples_of_the_class_raise_its_margin")
        found = check(HasTheWrongSign).failures["examples_of_the_class_raise_its_margin"]
        assert found == "they do for 1 of 40 test points"

        class Raises(Honest):
            def prepare_query(self, state, model, batch, query):
                raise KeyError("no such thing\nat all")

        found = check(Raises).failures["examples_of_the_class_raise_its_margin"]
        assert found == "KeyError: 'no such thing\\nat all'"

    def test_names_of_methods(self, monkeypatch):
        keep(monkeypatch)
        assert check(Honest).method == "Honest"
        assert check(partial(Honest, batch_size=3)).method == "Honest"
        assert check(Honest, name="mine").method == "mine"

    def test_exceptions_need_a_law_and_a_reason(self):
        with pytest.raises(
            ValueError, match=r"`exceptions` must be one of .* got 'the_cost'. Nearest: 'the_"
        ):
            check(Honest, exceptions={"the_cost": "none"})
        with pytest.raises(
            ValueError, match=r"`exceptions` must give a reason for each law; got '' for 'the_"
        ):
            check(Honest, exceptions={"the_cost_is_recorded": ""})

    def test_the_matrix_is_methods_by_laws_in_plain_text(self):
        first = ConformanceReport("mine", {"is_good": "pass", "is_quick": "fail: slow"})
        second = ConformanceReport(
            "yours", {"is_good": "exception: bad", "is_quick": "needless exception: x"}
        )
        assert matrix([first, second]).splitlines() == [
            "       1  2",
            "mine   +  F",
            "yours  e  ?",
            "",
            "  1  is good",
            "  2  is quick",
            "",
            "mine, 2: fail: slow",
            "yours, 1: exception: bad",
            "yours, 2: needless exception: x",
        ]
        assert str(first) == matrix([first])

    def test_the_command_prints_the_matrix_and_says_what_is_left_out(self, monkeypatch, capsys):
        class Absent(Honest):
            def fit_checkpoint(self, model, show_progress):
                raise ImportError('Absent needs nothing: pip install "nothing"')

        keep(monkeypatch, "examples_of_the_class_raise_its_margin")
        assert main([Subject("Honest", Honest), Subject("Absent", Absent)]) == 0
        printed = capsys.readouterr().out
        assert "Honest  +\n" in printed
        assert 'Absent was left out: Absent needs nothing: pip install "nothing"' in printed
        assert main([Subject("HasTheWrongSign", HasTheWrongSign)]) == 1
        assert "HasTheWrongSign, 1: fail: they do for 1 of 40" in capsys.readouterr().out

        def broken(*args: Any, **options: Any) -> None:
            raise TypeError("cannot be built")

        assert main([Subject("broken", broken)]) == 1
        assert "broken, 1: fail: TypeError: cannot be built" in capsys.readouterr().out


def keep(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Only some laws, for tests of what becomes of their outcomes."""
    laws = {name: CHECKS[name] for name in names}
    monkeypatch.setattr("stride_captum.conformance.registry.CHECKS", laws)


@pytest.mark.slow
def test_it_runs_without_pytest_and_without_the_tests(tmp_path):
    use = """
import sys
sys.modules["pytest"] = None
from stride_captum.adapters import Similarity
from stride_captum.conformance import check
report = check(Similarity)
assert report.passed, report
assert "planted" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
