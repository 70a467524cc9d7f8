"""Losses that are a sum over outputs: several labels, regression, and yours.

    loss(z, y) = sum_c l(z_c, y_c)        H = diag E[l'']

What a response is about is written as one number an output: the label y_c, and NaN for an output that is not
asked for. A response is a sum over the outputs that are.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import bad_value
from ..responses import not_one_row
from ..system.devices import as_float64, float64_device, on_device
from .base import Loss, Target, needs_labels
from .hessians import DiagonalHessians


class SeparateOutputs(Loss):
    """A loss that is a sum over outputs; labels are `(n, n_outputs)`, or `(n,)` where there is one output.

    A subclass says `elementwise` and `curvatures`, and `terms` where it has more responses than "output"
    and "loss".

    A ridge head that has not seen an example predicts q for its label y. Its residual is how much `-l'` at
    the model's output changes from the label q to the label y: `s (y - q)` for `l = s (a(z) - y z)`, so that
    scores of the response "output" are the same for any multiple of the loss.

    Attributes:
        label_free: Responses that need no labels.

    >>> from dataclasses import dataclass
    >>> from stride_captum.system.saved_values import saved_as
    >>> @saved_as("doctest.poisson")
    ... @dataclass(frozen=True)
    ... class Poisson(SeparateOutputs):
    ...     name = "poisson"
    ...     def elementwise(self, logits, labels):
    ...         return logits.exp() - labels * logits
    ...     def curvatures(self, logits):
    ...         return logits.exp()
    >>> Poisson().residuals(torch.zeros(1, 2), torch.tensor([[2.0, 3.0]]))
    tensor([[1., 2.]])
    """

    responses: ClassVar[tuple[str, ...]] = ("output", "loss")
    label_free: ClassVar[tuple[str, ...]] = ("output",)
    apart: ClassVar[bool] = True
    tempered: ClassVar[bool] = False
    label_units: ClassVar[bool] = False

    # What a subclass says.

    @abstractmethod
    def elementwise(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`l(z_c, y_c)`, of the shape of both."""

    @abstractmethod
    def curvatures(self, logits: Tensor) -> Tensor:
        """`E[l''(z_c)]`, of the shape of z."""

    def terms(self, logits: Tensor, labels: Tensor, response: str) -> Tensor:
        """The response of each output, of the shape of z."""
        return logits if response == "output" else self._losses(logits, labels)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`elementwise`, checked."""
        return self._of_each_output("elementwise", self.elementwise(logits, labels), logits)

    def _curvatures(self, logits: Tensor) -> Tensor:
        """`curvatures`, checked."""
        return self._of_each_output("curvatures", self.curvatures(logits), logits)

    def _of_each_output(self, method: str, found: Any, logits: Tensor) -> Tensor:
        """What a method of a subclass returns, if it has the shape of the outputs.

        Raises:
            ValueError: It is a mean or a sum, a number, or of another shape.
        """
        if isinstance(found, Tensor) and found.shape == logits.shape:
            return found
        must = f"return a tensor of the shape of the outputs, {tuple(logits.shape)}, one number for each"
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        remedy = "Take no mean or sum (reduction='none'); a constant is torch.full_like(logits, constant)."
        raise bad_value(f"{type(self).__name__}.{method}", must, got, remedy)

    # Outputs and labels.

    def logits(self, outputs: Tensor) -> Tensor:
        """Outputs as `(n, n_outputs)`.

        Raises:
            ValueError: Sequence or map outputs.
        """
        rows = outputs[:, None] if outputs.ndim == 1 else outputs
        if rows.ndim != 2:
            raise not_one_row(outputs, "outputs of shape (n, n_outputs)")
        return rows

    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        """Labels as `(n, n_outputs)` floats."""
        rows = labels[:, None] if labels.ndim == 1 and n_outputs == 1 else labels
        if rows.ndim != 2 or rows.shape[1] != n_outputs or rows.is_complex():
            shapes = f"(n, {n_outputs})" + (" or (n,)" if n_outputs == 1 else "")
            must = f"hold labels of shape {shapes} for loss={self.name!r}"
            remedy = "One label must stand for each output; class indices need loss='cross_entropy'."
            raise bad_value(argument, must, f"shape {tuple(labels.shape)}", remedy)
        exact = torch.float64 if float64_device(rows.device) == rows.device else torch.float32
        dtype = rows.dtype if rows.dtype in (torch.float32, torch.float64) else exact
        wide = rows.to(torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else dtype)
        finite = torch.isfinite(wide).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise bad_value(argument, "hold finite labels", f"NaN or infinity in row {row} of a batch")
        return wide

    # Responses.

    def asked(self, logits: Tensor, labels: Tensor | None, target: Target, response: str) -> Tensor:
        """The label of each output that is asked for, NaN for the others, `(n, n_outputs)`."""
        if isinstance(target, str) and target == "predicted":
            return self.predicted(logits)
        given = (
            None
            if labels is None
            else self.labels(on_device(labels, logits.device), logits.shape[1], "inputs")
        )
        if given is None:
            if response not in self.label_free:
                raise needs_labels(target)
            given = torch.ones_like(logits)
        given = given.to(logits)
        if isinstance(target, str):
            return given
        chosen = self.output_indices(target.to(logits.device), logits.shape[1])
        outside = torch.ones_like(logits, dtype=torch.bool).scatter_(1, chosen[:, None], False)
        return given.masked_fill(outside, float("nan"))

    def predicted(self, logits: Tensor) -> Tensor:
        """The labels that the model predicts.

        Raises:
            ValueError: They would be its outputs, at which the loss has no gradient.
        """
        must = f"be 'label' or output indices for loss={self.name!r}"
        raise bad_value("target", must, "'predicted'")

    @staticmethod
    def output_indices(target: Tensor, n_outputs: int) -> Tensor:
        """Indices of outputs, `(n,)` int64.

        Raises:
            ValueError: Others than 0 to n_outputs - 1.
        """
        flat = target.reshape(-1)
        whole = not flat.is_floating_point() and not flat.is_complex()
        if not whole or bool(((flat < 0) | (flat >= n_outputs)).any()):
            raise bad_value("target", f"hold output indices in [0, {n_outputs})", target.tolist())
        return flat.long()

    def response_value(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """Summed over the outputs that are asked for, `(..., n)`."""
        self.check_response(response)
        outside = asked.isnan()
        terms = self.terms(logits, asked.masked_fill(outside, 0.0), response)
        terms = self._of_each_output("terms", terms, logits)
        return terms.masked_fill(outside.expand_as(terms), 0.0).sum(-1)

    def response_gradient(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        """Of "loss", minus the residuals of the outputs that are asked for; of others by autograd."""
        if response != "loss":
            return super().response_gradient(logits, asked, response)
        outside = asked.isnan()
        return -self.residuals(logits, asked.masked_fill(outside, 0.0)).masked_fill(outside, 0.0)

    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row, `(n,)`."""
        return self._losses(logits, labels.to(logits)).sum(-1)

    # Residuals and curvature.

    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """`-l'`, by autograd unless a loss knows it."""
        with torch.enable_grad():
            leaf = (logits.detach() / temperature).requires_grad_()
            (gradient,) = torch.autograd.grad(self.values(leaf, labels).sum(), leaf)
        return -gradient

    def hessians(self, logits: Tensor, temperature: float) -> DiagonalHessians:
        """Diagonals; NaN where an output or its curvature is not finite."""
        z = logits / temperature
        found = self._curvatures(z)
        diagonals = torch.where(z.isfinite() & found.isfinite(), found, torch.nan)
        return DiagonalHessians(diagonals, lambda labels: self.residuals(logits, labels, temperature))

    def covariance(self, total: Tensor) -> Tensor:
        """The sum itself, `(n_outputs,)`."""
        return total

    def potential(self, logits: Tensor) -> Tensor:
        """The loss for labels of 0, whose curvature is that of any."""
        return self._losses(logits, torch.zeros_like(logits)).sum(1)

    def hessian_factors(self, logits: Tensor) -> list[Tensor]:
        """`sqrt(H_cc) e_c` for each output c."""
        roots = self._curvatures(logits).clamp_min(0).sqrt()
        return list(torch.diag_embed(roots).unbind(1))

    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Normal residuals with the variance of the loss's gradient, which is H."""
        tiny = torch.finfo(torch.float64).eps
        normal: Tensor = torch.special.ndtri(as_float64(uniforms).clamp(tiny, 1 - tiny)).to(logits)
        return self._curvatures(logits).clamp_min(0).sqrt() * normal

    # Out of the sample.

    def encoded(self, labels: Tensor, like: Tensor) -> Tensor:
        """The labels."""
        return labels.to(like)

    def projected(self, left_out: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
        """`left_out`: every prediction can be."""
        return left_out

    def possible(self, predictions: Tensor) -> Tensor:
        """The predictions."""
        return predictions

    def of_ridge_head(
        self, differences: Tensor, logits: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """`l'(z, q) - l'(z, y)`."""
        if self.label_units:
            return differences
        y = labels.to(logits)
        own = self.residuals(logits, y, temperature)
        return (own - self.residuals(logits, y - differences.to(y), temperature)).to(differences)

    def ridge_ratio(self, residual_square: Any, ridge_square: Any) -> Tensor | float:
        """1 without a temperature: both parts are in units of the residuals."""
        return super().ridge_ratio(residual_square, ridge_square) if self.tempered else 1.0
