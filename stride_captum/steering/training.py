"""Stage 1 (Algorithm 1): all K operators are trained at once on cached features."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import bad_value
from ..positions import Positions
from ..subsets import Membership
from ..system.devices import tf32_products
from ..system.memory import DEFAULT_BUDGET
from .gradient import BatchGradient
from .operators import SteeringOperators
from .rows import ExampleRows

if TYPE_CHECKING:
    from .options import Trained


@dataclass(frozen=True)
class StageOne:
    """Result of stage 1.

    Attributes:
        operators: phi and the K steering matrices.
        history: "fidelity", "stability" and "linearity", `(n_steps,)` each: the losses of the batches,
            averaged over subsets (the reading "subset" of (4) has one loss for all); NaN where a
            weight of 0 left (4) out.
    """

    operators: SteeringOperators
    history: dict[str, Tensor]


def train_operators(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    membership: Membership,
    options: Trained,
    *,
    positions: Positions | None = None,
    weights: Tensor | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    head: nn.Linear | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    show_progress: bool = False,
    fused: bool | None = None,
) -> StageOne:
    """Minimize equation (5) over phi and all a_k with Adam on mini-batches.

    Every step draws B_S inside and B_R outside each subset, and runs all subsets as one batched computation.
    A shared phi encodes each distinct example of the batch once.

    Memory: one block of subsets (`batch_gradient.block_bytes`, at most `memory_budget`); five
    times the operators (value, gradient, two moments and a temporary of Adam); z; the indices of the
    membership. The size of the blocks changes the result by rounding only.

    Args:
        features: h of the training set, `(n_rows, d)`, of about unit mean square. They may be on
            another device than the operators, and are read a batch at a time.
        logits: z, `(n_rows, n_classes)`.
        labels: `(n_rows,)` int64.
        membership: CSR `(n_subsets, n_train)`.
        options: Of stage 1.
        positions: Rows of each example, over which its losses are summed; None for one.
        weights: omega of each row, `(n_rows,)`, at least 0; None for 1. They count up to a factor.
        memory_budget: Bytes of one block of subsets.
        head: The Linear behind the features, for `steering="representation"`.
        seed: Replaces `options.seed`.
        device: Where the operators are trained; None means that of `features`.
        show_progress: Show a progress bar.
        fused: Whether Adam uses its fused kernel; None leaves it to torch.

    Returns:
        The operators, which no longer require gradients, and the history of the losses. The same
        seed gives the same bits; the global random state is not used.

    Raises:
        ValueError: Arguments that do not fit one another, an empty subset or one that holds every
            example, a head that does not turn the features into the logits, or losses that become NaN.
    """
    _check(features, logits, labels, membership, head, positions)
    seed = options.seed if seed is None else seed
    operators = SteeringOperators(
        features.shape[1],
        logits.shape[1],
        membership.shape[0],
        options.rank,
        encoder=options.encoder,
        steering=options.steering,
        head_weight=head.weight if head is not None and options.steering == "representation" else None,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64 if features.dtype == torch.float64 else torch.float32,
    ).to(features.device if device is None else device)
    like = operators.steering_matrices
    rows = ExampleRows.placed(features, logits, labels, positions, weights, like)
    gradient = BatchGradient(operators, rows, membership, options, seed, memory_budget)
    with tf32_products() if options.precision == "tf32" else nullcontext():
        return _minimize(gradient, options, show_progress, fused)


def _minimize(gradient: BatchGradient, options: Trained, show_progress: bool, fused: bool | None) -> StageOne:
    operators = gradient.operators
    optimizer = torch.optim.Adam(operators.parameters(), lr=options.learning_rate, fused=fused)
    for parameter in operators.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses: list[Tensor] = []
    for step in tqdm(range(options.iterations), desc="operators", disable=not show_progress):
        optimizer.zero_grad(set_to_none=False)
        optimizer.param_groups[0]["lr"] = step_size(options, step)
        losses.append(gradient.accumulate())
        optimizer.step()
    operators.zero_grad(set_to_none=True)
    table = torch.stack(losses).cpu()
    _check_finite(table, options)
    history = dict(zip(("fidelity", "stability", "linearity"), table.unbind(1), strict=True))
    return StageOne(operators.requires_grad_(False), history)


def _check_finite(losses: Tensor, options: Trained) -> None:
    """Raise if losses are not finite; equation (4) is NaN if its weight is 0."""
    used = losses if options.linearity_weight else losses[:, :2]
    wrong = (~torch.isfinite(used).all(1)).nonzero()
    if len(wrong):
        raise bad_value(
            "learning_rate",
            "be small enough for the operators to be trained",
            f"{options.learning_rate:g}, with which the losses were not finite from step {int(wrong[0])} on",
            "Lower it, or scale the features.",
        )


def step_size(options: Trained, step: int) -> float:
    """Adam's step size: `options.learning_rate`, or half a cosine that falls from it to 0."""
    if options.schedule == "constant":
        return options.learning_rate
    return options.learning_rate * (1 + math.cos(math.pi * step / options.iterations)) / 2


def _check(
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    membership: Membership,
    head: nn.Linear | None,
    positions: Positions | None,
) -> None:
    n_rows = len(features)
    if features.dim() != 2 or not features.is_floating_point():
        raise bad_value(
            "features", "be a float matrix (n_rows, d)", f"{features.dtype} {tuple(features.shape)}"
        )
    if logits.dim() != 2 or len(logits) != n_rows:
        raise bad_value("logits", f"have shape ({n_rows}, n_classes)", tuple(logits.shape))
    if labels.shape != (n_rows,):
        raise bad_value("labels", f"have shape ({n_rows},)", tuple(labels.shape))
    n_train = n_rows if positions is None else len(positions)
    if positions is not None and positions.n_rows != n_rows:
        raise bad_value("positions", f"have n_rows = {n_rows} rows together", positions.n_rows)
    if membership.shape[1] != n_train:
        raise bad_value("membership", f"have n_train = {n_train} columns", membership.shape[1])
    sizes = np.diff(sparse.csr_matrix(membership).indptr)
    wrong = np.flatnonzero((sizes < 1) | (sizes >= n_train))
    if wrong.size:
        raise bad_value(
            "membership",
            "hold subsets with an example inside and one outside",
            f"{sizes[wrong[0]]} of {n_train} examples in subset {wrong[0]}",
        )
    if head is not None:
        _check_head(head, features[:64], logits[:64])


@torch.no_grad()
def _check_head(head: nn.Linear, features: Tensor, logits: Tensor) -> None:
    there = head(features.to(head.weight))
    gap = float((there - logits.to(there)).abs().max())
    if gap > 1e-2 * max(1.0, float(there.abs().max())):
        raise bad_value(
            "head",
            "turn `features` into `logits`",
            f"a difference of {gap:.3g}",
            "Give the unscaled inputs of that Linear as features.",
        )
