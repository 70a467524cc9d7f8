from __future__ import annotations

import math

import pytest
import torch

from stride_captum.responses import (
    RESPONSES,
    class_labels,
    multiclass_logits,
    response_gradient,
    response_value,
)

DEFINITIONS = {
    "margin": lambda z, c: z[c] - math.log(sum(math.exp(z[j]) for j in range(len(z)) if j != c)),
    "logit": lambda z, c: z[c],
    "probability": lambda z, c: math.exp(z[c]) / sum(map(math.exp, z)),
    "log-probability": lambda z, c: math.log(math.exp(z[c]) / sum(map(math.exp, z))),
    "loss": lambda z, c: -math.log(math.exp(z[c]) / sum(map(math.exp, z))),
}


def random_logits(n_classes, dtype=torch.float64, n=12):
    generator = torch.Generator().manual_seed(n_classes)
    logits = 3 * torch.randn(n, n_classes, dtype=torch.float64, generator=generator)
    classes = torch.randint(n_classes, (n,), generator=generator)
    return logits.to(dtype), classes


def test_every_response_has_a_definition_here():
    assert set(RESPONSES) == set(DEFINITIONS)


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("response", RESPONSES)
class TestResponse:
    def test_value_is_the_definition(self, response, n_classes):
        logits, classes = random_logits(n_classes)
        expected = [
            DEFINITIONS[response](z, c) for z, c in zip(logits.tolist(), classes.tolist(), strict=True)
        ]
        torch.testing.assert_close(
            response_value(logits, classes, response), torch.tensor(expected, dtype=torch.float64)
        )

    def test_gradient_is_that_of_autograd(self, response, n_classes):
        logits, classes = random_logits(n_classes)
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(response_value(leaf, classes, response).sum(), leaf)
        torch.testing.assert_close(
            response_gradient(logits, classes, response), expected, rtol=1e-12, atol=1e-14
        )

    def test_leading_dimensions_are_independent_models(self, response, n_classes):
        logits, classes = random_logits(n_classes)
        stack = torch.stack([logits, logits + 1, -logits])
        together = response_value(stack, classes, response)
        for row, one in zip(together, stack, strict=True):
            torch.testing.assert_close(row, response_value(one, classes, response))

    def test_a_confident_float32_model_keeps_its_gradient(self, response, n_classes):
        logits, classes = random_logits(n_classes)
        logits[torch.arange(len(logits)), classes] += 25
        exact = response_gradient(logits, classes, response)
        single = response_gradient(logits.float(), classes, response).double()
        torch.testing.assert_close(single, exact, rtol=1e-4, atol=0)


def test_the_margin_is_the_log_odds_and_loss_is_minus_log_probability():
    logits, classes = random_logits(4)
    p = response_value(logits, classes, "probability")
    torch.testing.assert_close(response_value(logits, classes, "margin"), (p / (1 - p)).log())
    torch.testing.assert_close(
        response_value(logits, classes, "loss"), -response_value(logits, classes, "log-probability")
    )


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_has_the_probabilities_of_the_sigmoid_and_itself_as_margin(shape):
    z = torch.linspace(-4, 4, 6, dtype=torch.float64)
    logits = multiclass_logits(z.reshape(shape))
    torch.testing.assert_close(logits.softmax(1)[:, 1], z.sigmoid())
    ones, zeros = torch.ones(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(response_value(logits, ones, "margin"), z)
    torch.testing.assert_close(response_value(logits, zeros, "margin"), -z)


def test_several_logits_are_taken_as_they_are():
    logits, _ = random_logits(3)
    assert multiclass_logits(logits) is logits


def test_labels_are_flattened_and_whole_floats_become_indices():
    for labels in ([0, 2, 1], [[0], [2], [1]], [0.0, 2.0, 1.0]):
        classes = class_labels(torch.tensor(labels), 3, "inputs")
        assert classes.dtype == torch.int64
        assert classes.tolist() == [0, 2, 1]
    assert class_labels(torch.tensor([True, False]), 2, "inputs").tolist() == [1, 0]
    assert class_labels(torch.tensor([], dtype=torch.long), 2, "inputs").tolist() == []


@pytest.mark.parametrize("function", [response_value, response_gradient])
def test_an_unknown_response_is_refused(function):
    logits, classes = random_logits(3)
    with pytest.raises(
        ValueError, match=r"`response` must be one of 'margin', .*got 'margn'\. Nearest: 'margin'"
    ):
        function(logits, classes, "margn")


@pytest.mark.parametrize("shape", [(2, 5, 7), ()])
def test_sequence_and_scalar_outputs_are_refused(shape):
    with pytest.raises(
        ValueError,
        match=r"`model` must return logits of shape \(n, n_classes\) .*row for each example",
    ):
        multiclass_logits(torch.zeros(shape))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 3), r"`held_out` must hold one class index .*shape \(4, 3\). Several"),
        (torch.zeros(4, 3, 1), r"`held_out` must hold one class index .*shape \(4, 3, 1\).*outputs \(n, pos"),
        (torch.tensor(1), r"`held_out` must hold one class index per example, shape \(n,\); got shape \(\)"),
        (torch.tensor([0.0, 0.5]), "`held_out` must hold class indices; got the value 0.5. Targets"),
        (torch.tensor([0.0, float("nan")]), "got the value nan. Targets"),
        (torch.tensor([0, 3]), r"`held_out` must hold class indices in \[0, 3\); got 3"),
        (torch.tensor([0, -1]), r"`held_out` must hold class indices in \[0, 3\); got -1. Leave out"),
    ],
)
def test_labels_of_other_tasks_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        class_labels(labels, 3, "held_out")


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        ([29, 3, -14], "Whole numbers that are no classes look like a regression, which needs loss='mse'."),
        ([0, 1, -1], "Leave out examples without a label"),
        ([0, -100, -100], "Leave out examples without a label"),
    ],
)
def test_whole_numbers_for_one_or_two_outputs_look_like_a_regression(labels, remedy):
    with pytest.raises(ValueError, match=remedy):
        class_labels(torch.tensor(labels), 2, "train_dataset")
