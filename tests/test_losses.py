"""What the outputs of a model are: logits, log-probabilities or probabilities."""

from __future__ import annotations

import pytest
import torch
from planted import METHODS, OneLogit, built, planted_classes
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    DiagonalEKFAC,
    KNNShapley,
    LossDetector,
    Random,
    Similarity,
    TracIn,
)
from stride_captum.losses import CrossEntropy, loss_of

#: The random controls do not ask the model in `fit`.
EVERY = [*(m for m in METHODS if not issubclass(m, Random)), KNNShapley, TRAK, TracIn, DiagonalEKFAC, EKFAC]
REFUSED = r"`model` must return logits; got probabilities.*outputs of 'net', what 'last' reads.*CrossEntropy"


class Ending(nn.Module):
    """A network with a module at its end."""

    def __init__(self, net: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


def binary() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    train, test = planted_classes(30, seed=1), planted_classes(6, seed=2)
    train, test = (TensorDataset(d.tensors[0], (d.tensors[1] > 0).long()) for d in (train, test))
    return built(OneLogit).eval(), train, test


@pytest.mark.parametrize("method", EVERY)
class TestEveryMethod:
    def test_a_softmax_at_the_end_is_refused_and_the_module_before_it_named(self, planted, method):
        model, train, _ = planted
        with pytest.raises(ValueError, match=r"`model` must return logits; got probabilities.*'last' reads"):
            method(Ending(model, nn.Softmax(1)), train).fit()

    def test_a_sigmoid_at_the_end_is_refused(self, method):
        model, train, _ = binary()
        with pytest.raises(ValueError, match=r"`model` must return logits; got probabilities.*'last' reads"):
            method(Ending(model, nn.Sigmoid()), train).fit()

    @pytest.mark.slow
    def test_probabilities_that_are_declared_score_as_logits(self, planted, method):
        for (model, train, test), last in ((planted, nn.Softmax(1)), (binary(), nn.Sigmoid())):
            model = model.double()
            train, test = (TensorDataset(x.double(), y) for x, y in (train.tensors, test.tensors))
            ending = Ending(model, last).double()
            wanted = method(model, train).influence(test.tensors)
            found = method(ending, train, loss=CrossEntropy(outputs="probabilities")).influence(test.tensors)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))
            model.float()

    def test_log_probabilities_are_logits(self, planted, method):
        model, train, test = planted
        ending = Ending(model, nn.LogSoftmax(1))
        wanted = method(model, train).influence(test.tensors)
        found = method(ending, train).influence(test.tensors)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))

    def test_what_is_declared_is_believed(self, planted, method):
        model, train, test = planted
        ending = Ending(model, nn.Softmax(1))
        scores = method(ending, train, loss=CrossEntropy(outputs="logits")).influence(test.tensors)
        assert bool(torch.isfinite(scores).all())


def test_the_message_names_the_module_before_the_softmax(planted):
    with pytest.raises(ValueError, match=REFUSED):
        TRAK(Ending(nn.Linear(6, 3), nn.Softmax(1)), planted[1]).fit()


def test_one_output_outside_is_enough_to_be_logits(planted):
    """The whole training set counts: a model whose first logits happen to lie in [0, 1] is no sigmoid."""
    model, train, test = binary()
    with torch.no_grad():
        outputs = model(train.tensors[0])[:, 0]
        model.fc2.weight.mul_(1 / (outputs.max() - outputs.min() + 1))
        outputs = model(train.tensors[0])[:, 0]
        model.fc2.bias.sub_(outputs.sort().values[1] - 1e-3)  # all but the lowest lie in [0, 1]
    assert ((model(train.tensors[0]) < 0).sum()) == 1
    assert STRIDE(model, train, batch_size=7).influence(test.tensors).shape == (6, 30)
    with torch.no_grad():
        model.fc2.bias.add_(1e-2 + outputs.max() - outputs.min())
    with torch.no_grad():
        model.fc2.bias.sub_(model(train.tensors[0]).min())
    with pytest.raises(ValueError, match="`model` must return logits"):
        STRIDE(model, train, batch_size=7).fit()


