"""What the Fisher information is a mean over: examples, and labels that the model thinks possible.

F = E_x E_c[J_x^T (e_c - p) (e_c - p)^T J_x]     c ~ p, the prediction at x
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...residuals import tempered_residuals

FISHERS = ("sampled", "exact", "empirical")


def fisher_sample(n_train: int, n_fisher: int, seed: int) -> tuple[Tensor, Tensor]:
    """The training examples that F is estimated from.

    Args:
        n_train: Number of training examples.
        n_fisher: How many are drawn, without replacement; all if there are no more.
        seed: Of the draws.

    Returns:
        Their indices, ascending, and for each a number in [0, 1) that draws its label, `(n_fisher,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n_train, generator=generator, device="cpu")[:n_fisher].sort().values
    return chosen, torch.rand(len(chosen), generator=generator, dtype=torch.float32, device="cpu")


def fisher_vectors(kind: str, logits: Tensor, labels: Tensor, uniforms: Tensor) -> list[Tensor]:
    """Vectors v, `(n, n_classes)` each, such that F is the mean over examples of `sum J^T v v^T J`.

    Args:
        kind: "sampled": one label from each prediction; "exact": all labels, weighted by the prediction;
            "empirical": the labels given, which is F only where these follow the prediction.
        logits: `(n, n_classes)`.
        labels: `(n,)` int64.
        uniforms: What draws the labels, `(n,)`.

    >>> z = torch.tensor([[0.0, 0.0]])
    >>> fisher_vectors("sampled", z, torch.tensor([0]), torch.tensor([0.7]))
    [tensor([[-0.5000,  0.5000]])]
    """
    p = logits.softmax(1)
    if kind == "empirical":
        return [tempered_residuals(logits, labels)]
    if kind == "exact":
        every = torch.arange(p.shape[1], device=p.device)
        return [tempered_residuals(logits, c.expand(len(p))) * p[:, c, None].sqrt() for c in every]
    drawn = torch.searchsorted(p.cumsum(1), uniforms.to(p)[:, None], right=True).squeeze(1)
    return [tempered_residuals(logits, drawn.clamp_max(p.shape[1] - 1))]
