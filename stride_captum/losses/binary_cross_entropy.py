"""Binary cross-entropy: several labels for an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import bad_choice, bad_value
from ..options import checked_weights, is_number
from ..system.devices import as_float64
from ..system.saved_values import saved_as
from .output_check import OutputCheck, Outputs, ProbabilityCheck
from .positions import check_class_dim
from .separate_outputs import SeparateOutputs


@saved_as("loss.binary-cross-entropy")
@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(SeparateOutputs):
    """`-sum_c w_c y_c log p_c + (1 - y_c) log(1 - p_c)`, p = sigmoid(z); labels y `(n, n_outputs)` in [0, 1].

        r = w y (1 - p) - (1 - y) p     H = diag w p (1 - p) / (p + w (1 - p))

    at `z / T`; each label is damped by its own entry of H. Where w = 1, r = y - p and H = diag p (1 - p). A
    model trained with w has p = w q / (w q + 1 - q) where a label is on with probability q; H is the mean
    over such labels of the second derivative `(w y + 1 - y) p (1 - p)`.

    Labels do not mix: with a frozen backbone, C labels score what C binary models score. Out of the sample, q
    is what a ridge head without the example says, cut to [0, 1], and r = w (y - q) / (w q + 1 - q).

    Responses, summed over labels or of the one that `target=` names:

        margin             (2 y - 1) z, the log-odds of what the label says
        logit              z, the log-odds of "on"
        probability        of what the label says, y p + (1 - y) (1 - p)
        log-probability    y log p + (1 - y) log(1 - p)
        loss               with w

    Args:
        pos_weight: w, one number above 0 for each label, or one for all, as in `torch.nn.BCEWithLogitsLoss`;
            None for 1.
        outputs: As for `CrossEntropy`; "probabilities": p instead of z.
        class_dim: As for `CrossEntropy`; labels have the shape of the outputs.

    Raises:
        TypeError: A `pos_weight` that is no number, nor some.
        ValueError: An option out of its range; as many weights as there are no labels.

    >>> y = torch.tensor([[1.0, 0.0]])
    >>> BinaryCrossEntropy().response_value(torch.tensor([[2.0, 3.0]]), y, "margin")
    tensor([-1.])
    """

    name: ClassVar[str] = "binary_cross_entropy"
    responses: ClassVar[tuple[str, ...]] = ("margin", "logit", "probability", "log-probability", "loss")
    label_free: ClassVar[tuple[str, ...]] = ("logit",)
    tempered: ClassVar[bool] = True

    outputs: Outputs | None = None
    class_dim: int | None = None
    pos_weight: Sequence[float] | float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and self.outputs not in get_args(Outputs):
            raise bad_choice("outputs", self.outputs, get_args(Outputs))
        check_class_dim(self.class_dim)
        if self.pos_weight is not None:
            given = self.pos_weight
            single = is_number(given) or (isinstance(given, Tensor) and given.ndim == 0)
            found = checked_weights("pos_weight", [given] if single else given)
            if min(found) == 0:
                remedy = "A label whose positives count for nothing cannot be learned: leave its output out."
                raise bad_value("pos_weight", "hold numbers above 0", 0, remedy)
            object.__setattr__(self, "pos_weight", found[0] if len(found) == 1 else found)

    @property
    def label_units(self) -> bool:  # type: ignore[override]
        """Without `pos_weight`."""
        return self.pos_weight is None

    @property
    def weighs_outputs(self) -> bool:
        """With `pos_weight`."""
        return self.pos_weight is not None

    def output_weights(self, labels: Tensor) -> Tensor | None:
        """`w y + 1 - y`; None without `pos_weight`."""
        return None if self.pos_weight is None else self._positive(labels) * labels + (1 - labels)

    def _positive(self, like: Tensor) -> Tensor | float:
        """W, in the dtype of rows, `(n_outputs,)` or one number."""
        w = 1.0 if self.pos_weight is None else self.pos_weight
        return w if isinstance(w, float) else torch.as_tensor(w).to(like)

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs as logits, `(n, n_outputs)`."""
        rows = super().logits(outputs)
        return torch.log(rows) - torch.log1p(-rows) if self.outputs == "probabilities" else rows

    def output_check(self, model: nn.Module | None) -> OutputCheck:
        """Refuses probabilities where logits are expected."""
        return ProbabilityCheck(type(self).__name__, self.outputs, model, single=True)

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        """Labels as `(n, n_outputs)` in [0, 1]."""
        w = self.pos_weight
        if isinstance(w, tuple) and len(w) != n_outputs:
            raise bad_value("pos_weight", f"hold one number, or one for each of {n_outputs} labels", len(w))
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
        """`w y softplus(-z) + (1 - y) softplus(z)`."""
        return self._positive(logits) * labels * F.softplus(-logits) + (1 - labels) * F.softplus(logits)

    def curvatures(self, logits: Tensor) -> Tensor:
        """`w p (1 - p) / (p + w (1 - p))`, without cancellation."""
        p, rest = torch.sigmoid(logits), torch.sigmoid(-logits)
        return p * rest if self.pos_weight is None else p * rest * self._mean_weight(p, rest)

    def _mean_weight(self, p: Tensor, rest: Tensor) -> Tensor:
        """The mean of `w y + 1 - y` over labels of a model trained with w, given p and 1 - p."""
        return 1 / (p / self._positive(p) + rest)

    def terms(self, logits: Tensor, labels: Tensor, response: str) -> Tensor:
        """The response of each label."""
        if response == "logit":
            return logits
        if response == "margin":
            return (2 * labels - 1) * logits
        if response == "probability":
            return labels * torch.sigmoid(logits) + (1 - labels) * torch.sigmoid(-logits)
        if response == "loss":
            return self.elementwise(logits, labels)
        return -labels * F.softplus(-logits) - (1 - labels) * F.softplus(logits)

    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """`w y sigmoid(-z/T) - (1 - y) sigmoid(z/T)`, without cancellation."""
        z = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        y = labels.to(z)
        return (self._positive(z) * y * torch.sigmoid(-z) - (1 - y) * torch.sigmoid(z)).to(logits)

    def mean_residuals(self, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """`|y - p|` in the mean over labels, each with its weight `w y + 1 - y`."""
        found, omega = super().mean_residuals(logits, labels, temperature), self.output_weights(labels)
        return found if omega is None else found / omega.mean(1).to(found)

    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """`y - p` of labels that are on with probability p, times the root of H over `p (1 - p)`."""
        z = as_float64(logits)
        p, rest = torch.sigmoid(z), torch.sigmoid(-z)
        found = torch.where(as_float64(uniforms) < p, rest, -p)
        return (found if self.pos_weight is None else found * self._mean_weight(p, rest).sqrt()).to(logits)

    def projected(self, left_out: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
        """`y - q` with the prediction q cut to [0, 1]: `left_out` cut to [y - 1, y]."""
        y = labels.to(left_out)
        return torch.minimum(torch.maximum(left_out, y - 1), y)

    def possible(self, predictions: Tensor) -> Tensor:
        """Cut to [0, 1]."""
        return predictions.clamp(0, 1)

    def of_ridge_head(
        self, differences: Tensor, logits: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """`w (y - q) / (w q + 1 - q)`: r at the p that a model trained with w has for q."""
        if self.pos_weight is None:
            return differences
        w = self._positive(differences)
        q = (labels.to(differences) - differences).clamp(0, 1)
        return w * differences / (w * q + (1 - q))
