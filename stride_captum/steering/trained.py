"""Fitted steering operators: what they keep of a training set, and the scores from them (stage 2).

For a test point with logits z and class c, operator k responds with the change of the scalar that it
causes, `y_k = response(z + a_k^T phi(h)) - response(z)`; for the response "logit" this is
`(phi(h)^T a_k)_c` of section 3. The scores are the weights w of the regression `y = X w` on the
membership matrix (Algorithm 1, line 10).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import STRIDEConfig
from ..recovery import alpha_max, choose_alpha, lasso, ridge, ridge_scale
from ..responses import response_value
from ..subsets import Membership, coverage, partition, random_subsets
from ..system.saved_values import saved_as
from .operators import SteeringOperators
from .training import train_operators


@saved_as("trained-steering")
@dataclass
class TrainedSteering:
    """Trained operators and the memberships that they belong to.

    Attributes:
        operators: phi and the K steering matrices.
        membership: X, CSR `(n_subsets, n_train)`.
        scale: Factor of each feature before phi, `(n_features,)`.
        history: Losses of stage 1, one tensor each.
    """

    operators: SteeringOperators
    membership: Membership
    scale: Tensor
    history: dict[str, Tensor]

    @torch.no_grad()
    def subset_responses(self, features: Tensor, logits: Tensor, classes: Tensor, response: str) -> Tensor:
        """Y, `(n_test, n_subsets)`.

        Args:
            features: Raw features `(n_test, n_features)`.
            logits: z, `(n_test, n_classes)`.
            classes: c, `(n_test,)`.
            response: One of `responses.RESPONSES`.
        """
        shift = self.operators.shift(features * self.scale)
        before = response_value(logits, classes, response)
        return (response_value(logits + shift, classes, response) - before).T

    def weights(self, responses: Tensor, config: STRIDEConfig) -> Tensor:
        """Recover the scores `(n_test, n_train)` from Y `(n_test, n_subsets)`.

        Args:
            responses: Y.
            config: `recovery`, `alpha`, `center`.

        A test point with NaN gets NaN for every example; the others are recovered without it.
        """
        finite = torch.isfinite(responses).all(1)
        if not bool(finite.all()):
            scores = responses.new_full((len(responses), self.membership.shape[1]), float("nan"))
            if bool(finite.any()):
                scores[finite] = self.weights(responses[finite], config)
            return scores
        if config.recovery == "ridge":
            penalty = float(config.alpha) * ridge_scale(self.membership, center=config.center)
            return ridge(responses, self.membership, penalty, center=config.center)
        if isinstance(config.alpha, str):
            alpha = choose_alpha(responses, self.membership, config.alpha, center=config.center)
        else:
            alpha = config.alpha * alpha_max(responses, self.membership, center=config.center)
        return lasso(responses, self.membership, alpha, center=config.center).weights


def draw_subsets(n_train: int, config: STRIDEConfig) -> Membership:
    """The subsets of stage 1; warns where they leave examples uncovered (B.2's setting does)."""
    if config.subsets == "random":
        size = config.subset_size or min(-(-10 * n_train // config.n_subsets), max(n_train // 2, 1))
        membership = random_subsets(n_train, config.n_subsets, size, config.seed)
    else:
        size_or_all = config.subset_size if config.coverage == "paper" else None
        membership = partition(n_train, config.n_subsets, size_or_all, config.seed)
    left_out = int((~coverage(membership)).sum())
    if left_out:
        warnings.warn(
            f"{left_out} of {n_train} training examples are in no subset and get score 0 (see `coverage_`).",
            stacklevel=2,
        )
    return membership


def fit_steering(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    config: STRIDEConfig,
    head: nn.Linear | None,
    show_progress: bool,
) -> TrainedSteering:
    """Draw the subsets and train their operators.

    Args:
        features: Raw features `(n_train, n_features)`.
        logits: `(n_train, n_classes)`.
        labels: `(n_train,)` int64.
        scale: Factor of each feature, `(n_features,)`.
        config: Options of stage 1.
        head: The Linear behind the features, for `steering="representation"`.
        show_progress: Whether to show a bar over the steps.
    """
    membership = draw_subsets(len(labels), config)
    trained = train_operators(
        features * scale, logits, labels, membership, config, head=head, show_progress=show_progress
    )
    return TrainedSteering(trained.operators, membership, scale, trained.history)
