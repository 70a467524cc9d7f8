"""What a model returns, as a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import bad_type


def tensor_of(outputs: Any) -> Tensor:
    """Outputs of a model as a tensor, unwrapped (Hugging Face) and with at least one dimension.

    Raises:
        TypeError: The model has returned something else.
    """
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor):
        outputs = outputs["logits"]
    if not isinstance(outputs, Tensor):
        raise bad_type(
            "model",
            "return a tensor, an object with a tensor `.logits`, or a dict with the key 'logits'",
            outputs,
            "Say how to get the logits: batch=Batch(forward=lambda model, batch: ...).",
        )
    return outputs if outputs.ndim else outputs[None]
