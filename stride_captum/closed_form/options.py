"""`ClosedForm`: options of the closed-form operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from ..errors import bad_value
from ..operators import FittedOperators, Operators, TrainingSet
from ..options import check_choice, check_number
from ..system.saved_values import saved_as
from .estimate import estimate_closed_form
from .fit import fit_closed_form
from .memory import smaller_form
from .position_scores import PositionOperators

if TYPE_CHECKING:
    from ..influence.estimate import Estimate
    from ..stride import STRIDE

Residuals = Literal["training", "temperature", "leave-one-out", "both"]
Form = Literal["auto", "rows", "matrix"]
Curvature = Literal["identity", "kronecker", "eigenvalue-corrected", "gauss-newton"]


@saved_as("options.closed-form")
@dataclass(frozen=True, kw_only=True)
class ClosedForm(Operators):
    """Closed-form operators of all singleton subsets: the default of `STRIDE`.

        a_i = 1/N (F + lambda)^-1 phi_i (x) r_i,  F = E[phi phi^T (x) (diag p - p p^T)]

    the first-order response of a steering operator to the fidelity loss of one example under the stability
    loss (equations 1 and 2). No network is trained and no gradient of the network is taken.

    Attributes:
        residuals: How `r_i = e_y - p` of a training example is estimated: "training" (the model's own),
            "temperature" (p = softmax(z / T)), "leave-one-out" (of a ridge head on all layers but the last)
            or "both" (weighted mean of the last two). None means "both" for one model, and "temperature" for
            several checkpoints: the ridge head helps one and hurts averages. Losses without a temperature
            have no "temperature".
        temperature: T; None means 2 for one model, and one value per checkpoint for several (see
            `stride_captum.influence.temperature`); with `held_out` data it is matched to them.
        damping: lambda, relative to the mean diagonal of the curvature.
        head_damping: lambda of the ridge head, likewise relative.
        curvature: How the Fisher F is approximated: "identity" (A (x) s I), "kronecker" (A (x) Sigma),
            "eigenvalue-corrected" (exact diagonal in the eigenbasis of A (x) Sigma) or "gauss-newton" (exact,
            by conjugate gradients). The last two cost n_classes products or more.
        threshold: The Lasso's alpha, which for singleton subsets is a soft threshold on the scores; 0 keeps
            them dense.
        form: For examples with several positions, what is kept of each: "rows" (features and residuals of
            every position), "matrix" (their summed products), or "auto", the one that takes less memory.

    >>> ClosedForm(damping=0.1, residuals="temperature").damping
    0.1
    """

    name: ClassVar[str] = "closed-form"
    aliases: ClassVar[Sequence[str]] = ("newton",)
    takes_positions: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    changeable: ClassVar[bool] = True

    residuals: Residuals | None = None
    temperature: float | None = None
    damping: float = 0.3
    head_damping: float = 0.1
    curvature: Curvature = "kronecker"
    threshold: float = 0.0
    form: Form = "auto"

    def check(self) -> None:
        """Refuse values out of their range."""
        if self.residuals is not None:
            check_choice("residuals", self.residuals, get_args(Residuals))
        check_choice("curvature", self.curvature, get_args(Curvature))
        check_choice("form", self.form, get_args(Form))
        check_number("damping", self.damping, positive=True)
        check_number("head_damping", self.head_damping, positive=True)
        check_number("threshold", self.threshold, positive=False)
        if self.temperature is not None:
            check_number("temperature", self.temperature, positive=True)

    def fit(self, training: TrainingSet) -> FittedOperators:
        """Fit the closed form (see `fit_closed_form`)."""
        form = fit_closed_form(
            training.features,
            training.logits,
            training.labels,
            training.widths,
            self if self.residuals else replace(self, residuals=training.usual_residuals),
            training.temperature(self.temperature),
            memory_budget=training.memory_budget,
            ranks=training.ranks,
            moments=training.known,
            loss=training.loss,
            weights=training.weights,
            positions=training.positions,
        )
        if training.positions is None:
            return form
        by_rows = PositionOperators.of(form, training.memory_budget, training.ranks)
        sizes = by_rows.n_train, form.n_train, sum(training.widths), form.n_classes
        return by_rows.in_form(smaller_form(self.form, *sizes))

    def check_shared(self) -> None:
        """Refuse conjugate gradients, which need the whole training set in one place."""
        if self.curvature == "gauss-newton":
            raise bad_value("curvature", "be another one in a process group", "'gauss-newton'", "Use STRIDE.")

    def estimate(self, method: STRIDE, n_test: int, k: int | None) -> Estimate | None:
        """By counting, if there is one Kronecker term and no projection."""
        counted = self.curvature in ("identity", "kronecker") and method.features.projection is None
        return estimate_closed_form(method, n_test, k) if counted else None
