"""The paper's EKFAC (Appendix E.2): gradients divided by a mostly diagonal Fisher information F.

    score(x, i) = 1/W (J_x^T g)^T (F + eps)^-1 (J_i^T r_i),    W = n_train without weights

F is diagonal for convolutions, norm layers and biases. For the weights of dense layers, with inputs a and
output gradients b, it is `E[b b^T] (x) E[a a^T]`, and is inverted in its eigenbasis. (EKFAC as others know it
has Kronecker factors for convolutions too, and corrects the eigenvalues.)

Weights of examples multiply their terms of F and of both means, class weights and weights of positions those
of the positions of an example; positions that no label depends on, as padding, are not in the mean over a. An
example whose labels are all ignored has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_choice, bad_value
from ..losses.weights import times_root
from ..system.devices import as_float64
from ..system.saved_values import saved_as
from .gradients.damped import DampedMethod
from .gradients.dense_sides import all_weigh_1, dense_layers, dense_sides, order_of_rows, weights_of_rows
from .gradients.fisher import FISHERS, fisher_sample, fisher_vectors
from .gradients.method import GradientState
from .gradients.per_example import example_gradients, highest_dtype
from .gradients.safe_damping import check_damping, given_damping, least_lambda, rounding_of

DENSE = ("kronecker", "diagonal")


@saved_as("diagonal-ekfac")
@dataclass
class DiagonalKernel:
    """M of one model, by parameter.

    Attributes:
        spectra: F in the shape of the parameter, in the eigenbasis if it has one.
        bases: Eigenvectors of `E[b b^T]` and of `E[a a^T]`, in columns, for each dense layer.
        scales: `1 / (W (F + eps))` in the shape of the parameter.
    """

    spectra: dict[str, Tensor]
    bases: dict[str, list[Tensor]]
    scales: dict[str, Tensor]


class DiagonalEKFAC(DampedMethod[float]):
    """The EKFAC baseline of E.2.

    E.2 leaves three choices open. It gives no value of eps: here it is relative, because F of a confident
    model is tiny. It does not say whose labels F is of. Its text gives dense layers Kronecker factors,
    while its formula `v_i = grad l(z_i) / (F_diag + eps)` divides every parameter elementwise.

    `damping` may be set anew without another `fit`.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        damping: eps. The default is within .02 of the best of .01 to 10 on digits (LDS, as published).
        relative: Whether eps is in units of the mean of F over each parameter tensor.
        dense: "kronecker" or "diagonal": F of the weights of Linear layers. Those whose weights are used
            without a call of the layer are diagonal in any case.
        fisher: Labels of F: "sampled" from the prediction, their "exact" expectation (as many backward
            passes as there are classes, and less noise), or those of the training set ("empirical").
        n_fisher: Training examples that F is estimated from.
        seed: Of the choice of these and of the sampled labels.
        **options: Those of `GradientMethod`.

    Raises:
        ValueError: An option out of its range; in `fit`, a relative eps where F is 0 throughout; in `fit`, or
            where it is set anew, one at which rounding errors would decide (the least safe one is named).

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> DiagonalEKFAC(model, train, fisher="exact").influence(test.tensors).shape
    torch.Size([7, 48])
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        damping: float = 0.1,
        relative: bool = True,
        dense: str = "kronecker",
        fisher: str = "sampled",
        n_fisher: int = 1000,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, **options)
        if dense not in DENSE:
            raise bad_choice("dense", dense, DENSE)
        if fisher not in FISHERS:
            raise bad_choice("fisher", fisher, FISHERS)
        if not isinstance(n_fisher, int) or n_fisher < 1:
            raise bad_value("n_fisher", "be an integer of at least 1", repr(n_fisher))
        self.relative, self.dense, self.damping = bool(relative), dense, damping
        self.fisher, self.n_fisher, self.seed = fisher, n_fisher, seed

    @override
    def _checked_damping(self, value: Any) -> float:
        return given_damping(value, positive=True)

    @override
    def _damped(self, state: GradientState, damping: float) -> DiagonalKernel:
        return self._kernel(state.kernel.spectra, state.kernel.bases, damping)

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> DiagonalKernel:
        self._check_weight()
        self._n_outputs = residuals.shape[1]
        fisher: dict[str, list[Tensor]] = {}
        parameters = {name: p.detach() for name, p in model.named_parameters() if name in self.parameters_}
        layers = dense_layers(model, parameters) if self.dense == "kronecker" else {}
        vectors = self._probe_vectors(model)
        order = order_of_rows(model, layers, self._probe, vectors, self._rounding)
        n = self._fisher_weight()
        for batch, uniforms, places in self._fisher_batches(show_progress):
            with torch.no_grad():
                logits = self.batch_logits(model, batch)
            labels = self.train_labels(batch, logits.shape[1])
            own = self._position_weights(labels, places)
            omega = None if self._omega is None else self._omega[places]
            draws = fisher_vectors(self.fisher, logits, labels, uniforms, self.loss, own)
            draws = [times_root(v, omega) for v in draws]
            weights = logits.new_ones(len(batch)) if omega is None else omega.to(logits)
            alike = order == "any" and all_weigh_1(own) and len(weights.unique()) == 1
            size = len(batch) if order == "by example" or alike else 1
            groups = list(torch.arange(len(batch), device=weights.device).split(size))
            pieces = [batch] if len(groups) == 1 else [batch[some] for some in groups]
            counted = [
                weights_of_rows(model, layers, piece, None if own is None else own[some], logits.shape[1])
                for piece, some in zip(pieces, groups, strict=True)
            ]
            for vectors in draws:
                dense: set[str] = set()
                for piece, some, kept in zip(pieces, groups, counted, strict=True):
                    for name, (a, b) in dense_sides(model, layers, piece, vectors[some]).items():
                        # The positions of an example add up in one factor, and are averaged in the other.
                        of_rows = weights[some].repeat_interleave(len(a) // len(some)).to(a)
                        if name in kept:
                            of_rows = of_rows * kept[name].to(of_rows)
                        inputs = a.T @ (a * of_rows[:, None])
                        _add(fisher, name, [b.T @ b / n, inputs, of_rows.sum()])
                        dense.add(name)
                others = {name: p for name, p in parameters.items() if name not in dense}
                if others:
                    for name, g in example_gradients(model, others, batch, vectors).items():
                        _add(fisher, name, [g.square().sum(0) / n])
        if not all(bool(torch.isfinite(part).all()) for parts in fisher.values() for part in parts):
            self._find_bad_gradient(model, residuals)
        # Gradients have the highest precision of all parameters.
        highest = highest_dtype(parameters.values())
        parts = {name: [part.to(highest) for part in fisher[name]] for name in parameters}
        return self._kernel(*_spectra(parts), self.damping)

    def _fisher_weight(self) -> float:
        """The sum of the weights of the examples that F is estimated from."""
        if self._omega is None:
            return min(self.n_fisher, self.n_train_)
        chosen, _ = fisher_sample(self.n_train_, self.n_fisher, self.seed)
        total = float(self._omega[chosen].sum())
        if not total > 0:
            got = f"weights of 0 for all {len(chosen)} that F is estimated from"
            raise bad_value("n_fisher", "take in examples with a weight above 0", got, "Raise it.")
        return total

    def _fisher_batches(self, show_progress: bool) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Examples that F is estimated from, what draws their labels, and their places."""
        n_draws = self.loss.n_draws(self._n_outputs)
        chosen, uniforms = fisher_sample(self.n_train_, self.n_fisher, self.seed, n_draws)
        device = self._work_device()
        for rows, batch in self.train_blocks(self.n_train_, show_progress):
            inside = (chosen >= rows.start) & (chosen < rows.stop)
            if inside.any():
                places = chosen[inside]
                yield batch[places - rows.start], uniforms[inside].to(device), places

    def _kernel(
        self, spectra: dict[str, Tensor], bases: dict[str, list[Tensor]], damping: float
    ) -> DiagonalKernel:
        scales, safe, rounding = {}, [], 0.0
        for name, spectrum in spectra.items():
            unit = float(spectrum.mean()) if self.relative else 1.0
            damped = spectrum + damping * unit
            if name in bases:
                rounding = rounding_of(spectrum.dtype)
                safe.append((least_lambda(spectrum, rounding), damping * unit, unit))
            # A tensor that F says nothing about takes no part. Not where(damped > 0): NaN must stay NaN.
            scales[name] = torch.where(damped == 0, 0, 1 / (self.weight_ * damped))
        if not any(bool(scale.any()) for scale in scales.values()):
            remedy = "Take relative=False, or another one."
            raise bad_value("fisher", "be above 0 somewhere", f"0 throughout from {self.fisher!r}", remedy)
        check_damping(damping, safe, rounding, "Or take dense='diagonal'.")
        return DiagonalKernel(spectra, bases, scales)

    def _precondition(self, kernel: DiagonalKernel, sides: Tensor) -> Tensor:
        pieces = sides.split([scale.numel() for scale in kernel.scales.values()], dim=1)
        done = []
        for (name, scale), piece in zip(kernel.scales.items(), pieces, strict=True):
            if name in kernel.bases:
                left, right = kernel.bases[name]
                inside = left.T @ piece.unflatten(1, scale.shape) @ right
                done.append((left @ (inside * scale) @ right.T).flatten(1))
            else:
                done.append(piece * scale.flatten())
        return torch.cat(done, dim=1)

    @override
    def settings(self) -> dict[str, Any]:
        names = ("damping", "relative", "dense", "fisher", "n_fisher", "seed")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}


def _spectra(fisher: Mapping[str, list[Tensor]]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """F by parameter, and the eigenbases of dense layers, from the sums over examples."""
    spectra, bases = {}, {}
    for name, parts in fisher.items():
        spectra[name] = parts[0]
        if len(parts) == 3:
            b, a, n_inputs = parts
            sides = b, a / torch.where(n_inputs > 0, n_inputs, 1.0)
            (u, left), (v, right) = (torch.linalg.eigh(as_float64(side)) for side in sides)
            bases[name] = [left.to(b), right.to(b)]
            spectra[name] = (u.clamp_min(0)[:, None] * v.clamp_min(0)).to(b)
    return spectra, bases


def _add(total: dict[str, list[Tensor]], name: str, parts: list[Tensor]) -> None:
    total[name] = [a + b for a, b in zip(total[name], parts, strict=True)] if name in total else parts
