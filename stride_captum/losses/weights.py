"""What a loss multiplies its terms with, by their labels."""

from __future__ import annotations

import torch
from torch import Tensor


class LabelWeights:
    """Weights of rows and of outputs, of which a loss without any says nothing."""

    @property
    def has_weights(self) -> bool:
        """Whether it weighs terms by their label (`weights`)."""
        return type(self).weights is not LabelWeights.weights

    def weights(self, labels: Tensor) -> Tensor | None:
        """What the loss multiplies the term of each label with, `(n,)`; None for 1."""
        return None

    def weighed(self, residuals: Tensor, labels: Tensor) -> Tensor:
        """Residuals `(n, n_outputs)`, each row times the weight of its label."""
        return times(residuals, self.weights(labels))

    @property
    def weighs_outputs(self) -> bool:
        """Whether it weighs terms of a row by their label (`output_weights`)."""
        return type(self).output_weights is not LabelWeights.output_weights

    def output_weights(self, labels: Tensor) -> Tensor | None:
        """What the loss multiplies the term of each output with beside `weights`; None for 1.

        It is a part of `Loss.values`, of `Loss.residuals` and of the Hessian.

        Args:
            labels: `(n, n_outputs)`, as the result.
        """
        return None

    def rooted(self, residuals: Tensor, labels: Tensor) -> Tensor:
        """Residuals with the roots of `output_weights` in them, so that their squares have the weights."""
        omega = self.output_weights(labels)
        return residuals if omega is None else residuals / omega.to(residuals).sqrt()

    def counted(self, labels: Tensor) -> Tensor:
        """Which positions have a label that is not ignored, `(n, P)` bool.

        Args:
            labels: `(n, P)`, or `(n, P, n_outputs)`.
        """
        return torch.ones(labels.shape[:2], dtype=torch.bool, device=labels.device)

    def position_weights(self, labels: Tensor) -> Tensor | None:
        """What the loss multiplies the term of each position with, `(n, P)`; 0 without a label.

        None where an example has one position: its weight is `weights`, a part of that of the example.

        Args:
            labels: As of `Loss.labels`.
        """
        return None


def times(vectors: Tensor, weights: Tensor | None) -> Tensor:
    """Vectors `(n, n_outputs)` times weights of the examples.

    Args:
        vectors: One row for each example.
        weights: `(n,)`, or `(n, P)` where a row is that of P positions; None for 1.
    """
    if weights is None:
        return vectors
    each = weights.reshape(len(weights), -1, 1).to(vectors)
    return (vectors.reshape(*each.shape[:2], -1) * each).flatten(1)


def times_root(vectors: Tensor, weights: Tensor | None) -> Tensor:
    """Vectors times the roots of weights, as in `times`: products of two have the weights once."""
    return times(vectors, None if weights is None else weights.sqrt())
