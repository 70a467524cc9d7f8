"""Owns TRAK (Park et al., 2023): a linear model on randomly projected gradients of the margin.

    score(x, i) = phi(x)^T (Phi^T Phi + lambda I)^-1 phi_i (1 - p_i)

phi_i is the projection of the gradient of the margin m_i of the label, Phi stacks these, and `1 - p_i`
is what stands in the diagonal of the paper's Q. Since `e_y - p = (1 - p_y) dm/dz`, the last factor is the
projection of `J_i^T r_i`, so other residuals r_i apply here as to every gradient method.

The projection is a count sketch. The package `traker` 0.3.2 draws a matrix of the size parameters x
projection_dim anew for each batch where it has no CUDA kernel: for 100 gradients of 535,818 parameters and
2,048 coordinates that took 26 s on one core of a CPU, and the count sketch .07 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import float64_device, matching
from ..errors import bad_value
from ..responses import response_gradient
from .count_sketch import count_sketch, random_places
from .gradients import GradientMethod, GradientState
from .per_example_gradients import Gradients, chosen_parameters


@dataclass
class TRAKKernel:
    """What TRAK keeps of one model.

    Attributes:
        places: Of `count_sketch`.
        inverse: `(Phi^T Phi + lambda I)^-1`, `(n_coordinates, n_coordinates)`.
        features: Projections of `J_i^T r_i`, `(n_train, n_coordinates)`.
    """

    places: Tensor
    inverse: Tensor
    features: Tensor


class TRAK(GradientMethod):
    """TRAK of one model, or the mean over `checkpoints`, with the same projection.

    As published, a test point is scored by the response that is asked for (the margin) and R, the
    curvature of the loss in the margin, is left out of the kernel: scores are not in units of the response.
    Published ensembles multiply the mean of the scores without Q by the mean of Q; here the mean is of the
    scores. The projected training examples are kept: `n_train * projection_dim` numbers.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        projection_dim: Coordinates of the projection.
        damping: lambda in units of the mean of the largest `min(n_train, projection_dim)` eigenvalues of
            `Phi^T Phi`, the others being 0. The default is the best of .01, .1, .3, 1 and 3 on digits
            (LDS). Published: 0, and a projection_dim that is tuned.
        seed: Of the projection.
        **options: Those of `GradientMethod`.

    Raises:
        ValueError: An option out of its range; in `fit`, a damping below the rounding errors of a
            singular kernel.

    >>> from stride_captum.conformance.planted import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> TRAK(model, train, projection_dim=64).influence(test.tensors, 3).indices.shape
    torch.Size([7, 3])
    """

    # It keeps what it needs of it.
    reads_training_data = False

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        projection_dim: int = 2048,
        damping: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, **options)
        if not isinstance(projection_dim, int) or projection_dim < 1:
            raise bad_value("projection_dim", "be an integer of at least 1", repr(projection_dim))
        if not 0 <= damping < float("inf"):
            raise bad_value("damping", "be a number of at least 0", damping)
        self.projection_dim, self.damping, self.seed = projection_dim, damping, seed

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> TRAKKernel:
        n_parameters = sum(p.numel() for p in chosen_parameters(model, self.layers).values())
        k = min(self.projection_dim, n_parameters)
        places = random_places(n_parameters, k, self.seed).to(residuals.device)
        place = float64_device(residuals.device)
        gram, features = torch.zeros(k, k, dtype=torch.float64, device=place), []
        for rows, batch in self._train_blocks(self.n_train_, show_progress):
            with torch.no_grad():
                logits = self._logits(model, batch)
            labels = self._train_labels(batch, logits.shape[1])
            margins = response_gradient(logits, labels, "margin")
            phi = count_sketch(self._gradients(model, batch, margins), places, k)
            gram += matching(phi.T @ phi, gram)
            if self.residuals == "training":
                features.append(phi * residuals[rows].gather(1, labels[:, None]))
            else:
                features.append(count_sketch(self._gradients(model, batch, residuals[rows]), places, k))
        return TRAKKernel(places, self._inverse(gram).to(residuals), torch.cat(features))

    def _inverse(self, gram: Tensor) -> Tensor:
        rank = min(len(gram), self.n_train_)
        damped = gram + torch.eye(len(gram)).to(gram) * (self.damping * gram.trace() / rank)
        factor, info = torch.linalg.cholesky_ex(damped)
        if bool(info) or (self.damping == 0 and rank < len(gram)):
            raise bad_value(
                "damping",
                "be large enough to make the kernel positive definite",
                self.damping,
                "Raise it (the default is 1), or lower projection_dim below the number of examples.",
            )
        return torch.cholesky_inverse(factor)

    def _side(self, kernel: TRAKKernel, gradients: Gradients) -> Tensor:
        return count_sketch(gradients, kernel.places, len(kernel.inverse))

    def _precondition(self, kernel: TRAKKernel, sides: Tensor) -> Tensor:
        return sides @ kernel.inverse

    def _scores(self, state: GradientState, prepared: Any, columns: slice) -> Tensor:
        scores: Tensor = prepared.preconditioned @ state.kernel.features[columns].T
        return scores

    def _train_norms(self, state: GradientState) -> Tensor:
        features = state.kernel.features
        return self._norms(state, features, self._precondition(state.kernel, features))

    def _inverse_norms(self, state: GradientState, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        if state.norms is None:
            state.norms = self._train_norms(state)
        return super()._inverse_norms(state, prepared, model)

    def _train_self_influence(self, state: GradientState) -> Tensor | None:
        return self._train_norms(state).square() if self.residuals == "training" else None

    def _settings(self) -> dict[str, Any]:
        names = ("projection_dim", "damping", "seed")
        return {**super()._settings(), **{name: getattr(self, name) for name in names}}
