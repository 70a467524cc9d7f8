"""Softmax cross-entropy: one class for an example, or a distribution over classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import bad_choice, bad_value
from ..options import checked_weights
from ..residuals import (
    drawn_labels,
    leave_one_out_residuals,
    one_hot,
    project_on_simplex,
    simplex_shift,
    tempered_residuals,
)
from ..responses import RESPONSES, class_labels, multiclass_logits, response_gradient, response_value
from ..system.devices import as_float64, float64_device, on_device
from ..system.saved_values import saved_as
from .base import Loss, Target, needs_labels
from .hessians import SoftmaxHessians, laplacian, softmax_hessians
from .output_check import OutputCheck, Outputs, ProbabilityCheck
from .positions import check_class_dim
from .soft_labels import distributions


@saved_as("loss.cross-entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy over the classes; with one output, the binary cross-entropy of a sigmoid.

        -sum_c w_c y_c log p_c          p = softmax(z)
        r = omega (y' - softmax(z / T))         H = omega (diag p - p p^T)

    with omega = sum_c w_c y_c and y'_c = w_c y_c / omega: for class indices, y' = y and omega is the weight
    of the class, which counts like a weight of the example. Labels y are class indices `(n,)`, or
    distributions `(n, n_classes)`; label smoothing s replaces y by `(1 - s) y + s / n_classes`.

    Responses are those of `stride_captum.responses`. "loss" is of y' with its smoothing, without omega; the
    others are about one class, of a soft label the likeliest.

    Args:
        weight: w, one number for each class; None for 1.
        label_smoothing: s, from 0 to 1, as in `torch.nn.CrossEntropyLoss`.
        outputs: What the model returns. "logits": numbers before the softmax (or the sigmoid);
            log-probabilities are logits. "probabilities": what comes after it, of which the logarithm is
            taken. None: logits, and a model whose outputs are probabilities for the whole training set is
            refused. What is said is believed.
        ignore_index: Positions with this label count for nothing, as in `torch.nn.CrossEntropyLoss`, where an
            example has several, with labels `(n, P)` or `(n, H, W)`; nor do those of a class of weight 0. One
            label an example must be another.
        class_dim: Where the classes stand in outputs with several positions; None: `(n, P, C)` or
            `(n, C, H, W)`.

    >>> CrossEntropy(outputs="probabilities").logits(torch.tensor([[0.25, 0.75]])).exp()
    tensor([[0.2500, 0.7500]])
    """

    name: ClassVar[str] = "cross_entropy"
    responses: ClassVar[tuple[str, ...]] = RESPONSES
    has_classes: ClassVar[bool] = True

    weight: Sequence[float] | Tensor | None = None
    label_smoothing: float = 0.0
    outputs: Outputs | None = None
    ignore_index: int = -100
    class_dim: int | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None and self.outputs not in get_args(Outputs):
            raise bad_choice("outputs", self.outputs, get_args(Outputs))
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise bad_value("ignore_index", "be an integer", repr(self.ignore_index))
        check_class_dim(self.class_dim)
        smoothing = self.label_smoothing
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing <= 1:
            raise bad_value("label_smoothing", "be a number from 0 to 1", repr(smoothing))
        if self.weight is not None:
            object.__setattr__(self, "weight", checked_weights("weight", self.weight))

    @property
    def plain(self) -> bool:
        """Without class weights and smoothing."""
        return self.weight is None and not self.label_smoothing

    @property
    def has_weights(self) -> bool:
        """With class weights."""
        return self.weight is not None

    # Outputs and labels.

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs of the model as logits, `(n, n_classes)`; one output z becomes `(-z/2, z/2)`.

        Raises:
            ValueError: Outputs of another shape, or probabilities of exactly 0 or 1.
        """
        if self.outputs == "probabilities":
            single = outputs.ndim == 1 or outputs.shape[-1] == 1
            outputs = torch.log(outputs) - torch.log1p(-outputs) if single else torch.log(outputs)
        return multiclass_logits(outputs)

    def counted(self, labels: Tensor) -> Tensor:
        """Not `ignore_index`, and not of weight 0."""
        if labels.ndim > 2 and labels.shape[2] > 1:
            others = [c for c in range(labels.shape[2]) if c not in self.uncounted]
            return (labels[..., others] != 0).any(2) if self.uncounted else super().counted(labels)
        classes = labels.squeeze(2) if labels.ndim > 2 else labels
        wide = classes if classes.is_floating_point() else classes.long()  # a byte is never -100
        return ~torch.isin(wide, wide.new_tensor([self.ignore_index, *self.uncounted]))

    @property
    def uncounted(self) -> tuple[int, ...]:
        """Classes of weight 0, unless smoothing gives their labels a share of the others."""
        weights = () if self.weight is None or self.label_smoothing else self.weight
        return tuple(c for c, w in enumerate(weights) if w == 0)

    def output_check(self, model: nn.Module | None) -> OutputCheck:
        """Refuses probabilities where logits are expected."""
        return ProbabilityCheck(type(self).__name__, self.outputs, model)

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        """Class indices `(n,)` int64, or distributions `(n, n_classes)`."""
        if self.weight is not None and len(self.weight) != n_outputs:
            raise bad_value("weight", f"hold one for each of {n_outputs} classes", len(self.weight))
        if labels.ndim != 2 or labels.shape[1] == 1 or labels.shape[1] != n_outputs or labels.is_complex():
            classes, ignored = class_labels(labels, n_outputs, argument), self.ignore_index
            if 0 <= ignored < n_outputs and bool((classes == ignored).any()):
                must = f"hold no label that is `ignore_index` ({ignored}) where an example has one label"
                raise bad_value(argument, must, ignored, "Leave these examples out.")
            return classes
        return distributions(labels, argument)

    def weights(self, labels: Tensor) -> Tensor | None:
        """omega, `(n,)` float64; None without class weights."""
        if self.weight is None:
            return None
        w = torch.as_tensor(self.weight, dtype=torch.float64, device=float64_device(labels.device))
        if self._is_hard(labels):
            return w[labels.to(w.device)]
        return self._smoothed(labels, w) @ w

    def _is_hard(self, labels: Tensor) -> bool:
        return labels.ndim == 1 and not self.label_smoothing

    def _smoothed(self, labels: Tensor, like: Tensor) -> Tensor:
        """`(1 - s) y + s / n_classes`, in the dtype and the width of `like`."""
        rows = like.reshape(-1, like.shape[-1])
        y = one_hot(labels.to(like.device), rows) if labels.ndim == 1 else labels.to(like)
        s = self.label_smoothing
        return (1 - s) * y + s / like.shape[-1] if s else y

    def _distributions(self, labels: Tensor, like: Tensor) -> Tensor:
        """Y' of each row, in the dtype and the width of `like`."""
        y = self._smoothed(labels, like)
        if self.weight is None:
            return y
        weighted = y * torch.as_tensor(self.weight).to(y)
        total = weighted.sum(1, keepdim=True)
        return torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), y)

    # Responses.

    def response_of(self, outputs: Tensor, response: str) -> str:
        """The response that is meant: the logit of a model with one output is, up to its sign, the margin."""
        single = outputs.ndim == 1 or outputs.shape[-1] == 1
        return "margin" if single and response == "logit" else response

    def asked(self, logits: Tensor, labels: Tensor | None, target: Target, response: str) -> Tensor:
        """The class c of each test point, `(n,)` int64; of "loss", the labels as they are."""
        if isinstance(target, Tensor):
            return class_labels(target.to(logits.device), logits.shape[1], "target")
        if target == "predicted":
            return logits.argmax(1)
        if labels is None:
            raise needs_labels(target)
        found = self.labels(on_device(labels, logits.device), logits.shape[1], "inputs")
        return found if found.ndim == 1 or response == "loss" else found.argmax(1)

    def response_value(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """See `stride_captum.responses`, `(..., n)`."""
        if response != "loss" or self._is_hard(asked):
            return response_value(logits, asked, response)
        return -(self._distributions(asked, logits) * logits.log_softmax(-1)).sum(-1)

    def response_gradient(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """See `stride_captum.responses`, `(n, n_classes)`."""
        if response != "loss" or self._is_hard(asked):
            return response_gradient(logits, asked, response)
        return -self.residuals(logits, asked)

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row, without omega."""
        if self._is_hard(labels):
            # In this form the losses of a confident model stay apart, where log p_y rounds to 0.
            return F.softplus(-response_value(logits, labels, "margin"))
        return self.response_value(logits, labels, "loss")

    # Residuals and curvature.

    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """`y' - softmax(z / T)`, without cancellation."""
        if self._is_hard(labels):
            return tempered_residuals(logits, labels, temperature)
        z = as_float64(logits)
        return softmax_hessians(z, temperature).residuals(self._distributions(labels, z)).to(logits)

    def hessians(self, logits: Tensor, temperature: float) -> SoftmaxHessians:
        """`diag p - p p^T`."""
        return softmax_hessians(logits, temperature)

    def residual_labels(self, labels: Tensor, like: Tensor) -> Tensor:
        """Class indices, or y'."""
        return labels if self._is_hard(labels) else self._distributions(labels, like)

    def covariance(self, total: Tensor) -> Tensor:
        """From sums of `p p^T`, or of variances."""
        return total if total.ndim == 1 else laplacian(total)

    def unit(self, covariance: Tensor) -> float:
        """The mean of the C - 1 eigenvalues that `E[diag p - p p^T]` can have."""
        trace = covariance.sum() if covariance.ndim == 1 else covariance.trace()
        return float(trace) / (len(covariance) - 1)

    def certainty(self, logits: Tensor) -> Tensor:
        """By how much the first class leads, `(n,)`."""
        return -logits.topk(2, dim=1).values.diff(dim=1).squeeze(1)

    def potential(self, logits: Tensor) -> Tensor:
        """`log sum exp z`."""
        return logits.logsumexp(1)

    # Labels drawn from the model.

    def n_draws(self, n_outputs: int) -> int:
        """One number draws a class."""
        return 1

    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """`e_c - p` for classes c drawn by inversion of the distribution function."""
        return tempered_residuals(logits, drawn_labels(logits, uniforms[:, 0]))

    def hessian_factors(self, logits: Tensor) -> list[Tensor]:
        """`sqrt(p_c) (e_c - p)` for each class c."""
        p = logits.softmax(1)
        every = torch.arange(p.shape[1], device=p.device)
        return [tempered_residuals(logits, c.expand(len(p))) * p[:, c, None].sqrt() for c in every]

    # Out of the sample.

    def encoded(self, labels: Tensor, like: Tensor) -> Tensor:
        """e_y, or y'."""
        return one_hot(labels, like) if self._is_hard(labels) else self._distributions(labels, like)

    def left_out(self, fitted: Tensor, slack: Tensor, labels: Tensor) -> Tensor:
        """`(y' - f) / (1 - H)`."""
        if self._is_hard(labels):
            return leave_one_out_residuals(fitted, slack, labels)
        return super().left_out(fitted, slack, labels)

    def projection_shift(self, left_out: Tensor, labels: Tensor) -> Tensor:
        """What the projection on the simplex takes off each prediction."""
        if not self._is_hard(labels):
            return simplex_shift(self._distributions(labels, left_out) - left_out)
        label = labels[:, None]
        return simplex_shift(left_out.neg().scatter_(1, label, 1 - left_out.gather(1, label)))

    def projected(self, left_out: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
        """`y' - q` for the projection q of `y' - left_out` on the simplex.

        Beside a hard label `-max(-left_out - shift, 0) = min(left_out + shift, 0)`.
        """
        if not self._is_hard(labels):
            y = self._distributions(labels, left_out)
            return y - (y - left_out - shifts).clamp_min(0)
        label = labels[:, None]
        own = 1 - (1 - left_out.gather(1, label) - shifts).clamp_min(0)
        return left_out.add_(shifts).clamp_max_(0).scatter_(1, label, own)

    def possible(self, predictions: Tensor) -> Tensor:
        """On the simplex."""
        return project_on_simplex(predictions)

    def mean_residuals(self, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Half the L1 norm of the residual, for a hard label `1 - p_y`."""
        residuals = self.residuals(logits, labels, temperature)
        hard = self._is_hard(labels)
        return residuals.gather(1, labels[:, None]).squeeze(1) if hard else residuals.abs().sum(1) / 2

    def doubts(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """`1 - p_y`: the residual is this times the gradient of the margin; None for soft labels."""
        hard = self._is_hard(labels)
        return tempered_residuals(logits, labels).gather(1, labels[:, None]) if hard else None
