"""A feature store beside options that change what is read: of a loss, and parts the model is not given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from stride_captum import STRIDE, Batch
from stride_captum.losses import MSE, SeparateOutputs

N = 12


@dataclass(frozen=True)
class Scaled(SeparateOutputs):
    """Squared error of labels in another unit."""

    name: ClassVar[str] = "scaled"

    scale: float = 1.0

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        return super().labels(labels, n_outputs, argument) * self.scale

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (labels - logits).square() / 2

    def curvatures(self, logits: Tensor) -> Tensor:
        return torch.ones_like(logits)


class OwnMSE(MSE):
    """A loss with the name of a shipped one, and labels of its own."""

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        return 2 * super().labels(labels, n_outputs, argument)


class NoContent(Scaled):
    """A loss with an option that no digest can read."""

    def __reduce_ex__(self, protocol):
        raise TypeError("not to be pickled")


class Gated(nn.Module):
    """A network with an input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        return self.b(torch.tanh(self.a(x if w is None else x * w[:, None])))


class Items(Dataset):
    def __init__(self, **parts: Tensor) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: part[i] for name, part in self.parts.items()}


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return Gated(), torch.randn(N, 3), torch.rand(N), torch.randn(N, 2)


def test_options_of_a_loss_of_the_users_are_in_the_key(parts, tmp_path):
    model, x, _, y = parts
    train = TensorDataset(x, y)
    wanted = STRIDE(model, train, loss=Scaled(10.0), feature_store=tmp_path / "ten").influence(train[:2])
    STRIDE(model, train, loss=Scaled(), feature_store=tmp_path / "one").fit()
    with pytest.raises(ValueError, match="other code or options of the loss"):
        STRIDE(model, train, loss=Scaled(10.0), feature_store=tmp_path / "one").fit()
    again = STRIDE(model, train, loss=Scaled(10.0), feature_store=tmp_path / "ten").influence(train[:2])
    assert again.equal(wanted)


def test_a_subclass_of_a_shipped_loss_is_another_loss(parts, tmp_path):
    model, x, _, y = parts
    STRIDE(model, TensorDataset(x, y), loss=MSE(), feature_store=tmp_path).fit()
    with pytest.raises(ValueError, match="other code or options of the loss"):
        STRIDE(model, TensorDataset(x, y), loss=OwnMSE(), feature_store=tmp_path).fit()


def test_a_loss_without_a_digest_counts_with_its_class(parts, tmp_path):
    model, x, _, y = parts
    for _ in range(2):
        STRIDE(model, TensorDataset(x, y), loss=NoContent(), feature_store=tmp_path).fit()
    with pytest.raises(ValueError, match="other code or options of the loss"):
        STRIDE(model, TensorDataset(x, y), loss=Scaled(), feature_store=tmp_path).fit()


def test_a_part_that_is_a_weight_is_no_input_of_the_model(parts, tmp_path):
    model, x, w, y = parts
    train = Items(x=x, w=w, labels=y)
    weighed = {"loss": "mse", "batch": Batch(sample_weight="w")}
    STRIDE(model, train, loss="mse", feature_store=tmp_path / "inputs").fit()
    with pytest.raises(ValueError, match=r"other sample_weight \(None there, 'w' here\)"):
        STRIDE(model, train, feature_store=tmp_path / "inputs", **weighed).fit()
    wanted = STRIDE(model, train, **weighed).influence(train[:2])
    for _ in range(2):  # filled, then read
        found = STRIDE(model, train, feature_store=tmp_path / "weights", **weighed).influence(train[:2])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_tensor_of_weights_leaves_the_store_valid(parts, tmp_path):
    model, x, w, y = parts
    train = TensorDataset(x, y)
    STRIDE(model, train, loss="mse", feature_store=tmp_path).fit()
    weighed = {"loss": "mse", "batch": Batch(sample_weight=w)}
    found = STRIDE(model, train, feature_store=tmp_path, **weighed).influence(train[:2])
    wanted = STRIDE(model, train, **weighed).influence(train[:2])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
