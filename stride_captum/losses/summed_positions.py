"""The loss of an example with several positions: the sum of the losses of its positions.

For methods that read one row of outputs an example: the row is that of all positions, `(n, P C)`, and what
belongs to a position without a label is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_value
from ..positions import Positions
from ..system.devices import on_device
from ..system.saved_values import saved_as
from .base import Loss, Target, needs_labels
from .output_check import EachPosition, OutputCheck
from .positions import channels_last, labels_at_positions
from .weights import times


@saved_as("loss.summed-positions")
@dataclass(frozen=True, kw_only=True)
class SummedPositions(Loss):
    """`sum_t loss(z_t, y_t)` over the positions t of an example that have a label.

    Labels are `(n, P)` for classes, else `(n, P, C)`, and outputs z `(n, P C)`. A response is the sum over
    positions.

    Attributes:
        position: The loss of one position.
        n_positions: P, the same for all examples.
        n_outputs: C.
        shape: Of the outputs of one example, such as `(P, C)` or `(C, H, W)`, which labels must fit; None: it
            is not known, and P positions in any form are taken.
    """

    position: Loss
    n_positions: int
    n_outputs: int
    shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the loss of a position."""
        return self.position.name

    @property
    def responses(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of a position."""
        return self.position.responses

    @property
    def tempered(self) -> bool:  # type: ignore[override]
        """As for a position."""
        return self.position.tempered

    @property
    def has_weights(self) -> bool:
        """As for a position."""
        return self.position.has_weights

    @property
    def weighs_outputs(self) -> bool:
        """As for a position."""
        return self.position.weighs_outputs

    # Outputs and labels.

    @override
    def logits(self, outputs: Tensor) -> Tensor:
        last = channels_last(outputs, self.position.class_dim).flatten(1, -2)
        form, n = tuple(outputs.shape[1:]), last.shape[1]
        if n != self.n_positions or self.shape not in (None, form):
            positions = f"{self.n_positions} positions", n
            shapes = f"outputs of the shape {self.shape}", form
            wanted, got = positions if n != self.n_positions else shapes
            remedy = "Pad the inputs to one length, with `ignore_index` as the label of what is added."
            raise bad_value("model", f"give {wanted} for every example, for this method", got, remedy)
        return self.position.logits(last.flatten(0, 1)).reshape(len(last), -1)

    @override
    def labels(self, labels: Tensor, n_outputs: int, argument: str) -> Tensor:
        y = labels_at_positions(self.position, labels, self.n_positions, self.shape, argument)
        counted = self.position.counted(y)
        checked = self.position.labels(y[counted], self.n_outputs, argument)
        if checked.ndim > y.ndim - 1:  # one number each, of a loss with one output
            y = y[..., None]
        elif checked.ndim < y.ndim - 1:  # classes, with an axis of the only output
            y = y.squeeze(-1)
        found = y.to(checked.dtype).clone()
        found[counted] = checked
        return found

    @override
    def output_check(self, model: nn.Module | None) -> OutputCheck:
        return EachPosition(self.position, self.position.output_check(model))

    @property
    def _no_class(self) -> int:
        """Mark of positions without a label in what is `asked`: `ignore_index`, or -1 where it is a class."""
        ignored: int = getattr(self.position, "ignore_index", -1)
        return -1 if 0 <= ignored < self.n_outputs else ignored

    def counted_positions(self, labels: Tensor) -> Tensor:
        """Which positions have a label, `(n, P)` bool, for labels and for what is `asked` with them."""
        counted = self.position.counted(labels)
        classes = self.position.has_classes and labels.ndim == 2
        return counted & self._marked(labels) if classes or labels.ndim > 2 else counted

    def _marked(self, asked: Tensor) -> Tensor:
        """Which positions are asked about, `(n, P)` bool."""
        return asked != self._no_class if asked.ndim == 2 else ~asked.isnan().all(2)

    def positions_of(self, labels: Tensor) -> Positions:
        """The rows of `counted_rows` that each example has."""
        return Positions.of_mask(self.counted_positions(labels))

    def _rows(self, logits: Tensor) -> Tensor:
        return logits.reshape(len(logits) * self.n_positions, -1)

    def _of_rows(
        self, function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
    ) -> Tensor:
        """A function of z and y, with 0 for positions without a label: `(n, P)`, or `(n, P C)`."""
        return self._of_counted(function, logits, labels, self.counted_positions(labels).flatten())

    def _of_counted(
        self, function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, counted: Tensor
    ) -> Tensor:
        rows, y = self._rows(logits)[counted], labels.flatten(0, 1)[counted.to(labels.device)]
        part = function(rows, y)
        whole = part.new_zeros(len(counted), *part.shape[1:])
        whole[counted.to(part.device)] = part
        return whole.reshape(len(logits), -1)

    @override
    def weighed(self, residuals: Tensor, labels: Tensor) -> Tensor:
        return times(residuals, self.position_weights(labels)) if self.has_weights else residuals

    @override
    def output_weights(self, labels: Tensor) -> Tensor | None:
        omega = self.position.output_weights(labels.flatten(0, 1)) if self.weighs_outputs else None
        return None if omega is None else omega.reshape(len(labels), -1)

    def counted_rows(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs, labels and weights of the positions with a label, one row for each.

        Args:
            logits: z, `(n, P C)`.
            labels: Of `labels` or `asked`, `(n, P)` or `(n, P, C)`.
            weights: Of the examples, `(n,)`, or of their positions, `(n, P)`; None for 1.

        Returns:
            `(n_rows, C)`, `(n_rows,)` or `(n_rows, C)`, and `(n_rows,)`, these weights times those of the
            labels; None for 1.
        """
        counted = self.counted_positions(labels).flatten()
        y = labels.flatten(0, 1)[counted]
        omega = self.position.weights(y)
        if weights is not None:
            each = weights.reshape(len(weights), -1).expand(-1, self.n_positions)
            own = each.flatten()[counted.to(weights.device)]
            omega = own if omega is None else own * omega.to(own)
        return self._rows(logits)[counted.to(logits.device)], y, omega

    # Responses.

    @override
    def response_of(self, outputs: Tensor, response: str) -> str:
        width = channels_last(outputs, self.position.class_dim).shape[-1]
        return self.position.response_of(outputs.new_empty(1, width), response)

    @override
    def asked(
        self, logits: Tensor, labels: Tensor | None, target: Target, response: str, *masks: Tensor | None
    ) -> Tensor:
        """As of every loss, but for positions where one of the masks `(n, P)` is 0."""
        rows = self._rows(logits)
        if labels is None:
            if not isinstance(target, Tensor) and target != "predicted":
                raise needs_labels(target)
            y, counted = None, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        else:
            y = self.labels(on_device(labels, logits.device), self.n_outputs, "inputs")
            counted = self.position.counted(y).flatten()
        for mask in masks:
            if mask is not None and mask.shape == (len(logits), self.n_positions):
                counted = counted & (mask != 0).flatten().to(counted.device)
        given = None if y is None else y.flatten(0, 1)[counted]
        if isinstance(target, Tensor):
            target = target.to(rows.device)[:, None].expand(-1, self.n_positions).flatten()[counted]
        found = self.position.asked(rows[counted], given, target, response)
        fill = self._no_class if found.ndim == 1 else float("nan")
        whole = found.new_full((len(rows), *found.shape[1:]), fill)
        whole[counted] = found
        return whole.reshape(len(logits), self.n_positions, *found.shape[1:])

    def _of_asked(
        self, function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, asked: Tensor
    ) -> Tensor:
        return self._of_counted(function, logits, asked, self._marked(asked).flatten())

    @override
    def response_value(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        return self._of_asked(lambda z, c: self.position.response_value(z, c, response), logits, asked).sum(1)

    @override
    def response_gradient(self, logits: Tensor, asked: Tensor, response: str) -> Tensor:
        return self._of_asked(lambda z, c: self.position.response_gradient(z, c, response), logits, asked)

    @override
    def values(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._of_rows(self.position.values, logits, labels).sum(1)

    # Residuals.

    @override
    def residuals(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        def each(z: Tensor, y: Tensor) -> Tensor:
            return self.position.residuals(z, y, temperature)

        return self._of_rows(each, logits, labels)

    @override
    def mean_residuals(self, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        def each(z: Tensor, y: Tensor) -> Tensor:
            return self.position.mean_residuals(z, y, temperature)

        counts = self.counted_positions(labels).sum(1).clamp_min(1)
        return self._of_rows(each, logits, labels).sum(1) / counts.to(logits)

    @override
    def n_draws(self, n_outputs: int) -> int:
        return self.n_positions * self.position.n_draws(self.n_outputs)

    @override
    def drawn_residuals(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Of all positions, those without a label too."""
        rows = self._rows(logits)
        drawn = self.position.drawn_residuals(rows, uniforms.reshape(len(rows), -1))
        return drawn.reshape(logits.shape)

    @override
    def position_weights(self, labels: Tensor) -> Tensor:
        counted = self.counted_positions(labels)
        omega = self.position.weights(labels[counted])
        if omega is None:
            return counted.to(torch.get_default_dtype())
        whole = omega.new_zeros(counted.shape)
        whole[counted.to(omega.device)] = omega
        return whole

    @override
    def hessian_factors(self, logits: Tensor) -> list[Tensor]:
        """Those of each position, with 0 at all others."""
        rows = [part.reshape(len(logits), self.n_positions, -1) for part in self._factors(logits)]
        found = []
        for part in rows:
            for t in range(self.n_positions):
                alone = torch.zeros_like(part)
                alone[:, t] = part[:, t]
                found.append(alone.flatten(1))
        return found

    def _factors(self, logits: Tensor) -> list[Tensor]:
        return self.position.hessian_factors(self._rows(logits))

    @override
    def potential(self, logits: Tensor) -> Tensor:
        return self.position.potential(self._rows(logits)).reshape(len(logits), -1).sum(1)

    # What is asked of one position alone.

    def _not_here(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("ask the loss of one position (`position`)")

    hessians = covariance = encoded = projected = possible = _not_here
