"""TRAK (Park et al., 2023): a linear model on randomly projected gradients of the margin.

    score(x, i) = phi(x)^T (Phi^T Phi + lambda I)^-1 phi_i (1 - p_i)

phi_i is the projection of the gradient of the margin m_i of the label, Phi stacks these, and `1 - p_i`
is what stands in the diagonal of the paper's Q. Since `e_y - p = (1 - p_y) dm/dz`, the last factor is the
projection of `J_i^T r_i`, so other residuals r_i apply here as to every gradient method. Of another loss,
m is its default response, summed over the outputs of an example, and r_i its residual. Weights of examples
multiply their terms of `Phi^T Phi` and r_i. Weights omega of several positions t, of classes or their own,
multiply those of r_i, and `phi_i = sum_t sqrt(omega_t) phi_it`, so that `omega_t phi_it phi_it^T` is a part
of `Phi^T Phi`.

The projection is a count sketch. The package `traker` 0.3.2 draws a matrix of the size parameters x
projection_dim anew for each batch where it has no CUDA kernel: for 100 gradients of 535,818 parameters and
2,048 coordinates that took 26 s on one core of a CPU, and the count sketch .07 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_value
from ..influence.method import Query
from ..losses.weights import times_root
from ..system.devices import as_float64, float64_device
from ..system.memory import MOST_ROWS
from ..system.saved_values import saved_as
from .gradients.checks import check_gradients
from .gradients.count_sketch import count_sketch, random_places
from .gradients.damped import DampedMethod
from .gradients.method import GradientState
from .gradients.per_example import Gradients, chosen_parameters
from .gradients.safe_damping import check_damping, given_damping, least_lambda, rounding_of

#: How far below the largest eigenvalue of a matrix in float64 the smallest may be, for scores within 1e-4.
_INVERSE_ROUNDING = 2.0**-38


@saved_as("trak.projected")
@dataclass
class Projected:
    """Projected gradients of the training examples, whatever the damping is.

    Attributes:
        places: Of `count_sketch`.
        gram: `Phi^T Phi`, `(n_coordinates, n_coordinates)` float64.
        n_examples: Sum of the weights of the examples that have a label.
        phi: `(n_train, n_coordinates)`; None without `doubts`.
        doubts: q with `J_i^T (e_y - p) = q phi_i`, `(n_train,)`; None where there is none.
        weights: omega of the examples, `(n_train,)`; None for 1.
        rows: Projections of `J_i^T r_i`, `(n_train, n_coordinates)`; None where they are `omega_i q phi_i`.
    """

    places: Tensor
    gram: Tensor
    n_examples: float
    phi: Tensor | None
    doubts: Tensor | None
    weights: Tensor | None
    rows: Tensor | None


@saved_as("trak")
@dataclass
class TRAKKernel:
    """What TRAK keeps of one model.

    Attributes:
        projected: What does not depend on the damping.
        factor: Lower Cholesky factor of `M^-1 = Phi^T Phi + lambda I`, in float64.
        features: M times the projections of `J_i^T r_i`, `(n_train, n_coordinates)`.
        norms: Norms of these projections in M, `(n_train,)`.
        own: Self-influence, `(n_train,)`; None where gradients beside these are needed for it.
    """

    projected: Projected
    factor: Tensor
    features: Tensor
    norms: Tensor
    own: Tensor | None


class TRAK(DampedMethod[float]):
    """TRAK of one model, or the mean over `checkpoints`, with the same projection.

    As published, a test point is scored by the response that is asked for (the margin) and R, the
    curvature of the loss in the margin, is left out of the kernel: scores are not in units of the response.
    Published ensembles multiply the mean of the scores without Q by the mean of Q; here the mean is of the
    scores. The projected training examples are kept, as they are and times M: `2 * n_train * projection_dim`
    numbers, or 3 of these where other residuals of classes have projections of their own. `damping` may be
    set anew without another `fit`.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        projection_dim: Coordinates of the projection.
        damping: lambda in units of the mean of the largest `min(n_train, projection_dim)` eigenvalues of
            `Phi^T Phi`, the others being 0. Examples of which all labels are ignored, or of classes of
            weight 0, are not among the n_train. With weights of examples, their sum stands for n_train: an
            example of weight 2 is two examples, and one of weight 0 is none. So all weights times a constant
            is another damping where their sum is below projection_dim; let their mean be 1. The default is
            the best of .01, .1, .3, 1 and 3 on digits (LDS). Published: 0, and a projection_dim that is
            tuned.
        seed: Of the projection.
        **options: Those of `GradientMethod`.

    Raises:
        ValueError: An option out of its range; in `fit`, or where it is set anew, a damping at which rounding
            errors would decide (the least safe one is named); in `fit`, a training set of which no example
            counts.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
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
        self.projection_dim, self.damping, self.seed = projection_dim, damping, seed

    @override
    def _checked_damping(self, value: Any) -> float:
        return given_damping(value, positive=False)

    @override
    def _damped(self, state: GradientState, damping: float) -> TRAKKernel:
        return _kernel(state.kernel.projected, damping)

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> TRAKKernel:
        n_parameters = sum(p.numel() for p in chosen_parameters(model, self.layers).values())
        k = min(self.projection_dim, n_parameters)
        places = random_places(n_parameters, k, self.seed).to(residuals.device)
        place = float64_device(residuals.device)
        gram = torch.zeros(k, k, dtype=torch.float64, device=place)
        phis, doubts, sides, labeled = [], [], [], []
        feature = self.loss.responses[0]
        for rows, batch in self.train_blocks(self.n_train_, show_progress):
            with torch.no_grad():
                logits = self.batch_logits(model, batch)
            labels = self.train_labels(batch, logits.shape[1])
            weights = self._position_weights(labels, rows)
            labeled.append(torch.ones(len(batch), dtype=torch.bool) if weights is None else weights.any(1))
            asked = self.loss.asked(logits, batch.labels, "label", feature)
            vectors = self.loss.response_gradient(logits, asked, feature)
            vectors = times_root(vectors, weights)
            of_outputs = self.loss.output_weights(labels)
            if of_outputs is not None:
                vectors = vectors * of_outputs.to(vectors).sqrt()
            phi = count_sketch(self._gradients(model, batch, vectors), places, k)
            check_gradients(phi, rows.start)
            wide = as_float64(phi)
            gram += wide.T @ (wide if self._omega is None else wide * self._omega[rows].to(wide)[:, None])
            doubt = self.loss.doubts(logits, labels)
            if doubt is not None:
                phis.append(phi)
                doubts.append(doubt)
            if self.residuals != "training" or doubt is None:
                sides.append(count_sketch(self._gradients(model, batch, residuals[rows]), places, k))
        n_examples = self._n_counted(torch.cat(labeled))
        omega = None if self._omega is None else self._omega.to(residuals)
        every_phi, q, right = (torch.cat(parts) if parts else None for parts in (phis, doubts, sides))
        doubt = None if q is None else q.squeeze(1)
        return _kernel(Projected(places, gram, n_examples, every_phi, doubt, omega, right), self.damping)

    def _n_counted(self, labeled: Tensor) -> float:
        """The sum of the weights of examples that have a label, `labeled` `(n_train,)` bool."""
        omega = self._omega
        total = float(labeled.sum() if omega is None else omega[labeled.to(omega.device)].sum())
        if not total > 0:
            must = "hold an example with a label that is not ignored, and a weight above 0"
            raise bad_value("train_dataset", must, "none")
        return total

    def _side(self, kernel: TRAKKernel, gradients: Gradients) -> Tensor:
        return count_sketch(gradients, kernel.projected.places, len(kernel.factor))

    def _precondition(self, kernel: TRAKKernel, sides: Tensor) -> Tensor:
        return _applied(kernel.factor, sides)[0]

    @override
    def prepare_query(self, state: GradientState, model: nn.Module, batch: Any, query: Query) -> Tensor:
        vectors = self._response_gradients(model, batch, query)
        return self._side(state.kernel, self._gradients(model, batch, vectors))

    @override
    def score_columns(self, state: GradientState, prepared: Any, columns: slice) -> Tensor:
        scores: Tensor = prepared @ state.kernel.features[columns].T
        return scores

    @override
    def query_vectors(self, state: GradientState, prepared: Any) -> Tensor | None:
        sides: Tensor = prepared
        return sides

    @override
    def train_vectors(self, state: GradientState, rows: Tensor) -> Tensor | None:
        features: Tensor = state.kernel.features
        return features[rows.to(features.device)]

    @override
    def test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        return _applied(state.kernel.factor, prepared)[1]

    def _inverse_norms(self, state: GradientState, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        state.norms = state.kernel.norms
        return super()._inverse_norms(state, prepared, model)

    @override
    def train_self_influence(self, state: GradientState) -> Tensor | None:
        own: Tensor | None = state.kernel.own
        return own  # None: the other side, `J_i^T (e_y - p)`, is projected when it is asked for

    @override
    def settings(self) -> dict[str, Any]:
        names = ("projection_dim", "damping", "seed")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}


