"""Network of the scalability benchmark (B.3, Table 5), of any depth and width."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ....errors import bad_value

#: Channels double until they reach this.
_WIDE = 2048
_IMAGE_SIDE = 32
_SMALLEST_SIDE = 4


def channels(depth: int, width: int) -> list[int]:
    """Output channels of every convolution: doubled after every two layers while below 2,048.

    Args:
        depth: Number of convolutions.
        width: Channels of the first one.

    >>> channels(6, 768)
    [768, 768, 1536, 1536, 3072, 3072]
    """
    counts = [width]
    while len(counts) < depth:
        doubles = len(counts) % 2 == 0 and counts[-1] < _WIDE
        counts.append(2 * counts[-1] if doubles else counts[-1])
    return counts


class ScalableCNN(nn.Sequential):
    """3x3 convolutions with ReLU on images of 3 x 32 x 32, and a linear head to the classes.

    B.3 describes "convolutional blocks followed by a linear head". With the channels of `channels`, a bias in
    every layer and a head on one value per channel, these are the models of Table 5: the printed numbers of
    parameters agree in all 18 rows with `batch_norm`, which adds at most 0.3%, and in 9 rows without it. (B.3
    says "from 15M"; the table starts at 262K.)

    Choices that the paper leaves open:

    - Pooling: 2 x 2 maxima wherever channels double, while maps are larger than 4 x 4, and the mean over the
      map before the head. Any depth is possible. (In Table 5 each layer of 2,048 channels adds 0.44 s, which
      is one forward pass of 5,000 examples through it at 55 TFLOP/s.)
    - Weights: normal with variance 2 / (9 c_in kept), where `kept` is the share of a map's energy that
    remains
      after zero padding; biases are 0. This keeps the scale of activations over depth without normalization.

    Args:
        depth: Number of convolutions, `conv1` to `conv<depth>`.
        width: Channels of the first one.
        n_classes: Outputs of `head`.
        batch_norm: Whether a BatchNorm2d, `norm1` to `norm<depth>`, follows every convolution.

    Raises:
        ValueError: A size below 1.

    >>> sum(p.numel() for p in ScalableCNN(4, 64).parameters())
    261450
    """

    def __init__(self, depth: int, width: int, n_classes: int = 10, batch_norm: bool = False) -> None:
        for name, value in (("depth", depth), ("width", width), ("n_classes", n_classes)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise bad_value(name, "be an integer of at least 1", repr(value))
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        side, before = _IMAGE_SIDE, 3
        for i, count in enumerate(channels(depth, width), 1):
            if i > 1 and count > before and side > _SMALLEST_SIDE:
                modules[f"pool{i - 1}"] = nn.MaxPool2d(2)
                side //= 2
            modules[f"conv{i}"] = _convolution(before, count, side)
            if batch_norm:
                modules[f"norm{i}"] = nn.BatchNorm2d(count)
            modules[f"relu{i}"] = nn.ReLU()
            before = count
        modules["mean"] = nn.AdaptiveAvgPool2d(1)
        modules["flatten"] = nn.Flatten()
        modules["head"] = nn.Linear(before, n_classes)
        super().__init__(modules)


def n_parameters(depth: int, width: int, batch_norm: bool = False) -> int:
    """Number of parameters of `ScalableCNN`, without allocating them.

    >>> n_parameters(16, 768)
    1014000394
    """
    with torch.device("meta"):
        model = ScalableCNN(depth, width, batch_norm=batch_norm)
    return sum(p.numel() for p in model.parameters())


def synthetic_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal images `(n, 3, 32, 32)` and labels of ten classes `(n,)`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, _IMAGE_SIDE, _IMAGE_SIDE, generator=generator)
    return images, torch.randint(0, 10, (n,), generator=generator)


def _convolution(n_inputs: int, n_outputs: int, side: int) -> nn.Conv2d:
    layer = nn.Conv2d(n_inputs, n_outputs, 3, padding=1)
    # The largest eigenvalue of the mean over the neighbors that lie inside the map, in each direction.
    kept = ((1 + 2 * math.cos(math.pi / (side + 1))) / 3) ** 2
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * n_inputs * kept)))
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
