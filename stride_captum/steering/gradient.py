"""Gradient of equation (5) on one mini-batch: all subsets at once, or block by block."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from ..subsets import Membership, sketch, sketch_projection
from .objective import combined, example_responses, fidelity, linearity, stability, subset_responses
from .operators import SteeringOperators
from .rows import ExampleRows
from .sampling import MiniBatch, MiniBatches, SubsetRows

if TYPE_CHECKING:
    from .options import Trained


class BatchGradient:
    """Losses on B_S and B_R of every subset, and their gradient with respect to the operators.

    Subsets are processed in blocks that fit `memory_budget` (`block_bytes`). The gradient of a block is
    written into a view of the whole gradient, without a temporary of the size of all operators.

    Attributes:
        operators: Their `.grad` receives the gradients.
        blocks: Slices of the subsets.
        width: |B_S| = |B_R|, in examples.
    """

    def __init__(
        self,
        operators: SteeringOperators,
        rows: ExampleRows,
        membership: Membership,
        options: Trained,
        seed: int,
        memory_budget: int,
    ) -> None:
        """Prepare the draws of every step.

        Args:
            operators: phi and a.
            rows: Of the training set, placed for the operators.
            membership: CSR `(n_subsets, n_train)`.
            options: Of stage 1.
            seed: Of the batches and the sketch.
            memory_budget: Bytes of one block of subsets.
        """
        self.operators, self.rows, self.options = operators, rows, options
        parameter = operators.steering_matrices
        self.device, self.dtype = parameter.device, parameter.dtype
        subsets = SubsetRows.from_membership(membership, self.device)
        smallest = int(membership.getnnz(axis=1).min())
        examples = max(round(options.batch_size * subsets.n_train / len(rows.labels)), 1)
        self.width = min(examples, max(subsets.largest, subsets.n_train - smallest))
        size = largest_block(operators, len(rows.labels), self.width * rows.longest, memory_budget)
        n_subsets = operators.n_subsets
        self.blocks = [slice(k, min(k + size, n_subsets)) for k in range(0, n_subsets, size)]
        generator = torch.Generator().manual_seed(seed)
        self.batches = MiniBatches(subsets, self.blocks, self.width, generator)
        self.sketch = self._sketch(membership, seed) if options.linearity_weight else None

    def _sketch(self, membership: Membership, seed: int) -> Tensor:
        """R for the reading "example" of (4), `(N, sketch_width)`; X R for "subset", `(K, sketch_width)`."""
        n_train, width = membership.shape[1], self.options.sketch_width
        if self.options.linearity == "example":
            return sketch_projection(n_train, width, seed).to(self.dtype).to(self.device)
        return sketch(membership, n_train, width, seed).to(self.dtype).to(self.device)

    def accumulate(self) -> Tensor:
        """Draw a batch and add its gradient to `.grad` of the parameters, which must not be None.

        Returns:
            Fidelity and stability, averaged over subsets, and linearity, averaged ("example") or
            whole ("subset") or NaN (weight 0): `(3,)`.
        """
        options = self.options
        batches: Iterable[MiniBatch] = self.batches.step()
        couples = self.sketch is not None and options.linearity == "subset"
        pull, value = None, None
        if couples and len(self.blocks) > 1:
            batches = list(batches)
            pull, value = self._pull(batches)
        losses = torch.zeros(3, device=self.device, dtype=self.dtype)
        for block, batch in zip(self.blocks, batches, strict=True):
            parameters = self._block_parameters(block)
            shift = self._shift(parameters, batch.distinct, batch.places)
            inner, outer = shift[:, : self.width], shift[:, self.width :]
            logits, labels = self.rows.logits, self.rows.labels
            (inside, omega), (outside, other) = self.rows.of(batch.inside), self.rows.of(batch.outside)
            fid = fidelity(logits[inside], inner, labels[inside], batch.mask, omega)
            stab = stability(logits[outside], outer, batch.outside_mask, other)
            lin = self._linearity(block, batch, inner, omega, pull)
            loss = combined(
                fid,
                stab,
                lin,
                fidelity_weight=options.fidelity_weight,
                stability_weight=options.stability_weight,
                linearity_weight=options.linearity_weight,
            )
            if options.weight_decay:
                loss = loss + 0.5 * options.weight_decay * parameters["steering_matrices"].square().sum()
            loss.backward()
            lin_sum = torch.full_like(losses[2], float("nan")) if lin is None else lin.detach().sum()
            losses += torch.stack([fid.detach().sum(), stab.detach().sum(), lin_sum])
        whole = losses[2] if value is None else value
        losses = losses / self.operators.n_subsets
        return torch.cat([losses[:2], whole[None]]) if couples else losses

    def _linearity(
        self, block: slice, batch: MiniBatch, shift: Tensor, omega: Tensor | None, pull: Tensor | None
    ) -> Tensor | None:
        if self.sketch is None:
            return None
        if self.options.linearity == "example":
            responses = example_responses(shift, omega).where(batch.mask, 0)
            sketch = self.sketch[batch.inside] * batch.mask[..., None]
            return linearity(responses, sketch, self.options.sketch_ridge)
        responses = subset_responses(shift, batch.mask, omega)
        if pull is None:
            return linearity(responses, self.sketch, self.options.sketch_ridge)
        return (pull[block] * responses).sum()

    def _pull(self, batches: Iterable[MiniBatch]) -> tuple[Tensor, Tensor]:
        """Gradient and value of (4), read "subset", with respect to y, which no single block holds."""
        responses = []
        with torch.no_grad():
            for block, batch in zip(self.blocks, batches, strict=True):
                inside = batch.places[:, : self.width]
                shift = self._shift(self._block_parameters(block), batch.distinct, inside)
                responses.append(subset_responses(shift, batch.mask, self.rows.of(batch.inside)[1]))
        y = torch.cat(responses).requires_grad_()
        assert self.sketch is not None
        value = linearity(y, self.sketch, self.options.sketch_ridge)
        return torch.autograd.grad(value, y)[0], value.detach()

    def _shift(self, parameters: dict[str, Tensor], distinct: Tensor, places: Tensor) -> Tensor:
        """Shifts of the examples at some places of `distinct`, `(k, n, C)` or `(k, n, P, C)`."""
        rows, places = self.rows.distinct(distinct, places)
        features = self.rows.features[rows.to(self.rows.features.device)].to(self.device, self.dtype)
        rounded = self.options.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if rounded else nullcontext():
            shift = functional_call(self.operators, parameters, (features, places.flatten(1)))
        moved: Tensor = shift.to(self.dtype).unflatten(1, places.shape[1:])
        return moved

    def _block_parameters(self, block: slice) -> dict[str, Tensor]:
        """Block of the stacked parameters, as leaves whose gradients are views of the whole."""
        part = {}
        for name in self.operators.stacked:
            whole = self.operators.get_parameter(name)
            part[name] = whole.detach()[block].requires_grad_()
            part[name].grad = None if whole.grad is None else whole.grad[block]
        return part


def block_bytes(operators: SteeringOperators, n_subsets: int, n_rows: int, width: int) -> int:
    """Memory of a block of k subsets: `itemsize (m (6 d + 4 q) + 2 b k (4 q + 12 C) + e)` bytes.

    2 b k rows are drawn (b = `width`: examples of a batch times the positions of the longest). m of them are
    encoded: min(2 b k, n_rows) for a shared phi, 2 b k for one a subset. q is what a row carries behind phi:
    r, or r (d + C) for "representation". e = 2 k (d^2 + d n_outputs) is a gradient of each phi, where every
    subset has one.
    """
    d, n_classes = operators.n_features, operators.n_classes
    q = operators.rank * (1 if operators.steering == "logits" else d + n_classes)
    drawn = 2 * width * n_subsets
    own = operators.encoder == "per-subset"
    encoded = drawn if own else min(n_rows, drawn)
    encoders = 2 * n_subsets * d * (d + operators.output_bias.shape[-1]) if own else 0
    itemsize: int = operators.steering_matrices.element_size()
    return itemsize * (encoded * (6 * d + 4 * q) + drawn * (4 * q + 12 * n_classes) + encoders)


def largest_block(operators: SteeringOperators, n_rows: int, width: int, budget: int) -> int:
    """Largest number of subsets whose `block_bytes` fit the budget, at least one."""
    low, high = 1, operators.n_subsets
    while low < high:
        middle = (low + high + 1) // 2
        if block_bytes(operators, middle, n_rows, width) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
