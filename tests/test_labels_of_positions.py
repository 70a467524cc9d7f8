"""Kinds of labels of cross-entropy: bytes, a last axis of one output, soft labels in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import TracIn
from stride_captum.losses import CrossEntropy

N, P, IGNORED = 12, 4, -100


def network(*shape: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(shape[0], 5), nn.Tanh(), nn.Linear(5, shape[1]))


@pytest.mark.parametrize("method", [STRIDE, TracIn])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_bytes_are_never_a_negative_label(method, dtype):
    model, x = network(3, 200), torch.randn(N, P, 3)
    labels = torch.randint(0, 200, (N, P))
    labels[0], labels[1, 1] = 156, 156  # -100 as a byte
    labels = labels if dtype != torch.int16 else labels.masked_fill(labels == 3, IGNORED)
    found = method(model, TensorDataset(x, labels.to(dtype))).fit()
    wanted = method(model, TensorDataset(x, labels)).fit()
    test = (x[:2], labels[:2])
    assert found.influence(test).equal(wanted.influence(test))
    assert found.influence((x[:2], labels[:2].to(dtype))).equal(wanted.influence(test))


def test_a_byte_is_ignored_where_its_own_value_is():
    labels = torch.tensor([[0, 255, 156]], dtype=torch.uint8)
    assert CrossEntropy(ignore_index=255).counted(labels).tolist() == [[True, False, True]]
    assert CrossEntropy(ignore_index=-1).counted(labels).tolist() == [[True, True, True]]
    assert CrossEntropy().counted(labels.float() - 100).tolist() == [[False, True, True]]


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("method", [STRIDE, TracIn])
@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_labels_with_an_axis_of_the_only_output_may_be_ignored(method, pixels, dtype):
    torch.manual_seed(1)
    model, x = (Pixels(), torch.randn(N, 2, 2, 3)) if pixels else (network(3, 1), torch.randn(N, P, 3))
    y = torch.randint(0, 2, (N, 2, 3) if pixels else (N, P)).to(dtype)
    y[::2, 1] = IGNORED
    axis = 1 if pixels else 2
    wanted = method(model, TensorDataset(x, y)).influence((x[:3], y[:3]))
    wide = y.unsqueeze(axis)
    assert method(model, TensorDataset(x, wide)).influence((x[:3], wide[:3])).equal(wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_labels_in_half_precision(dtype):
    torch.manual_seed(0)
    model, x, soft = network(3, 5), torch.randn(400, 3), torch.randn(400, 5).softmax(1).to(dtype)
    assert float((soft.float().sum(1) - 1).abs().max()) > 1e-4
    exact = soft.double() / soft.double().sum(1, keepdim=True)
    found = STRIDE(model, TensorDataset(x, soft)).influence((x[:3], soft[:3]), response="loss")
    wanted = STRIDE(model, TensorDataset(x, exact)).influence((x[:3], exact[:3]), response="loss")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 2e-4), (torch.float16, 8e-3), (torch.bfloat16, 0.05)]
)
def test_soft_labels_with_another_sum_are_refused(dtype, off):
    rows = torch.tensor([[0.5, 0.5 - off]], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"distributions \(n, 2\), each with the sum 1; got a row with the sum"
    ):
        CrossEntropy().labels(rows, 2, "labels")