def test_a_detector_of_label_noise_refuses_them_too(planted):
    ending = Ending(planted[0], nn.Softmax(1))
    with pytest.raises(ValueError, match="`model` must return logits"):
        LossDetector(ending, planted[1]).mislabel_scores()
    said = LossDetector(ending, planted[1], loss=CrossEntropy(outputs="probabilities"))
    wanted = LossDetector(*planted[:2]).mislabel_scores()
    torch.testing.assert_close(said.mislabel_scores(), wanted, rtol=1e-3, atol=1e-5)


class TestFeatures:
    def test_probabilities_in_the_place_of_logits_are_refused(self, planted):
        model, (x, y), (xt, yt) = planted[0], planted[1].tensors, planted[2].tensors
        with torch.no_grad():
            p, pt = model(x).softmax(1), model(xt).softmax(1)
            wanted = STRIDE.from_features(x, model(x), y).influence((xt, model(xt), yt))
        with pytest.raises(ValueError, match=r"`model` must return logits; got probabilities"):
            STRIDE.from_features(x, p, y)
        said = STRIDE.from_features(x, p, y, loss=CrossEntropy(outputs="probabilities"))
        torch.testing.assert_close(said.influence((xt, pt, yt)), wanted, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_an_exact_zero_or_one_has_no_logarithm(self, planted, value):
        x, y = planted[1].tensors
        p = torch.full((48, 3), 1 / 3)
        p[17] = torch.tensor([value, (1 - value) / 2, (1 - value) / 2])
        with pytest.raises(ValueError, match=r"an exact 0 or 1 \(no logarithm\) for training example 17"):
            STRIDE.from_features(x, p, y, loss=CrossEntropy(outputs="probabilities"))

    def test_other_numbers_are_no_probabilities(self, planted):
        x, y = planted[1].tensors
        with pytest.raises(ValueError, match=r"`model` must return probabilities.*other numbers for"):
            STRIDE.from_features(x, torch.randn(48, 3), y, loss=CrossEntropy(outputs="probabilities"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounded_probabilities_are_seen(dtype):
    x = torch.randn(64, 5)
    p = torch.randn(64, 1000).mul(3).softmax(1).to(dtype)
    with pytest.raises(ValueError, match="`model` must return logits"):
        STRIDE.from_features(x, p, torch.arange(64))


@pytest.mark.parametrize("method", [STRIDE, TracIn, Similarity])
def test_a_class_that_is_ignored_is_no_label_of_an_example(planted, method):
    model, train, test = planted
    made = method(model, train, loss=CrossEntropy(ignore_index=2))
    with pytest.raises(ValueError, match=r"`train_dataset` must hold no label that is `ignore_index` \(2\)"):
        made.fit()
    few = TensorDataset(*(part[train.tensors[1] != 2] for part in train.tensors))
    made = method(model, few, loss=CrossEntropy(ignore_index=2))
    with pytest.raises(ValueError, match=r"`inputs` must hold no label that is `ignore_index` \(2\)"):
        made.influence(test)
    x = test.tensors[0]
    assert made.influence((x,), target=1).equal(method(model, few).influence((x,), target=1))


def test_losses_by_name_and_by_object():
    assert loss_of("cross_entropy") == CrossEntropy()
    assert loss_of(CrossEntropy(outputs="logits")).outputs == "logits"
    with pytest.raises(ValueError, match=r"`loss` must be one of 'cross_entropy', .*; got 'crossentropy'"):
        loss_of("crossentropy")
    with pytest.raises(TypeError, match=r"`loss` must be a name or a loss"):
        loss_of(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"`outputs` must be one of 'logits', 'probabilities'; got 'probs'"):
        CrossEntropy(outputs="probs")
