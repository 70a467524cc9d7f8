"""The exact Gauss-Newton curvature, solved by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..system.memory import blocks
from ..system.saved_values import saved_as
from .curvature import Curvature, Term


@saved_as("curvature.gauss-newton")
@dataclass
class GaussNewtonCurvature(Curvature):
    """F itself, solved by conjugate gradients over the training set for each block of test points.

    Preconditioned by A (x) s I, which reduces hundreds of steps to tens. Products with `diag p - p p^T` are
    taken relative to the most likely class, so that nothing cancels if its p is close to 1.

    Attributes:
        scale: s.
        phi: Scaled features of the training set times `sqrt(omega_i)`, `(n_train, n_features + 1)`.
        others: p / s with 0 at the most likely class, `(n_train, n_classes)`; if the loss treats outputs
            separately, the diagonals of the Hessians divided by s.
        first: The most likely class, `(n_train, 1)` int64; None if the loss treats outputs separately.
        damping: lambda / s, absolute; a number, or one per output.
        inverse: `(A + damping mean(diag A) I)^-1`.
        tolerance: Relative residual at which the solver stops.
        weight: W, the sum of omega; None for n_train.
    """

    scale: float
    phi: Tensor
    others: Tensor
    first: Tensor | None
    damping: float | Tensor
    inverse: Tensor
    tolerance: float = 1e-6
    weight: float | None = None

    def solve(self, phi: Tensor, vectors: Tensor) -> list[Term]:
        """One term per class: the columns of the solution."""
        right = phi[:, :, None] * vectors[:, None, :]
        solution = self._solve(right)
        classes = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
        return [(solution[:, :, c], classes[c].expand_as(vectors)) for c in range(vectors.shape[1])]

    def multiply(self, a: Tensor) -> Tensor:
        """(F + lambda I) a / s for a `(n, n_features + 1, n_classes)`."""
        result = self.damping * a
        weight = len(self.phi) if self.weight is None else self.weight
        for rows in blocks(len(self.phi), 1024):
            phi, p = self.phi[rows], self.others[rows]
            moved = torch.einsum("id,ndc->nic", phi, a)
            if self.first is None:
                moved = p * moved
            else:
                first = self.first[rows].expand(len(a), -1, 1)
                moved = moved - moved.gather(-1, first)
                moved = p * (moved - self.scale * (p * moved).sum(-1, keepdim=True))
                moved.scatter_(-1, first, -moved.sum(-1, keepdim=True))
            result += torch.einsum("id,nic->ndc", phi, moved) / weight
        return result

    def _solve(self, right: Tensor) -> Tensor:
        """Conjugate gradients, all right-hand sides at once; stops when each residual is small."""
        x = 0 * right  # keeps NaN of the right-hand side
        r = right.clone()
        direction = z = self.inverse @ r
        rho = (r * z).sum((1, 2))
        goal = self.tolerance * r.norm(dim=(1, 2))
        for _ in range(10 * right.shape[1] * right.shape[2]):
            if not bool((r.norm(dim=(1, 2)) > goal).any()):  # NaN compares as False
                break
            product = self.multiply(direction)
            step = _ratio(rho, (direction * product).sum((1, 2)))
            x += step * direction
            r -= step * product
            z = self.inverse @ r
            rho, previous = (r * z).sum((1, 2)), rho
            direction = z + _ratio(rho, previous) * direction
        return x


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Quotient for each right-hand side, `(n, 1, 1)`; 0 if the denominator is 0 (converged)."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)[:, None, None]
