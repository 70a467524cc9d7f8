"""Training examples as stage 1 reads them: one row of features and logits, or one for each position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import bad_value
from ..operators import TrainingSet
from ..positions import Positions


@dataclass(frozen=True)
class ExampleRows:
    """Rows of the training set, and which of them are an example's.

    Attributes:
        features: h, `(n_rows, d)`, possibly on another device than the rest.
        logits: z, `(n_rows, n_classes)`.
        labels: `(n_rows,)` int64.
        starts: First row of each example, `(n_train,)` int64; None where an example has one row, of weight 1.
        counts: Rows of each example, `(n_train,)` int64; None likewise.
        weights: `N omega / W` of each row, W the sum of all omega, so that an example weighs 1 on average,
            however many positions it has; `(n_rows,)`, None likewise.
        longest: P, rows of the longest example.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    starts: Tensor | None = None
    counts: Tensor | None = None
    weights: Tensor | None = None
    longest: int = 1

    @classmethod
    def placed(
        cls,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
        positions: Positions | None,
        weights: Tensor | None,
        like: Tensor,
    ) -> ExampleRows:
        """Rows with all but the features on the device and in the dtype of `like`.

        Args:
            features: `(n_rows, d)`.
            logits: `(n_rows, n_classes)`.
            labels: `(n_rows,)`.
            positions: Rows of each example; None for one.
            weights: omega, `(n_rows,)`; None for 1.
            like: A parameter of the operators.
        """
        known = features, logits.to(like), labels.to(like.device)
        if positions is None and weights is None:
            return cls(*known)
        positions = positions or Positions.single(len(labels))
        ones = torch.ones(len(labels), dtype=torch.float64, device="cpu")
        omega = ones if weights is None else weights.cpu().double()
        scaled = omega * (len(positions) / omega.sum())
        starts, counts = positions.offsets[:-1].to(like.device), positions.counts.to(like.device)
        return cls(*known, starts, counts, scaled.to(like), int(positions.counts.max()))

    def of(self, examples: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of some examples and their weights.

        Args:
            examples: `(k, n)` int64.

        Returns:
            `examples` and None where an example has one row; else rows `(k, n, P)`, 0 behind the last of an
            example, and their weights `(k, n, P)`, 0 there.
        """
        if self.starts is None or self.counts is None or self.weights is None:
            return examples, None
        rows, there = self._up_to_the_last(self.starts[examples], self.counts[examples])
        return rows, self.weights[rows].where(there, 0)

    def distinct(self, examples: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of distinct examples, none of them padding, and where those of others are among them.

        Args:
            examples: `(m,)` int64.
            places: Indices into `examples`, `(k, n)` int64.

        Returns:
            Rows, `(n_distinct,)`; indices into them, `(k, n)` or `(k, n, P)`, 0 behind the last row of an
            example. The first waits for a GPU where an example has several rows.
        """
        if self.starts is None or self.counts is None:
            return examples, places
        counts = self.counts[examples]
        rows, there = self._up_to_the_last(self.starts[examples], counts)
        ends = counts.cumsum(0)
        return rows[there], self._up_to_the_last((ends - counts)[places], counts[places])[0]

    def _up_to_the_last(self, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`start, ..., start + count - 1`, then 0: `(..., P)`; and which of these are rows."""
        steps = torch.arange(self.longest, device=starts.device)
        there = steps < counts[..., None]
        return (starts[..., None] + steps).where(there, 0), there


def rows_with_weight(training: TrainingSet) -> tuple[TrainingSet, Tensor | None]:
    """The rows with a weight above 0, and which examples have some, `(n_counted,)` ascending; None for all.

    Raises:
        ValueError: No row has a weight.
    """
    positions, weights = training.positions, training.weights
    if weights is not None and not bool((weights > 0).all()):
        kept = weights.cpu() > 0
        if not bool(kept.any()):
            raise bad_value("sample_weight", "be above 0 for some example", "zeros")
        positions = Positions((positions or Positions.single(len(kept))).counted(weights))
        rows = ("features", "logits", "labels", "weights")
        few = {name: getattr(training, name) for name in rows}
        training = replace(training, **{name: few[name][kept.to(few[name].device)] for name in rows})
    if positions is None or bool((positions.counts > 0).all()):
        return replace(training, positions=positions), None
    examples = positions.counts.nonzero().squeeze(1)
    if training.positions is not None:
        training = replace(training, positions=Positions(positions.counts[examples]))
    return training, examples
