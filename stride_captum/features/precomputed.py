"""Precomputed features instead of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..errors import bad_value
from ..losses import Loss
from ..positions import Positions
from ..system.memory import MOST_ROWS, blocks
from .store_files import as_tensor


class PrecomputedNetwork(nn.Module):
    """Stand-in for a network with known features and logits: `forward(features, logits) -> logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return the logits."""
        self.features(features)
        return logits


@dataclass(frozen=True)
class Precomputed:
    """Features, logits and labels of a training set.

    Attributes:
        features: `(n_train, n_features)`, may be memory-mapped.
        logits: `(n_train, n_classes)`.
        labels: As the loss has them: `(n_train,)` int64, or `(n_train, n_classes)`.
        widths: Widths of the layers that the columns come from.
        weights: omega of each example, `(n_train,)` float64; None for 1.
        positions: Where all of these have one row for each position: which rows are those of an example.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]
    weights: Tensor | None = None
    positions: Positions | None = None

    @classmethod
    def checked(
        cls,
        features: Any,
        logits: Any,
        labels: Any,
        widths: Sequence[int] | None,
        loss: Loss,
        sample_weight: Any = None,
    ) -> tuple[Precomputed, TensorDataset]:
        """Validate the arrays of the user; also returns a data set of them.

        Raises:
            ValueError: Shapes do not match, undeclared probabilities, or sample weights that are no tensor.
        """
        features, logits, labels = (as_tensor(a) for a in (features, logits, labels))
        for name, value, dims in (
            ("features", features, (2,)),
            ("logits", logits, (2,)),
            ("labels", labels, (1, 2)),
        ):
            if value.ndim not in dims or len(value) != len(features):
                raise bad_value(
                    name,
                    f"have {' or '.join(map(str, dims))} dimensions and n_train = {len(features)} rows",
                    f"shape {tuple(value.shape)}",
                )
        widths = [features.shape[1]] if widths is None else list(widths)
        if sum(widths) != features.shape[1]:
            raise bad_value("widths", f"add up to n_features = {features.shape[1]}", sum(widths))
        check = loss.output_check(None)
        for rows in blocks(len(logits), MOST_ROWS):
            check.look(logits[rows], rows.start)
        check.finish()
        rows_of_outputs = loss.logits(logits)
        known = loss.labels(labels, rows_of_outputs.shape[1], "labels")
        weights = loss.weights(known)
        if sample_weight is not None:
            if not isinstance(sample_weight, Tensor) or sample_weight.shape != (len(features),):
                must = f"be a tensor of shape ({len(features)},), where features are given"
                got = sample_weight.shape if isinstance(sample_weight, Tensor) else repr(sample_weight)
                raise bad_value("sample_weight", must, got)
            own = sample_weight.to(known.device)
            weights = own if weights is None else own * weights
        every = cls(features, rows_of_outputs, known, widths, weights)
        return every, TensorDataset(features, logits, labels)


def check_positions_finite(read: Precomputed) -> None:
    """Refuse rows of positions with NaN or infinities, by the example that has them.

    Raises:
        ValueError: There are some.
    """
    assert read.positions is not None
    for name, values in (("activations", read.features), ("outputs", read.logits)):
        for rows in blocks(len(values), MOST_ROWS):
            if bool(values[rows].sum().isfinite()):  # a single pass; a finite sum has finite terms
                continue
            finite = torch.isfinite(values[rows]).all(1)
            if not bool(finite.all()):
                row = rows.start + int((~finite).nonzero()[0])
                example = int(read.positions.examples[row])
                got = f"NaN or infinity for example {example}"
                raise bad_value("train_dataset", f"give finite {name}", got)


def check_some_rows(n_rows: int) -> None:
    """Refuse examples without a position that has a label.

    Raises:
        ValueError: There is no row.
    """
    if not n_rows:
        raise bad_value("train_dataset", "have at least one label that is not ignored", "none")


def positions_in_some() -> ValueError:
    """The error for outputs with positions for some batches, and without for others."""
    return bad_value("model", "return outputs with positions for every batch, or for none", "both")
