"""Gaussian posterior of the effects of training examples, given the responses of retrained models.

`X diag(s^2) X^T` of each test point is diagonalized once; at given hyperparameters the posterior is then a
few products (formulas in `refinement.refine`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from ..system.devices import as_float64, matching
from ..system.memory import blocks, spread_rows
from .design import Design, read_membership
from .marginal_likelihood import Hyperparameters, MarginalLikelihood
from .score_shape import fit_shape, relative, shaped

_BLOCK_CELLS = 2**22  # float64 numbers in one array
_GPU_BLOCK_FACTOR = 16
_SHAPE_POINTS = 200  # test points that determine the shape
_KEPT_CELLS = 2**27  # float64 numbers of eigenvectors that are cached


class Spectra(NamedTuple):
    """Test points in the eigenbasis of `X diag(s^2) X^T`, in units of u.

    Attributes:
        rows: `(n_test,)` bool, test points that are used for the estimates.
        likelihood: Of these test points, in the eigenbasis.
        predicted: X s of these test points, `(n, n_subsets)`.
        measured: y of these test points, `(n, n_subsets)`.
    """

    rows: Tensor
    likelihood: MarginalLikelihood
    predicted: Tensor
    measured: Tensor


class _Block(NamedTuple):
    """Block of test points: scores s, their largest absolute value, u relative to it, and eigenvectors."""

    scores: Tensor
    size: Tensor
    unit: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    predicted: Tensor
    measured: Tensor


class EffectPosterior:
    """Validated scores, centered columns and centered responses.

    Attributes:
        scores: As they came, `(n_test, n_train)`, in a floating dtype.
        shape: In which the prior is around them.

    Args:
        scores: As for `refine`, as are all others.
        membership: See there.
        measured: See there.
        power: Of the shape; None estimates it from up to 200 test points, evenly spaced.
        opponents: Likewise.
    """

    def __init__(
        self,
        scores: Any,
        membership: Any,
        measured: Any,
        power: float | None = 1.0,
        opponents: float | None = 1.0,
    ) -> None:
        matrix = read_membership(membership)
        self.n_subsets, n_train = matrix.shape
        if self.n_subsets < 3:
            raise bad_value("membership", "hold at least 3 subsets", self.n_subsets)
        given = _matrix("scores", scores, n_train, "n_train", "columns")
        y = _matrix("measured", measured, self.n_subsets, "n_subsets", "rows")
        if len(y) != len(given):
            raise bad_value("measured", f"have a row for each of the {len(given)} rows of `scores`", len(y))
        self.scores = given if given.is_floating_point() else given.double()
        y = as_float64(y).to(as_float64(self.scores[:0]).device)
        finite = torch.isfinite(self.scores).all(1).to(y.device) & torch.isfinite(y).all(1)
        self.finite = finite
        y = torch.where(finite[:, None], y, 0.0)
        self.y = y - y.mean(1, keepdim=True)
        self.columns = Design(matrix, True, y.device)
        cells = _BLOCK_CELLS * (1 if y.device.type == "cpu" else _GPU_BLOCK_FACTOR)
        self.n_rows = max(1, cells // max(n_train, self.n_subsets**2))
        self.n_columns = max(1, cells // (self.n_rows * self.n_subsets))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        rows = self.finite.nonzero()[:, 0]
        rows = rows[spread_rows(len(rows), _SHAPE_POINTS).to(rows.device)]
        some = matching(self.scores[rows.to(self.scores.device)], self.y)
        self.shape = fit_shape(some, self.columns, self.y[rows], power, opponents)

    def _shaped(self, rows: slice) -> Tensor:
        """Scores in their shape, `(n, n_train)` float64; 0 in rows that are not finite."""
        s = torch.where(self.finite[rows, None], as_float64(self.scores[rows]), 0.0)
        return shaped(s, self.shape, self.columns.squares)

    def blocks(self) -> Iterator[tuple[slice, _Block]]:
        """Iterate over blocks of test points."""
        for begin in range(0, len(self.y), self.n_rows):
            rows = slice(begin, begin + self.n_rows)
            s = self._shaped(rows)
            units_of_largest, size = relative(s)
            values, vectors = self._kept.get(begin) or self._eigen(units_of_largest.square())
            if vectors.numel() * len(self.y) <= _KEPT_CELLS * len(s):
                self._kept[begin] = (values, vectors)
            unit = values.mean(1, keepdim=True).sqrt()
            unit = torch.where(unit > 0, unit, 1.0)
            predicted = self.columns.forward(self.columns.collect(units_of_largest)) / unit
            measured = self.y[rows] / (size * unit)
            yield rows, _Block(s, size, unit, values / unit.square(), vectors, predicted, measured)

    def _eigen(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of `X diag(squares) X^T` on the vectors of mean 0."""
        n, n_subsets = len(squares), self.n_subsets
        weights = self.columns.collect(squares)
        gram = squares.new_zeros(n, n_subsets, n_subsets)
        for columns, block in self.columns.blocks(self.n_columns):
            scaled = (weights[:, None, columns] * block).reshape(n * n_subsets, -1)
            gram += (scaled @ block.T).view(n, n_subsets, n_subsets)
        gram = (gram + gram.mT) / 2
        # Shifts the constant vector to the largest eigenvalue, which is then dropped.
        trace = gram.diagonal(dim1=1, dim2=2).sum(1)
        above = torch.where(trace > 0, 2 * trace, 1.0)
        values, vectors = torch.linalg.eigh(gram + above[:, None, None] / n_subsets)
        values, vectors = values[:, :-1], vectors[:, :, :-1]
        rounding = n_subsets * torch.finfo(values.dtype).eps * above[:, None]
        return torch.where(values > rounding, values, 0.0), vectors

    def spectra(self) -> Spectra:
        """Test points with informative predictions and measurements, in their eigenbases."""
        used, eigenvalues, predicted, measured, rotated = [], [], [], [], []
        for _, block in self.blocks():
            informed = (block.eigenvalues > 0).any(1)  # False if the row is not finite
            used.append(informed)
            eigenvalues.append(block.eigenvalues[informed])
            predicted.append(block.predicted[informed])
            measured.append(block.measured[informed])
            pair = torch.stack([block.predicted[informed], block.measured[informed]], 1)
            rotated.append(pair @ block.vectors[informed])
        if not used:
            used, empty = [self.finite], self.y.new_zeros(0, self.n_subsets)
            eigenvalues, predicted, measured = [empty], [empty], [empty]
            rotated = [self.y.new_zeros(0, 2, self.n_subsets)]
        both = torch.cat(rotated)
        likelihood = MarginalLikelihood(torch.cat(eigenvalues), both[:, 0], both[:, 1])
        return Spectra(torch.cat(used), likelihood, torch.cat(predicted), torch.cat(measured))

    def posterior(
        self, at: Hyperparameters, usable: Spectra, known: bool
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Means and standard deviations, and the contribution of each subset to the slope, `(n_subsets,)`.

        Args:
            at: The hyperparameters.
            usable: Test points from which the slope is estimated.
            known: Whether the prior scale was given by the user, so that 0 is exact.
        """
        mean, deviation = torch.empty_like(self.scores), torch.empty_like(self.scores)
        total = self.y.new_zeros(self.n_subsets)
        if at.prior_scale == 0:
            residual = usable.measured - at.slope * usable.predicted
            if at.noise > 0:
                total = (usable.predicted * residual).sum(0) / at.noise**2
            for rows in blocks(len(mean), self.n_rows):
                mean[rows] = matching(at.slope * self._shaped(rows), mean)
            zero = (self.scores == 0).all(1, keepdim=True)
            deviation.copy_(torch.where(zero | known, 0.0, math.nan).expand_as(deviation))
        else:
            for rows, block in self.blocks():
                effects, errors, contributions = self._solve(at, block)
                total += contributions.sum(0)
                mean[rows] = matching(effects, mean)
                deviation[rows] = matching(errors, deviation)
        lost = ~self.finite.to(mean.device)
        mean[lost], deviation[lost] = math.nan, math.nan
        return (mean, deviation), total

    def _solve(self, at: Hyperparameters, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
        tau2, vectors = at.prior_scale**2, block.vectors
        variance = tau2 * block.eigenvalues + at.noise**2
        inverse = torch.where(variance > 0, 1 / variance, 0.0)
        residual = block.measured - at.slope * block.predicted
        pair = torch.stack([block.predicted, residual], 1) @ vectors
        white = (pair * inverse.sqrt()[:, None]) @ vectors.mT
        dual = ((pair[:, 1] * inverse)[:, None] @ vectors.mT)[:, 0]
        n, columns = len(dual), self.columns
        quadratic = dual.new_zeros(n, columns.n_columns)
        roots = (vectors * inverse.sqrt()[:, None]).mT.reshape(-1, self.n_subsets)
        for index, part in columns.blocks(self.n_columns):
            quadratic[:, index] = (roots @ part).view(n, -1, part.shape[1]).square().sum(1)
        relative = block.scores / (block.size * block.unit)
        own = at.slope + tau2 * relative * columns.expand(columns.adjoint(dual))
        left = 1 - tau2 * relative.square() * columns.expand(quadratic)
        errors = at.prior_scale * block.scores.abs() * left.clamp(min=0).sqrt()
        return block.scores * own, errors, white[:, 0] * white[:, 1]

    def unchanged(self) -> tuple[Tensor, Tensor]:
        """The given scores, with unknown standard deviations."""
        lost = ~self.finite.to(self.scores.device)[:, None]
        zero = (self.scores == 0).all(1, keepdim=True)
        scores = torch.where(lost, math.nan, self.scores)
        deviation = torch.where(zero & ~lost, 0.0, math.nan).to(scores).expand_as(scores).clone()
        return scores, deviation


def _matrix(name: str, values: Any, width: int, size: str, which: str) -> Tensor:
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    if not isinstance(values, Tensor):
        raise bad_type(name, "be a torch tensor or a NumPy array", values)
    if values.ndim != 2 or values.shape[1] != width:
        must = f"be of shape (n_test, {size}) with {size} = {width}, as `membership` has {which}"
        remedy = f"One test point is {name}[None]." if values.ndim == 1 else None
        raise bad_value(name, must, tuple(values.shape), remedy)
    return values.detach()
