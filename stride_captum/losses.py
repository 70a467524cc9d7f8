"""Losses that a model was trained with: what its outputs are, and how they become logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .errors import bad_choice, bad_type, bad_value
from .responses import multiclass_logits
from .system.saved_values import saved_as

Outputs = Literal["logits", "probabilities"]


@saved_as("loss.cross-entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Softmax cross-entropy over the classes; with one output, the binary cross-entropy of a sigmoid.

    Args:
        outputs: What the model returns. "logits": numbers before the softmax (or the sigmoid);
            log-probabilities are logits. "probabilities": what comes after it, of which the logarithm is
            taken. None: logits, and a model whose outputs are probabilities for the whole training set is
            refused. What is said is believed.

    >>> CrossEntropy(outputs="probabilities").logits(torch.tensor([[0.25, 0.75]])).exp()
    tensor([[0.2500, 0.7500]])
    """

    outputs: Outputs | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and self.outputs not in get_args(Outputs):
            raise bad_choice("outputs", self.outputs, get_args(Outputs))

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs of the model as logits, `(n, n_classes)`; one output z becomes `(-z/2, z/2)`.

        Raises:
            ValueError: Outputs of another shape, or probabilities of exactly 0 or 1.
        """
        if self.outputs != "probabilities":
            return multiclass_logits(outputs)
        if outputs.ndim == 1 or outputs.shape[-1] == 1:
            return multiclass_logits(torch.log(outputs) - torch.log1p(-outputs))
        return multiclass_logits(torch.log(outputs))

    def response_of(self, outputs: Tensor, response: str) -> str:
        """The response that is meant: the logit of a model with one output is, up to its sign, the margin."""
        single = outputs.ndim == 1 or outputs.shape[-1] == 1
        return "margin" if single and response == "logit" else response


def loss_of(loss: Any) -> CrossEntropy:
    """The loss behind a name or an object.

    Raises:
        ValueError: Another name.
        TypeError: Another object.
    """
    if isinstance(loss, CrossEntropy):
        return loss
    if isinstance(loss, str):
        if loss != "cross_entropy":
            raise bad_choice("loss", loss, ["cross_entropy"])
        return CrossEntropy()
    raise bad_type(
        "loss",
        "be 'cross_entropy' or a loss of stride_captum.losses",
        loss,
        "Write loss=CrossEntropy(outputs=...).",
    )


class OutputCheck:
    """Looks at the outputs for a training set: are they what the loss says they are?

    Args:
        loss: What the model was trained with.
        model: The network, in which errors look for the last softmax; None where there is none.
    """

    def __init__(self, loss: CrossEntropy, model: nn.Module | None) -> None:
        self.loss, self.model = loss, model
        self.probable: Tensor | None = None  # whether all rows so far are probabilities

    def look(self, outputs: Tensor, start: int = 0) -> None:
        """Take in the outputs of some training examples.

        Args:
            outputs: `(n, n_outputs)` or `(n,)`.
            start: Place of the first example in the training set.

        Raises:
            ValueError: With `outputs="probabilities"`: others than numbers above 0 and below 1.
        """
        values = outputs.detach()
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or not len(values):
            return
        if self.loss.outputs == "probabilities":
            self._check_probabilities(values, start)
        elif self.loss.outputs is None and not self._known():
            found = _are_probabilities(values).all()
            self.probable = found if self.probable is None else self.probable & found.to(self.probable.device)

    def _known(self) -> bool:
        """Whether the rows so far settle that these are no probabilities; no GPU is waited for to know."""
        return self.probable is not None and self.probable.device.type == "cpu" and not bool(self.probable)

    def finish(self) -> None:
        """Refuse outputs that are probabilities throughout where logits are expected.

        Raises:
            ValueError: They are.
        """
        if self.probable is None or not bool(self.probable):
            return
        raise bad_value(
            "model",
            "return logits",
            "probabilities: outputs that are not negative and add up to 1 (or one output between 0 and 1) "
            "for all training examples",
            f"{self._advice()} If the outputs are what they seem to be, say "
            "loss=CrossEntropy(outputs='probabilities'); if they are logits all the same, "
            "loss=CrossEntropy(outputs='logits').",
        )

    def _check_probabilities(self, values: Tensor, start: int) -> None:
        inside = _are_probabilities(values)
        exact = ((values == 0) | (values == 1)).any(1)
        for wrong, what in ((~inside, "other numbers"), (exact, "an exact 0 or 1 (no logarithm)")):
            if bool(wrong.any()):
                place = start + int(wrong.nonzero()[0])
                raise bad_value(
                    "model",
                    "return probabilities above 0 and below 1 with outputs='probabilities'",
                    f"{what} for training example {place}",
                    self._advice(),
                )

    def _advice(self) -> str:
        """Which module gives the logits, if the network ends in a softmax or a sigmoid."""
        leaves = [] if self.model is None else list(self.model.named_modules())
        leaves = [(name, module) for name, module in leaves if name and not list(module.children())]
        places = [i for i, (_, m) in enumerate(leaves) if isinstance(m, nn.Softmax | nn.Sigmoid)]
        if not places:
            return "Give the logits, which come before the softmax or the sigmoid."
        before = f"the outputs of {leaves[places[-1] - 1][0]!r}, " if places[-1] else ""
        return f"Use a model that returns the logits: {before}what {leaves[places[-1]][0]!r} reads."


def _are_probabilities(values: Tensor) -> Tensor:
    """Which rows are probabilities, `(n,)` bool: not negative and of sum 1, or one output in [0, 1]."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if values.shape[1] == 1:
        return ((values >= 0) & (values <= 1))[:, 0]
    wide = values if values.dtype == torch.float64 else values.float()
    rounding = 4 * torch.finfo(values.dtype).eps * values.shape[1] ** 0.5 + 1e-6
    found: Tensor = (wide >= 0).all(1) & ((wide.sum(1) - 1).abs() <= rounding)
    return found


__all__ = ["CrossEntropy"]
