"""Every method that is defined for a loss keeps every law on problems that are posed with it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom, ClassSimilarity, ConfidentLearning, KNNShapley
from stride_captum.conformance import CHECKS, check, run_check, shipped_for
from stride_captum.conformance.toy_problems import MLP, planted_classes, posed_with, trained

LOSSES = ("binary_cross_entropy", "mse")
SUBJECTS = [subject for loss in LOSSES for subject in shipped_for(loss)]


@pytest.mark.matrix
@pytest.mark.parametrize("law", CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_method_keeps_every_law(subject, law):
    reason = subject.exceptions.get(law)
    outcome = run_check(CHECKS[law], subject.build, reason, subject.loss)
    assert outcome == ("pass" if reason is None else "exception: " + reason)


@pytest.mark.parametrize("method", [ClassSimilarity, ClassRandom, KNNShapley, ConfidentLearning])
@pytest.mark.parametrize("loss", LOSSES)
def test_methods_that_compare_classes_refuse_other_losses(method, loss):
    with posed_with(loss):
        model, train, _ = trained(MLP)
    with pytest.raises(ValueError, match=f"`loss` must be one whose labels are classes.*got '{loss}'"):
        method(model, train, loss=loss)


@pytest.mark.parametrize("method", [ClassSimilarity, KNNShapley, ConfidentLearning])
def test_and_distributions_over_classes(method):
    model, train, _ = trained(MLP)
    x, y = train.tensors
    soft = torch.utils.data.TensorDataset(x, torch.nn.functional.one_hot(y, 3).float())
    with pytest.raises(ValueError, match="`train_dataset` must hold class indices for"):
        method(model, soft).mislabel_scores()


@pytest.mark.slow
def test_a_method_with_another_loss_than_the_problem_fails():
    report = check(partial(STRIDE, loss="binary_cross_entropy"), loss="mse")
    assert not report.passed


def test_problems_are_posed_anew_and_put_back():
    classes = planted_classes(5).tensors[1]
    with posed_with("binary_cross_entropy"):
        several = planted_classes(5).tensors[1]
    assert several.gather(1, classes[:, None]).all()
    assert planted_classes(5).tensors[1].equal(classes)
    with pytest.raises(ValueError, match="`loss` must be one of 'cross_entropy', "), posed_with("hinge"):
        pass