def _kernel(projected: Projected, damping: float) -> TRAKKernel:
    """The kernel of a damping: M is applied to phi itself, since q phi, rounded, leaves the span of Phi."""
    phi, q, rows = projected.phi, projected.doubts, projected.rows
    given = phi if rows is None else rows
    assert given is not None, "one of the two"
    factor = _factor(projected.gram, projected.n_examples, damping, given.dtype)
    features, norms = _applied(factor, given)
    if q is None or phi is None:
        return TRAKKernel(projected, factor, features, norms, None)
    if rows is not None:
        own = (_applied(factor, phi)[0] * rows).sum(1) * q
        return TRAKKernel(projected, factor, features, norms, own)
    omega = torch.ones_like(q) if projected.weights is None else projected.weights
    norms, features = norms * q.abs(), features * (q * omega)[:, None]
    return TRAKKernel(projected, factor, features, norms * omega, norms.square() * omega)


def _factor(gram: Tensor, n_examples: float, damping: float, dtype: torch.dtype) -> Tensor:
    """Cholesky factor of `M^-1` of `Phi^T Phi`, a sum over so many examples of products of some dtype.

    Raises:
        ValueError: A damping at which rounding errors would decide.
    """
    rank, trace = min(len(gram), n_examples), float(gram.trace())
    unit, rounding = trace / rank, rounding_of(dtype)
    given = damping * unit
    if given < rounding * trace:  # more is safe whatever the eigenvalues are
        spectrum = torch.linalg.eigvalsh(gram)
        # With more coordinates than examples the rest is 0, which matters for the inverse alone.
        least = max(
            least_lambda(spectrum[-math.ceil(rank) :], rounding),
            least_lambda(spectrum, _INVERSE_ROUNDING),
        )
        check_damping(damping, [(least, given, unit)], rounding, "Or lower projection_dim.")
    factor: Tensor = torch.linalg.cholesky(gram + torch.eye(len(gram)).to(gram) * given)
    return factor


def _applied(factor: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """M times each row, and its norm in M; in float64 inside, in the dtype of the rows outside."""
    applied, norms = [], []
    for part in sides.split(MOST_ROWS):
        half = torch.linalg.solve_triangular(factor, as_float64(part).T, upper=False)
        norms.append(torch.linalg.vector_norm(half, dim=0).to(sides))
        applied.append(torch.linalg.solve_triangular(factor.T, half, upper=True).T.to(sides))
    return torch.cat(applied), torch.cat(norms)
