"""Weights of the rows that a tracked layer sees, in the covariances that kronfluence makes of them.

kronfluence counts every row once, or not at all (its attention mask). Here row t of example i has the weight
`w_i omega_it` in the mean of the outer products of inputs a. Gradients b of a weighted loss have the root of
their weight in them already; their mean is over all rows with a weight, each counted w_i times.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeighedRows:
    """Stands between a tracked layer and its rows.

    Args:
        layer: Of the class `TrackedModule` of kronfluence.

    Attributes:
        weights: w of the examples of the next batch, `(n,)`; None counts every row once.
        rows: omega of their rows, `(n, k)`, or `(n, 1)` for the same in all of an example; None for 1.
        counts: What the sums over inputs and over gradients are to be divided by.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.weights: Tensor | None = None
        self.rows: Tensor | None = None
        self.counts = {"activation": 0.0, "gradient": 0.0}
        self._inputs, self._gradients = layer.get_flattened_activation, layer.get_flattened_gradient
        for name, function in (("activation", self.inputs), ("gradient", self.gradients)):
            setattr(layer, f"get_flattened_{name}", function)

    def inputs(self, input_activation: Tensor) -> tuple[Tensor, int]:
        """Rows of inputs, times the roots of their weights, and how many there are."""
        found, count = self._inputs(input_activation=input_activation)  # type: ignore[operator]
        if self.weights is not None:
            each = self._each(len(found))
            self.counts["activation"] += float(each.sum())
            found = found * each.sqrt().to(found)[:, None]
        return found, count

    def gradients(self, output_gradient: Tensor) -> tuple[Tensor, int]:
        """Rows of output gradients, and how many there are."""
        found, count = self._gradients(output_gradient=output_gradient)  # type: ignore[operator]
        if self.weights is not None:
            self.counts["gradient"] += float(self._each(len(found), counted=True).sum())
        return found, count

    def _each(self, n_rows: int, counted: bool = False) -> Tensor:
        """The weight of every row, `(n_rows,)`; `counted` for 1 instead of omega above 0."""
        assert self.weights is not None
        weights = self.weights[:, None].expand(-1, n_rows // len(self.weights))
        if self.rows is not None:
            rows = self.rows.to(weights.device)
            weights = weights * ((rows > 0) if counted else rows)
        return weights.flatten()


def divided_by_weights(
    covariances: dict[str, dict[str, Tensor]], weighed: Mapping[str, WeighedRows]
) -> dict[str, dict[str, Tensor]]:
    """Covariances of kronfluence with the sums of weights as numbers of rows.

    Args:
        covariances: By kind and layer.
        weighed: By layer.
    """
    for kind in ("activation", "gradient"):
        counts = {name: layer.counts[kind] for name, layer in weighed.items()}
        covariances[f"num_{kind}_covariance_processed"] = {
            name: torch.tensor([count], dtype=torch.float64) for name, count in counts.items()
        }
    return covariances
