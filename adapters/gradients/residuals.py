"""Training residuals of gradient methods, from one pass over the training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...closed_form.options import Residuals
from ...closed_form.training_residuals import out_of_sample_residuals
from ...data.batch import ExampleBatch
from ...errors import bad_choice, bad_value
from ...features.options import Features
from ...features.precomputed import check_some_rows
from ...influence.method import Query
from ...influence.temperature import choose_temperature
from ...layers.activations import Tap, default_taps, recording
from ...layers.positions import at_kept_positions, grid_of
from ...losses import Loss
from ...losses.summed_positions import SummedPositions
from ...losses.weights import times
from ...system.devices import float64_device
from .dense_sides import mean_weights
from .working_model import OnWorkingCopy


class WithResiduals(OnWorkingCopy):
    """A method whose training side is a residual r_i: as published, tempered, or out of sample.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        residuals: An option of `ClosedForm.residuals`.
        temperature: T; None matches `held_out`, or takes the default.
        **options: Those of `InfluenceMethod`.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        residuals: str,
        temperature: float | None,
        **options: Any,
    ) -> None:
        if residuals not in get_args(Residuals):
            raise bad_choice("residuals", residuals, get_args(Residuals))
        if temperature is not None and not temperature > 0:
            raise bad_value("temperature", "be positive, or None", temperature)
        self.residuals = residuals
        self.temperature = temperature
        super().__init__(model, train_dataset, **options)
        # Weights of the training examples, `(n_train,)`, and what those of their positions, `(n_train, P)`,
        # are multiplied with beside these, as `fit` has read them; None for 1.
        self._omega: Tensor | None = None
        self._shares: Tensor | None = None

    @override
    def check_loss(self, loss: Loss) -> None:
        if self.residuals == "temperature" and not loss.tempered:
            must = f"be one of the others for loss={loss.name!r}, which has no temperature"
            raise bad_value("residuals", must, repr(self.residuals))

    @property
    def _of_the_model(self) -> bool:
        """Whether residuals come from the model's own outputs alone, without a ridge head on features."""
        return self.residuals in ("training", "temperature")

    def _read_residuals(self, model: nn.Module, show_progress: bool) -> tuple[Tensor, Tensor, float]:
        """r_i times omega, `e_y - p` (both `(n_train, n_classes)`) and the temperature, from one pass."""
        taps = [] if self._of_the_model else self._feature_taps(model)
        features, z, y = self._read_training_set(model, taps, show_progress)
        if not bool(torch.isfinite(z).all()):
            wrong = int((~torch.isfinite(z).all(1)).nonzero()[0])
            raise bad_value("model", "return finite logits", f"NaN or infinity for training example {wrong}")
        omega = times(self._shares, self._omega) if self._shares is not None else self._omega
        temperature = choose_temperature(self, model, z, y, self.temperature, omega)
        loss_residuals = times(self.loss.residuals(z, y), None if self._shares is None else self._shares > 0)
        if not self._of_the_model:
            widths = [tap.width for tap in taps]
            return self._of_a_head(features, z, y, widths, temperature, omega), loss_residuals, temperature
        given = 1.0 if self.residuals == "training" else temperature
        residuals = loss_residuals if given == 1.0 else self.loss.residuals(z, y, given)
        if isinstance(self.loss, SummedPositions):  # of rows, they are part of omega
            residuals = self.loss.weighed(residuals, y)
        return times(residuals, omega), loss_residuals, temperature

    def _of_a_head(
        self,
        features: Tensor,
        z: Tensor,
        y: Tensor,
        widths: Sequence[int],
        temperature: float,
        omega: Tensor | None,
    ) -> Tensor:
        """omega_i r_i of kinds with a ridge head, which leaves out all positions of an example at once."""
        loss, positions, n_positions = self.loss, None, 0
        if isinstance(loss, SummedPositions):
            positions, n_positions = loss.positions_of(y), loss.n_positions
            check_some_rows(positions.n_rows)
            z, y, omega = loss.counted_rows(z, y, omega)
            loss = loss.position
        residuals = out_of_sample_residuals(
            features,
            z,
            y,
            widths,
            self.residuals,
            temperature,
            memory_budget=self.memory_budget,
            loss=loss,
            weights=omega,
            positions=positions,
        )
        return residuals if positions is None else positions.in_place(residuals, n_positions).flatten(1)

    def _read_training_set(
        self, model: nn.Module, taps: Sequence[Tap], show_progress: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features at the taps, a row for each example or counted position, logits, labels; sets weights."""
        features, logits, labels, weights = [], [], [], []
        with recording(model, taps) as run:
            for batch in self.train_batches(show_progress):
                outputs, rows = run(batch)
                z = self._as_logits(outputs, batch)
                logits.append(z)
                labels.append(self.train_labels(batch, z.shape[1]))
                if isinstance(self.loss, SummedPositions):
                    grid = grid_of(outputs, self.loss.position)
                    assert grid is not None, "examples have positions"
                    rows = at_kept_positions(rows, taps, grid, self.loss.counted_positions(labels[-1]))
                features.append(torch.cat(rows, 1) if rows else z.new_empty(len(z), 0))
                omega = self.train_weights(batch, labels[-1])
                if omega is not None:
                    weights.append(omega)
        y = torch.cat(labels)
        self._set_weights(torch.cat(weights) if weights else None, y)
        return torch.cat(features), torch.cat(logits), y

    def _set_weights(self, weights: Tensor | None, labels: Tensor) -> None:
        """Set `_omega`, to 0 where no position has a label of weight above 0, and `_shares`."""
        self._omega, self._shares = weights, None
        labeled = self.loss.position_weights(labels)
        if labeled is None:
            return
        counted = (labeled > 0).to(float64_device(self._work_device()))
        if weights is not None and weights.ndim == 2:
            each = weights * counted
            self._omega = mean_weights(each)
            self._shares = torch.where(each > 0, each / self._omega[:, None], 0.0)
        elif not bool(counted.any(1).all()):
            some = counted.any(1)
            self._omega = some.double() if weights is None else weights * some

    def _position_weights(self, labels: Tensor, examples: slice | Tensor) -> Tensor | None:
        """Weights of the positions of training examples beside `_omega`, those of their labels included.

        Args:
            labels: `(n, P)` or `(n, P, C)`.
            examples: Their places in the training set.

        Returns:
            `(n, P)`, 0 for positions that count for nothing; None where an example has one position.
        """
        found = self.loss.position_weights(labels)
        if found is None or self._shares is None:
            return found
        return found.to(self._shares) * self._shares[examples]

    def _feature_taps(self, model: nn.Module) -> list[Tap]:
        """Taps of the features for the ridge head of out-of-sample residuals.

        Raises:
            ValueError: A model in which nothing can be read.
        """
        try:
            batch = self._first_train_batch()
            if isinstance(self.loss, SummedPositions):  # features of each position
                reading = replace(batch.reading, loss=self.loss.position)
                batch = ExampleBatch(batch.content, reading, argument=batch.argument)
            return default_taps(model, batch, Features().max_width)
        except ValueError as error:
            which = "module runs"
            if isinstance(self.loss, SummedPositions):
                which = "gives one row for each position"
            must = f"be 'training' or 'temperature' for a model in which no Linear or convolution {which}"
            raise bad_value("residuals", must, repr(self.residuals)) from error

    def _both_residuals(
        self, state: Any, model: nn.Module, batch: Any, rows: slice | None
    ) -> tuple[Tensor, Tensor]:
        """`e_y - p` and r of training examples, or (`rows` is None) of examples outside the training set."""
        if rows is not None:
            if state.residuals is state.loss_residuals:
                both = state.residuals[rows]
                return both, both
            return state.loss_residuals[rows], state.residuals[rows]
        if not self._of_the_model:
            raise bad_value(
                "residuals", "be 'training' or 'temperature' for other inputs", repr(self.residuals)
            )
        with torch.no_grad():
            logits = self.batch_logits(model, batch)
        labels = Query("loss", "label").asked(logits, batch)
        left = self.loss.residuals(logits, labels)
        right = left
        if self.residuals != "training":
            right = self.loss.residuals(logits, labels, state.temperature)
        return left, self.loss.weighed(right, labels)

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "residuals": self.residuals, "temperature": self.temperature}
