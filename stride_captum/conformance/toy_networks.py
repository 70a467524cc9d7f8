"""Toy networks, and those that stand in their place where an example has several positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

N_CLASSES = 3


class MLP(nn.Module):
    """6-8-5-3 with ReLU modules; `shape` is that of its inputs, as for all networks here."""

    shape: tuple[int, ...] = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.relu1 = nn.Linear(6, 8), nn.ReLU()
        self.fc2, self.relu2 = nn.Linear(8, 5), nn.ReLU()
        self.fc3 = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        logits: Tensor = self.fc3(self.relu2(self.fc2(self.relu1(self.fc1(x)))))
        return logits


class BatchNormCNN(nn.Module):
    """Convolution, BatchNorm, in-place ReLU and Dropout: wrong in train mode in every way."""

    shape: tuple[int, ...] = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True)
        self.conv2, self.relu2 = nn.Conv2d(4, 3, 3), nn.ReLU(True)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(3 * 4 * 4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        x = self.relu1(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.dropout(self.relu2(self.conv2(x)).flatten(1)))
        return logits


class TwoInputs(nn.Module):
    """A network that reads two tensors; with a list they go in by position, with a dict by name."""

    shape: tuple[int, ...] = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, N_CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits `(n, 3)`."""
        logits: Tensor = self.head(torch.cat([self.left(first), self.right(second)], -1).relu())
        return logits


class HuggingFaceLike(nn.Module):
    """Token ids and a mask by name, an output object with `.logits`."""

    shape: tuple[int, ...] = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, N_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """An object with logits `(n, 3)`."""
        hidden = self.encoder(self.embedding(input_ids)).tanh() * attention_mask[..., None]
        return SimpleNamespace(logits=self.classifier(hidden.mean(1)), hidden_states=hidden)


class TokenMLP(MLP):
    """An `MLP` on tokens `(n, P, 6)`, each of which reads a tenth of the sum of those before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, P, 3)`."""
        hidden = self.relu2(self.fc2(self.relu1(self.fc1(x))))
        logits: Tensor = self.fc3(hidden + hidden.cumsum(1) / 10)
        return logits


class PixelCNN(BatchNormCNN):
    """A `BatchNormCNN` with logits for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.fc = nn.Conv2d(3, N_CLASSES, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(n, 3, 6, 6)`."""
        x = self.relu1(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.dropout(self.relu2(self.conv2(x))))
        return logits


#: What stands in the place of a network where an example has several positions; `TwoInputs` takes both.
AT_POSITIONS: Mapping[Callable[[], nn.Module], Callable[[], nn.Module]] = {
    MLP: TokenMLP,
    BatchNormCNN: PixelCNN,
}
