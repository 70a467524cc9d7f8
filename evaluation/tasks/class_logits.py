"""Outputs of a network as logits of classes, and the checks that they are logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import bad_type, bad_value
from ...responses import multiclass_logits

#: Last operations of networks that return probabilities.
_PROBABILITIES = ("SoftmaxBackward", "SigmoidBackward", "LogSigmoidBackward", "LogSigmoidForwardBackward")
#: Operations that change only the shape, and may come after them.
_SHAPES = (
    "Alias", "Clone", "Flatten", "Reshape", "Select", "Slice", "Squeeze", "ToCopy", "Transpose", "UnsafeView",
    "Unsqueeze", "View",
)  # fmt: skip


def class_logits(outputs: Any) -> Tensor:
    """Outputs of a network as logits `(n, n_classes)`.

    The single logit z of a binary network becomes two, (-z/2, z/2): their cross-entropy is the binary
    cross-entropy of z.

    Args:
        outputs: A tensor `(n, n_classes)`, `(n, 1)` or `(n,)`, or an object with such `.logits`.

    Raises:
        TypeError: Something else.
        ValueError: A tensor of another shape.

    >>> class_logits(torch.tensor([[2.0], [-1.0]])).tolist()
    [[-1.0, 1.0], [0.5, -0.5]]
    """
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        remedy = "Wrap it in a module that returns the logits alone."
        raise bad_type("model", "return logits, or an object with a tensor `.logits`", outputs, remedy)
    return multiclass_logits(outputs if outputs.ndim else outputs[None])


def first_logits(model: nn.Module, x: Tensor, n_classes: int) -> Tensor:
    """Logits of the first batch, with clear errors if the network cannot be trained on it.

    Args:
        model: The network.
        x: Inputs `(n, ...)`.
        n_classes: As for `check_logits`.

    Returns:
        `(n, n_classes)`.

    Raises:
        TypeError: As for `class_logits`.
        ValueError: The network cannot read the inputs, or as for `check_logits`.
    """
    try:
        outputs = model(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if "memory" in str(error):
            raise
        if "more than 1 value per channel" in str(error):
            raise bad_value(
                "batch_size", "be at least 2 for a network with BatchNorm", f"a batch of {len(x)}"
            ) from error
        raise unreadable(model, x, error) from error
    logits = class_logits(outputs)
    check_logits(logits, len(x), n_classes)
    return logits


def unreadable(
    model: nn.Module,
    x: Tensor,
    error: Exception,
    argument: str = "build_model",
    name: str = "a network that does not",
    remedy: str | None = None,
) -> ValueError:
    """The error for a network that cannot read its inputs.

    Args:
        model: The network.
        x: The inputs, `(n, ...)`.
        error: What the network raised.
        argument: Name of the argument that gives the network.
        name: Name of the network.
        remedy: Advice, unless the dtype of the inputs is the reason.
    """
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if own is not None and x.is_floating_point() and x.dtype != own:
        remedy = f"Convert the inputs: x.to({own})."
    elif own is not None and x.dtype == torch.uint8:
        remedy = f"Scale the pixels: x.to({own}) / 255."
    said = " ".join(str(error).split()).rstrip(".")
    must = f"read inputs of shape {tuple(x.shape)} in {str(x.dtype).removeprefix('torch.')}"
    return bad_value(argument, must, f"{name} ({type(error).__name__}: {said})", remedy)


def check_logits(logits: Tensor, n: int, n_classes: int, argument: str = "build_model") -> None:
    """Check that outputs are logits: one row for each example, and a column for each class.

    Args:
        logits: From `class_logits`; its autograd graph, if it has one, tells a softmax or sigmoid.
        n: Number of examples.
        n_classes: Classes of the labels: the largest label plus 1.
        argument: Name of the argument that gives the network, for errors.

    Raises:
        ValueError: Rows or classes are missing, or the outputs are probabilities.
    """
    if len(logits) != n:
        raise bad_value(
            argument, "return one row of logits for each example", f"{len(logits)} rows for {n} examples"
        )
    if logits.shape[1] < n_classes:
        raise bad_value(
            argument,
            f"give {n_classes} logits, as the labels go up to {n_classes - 1}",
            logits.shape[1],
            "Labels are 0 to C - 1 for a network with C outputs, and 0 and 1 for one with one output.",
        )
    if are_probabilities(logits):
        raise bad_value(
            argument,
            "return logits",
            "probabilities",
            "Leave out the Softmax or Sigmoid at the end: the loss takes logits.",
        )


def are_probabilities(logits: Tensor) -> bool:
    """Whether outputs are probabilities: the last operation was a softmax or sigmoid, or rows sum to 1.

    Args:
        logits: `(n, n_classes)`.
    """
    z = logits.detach()
    sums_to_one = bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-3).all())
    return (len(z) > 1 and sums_to_one) or _last_operation(logits).startswith(_PROBABILITIES)


def _last_operation(tensor: Tensor) -> str:
    """Name of the last operation in the autograd graph that changes more than the shape; "" without one."""
    node: Any = tensor.grad_fn
    if node is not None and node.name().startswith("Cat"):  # (-z/2, z/2), made of one logit
        half = node.next_functions[-1][0]
        node = half.next_functions[0][0] if half is not None and half.name().startswith("Div") else node
    while node is not None and node.name().startswith(_SHAPES):
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return "" if node is None else str(node.name())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the network has a BatchNorm, which cannot be trained on a batch of one example."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())
