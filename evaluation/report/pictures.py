"""Examples as PNG images."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

#: Default size of a picture in pixels: images are enlarged to about this by a whole factor.
_SIDE = 96


def picture(example: Tensor, side: int = _SIDE) -> str | None:
    """A PNG data URI of one example; None if it is not an image.

    Args:
        example: `(1, h, w)`, `(3, h, w)` or `(h, w)`; its smallest value becomes black, its largest white.
            One channel of at most 28 pixels, as in MNIST, is inverted.
        side: Size to enlarge it to, by a whole factor; 0 keeps its size.
    """
    from PIL import Image

    if example.ndim == 3 and example.shape[0] == 3:
        pixels = example.permute(1, 2, 0)
    elif example.ndim == 3 and example.shape[0] == 1:
        pixels = 1 - _stretch(example[0]) if example.shape[-1] <= 28 else example[0]
    elif example.ndim == 2:
        pixels = example
    else:
        return None
    pixels = _stretch(pixels)
    factor = max(1, side // max(pixels.shape[:2]))
    pixels = pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).round().to(torch.uint8).numpy()).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _stretch(pixels: Tensor) -> Tensor:
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low) if high > low else torch.zeros_like(pixels)
