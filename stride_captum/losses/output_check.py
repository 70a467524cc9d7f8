"""A look at the outputs of a model for its training set: logits or probabilities?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import bad_value
from .positions import position_rows

if TYPE_CHECKING:
    from .base import Loss

Outputs = Literal["logits", "probabilities"]


class OutputCheck:
    """Looks at the outputs for a training set; this one takes all."""

    def look(self, outputs: Tensor, start: int = 0, examples: Tensor | None = None) -> None:
        """Take in the outputs of some training examples.

        Args:
            outputs: `(n, n_outputs)` or `(n,)`.
            start: Place of the first example in the training set.
            examples: Which of these each row belongs to, `(n,)`; None for one row an example.
        """

    def finish(self) -> None:
        """Refuse outputs that are not what the loss says."""


class EachPosition(OutputCheck):
    """Looks at the outputs of all positions of the examples.

    Args:
        loss: Of one position.
        check: Of rows of outputs.
    """

    def __init__(self, loss: Loss, check: OutputCheck) -> None:
        self.loss, self.check = loss, check

    def look(self, outputs: Tensor, start: int = 0, examples: Tensor | None = None) -> None:
        """Take in the outputs of some training examples, with several positions each."""
        found = position_rows(self.loss, outputs, None, None, "inputs")
        self.check.look(found.outputs, start, found.positions.examples)

    def finish(self) -> None:
        """Refuse outputs that are not what the loss says."""
        self.check.finish()


class ProbabilityCheck(OutputCheck):
    """Looks at the outputs for a training set: are they logits, or probabilities, as the loss says?

    Args:
        loss: Name of the class of the loss.
        outputs: What the user says that they are; None for nothing.
        model: The network, in which errors look for the last softmax; None where there is none.
        single: Whether each output is a probability of its own, as a sigmoid gives it.
    """

    def __init__(self, loss: str, outputs: str | None, model: nn.Module | None, single: bool = False) -> None:
        self.loss, self.outputs, self.model, self.single = loss, outputs, model, single
        self.probable: Tensor | None = None  # whether all rows so far are probabilities

    def look(self, outputs: Tensor, start: int = 0, examples: Tensor | None = None) -> None:
        """Take in the outputs of some training examples.

        Args:
            outputs: `(n, n_outputs)` or `(n,)`.
            start: Place of the first example in the training set.
            examples: Which of these each row belongs to, `(n,)`; None for one row an example.

        Raises:
            ValueError: With `outputs="probabilities"`: others than numbers above 0 and below 1.
        """
        values = outputs.detach()
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or not len(values):
            return
        if self.outputs == "probabilities":
            self._check_probabilities(values, start, examples)
        elif self.outputs is None and not self._known():
            found = _are_probabilities(values, self.single).all()
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
        kind = "outputs that are not negative and add up to 1 (or one output between 0 and 1)"
        if self.single:
            kind = "outputs between 0 and 1"
        raise bad_value(
            "model",
            "return logits",
            f"probabilities: {kind} for all training examples",
            f"{self._advice()} If the outputs are what they seem to be, say "
            f"loss={self.loss}(outputs='probabilities'); if they are logits all the same, "
            f"loss={self.loss}(outputs='logits').",
        )

    def _check_probabilities(self, values: Tensor, start: int, examples: Tensor | None) -> None:
        inside = _are_probabilities(values, self.single)
        exact = ((values == 0) | (values == 1)).any(1)
        for wrong, what in ((~inside, "other numbers"), (exact, "an exact 0 or 1 (no logarithm)")):
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                place = start + (row if examples is None else int(examples[row]))
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


def _are_probabilities(values: Tensor, single: bool) -> Tensor:
    """Which rows are probabilities, `(n,)` bool: not negative and of sum 1, or single ones in [0, 1]."""
    if not values.is_floating_point():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if single or values.shape[1] == 1:
        return ((values >= 0) & (values <= 1)).all(1)
    wide = values if values.dtype == torch.float64 else values.float()
    rounding = 4 * torch.finfo(values.dtype).eps * values.shape[1] ** 0.5 + 1e-6
    found: Tensor = (wide >= 0).all(1) & ((wide.sum(1) - 1).abs() <= rounding)
    return found
