"""Models with parameters of two precisions: scores are those of a model of one, up to the lower."""

import copy

import pytest
import torch
from planted import planted_classes
from torch import nn

from stride_captum import STRIDE
from stride_captum.adapters import EKFAC, TRAK, DiagonalEKFAC, TracIn


class Mixed(nn.Module):
    """float64, then float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x.double())).to(self.head.weight.dtype))


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.mark.parametrize("cls", [STRIDE, TracIn, TRAK, DiagonalEKFAC])
def test_scores_are_those_of_one_precision(mixed, cls):
    train, tests = planted_classes(40), planted_classes(6, seed=9).tensors
    found = cls(mixed, train).influence(tests)
    assert found.dtype == torch.float64
    one = copy.deepcopy(mixed)
    one.body.float()
    one.forward = lambda x: one.head(torch.relu(one.body(x)))
    wanted = cls(one, train).influence(tests)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("cls", [TRAK, DiagonalEKFAC, TracIn])
def test_self_influence_too(mixed, cls):
    train = planted_classes(40)
    found = cls(mixed, train).self_influence()
    wanted = -cls(mixed, train).influence(train.tensors, response="loss").diagonal()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=float(wanted.max()) * 1e-6)


def test_ekfac_refuses_it(mixed):
    pytest.importorskip("kronfluence")
    train = planted_classes(40)
    with pytest.raises(ValueError, match=r"`model` must have parameters of one precision.*32, torch.float64"):
        EKFAC(mixed, train).fit()
    assert EKFAC(mixed, train, layers=["head"]).fit().self_influence().shape == (40,)
