"""The methods of this package, the laws that each one does not keep, and the matrix of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from .registry import Build
from .runner import ConformanceReport, Subject, check, matrix
from .toy_problems import MLP, trained

_BY_COLUMN = "scores belong to the column, not to the example"
_READS_NOTHING = "the values of the inputs do not enter the scores"


def shipped() -> list[Subject]:
    """The methods of this package, with the laws that each does not keep.

    >>> [subject.name for subject in shipped()][:2]
    ['STRIDE', 'TracIn']
    """
    from .. import adapters
    from ..stride import STRIDE

    control = {
        "permuting_the_training_set_permutes_the_columns": _BY_COLUMN,
        "nan_in_a_test_point_is_never_hidden": _READS_NOTHING,
        "nan_in_a_training_example_is_never_hidden": _READS_NOTHING,
    }
    no_meaning = "scores are random"
    left_out = {
        "frozen_parameters_change_nothing": "gradients are those of the parameters that are not frozen"
    }
    return [
        Subject("STRIDE", STRIDE),
        Subject(
            "TracIn",
            adapters.TracIn,
            {**left_out, "checkpoints_are_averaged": "they are summed with their learning rates"},
        ),
        Subject(
            "DiagonalEKFAC",
            adapters.DiagonalEKFAC,
            {
                **left_out,
                "permuting_the_training_set_permutes_the_columns": "labels of the Fisher are drawn by place",
            },
        ),
        Subject("EKFAC", adapters.EKFAC, left_out),
        Subject("TRAK", adapters.TRAK, left_out),
        Subject("Similarity", adapters.Similarity),
        Subject("ClassSimilarity", adapters.ClassSimilarity),
        Subject("KNNShapley", adapters.KNNShapley),
        Subject("ClassRandom", adapters.ClassRandom, control),
        Subject(
            "Random",
            adapters.Random,
            {
                **control,
                "examples_of_the_class_raise_its_margin": no_meaning,
                "examples_of_the_class_lower_its_loss": no_meaning,
                "self_influence_is_not_negative": no_meaning,
            },
        ),
    ]


def shipped_for(loss: str) -> list[Subject]:
    """The methods of this package that are defined for a loss without classes, with their exceptions.

    Args:
        loss: "binary_cross_entropy" or "mse".

    >>> [subject.name for subject in shipped_for("mse")][:2]
    ['STRIDE, mse', 'TracIn, mse']
    """
    left_out = ("ClassSimilarity", "KNNShapley", "ClassRandom")
    own: dict[str, dict[str, str]] = {}
    if loss == "mse":
        margin = {"examples_of_the_class_raise_its_margin": "a regression has no margin"}
        past = {"examples_of_the_class_lower_its_loss": "neighbors may pull an output past its label"}
        sign = {"self_influence_is_not_negative": "a head that has not seen it may err to the other side"}
        own = {subject.name: margin for subject in shipped()}
        own |= dict.fromkeys(("TracIn", "TRAK"), margin | past) | {"STRIDE": margin | sign}
    return [
        Subject(
            f"{subject.name}, {loss}",
            partial(subject.build, loss=loss),
            {**subject.exceptions, **own.get(subject.name, {})},
            loss,
        )
        for subject in shipped()
        if subject.name not in left_out
    ]


def shipped_at_positions() -> list[Subject]:
    """The methods of this package that take examples with several positions, with their exceptions.

    >>> [subject.name for subject in shipped_at_positions()][:2]
    ['STRIDE by rows, positions', 'STRIDE by matrices, positions']
    """
    from ..adapters import TracIn
    from ..closed_form.options import ClosedForm
    from ..stride import STRIDE

    split = "the_positions_of_one_example_over_two_add_up"
    padded = "padded_positions_change_no_score"
    two = "two_inputs_score_as_one_that_holds_both"
    no_sums = {
        split: "scores are no sums over positions",
        "a_response_is_the_sum_over_positions": "scores are no sums over positions",
        "an_example_without_labels_scores_0": "labels do not enter the scores",
    }
    whole = {split: "gradients of whole examples are squared"}
    by_bits = {two: "inputs are told apart by their bits in order"}
    own = {
        "TracIn": {},
        "DiagonalEKFAC": {**whole, padded: "labels of the Fisher are drawn by place"},
        "EKFAC": {**whole, **by_bits, padded: "labels of the Fisher are drawn by the bits of the inputs"},
        "TRAK": whole,
        "Similarity": {**no_sums, padded: "features are means over all positions"},
        "Random": {**no_sums, **by_bits, padded: "scores are random in the bits of the inputs"},
    }
    closed = {
        two: "tokens are no features where they are the input, and are where they are a part of it",
        split: "the positions of an example are left out together",
    }
    forms = [
        Subject("STRIDE by rows", partial(STRIDE, operators=ClosedForm(form="rows")), closed),
        Subject("STRIDE by matrices", partial(STRIDE, operators=ClosedForm(form="matrix")), closed),
    ]
    others = [replace(s, exceptions={**s.exceptions, **own[s.name]}) for s in shipped() if s.name in own]
    (tracin,) = (s for s in others if s.name == "TracIn")
    head = replace(
        tracin,
        name="TracIn of a ridge head",
        build=partial(TracIn, residuals="both"),
        exceptions={**tracin.exceptions, **closed},
    )
    return [replace(s, name=f"{s.name}, positions", loss="positions") for s in (*forms, *others, head)]


def missing_extra(build: Build) -> str | None:
    """What the method says of a package that is not installed; None where it can be fitted.

    >>> from ..stride import STRIDE
    >>> missing_extra(STRIDE) is None
    True
    """
    model, train, _ = trained(MLP)
    try:
        build(model, train).fit()
    except ImportError as error:
        return str(error)
    except Exception:
        return None  # the laws will say more of it
    return None


def main(subjects: Iterable[Subject] | None = None) -> int:
    """Print the matrix of the methods whose extras are installed; 0 where all of them pass.

    >>> main([])  # of no methods at all
    <BLANKLINE>
    <BLANKLINE>
    0
    """
    reports: list[ConformanceReport] = []
    absent: list[str] = []
    for subject in shipped() if subjects is None else subjects:
        missing = missing_extra(subject.build)
        if missing is None:
            reports.append(
                check(subject.build, exceptions=subject.exceptions, name=subject.name, loss=subject.loss)
            )
        else:
            absent.append(f"{subject.name} was left out: {missing}")
    print("\n".join([matrix(reports), *absent]))
    return 0 if all(report.passed for report in reports) else 1
