"""Trained operators and their scores (stage 2).

The response of operator k for a test point with logits z and class c is the change of the scalar,
`y_k = response(z + a_k^T phi(h)) - response(z)`; for the response "logit" this is
`(phi(h)^T a_k)_c` of section 3. The scores are the weights w of the regression `y = X w` on the
membership matrix (Algorithm 1, line 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_value
from ..layers.activations import check_finite
from ..losses import CrossEntropy
from ..operators import FittedOperators, TestPoints, TrainingSet
from ..recovery.estimators import Recovery
from ..subsets import Membership, at_columns, coverage
from ..system.devices import as_float64
from ..system.memory import DEFAULT_BUDGET, MOST_ROWS, blocks, rows_that_fit
from ..system.saved_values import saved_as
from ..system.to_device import working_dtype
from .operators import SteeringOperators
from .rows import rows_with_weight
from .training import train_operators

if TYPE_CHECKING:
    from .options import Trained

#: The only loss that operators are trained with.
_PLAIN = CrossEntropy()
#: Arrays of the size of the shifts that a response makes.
_COPIES = 6


@dataclass(frozen=True)
class TrainedQuery:
    """Test points as trained operators score them.

    Attributes:
        scores: `(n_test, n_train)`.
        points: Where scores are sums over the positions of test points; else None.
    """

    scores: Tensor
    points: TestPoints | None = None


@saved_as("trained-operators")
@dataclass
class TrainedOperators(FittedOperators):
    """Trained operators and their membership matrix.

    Attributes:
        steering: phi and the K steering matrices.
        membership: X, CSR `(n_subsets, n_train)`.
        scale: Factor of each feature before phi, `(n_features,)`.
        history: Losses of stage 1, one tensor each.
        recovery: How scores are recovered; may be replaced.
        most_bytes: Of what is held at a time for test points.
        longest: Rows of the longest training example, if examples have positions; else 0.
    """

    steering: SteeringOperators
    membership: Membership
    scale: Tensor
    history: dict[str, Tensor]
    recovery: Recovery
    most_bytes: int = DEFAULT_BUDGET
    longest: int = 0

    @property
    def n_train(self) -> int:
        """N."""
        return int(self.membership.shape[1])

    @property
    def n_classes(self) -> int:  # type: ignore[override]
        """C."""
        return self.steering.n_classes

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the operators."""
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the operators."""
        return self.scale.dtype

    def coverage(self) -> Tensor:
        """Which training examples are in a subset, `(n_train,)` bool."""
        return torch.from_numpy(coverage(self.membership))

    def prepare(self, points: TestPoints) -> TrainedQuery:
        """Recover the scores `(n_test, n_train)`, all columns at once."""
        scores = self.recovery.weights(self.subset_responses(points), self.membership)
        return TrainedQuery(scores, points if self.recovery.linear and points.positions is not None else None)

    def scores(self, prepared: TrainedQuery, columns: slice) -> Tensor:
        """Some columns of the scores."""
        return prepared.scores[:, columns]

    @override
    def position_scores(self, prepared: TrainedQuery, example: int | None) -> Tensor | None:
        if example is not None:
            must = "be ClosedForm(form='rows') for scores of the positions of a training example"
            raise bad_value("operators", must, repr("trained"))
        if not self.recovery.linear:
            must = "be linear, as Ridge() is, for scores of positions, which add up"
            raise bad_value("recovery", must, repr(self.recovery.name), "Write Trained(recovery=Ridge()).")
        points = prepared.points
        if points is None or points.positions is None:
            return None
        parts = [self.recovery.weights(part, self.membership) for _, part in self._responses(points)]
        empty = prepared.scores.new_zeros(0, self.n_train)
        return points.positions.in_place(torch.cat([empty, *parts]), points.n_positions)

    def test_points_at_once(self) -> int | None:
        """As many as their rows fit the budget, where examples have positions."""
        if not self.longest:
            return None
        each = 4 * self.longest * (self.steering.n_features + self.n_classes)
        return rows_that_fit(self.most_bytes, each * self.dtype.itemsize, None)

    def subset_responses(self, points: TestPoints) -> Tensor:
        """Y, `(n_test, n_subsets)`: with positions, sums over those of each test point."""
        if points.positions is None:
            return torch.cat([part for _, part in self._responses(points)])
        total = points.logits.new_zeros(len(points.positions), self.steering.n_subsets)
        examples = points.positions.examples.to(total.device)
        for rows, part in self._responses(points):
            total.index_add_(0, examples[rows], part)
        return total

    @torch.no_grad()
    def _responses(self, points: TestPoints) -> Iterator[tuple[slice, Tensor]]:
        """Responses of each row, `(n, n_subsets)`, for as many rows at a time as fit the budget."""
        each = _COPIES * self.steering.n_subsets * self.n_classes * self.dtype.itemsize
        for rows in blocks(len(points.features), rows_that_fit(self.most_bytes, each, None)):
            shift = self.steering.shift(points.features[rows].to(self.dtype) * self.scale)
            logits, asked, response = points.logits[rows], points.asked[rows], points.response
            before = _PLAIN.response_value(logits, asked, response)  # of soft labels, too
            yield rows, (_PLAIN.response_value(logits + shift, asked, response) - before).T


def fit_trained(options: Trained, training: TrainingSet) -> TrainedOperators:
    """Draw the subsets and train their operators.

    Rows of weight 0 are left out. Examples that have no other rows are in no subset.

    Args:
        options: Of stage 1 and the recovery.
        training: Features in memory.
    """
    if training.labels.ndim != 1:
        must = "be ClosedForm(...) for labels that are distributions over classes"
        raise bad_value("operators", must, repr(options.name), "Leave `operators` out.")
    check_finite(training.features)
    check_finite(training.logits, "logits")
    counted, examples = rows_with_weight(training)
    features, positions = counted.features.to(working_dtype(counted.features)), counted.positions
    head = _head(counted, features) if options.steering == "representation" else None
    ones = features.new_ones(features.shape[1])
    scale = ones if head else unit_scale(features, counted.widths, counted.weights)
    membership = options.subsets.draw(counted.n_train, options.seed)
    with torch.enable_grad():  # the caller runs without gradients
        trained = train_operators(
            features * scale,
            counted.logits,
            counted.labels,
            membership,
            options,
            positions=positions,
            weights=counted.weights,
            memory_budget=counted.memory_budget,
            head=head,
            show_progress=counted.show_progress,
        )
    return TrainedOperators(
        trained.operators,
        membership if examples is None else at_columns(membership, examples.numpy(), training.n_train),
        scale,
        trained.history,
        options.recovery,
        training.memory_budget,
        0 if positions is None else int(positions.counts.max()),
    )


def unit_scale(features: Tensor, widths: Sequence[int], weights: Tensor | None = None) -> Tensor:
    """Factor of each feature that gives every layer unit mean square per feature, `(n_features,)`.

    Args:
        features: `(n_rows, n_features)`.
        widths: Of the layers.
        weights: omega of each row, `(n_rows,)`, with which the mean is taken; None for 1.
    """
    n: float = len(features)
    omega = None if weights is None else as_float64(weights).to(as_float64(features[:0]).device)
    if omega is not None:
        n = float(omega.sum())
    scales = []
    for part in features.split(list(widths), dim=1):
        # Squares may overflow float32.
        rows = blocks(len(part), MOST_ROWS)
        squares = torch.stack([_squares(part[r], None if omega is None else omega[r]) for r in rows]).sum()
        scale = (n * part.shape[1] / squares).sqrt() if squares > 0 else torch.ones_like(squares)
        scales.append(scale.to(features).expand(part.shape[1]))
    return torch.cat(scales)


def _squares(rows: Tensor, omega: Tensor | None) -> Tensor:
    squares = as_float64(rows).square()
    return squares.sum() if omega is None else squares.sum(1) @ omega


def _head(training: TrainingSet, features: Tensor) -> nn.Linear:
    """The Linear that maps the features of the only layer to the logits.

    Raises:
        ValueError: There is none; equation (6) would need backward passes through the rest of the model.
    """
    few, logits = slice(0, 64), training.logits
    if len(training.layers) == 1:
        for module in training.model.modules():
            if isinstance(module, nn.Linear) and module.weight.shape == (logits.shape[1], features.shape[1]):
                with torch.no_grad():
                    outputs = module(features[few].to(module.weight))
                if torch.allclose(outputs.to(logits), logits[few], rtol=1e-3, atol=1e-3):
                    return module
    raise bad_value(
        "steering",
        "be 'logits' unless one layer is read and a single Linear makes the logits of it",
        f"'representation' with layers {training.layers}",
        "Read the penultimate layer (features=Features(select='penultimate')), or steer the logits.",
    )
