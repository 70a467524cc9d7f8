"""Pictures of examples."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

#: Images are enlarged by a whole factor to about this many pixels, unless told otherwise.
_SIDE = 96


def picture(example: Tensor, side: int = _SIDE) -> str | None:
    """A PNG data URI of one example, or None where it is not an image.

    Args:
        example: `(1, h, w)`, `(3, h, w)` or `(h, w)`; values are stretched to the range of the image.
        side: Pixels are repeated a whole number of times to get near this size; 0 keeps them.
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
