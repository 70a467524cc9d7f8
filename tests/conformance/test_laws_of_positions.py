"""Every method that takes positions keeps every law on problems whose examples have several."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from test_conformance import Honest, products, with_a_one
from torch import Tensor

from stride_captum import STRIDE, ClosedForm, Lasso, RandomSubsets, Ridge, Trained
from stride_captum.adapters import EKFAC, DiagonalEKFAC
from stride_captum.conformance import (
    CHECKS,
    Subject,
    check,
    laws_of,
    missing_extra,
    run_check,
    shipped_at_positions,
)
from stride_captum.conformance.registry import POSITION_CHECKS
from stride_captum.conformance.toy_problems import IGNORED, MLP, BatchNormCNN, posed_with, trained
from stride_captum.layers.activations import check_finite

LAWS = laws_of("positions")
SHIPPED = {subject.name: subject for subject in shipped_at_positions()}
SPLIT, PADDED = "the_positions_of_one_example_over_two_add_up", "padded_positions_change_no_score"


def without(name: str, *laws: str) -> dict[str, str]:
    """Exceptions of a method that ships, but for some laws."""
    return {law: why for law, why in SHIPPED[f"{name}, positions"].exceptions.items() if law not in laws}


def tempered(form: str) -> Subject:
    operators = ClosedForm(form=form, residuals="temperature")
    exceptions = without("STRIDE by rows", SPLIT)
    return Subject(f"STRIDE, tempered {form}", partial(STRIDE, operators=operators), exceptions, "positions")


# Labels that are not drawn: what is padded changes nothing.
SUBJECTS = [
    *SHIPPED.values(),
    tempered("rows"),
    tempered("matrix"),
    Subject("exact", partial(DiagonalEKFAC, fisher="exact"), without("TRAK"), "positions"),
    Subject("empirical", partial(EKFAC, fisher="empirical"), without("TRAK"), "positions"),
]
#: Methods of which all laws are quick, or those of positions; the others are left to `make conformance`.
QUICK = {"STRIDE by matrices, positions"}
OF_POSITIONS = {
    "STRIDE by rows, positions",
    "STRIDE, tempered rows",
    "TracIn, positions",
    "Random, positions",
}


def marks(subject: Subject, law: str) -> list[pytest.MarkDecorator]:
    quick = subject.name in QUICK or (law in POSITION_CHECKS and subject.name in OF_POSITIONS)
    return [] if quick else [pytest.mark.matrix]


@cache
def missing(name: str) -> str | None:
    """What a method says of an extra that is not installed."""
    return next(missing_extra(subject.build) for subject in SUBJECTS if subject.name == name)


@pytest.mark.parametrize(
    ("subject", "law"),
    [pytest.param(s, law, marks=marks(s, law), id=f"{s.name}-{law}") for s in SUBJECTS for law in LAWS],
)
@pytest.mark.slow
def test_every_method_keeps_every_law(subject, law):
    if missing(subject.name):
        pytest.skip(missing(subject.name))
    reason = subject.exceptions.get(law)
    outcome = run_check(LAWS[law], subject.build, reason, "positions")
    assert outcome == ("pass" if reason is None else f"exception: {reason}")


@pytest.mark.slow
@pytest.mark.parametrize("law", POSITION_CHECKS)
@pytest.mark.parametrize("recovery", [Ridge(), Lasso()], ids=lambda recovery: recovery.name)
def test_trained_operators_keep_the_laws_of_positions(recovery, law):
    operators = Trained(subsets=RandomSubsets(12), rank=4, iterations=20, recovery=recovery)
    broken = {SPLIT: "subsets are of other examples"}
    if not recovery.linear:
        broken["a_response_is_the_sum_over_positions"] = "the Lasso is not linear"
    reason = broken.get(law)
    outcome = run_check(POSITION_CHECKS[law], partial(STRIDE, operators=operators), reason, "positions")
    assert outcome == ("pass" if reason is None else f"exception: {reason}")


def test_laws_of_positions_are_beside_those_of_every_loss():
    assert LAWS == CHECKS | POSITION_CHECKS
    assert laws_of("mse") == CHECKS
    assert not CHECKS.keys() & POSITION_CHECKS.keys()
    with pytest.raises(ValueError, match=r"`exceptions` must be one of .* got 'padded_positions"):
        check(Honest, exceptions={PADDED: "none"})


def test_the_problems_have_padding():
    with posed_with("positions"):
        for network, grid in ((MLP, (4,)), (BatchNormCNN, (6, 6))):
            model, train, _ = trained(network, n_train=20, steps=1)
            x, y = train.tensors
            outputs = model(x)
            assert y.shape == (20, *grid)
            assert outputs.shape == ((20, 3, *grid) if network is BatchNormCNN else (20, *grid, 3))
            ignored = y.flatten(1) == IGNORED
            assert 0.1 < float(ignored.float().mean()) < 0.5
            assert bool((ignored.int().diff(dim=1) >= 0).all())  # behind all others
            assert bool((ignored.sum(1) < y[0].numel()).all())


# That the laws can fail.


class HonestAtPositions(Honest):
    """`1/W sum_s sum_t omega_t (<p_s, p_t> + 1) <g_s, e_y - p_t>`, W the sum of all omega."""

    def fit_checkpoint(self, model, show_progress):
        terms, omegas = [], []
        for batch in self.train_batches(show_progress):
            logits = self.batch_logits(model, batch)
            labels = self.train_labels(batch, logits.shape[1])
            counted = self.loss.position.counted(labels).to(logits)
            omegas.append(counted if batch.weights is None else self.weighed(counted, batch.weights))
            residuals = self.rows(self.loss.residuals(logits, labels)) * omegas[-1][..., None]
            terms.append(self.of_examples(self.terms(logits, residuals), omegas[-1]))
        every = torch.cat(terms)
        check_finite(every.flatten(1), "logits")
        self.n_train_ = len(every)
        return {"terms": every / torch.cat(omegas).sum()}

    def weighed(self, counted: Tensor, weights: Tensor) -> Tensor:
        return counted * weights.reshape(len(weights), -1).to(counted)

    def of_examples(self, terms: Tensor, omega: Tensor) -> Tensor:
        return terms

    def of_test_points(self, terms: Tensor, labels: Tensor) -> Tensor:
        return terms

    def rows(self, vectors: Tensor) -> Tensor:
        return vectors.reshape(len(vectors), self.loss.n_positions, -1)

    def terms(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """`[p, 1] (x) v` of each position, `(n, P, (C + 1) C)`."""
        p = with_a_one(self.rows(logits).flatten(0, 1))
        return products(p, vectors.flatten(0, 1).to(p)).unflatten(0, (len(logits), -1))

    def prepare_query(self, state, model, batch, query):
        logits = self.batch_logits(model, batch)
        asked = query.asked(logits, batch)
        gradients = self.loss.response_gradient(logits, asked, query.response)
        terms = self.terms(logits, self.rows(gradients))
        return self.of_test_points(terms, asked)

    def score_columns(self, state, prepared, columns):
        return prepared.sum(1) @ state["terms"][columns].sum(1).T

    def position_scores(self, state, prepared, example):
        if example is None:
            return prepared @ state["terms"].sum(1).T
        return prepared.sum(1) @ state["terms"][example].T


class CountsPadding(HonestAtPositions):
    def of_examples(self, terms, omega):
        return terms / omega.shape[1]


class TakesMeansOverPositions(HonestAtPositions):
    def of_examples(self, terms, omega):
        return terms / omega.sum(1).clamp_min(1)[:, None, None]


class ForgetsWeights(HonestAtPositions):
    def weighed(self, counted, weights):
        return counted


class CountsWeightsOfPositionsTwice(HonestAtPositions):
    def weighed(self, counted, weights):
        return super().weighed(counted, weights**weights.ndim)


class ForgetsWeightsOfClasses(HonestAtPositions):
    def __init__(self, model, train_dataset, *, loss="cross_entropy", **options):
        super().__init__(model, train_dataset, **options)


class GivesTheUnlabeledAShare(HonestAtPositions):
    def of_examples(self, terms, omega):
        return torch.where(omega.sum(1)[:, None, None] > 0, terms, 1.0)


class AveragesTheResponse(HonestAtPositions):
    def of_test_points(self, terms, labels):
        return terms / (terms != 0).any(2).sum(1).clamp_min(1)[:, None, None]


class DoublesPositions(HonestAtPositions):
    def position_scores(self, state, prepared, example):
        return 2 * super().position_scores(state, prepared, example)


class ScoresPadding(HonestAtPositions):
    def position_scores(self, state, prepared, example):
        found = super().position_scores(state, prepared, example)
        return found.mean(1, keepdim=True).expand_as(found)


class SplitsTheNextExample(HonestAtPositions):
    def position_scores(self, state, prepared, example):
        return super().position_scores(state, prepared, None if example is None else example + 1)


#: The one law of positions that each broken method fails.
BROKEN = {
    CountsPadding: PADDED,
    TakesMeansOverPositions: SPLIT,
    ForgetsWeights: "an_ignored_position_has_weight_0",
    CountsWeightsOfPositionsTwice: "one_weight_of_all_positions_is_that_of_the_example",
    ForgetsWeightsOfClasses: "a_class_of_weight_0_is_ignored",
    GivesTheUnlabeledAShare: "an_example_without_labels_scores_0",
    AveragesTheResponse: "a_response_is_the_sum_over_positions",
    DoublesPositions: "scores_of_positions_add_up",
    ScoresPadding: "scores_of_positions_add_up",
    SplitsTheNextExample: "scores_of_positions_add_up",
}


@pytest.mark.slow
def test_an_honest_method_passes():
    report = check(HonestAtPositions, loss="positions")
    assert report.failures == {}
    assert list(report.outcomes) == list(LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_method_is_caught_by_exactly_its_law(broken):
    outcomes = {law: run_check(POSITION_CHECKS[law], broken, loss="positions") for law in POSITION_CHECKS}
    assert {law for law, outcome in outcomes.items() if outcome != "pass"} == {BROKEN[broken]}


def test_every_law_catches_a_broken_method():
    assert set(BROKEN.values()) == set(POSITION_CHECKS)
