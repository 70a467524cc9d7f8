"""Trained operators and their scores (stage 2).

The response of operator k for a test point with logits z and class c is the change of the scalar,
`y_k = response(z + a_k^T phi(h)) - response(z)`; for the response "logit" this is
`(phi(h)^T a_k)_c` of section 3. The scores are the weights w of the regression `y = X w` on the
membership matrix (Algorithm 1, line 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import bad_value
from ..layers.activations import check_finite
from ..losses import CrossEntropy
from ..operators import FittedOperators, TestPoints, TrainingSet
from ..recovery.estimators import Recovery
from ..subsets import Membership, coverage
from ..system.devices import as_float64
from ..system.saved_values import saved_as
from ..system.to_device import working_dtype
from .operators import SteeringOperators
from .training import train_operators

if TYPE_CHECKING:
    from .options import Trained

#: The only loss that operators are trained with.
_PLAIN = CrossEntropy()


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
    """

    steering: SteeringOperators
    membership: Membership
    scale: Tensor
    history: dict[str, Tensor]
    recovery: Recovery

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

    def prepare(self, points: TestPoints) -> Tensor:
        """Recover the scores `(n_test, n_train)`, all columns at once."""
        return self.recovery.weights(self.subset_responses(points), self.membership)

    def scores(self, prepared: Tensor, columns: slice) -> Tensor:
        """Some columns of the scores."""
        return prepared[:, columns]

    @torch.no_grad()
    def subset_responses(self, points: TestPoints) -> Tensor:
        """Y, `(n_test, n_subsets)`."""
        shift = self.steering.shift(points.features * self.scale)
        asked, response = points.asked, points.response
        before = _PLAIN.response_value(points.logits, asked, response)  # of soft labels, too
        return (_PLAIN.response_value(points.logits + shift, asked, response) - before).T


def fit_trained(options: Trained, training: TrainingSet) -> TrainedOperators:
    """Draw the subsets and train their operators.

    Args:
        options: Of stage 1 and the recovery.
        training: Features in memory.
    """
    if training.weights is not None or training.labels.ndim != 1:
        must = "be ClosedForm(...) for weighted examples, and for labels that are distributions over classes"
        raise bad_value("operators", must, repr(options.name), "Leave `operators` out.")
    check_finite(training.features)
    check_finite(training.logits, "logits")
    features = training.features.to(working_dtype(training.features))
    head = _head(training, features) if options.steering == "representation" else None
    scale = features.new_ones(features.shape[1]) if head else unit_scale(features, training.widths)
    membership = options.subsets.draw(len(training.labels), options.seed)
    with torch.enable_grad():  # the caller runs without gradients
        trained = train_operators(
            features * scale,
            training.logits,
            training.labels,
            membership,
            options,
            memory_budget=training.memory_budget,
            head=head,
            show_progress=training.show_progress,
        )
    return TrainedOperators(trained.operators, membership, scale, trained.history, options.recovery)


def unit_scale(features: Tensor, widths: Sequence[int]) -> Tensor:
    """Factor of each feature that gives every layer unit mean square per feature, `(n_features,)`."""
    scales = []
    for part in features.split(list(widths), dim=1):
        # Squares may overflow float32.
        squares = torch.stack([as_float64(rows).square().sum() for rows in part.split(8192)]).sum()
        scale = (part.numel() / squares).sqrt() if squares > 0 else torch.ones_like(squares)
        scales.append(scale.to(features).expand(part.shape[1]))
    return torch.cat(scales)


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
