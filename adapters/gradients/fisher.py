"""Samples of which the Fisher information is a mean: examples, and labels drawn from the model.

F = E_x E_c[J_x^T (e_c - p) (e_c - p)^T J_x]     c ~ p, the prediction at x
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses import CrossEntropy, Loss
from ...losses.weights import times_root

FISHERS = ("sampled", "exact", "empirical")


def fisher_sample(n_train: int, n_fisher: int, seed: int, n_draws: int = 1) -> tuple[Tensor, Tensor]:
    """The training examples that F is estimated from.

    Args:
        n_train: Number of training examples.
        n_fisher: How many are drawn, without replacement; all if there are no more.
        seed: Of the draws.
        n_draws: Numbers that draw one label.

    Returns:
        Their indices, ascending, and for each the numbers in [0, 1) that draw its label, `(n_fisher,)` or
        `(n_fisher, n_draws)`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n_train, generator=generator, device="cpu")[:n_fisher].sort().values
    return chosen, _uniforms(len(chosen), n_draws, generator)


def _uniforms(n: int, n_draws: int, generator: torch.Generator) -> Tensor:
    found = torch.rand(n, n_draws, generator=generator, dtype=torch.float32, device="cpu")
    return found[:, 0] if n_draws == 1 else found


def fisher_vectors(
    kind: str,
    logits: Tensor,
    labels: Tensor,
    uniforms: Tensor,
    loss: Loss | None = None,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Vectors v, `(n, n_classes)` each, such that F is the mean over examples of `sum J^T v v^T J`.

    Args:
        kind: "sampled": one label from each prediction; "exact": all labels, weighted by the prediction;
            "empirical": the labels given, which is F only where these follow the prediction.
        logits: `(n, n_classes)`.
        labels: `(n,)` int64, or as `loss` has them.
        uniforms: What draws the labels, `(n,)` or `(n, n_draws)`.
        loss: What the model was trained with; None for cross-entropy.
        weights: Of the positions of an example, `(n, P)`; None for 1.

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> fisher_vectors("sampled", z, torch.tensor([0]), torch.tensor([0.7]))
    [tensor([[-0.5000,  0.5000]])]
    """
    loss = CrossEntropy() if loss is None else loss
    if kind == "empirical":
        found = [loss.rooted(loss.residuals(logits, labels), labels)]
    elif kind == "exact":
        found = loss.hessian_factors(logits)
    else:
        found = [loss.drawn_residuals(logits, uniforms.reshape(len(uniforms), -1))]
    return [times_root(vectors, weights) for vectors in found]
