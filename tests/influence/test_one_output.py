"""Models with one output, and models whose outputs are probabilities, in every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captum.influence import TracInCP
from planted import MLP, OneLogit, built, planted_classes, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    CaptumInfluence,
    ClassSimilarity,
    ConfidentLearning,
    DiagonalEKFAC,
    KNNShapley,
    LossDetector,
    Similarity,
    TracIn,
)
from stride_captum.adapters.captum_influence import ResidualLoss, keep_weights
from stride_captum.losses import CrossEntropy

pytest.importorskip("kronfluence")
pytest.importorskip("cleanlab")

N_TRAIN, N_TEST = 20, 5


def tracincp(model: Any, train: Any) -> TracInCP:
    return TracInCP(model, train, [""], keep_weights, loss_fn=ResidualLoss("none"), batch_size=7)


GRADIENTS: dict[str, Callable[..., Any]] = {
    "TracIn": TracIn,
    "TRAK": partial(TRAK, projection_dim=20),
    "DiagonalEKFAC": DiagonalEKFAC,
    "EKFAC": EKFAC,
    "CaptumInfluence": partial(CaptumInfluence, build=tracincp),
    "STRIDE": STRIDE,
}
OTHERS: dict[str, Callable[..., Any]] = {
    "Similarity": Similarity,
    "ClassSimilarity": ClassSimilarity,
    "KNNShapley": KNNShapley,
}
DETECTORS = [LossDetector, ConfidentLearning]


class Then(nn.Module):
    """A network with something behind it."""

    def __init__(self, net: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


@pytest.fixture(scope="module")
def binary() -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    """A network with one output in float64, and data of two classes."""
    train, test = (planted_classes(n, (6,), seed) for n, seed in ((N_TRAIN, 1), (N_TEST, 2)))
    sets = [(d.tensors[0].double(), d.tensors[1] % 2) for d in (train, test)]
    return built(OneLogit).double().eval(), TensorDataset(*sets[0]), sets[1]


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_logit_of_one_output_is_the_margin(binary, name, squeeze) -> None:
    model, train, test = copy.deepcopy(binary[0]), *binary[1:]
    model.squeeze = squeeze
    method = GRADIENTS[name](model, train)
    margin = method.influence(test)
    torch.testing.assert_close(method.influence(test, response="logit"), margin)
    assert float(margin.abs().max()) > 0
    other = method.influence((test[0],), response="logit", target=1 - test[1])
    torch.testing.assert_close(other, -margin)


def test_an_object_of_captum_that_answers_the_logit_may_be_asked_for_it(binary) -> None:
    model, train, test = binary
    loss = nn.BCEWithLogitsLoss(reduction="none")

    def build(model: Any, train: Any) -> TracInCP:
        def each(outputs: Tensor, labels: Tensor) -> Tensor:
            return loss(outputs.squeeze(1), labels.to(outputs))

        return TracInCP(model, train, [""], lambda *_: 1.0, loss_fn=each, batch_size=7, test_loss_fn=each)

    method = CaptumInfluence(model, train, build=build, answers="logit")
    assert method.influence(test).shape == (N_TEST, N_TRAIN)
    margins = CaptumInfluence(model, train, build=build, answers="margin")
    assert torch.equal(margins.influence(test, response="logit"), margins.influence(test))


def with_probabilities(classes: int, binary: Any) -> tuple[Any, Any]:
    """`(model, train, test)` of a network with logits, and of the same one with probabilities."""
    if classes == 1:
        model, train, test = binary
        return (Then(model, nn.Identity()), train, test), (Then(model, nn.Sigmoid()), train, test)
    model, train, test = trained(MLP, n_train=N_TRAIN, steps=8)
    sets = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (train, test)]
    model = model.double()
    return tuple(
        (Then(model, last).eval(), sets[0], sets[1].tensors) for last in (nn.Identity(), nn.Softmax(1))
    )


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", [*GRADIENTS, *OTHERS])
def test_probabilities_that_are_said_to_be_such_give_the_scores_of_the_logits(binary, name, classes) -> None:
    build = {**GRADIENTS, **OTHERS}[name]
    (model, train, test), (prob, *_) = with_probabilities(classes, binary)
    wanted, found = build(model, train), build(prob, train, loss=CrossEntropy(outputs="probabilities"))
    for response in ("margin", "loss", "log-probability", "probability"):
        scores = wanted.influence(test, response=response)
        torch.testing.assert_close(found.influence(test, response=response), scores, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.self_influence(), wanted.self_influence(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"`model` must return logits; got probabilities"):
        build(prob, train).fit()


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_take_probabilities_that_are_said_to_be_such(binary, detector, classes) -> None:
    (model, train, _), (prob, *_) = with_probabilities(classes, binary)
    wanted = detector(model, train).mislabel_scores()
    found = detector(prob, train, loss=CrossEntropy(outputs="probabilities")).mislabel_scores()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`model` must return logits; got probabilities"):
        detector(prob, train).mislabel_scores()


def test_the_fast_kind_of_tracin_needs_the_last_layer_itself(binary) -> None:
    _, (prob, train, _) = with_probabilities(3, binary)
    loss = CrossEntropy(outputs="probabilities")
    with pytest.raises(ValueError, match="`layers` must name the Linear layer"):
        TracIn(prob, train, fast=True, loss=loss, layers=["net.fc3"]).fit()
