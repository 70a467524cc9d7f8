"""Features of one batch, or of a whole training set in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..errors import bad_value
from ..layers.activations import Tap, recording
from .projection import Projection
from .store_writer import Computed


def read_batch(
    model: nn.Module,
    taps: Sequence[Tap],
    batch: Any,
    as_logits: Callable[[Tensor, Any], Tensor],
    projection: Projection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and outputs of one batch.

    Args:
        model: The network.
        taps: Places that are read.
        batch: On the working device.
        as_logits: `f(outputs, batch) -> logits`.
        projection: Of the features; None for none.

    Returns:
        Features `(n, n_features)`; logits `(n, n_classes)`, at least float32; raw outputs.
    """
    with recording(model, taps) as run:
        outputs, rows = run(batch)
    logits = as_logits(outputs.detach(), batch)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    features = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    return features if projection is None else projection(features), logits, outputs


def read_training_set(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Iterable[ExampleBatch],
    compute: Callable[[Any, ExampleBatch], Computed],
    expected: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits and labels of a whole training set, written in place if its length is known.

    Args:
        model: The network.
        taps: Where features are read.
        batches: The training set in order.
        compute: `f(run, batch) -> (rows of each tap, logits, labels)`, with `run` from `recording`.
        expected: Number of examples; None if unknown.
    """
    width = sum(tap.width for tap in taps)
    features: Tensor | None = None
    parts, logits, labels, seen = [], [], [], 0
    with recording(model, taps) as run:
        for batch in batches:
            rows, z, y = compute(run, batch)
            n = len(z)
            if expected is not None and seen + n <= expected:
                if features is None:
                    features = rows[0].new_empty(expected, width)
                start = 0
                for tap, row in zip(taps, rows, strict=True):
                    features[seen : seen + n, start : start + tap.width] = row
                    start += tap.width
            else:
                parts.append(torch.cat(list(rows), dim=1))
            logits.append(z)
            labels.append(y)
            seen += n
    if seen == 0:
        raise bad_value("train_dataset", "hold at least one example", "an empty one")
    if features is None:
        features = torch.cat(parts)
    return features[:seen], torch.cat(logits).to(features), torch.cat(labels)
