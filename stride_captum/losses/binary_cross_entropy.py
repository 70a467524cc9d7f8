"""Binary cross-entropy: several labels for an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import bad_choice, bad_value
from ..system.devices import as_float64
from ..system.saved_values import saved_as
from .output_check import OutputCheck, Outputs, ProbabilityCheck
from .positions import check_class_dim
from .separate_outputs import SeparateOutputs


@saved_as("loss.binary-cross-entropy")
@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(SeparateOutputs):
    """`-sum_c y_c log p_c + (1 - y_c) log(1 - p_c)`, p = sigmoid(z); labels y `(n, n_outputs)` in [0, 1].

        r = y - sigmoid(z / T)          H = diag p (1 - p), each label damped by its own entry

    Labels do not mix: with a frozen backbone, C labels score what C binary models score. Out of the sample,
    what a ridge head without the example says is cut to [0, 1].

    Responses, summed over labels or of the one that `target=` names:

        margin             (2 y - 1) z, the log-odds of what the label says
        logit              z, the log-odds of "on"
        probability        of what the label says, y p + (1 - y) (1 - p)
        log-probability    minus the loss
        loss

    Args:
        outputs: As for `CrossEntropy`; "probabilities": p instead of z.
        class_dim: As for `CrossEntropy`; labels have the shape of the outputs.

    >>> y = torch.tensor([[1.0, 0.0]])
    >>> BinaryCrossEntropy().response_value(torch.tensor([[2.0, 3.0]]), y, "margin")
    tensor([-1.])
    """

    name: ClassVar[str] = "binary_cross_entropy"
    responses: ClassVar[tuple[str, ...]] = ("margin", "logit", "probability", "log-probability", "loss")
    label_free: ClassVar[tuple[str, ...]] = ("logit",)
    tempered: ClassVar[bool] = True
    label_units: ClassVar[bool] = True

    outputs: Outputs | None = None
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and self.outputs not in get_args(Outputs):
            raise bad_choice("outputs", self.outputs, get_args(Outputs))
        check_class_dim(self.class_dim)

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs as logits, `(n, n_outputs)`."""
        rows = super().logits(outputs)
        return torch.log(rows) - torch.log1p(-rows) if self.outputs == "probabilities" else rows

    def output_check(self, model: nn.Module | None) -> OutputCheck:
        """Refuses probabilities where logits are expected."""
        return ProbabilityCheck(type(self).__name__, self.outputs, model, single=True)

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        """Labels as `(n, n_outputs)` in [0, 1]."""
        rows = super().labels(labels, n_outputs, argument)
        outside = (rows < 0) | (rows > 1)
        if bool(outside.any()):
            must = f"hold labels from 0 (off) to 1 (on) for loss={self.name!r}"
            raise bad_value(argument, must, rows[outside][0].item())
        return rows

    def predicted(self, logits: Tensor) -> Tensor:
        """1 where the logit is positive."""
        return (logits > 0).to(logits)

    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`y softplus(-z) + (1 - y) softplus(z)`."""
        return labels * F.softplus(-logits) + (1 - labels) * F.softplus(logits)

    def curvatures(self, logits: Tensor) -> Tensor:
        """`p (1 - p)`, without cancellation."""
        return torch.sigmoid(logits) * torch.sigmoid(-logits)

    def terms(self, logits: Tensor, labels: Tensor, response: str) -> Tensor:
        """The response of each label."""
        if response == "logit":
            return logits
        if response == "margin":
            return (2 * labels - 1) * logits
        if response == "probability":
            return labels * torch.sigmoid(logits) + (1 - labels) * torch.sigmoid(-logits)
        loss = self.elementwise(logits, labels)
        return loss if response == "loss" else -loss

    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """`y - p = y sigmoid(-z/T) - (1 - y) sigmoid(z/T)`, without cancellation."""
        z = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        y = labels.to(z)
        return (y * torch.sigmoid(-z) - (1 - y) * torch.sigmoid(z)).to(logits)

    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Of labels that are on with probability p."""
        drawn = as_float64(uniforms) < torch.sigmoid(as_float64(logits))
        return self.residuals(logits, drawn.to(logits))

    def projected(self, left_out: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
        """`y - q` with the prediction q cut to [0, 1]: `left_out` cut to [y - 1, y]."""
        y = labels.to(left_out)
        return torch.minimum(torch.maximum(left_out, y - 1), y)

    def possible(self, predictions: Tensor) -> Tensor:
        """Cut to [0, 1]."""
        return predictions.clamp(0, 1)
