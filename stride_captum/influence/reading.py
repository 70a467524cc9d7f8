"""Batches of a method: passes over the training set, test points, labels and logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import inputs as data
from ..data.batch import ExampleBatch, is_batch
from ..data.passes import Passes
from ..data.reading import Batch, Reading
from ..errors import bad_type, bad_value, whole_number
from ..layers.activations import token_mask
from ..layers.probes import check_deterministic
from ..losses import Loss, loss_of
from ..losses.output_check import OutputCheck
from ..losses.positions import PositionRows, check_weight_shape, has_positions
from ..losses.positions import position_rows as as_position_rows
from ..losses.summed_positions import SummedPositions
from ..losses.whole_examples import loss_of_outputs
from ..system.devices import float64_device, on_device
from .checkpoints.checkpoint import LoadCheckpoint
from .query import Query, asked_weights, weights_of
from .session import ModelSession

#: Test points that are scored together, at most.
_TEST_ROWS = 1024


class BatchReader(ModelSession):
    """The part of every method that reads examples.

    Args:
        model: The network.
        train_dataset: Dataset or DataLoader of the training set.
        batch_size: Examples a forward pass, if a data set is given.
        loss: What the model was trained with.
        batch: How a batch is read.
        device: As for `ModelSession`.
        checkpoints: As for `ModelSession`.
        checkpoints_load_func: As for `ModelSession`.
        memory_budget: As for `ModelSession`.
    """

    #: Whether the method reads the positions of an example as rows of their own.
    takes_positions: ClassVar[bool] = False

    n_train_: int

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        batch_size: int,
        loss: str | Loss,
        batch: Batch | None,
        device: torch.device | str | None,
        checkpoints: Iterable[Any] | str | Path | None,
        checkpoints_load_func: LoadCheckpoint,
        memory_budget: int | str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise bad_type("model", "be a torch.nn.Module", model)
        data.check_training_set(train_dataset)
        self.train_dataset = train_dataset
        self.batch_size = whole_number("batch_size", batch_size)
        super().__init__(model, device, checkpoints, checkpoints_load_func, memory_budget)
        if batch is not None and not isinstance(batch, Batch):
            raise bad_type("batch", "be a stride_captum.Batch", batch, "Write Batch(label_key=...).")
        self.loss = loss_of(loss)
        self.check_loss(self.loss)
        self.batch = Batch() if batch is None else batch
        self.batch.check_weights_of(data.count_examples(train_dataset))
        self._passes: Passes | None = None
        self._output_check: OutputCheck | None = None

    def check_loss(self, loss: Loss) -> None:
        """Refuse a loss that the method cannot take. By default every loss is taken.

        It is called when the method is built, before the attributes of a subclass that are set after
        `super().__init__`. A method that does not take positions is also asked about `SummedPositions`: by
        `fit`, if the model turns out to return several positions for each example.

        Args:
            loss: What the model was trained with.

        Raises:
            ValueError: The method, or its options, cannot take it.
        """

    def need_classes(self, loss: Loss, why: str) -> None:
        """Refuse a loss without one class for each example: `check_loss` of a method that compares classes.

        Args:
            loss: As for `check_loss`.
            why: What the method does with the classes, as a relative clause for the message.

        Raises:
            ValueError: Labels are no classes, or an example has several positions.
        """
        name = type(self).__name__
        if isinstance(loss, SummedPositions):
            must = f"return one row of logits for each example for {name}, {why}"
            raise bad_value("model", must, f"{loss.n_positions} positions", "Use another method.")
        loss.refuse(name, why)

    def _own_columns(self) -> slice:
        """Places of the training examples that this process reads."""
        return slice(None)

    def _every_example(self) -> Any:
        """The training set of all processes together."""
        return self.train_dataset

    def max_rows(self) -> int | None:
        """Examples that the method takes at a time, None for as many as a batch has."""
        return None

    def train_batches(self, show_progress: bool) -> Iterator[Any]:
        """One pass over the training set, in batches on the working device."""
        return self._batches(
            self.train_dataset, "train_dataset", show_progress, f"fitting {type(self).__name__}"
        )

    def train_blocks(self, size: int, show_progress: bool) -> Iterator[tuple[slice, Any]]:
        """Batches of the training set, cut to `size` and `max_rows`, with their places in it."""
        for batch in self.train_batches(show_progress):
            for piece in batch.split(min(size, self.max_rows() or size)):
                assert piece.columns is not None, "a batch of the training set"
                yield piece.columns, piece

    def train_labels(self, batch: ExampleBatch, n_classes: int, rows: Tensor | None = None) -> Tensor:
        """Labels of a batch of training examples as the loss has them (`Loss.labels`), on the working device.

        With cross-entropy they are `(n,)` int64 in `[0, n_classes)`, or `(n, n_classes)`.

        They are checked where they are: those of a batch that is not on a GPU wait for none.

        Args:
            batch: Of the training set.
            n_classes: Number of outputs.
            rows: Labels of the positions of its examples, which count in the place of its labels.
        """
        labels = batch.labels if rows is None else rows
        if labels is None:
            raise bad_value(
                "train_dataset",
                "give one label per example, last in (inputs..., label) or under 'labels'",
                "none",
            )
        return on_device(self.loss.labels(labels, n_classes, "train_dataset"), self._work_device())

    def train_weights(self, batch: ExampleBatch, labels: Tensor, kept: Tensor | None = None) -> Tensor | None:
        """Weights omega of a batch of examples, `(n,)` float64 where the device has it; None for 1.

        Args:
            batch: Of the training set, or of others, whose own weights are 1 unless they stand in it.
            labels: Its labels (`train_labels`).
            kept: Which positions of its examples have a row, `(n, P)` bool; the weight of an example is that
                of each of them. None for whole examples: of `SummedPositions` weights may be `(n, P)`.
        """
        own = weights_of(batch)
        grid = labels if isinstance(self.loss, SummedPositions) else kept
        check_weight_shape(own, None if grid is None else tuple(grid.shape[:2]))
        if own is not None and kept is not None:
            own = (own if own.ndim == 2 else own[:, None].expand(kept.shape))[kept.to(own.device)]
        place = float64_device(self._work_device())
        found = [w.to(place) for w in (own, self.loss.weights(labels)) if w is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] * found[1]

    def batch_logits(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Logits of a batch, `(n, n_classes)`."""
        return self._as_logits(batch.outputs(model), batch)

    def _as_logits(self, outputs: Tensor, batch: ExampleBatch) -> Tensor:
        """Outputs for a batch as logits; those for training examples are looked at in `fit`."""
        self._look_at(outputs, batch)
        return batch.logits_of(outputs)

    def _look_at(self, outputs: Tensor, batch: ExampleBatch, examples: Tensor | None = None) -> None:
        if self._output_check is not None and batch.columns is not None:
            self._output_check.look(outputs, batch.columns.start, examples)

    def position_rows(self, outputs: Tensor, batch: ExampleBatch, asked: bool = False) -> PositionRows | None:
        """The positions of a batch as rows; None where an example has one row of outputs.

        Args:
            outputs: Of the model for the batch.
            batch: Examples.
            asked: Whether training examples are asked as test points, without positions of weight 0.

        Raises:
            ValueError: Labels that do not fit them.
        """
        if not has_positions(outputs) or not self.takes_positions:
            return None
        if len(outputs) != len(batch):
            raise bad_value("model", f"return one row for each of {len(batch)} examples", len(outputs))
        own = asked_weights(batch) if asked or batch.columns is None else None
        labels, mask = batch.labels, token_mask(batch)
        found = as_position_rows(self.loss, outputs.detach(), labels, mask, batch.argument, own)
        if self._output_check is not None:
            self._look_at(found.outputs, batch, found.positions.examples)
        return found

    def _take_positions_together(self, model: nn.Module) -> None:
        """Make the loss that of whole examples, if they have several positions: `SummedPositions`."""
        if self.takes_positions or isinstance(self.loss, SummedPositions):
            return
        few = self._first_train_batch().first(2)
        with torch.no_grad():
            outputs = few.outputs(model)
        together = loss_of_outputs(self.loss, outputs)
        if together is not self.loss:
            self.check_loss(together)
            self.loss = together
            self._training_passes().read_with(self.loss)

    def labeled_rows(self, model: nn.Module, batch: ExampleBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, labels and weights (None for 1) of a batch, one row for each example or position."""
        outputs = batch.outputs(model)
        found = self.position_rows(outputs, batch)
        if found is None:
            logits = self._as_logits(outputs, batch)
            labels, kept = Query("loss", "label").asked(logits, batch), None
        else:
            logits, kept = self.loss.logits(found.outputs), found.kept
            labels = self.loss.asked(logits, found.labels, "label", "loss")
        return logits, labels, self.train_weights(batch, labels, kept)

    def _test_rows(self) -> int:
        """Test points of one batch, at most."""
        return self.max_rows() or max(self.batch_size, _TEST_ROWS)

    def _test_batches(self, inputs: Any, show_progress: bool) -> Iterator[ExampleBatch]:
        for batch in self._batches(inputs, "inputs", show_progress, type(self).__name__):
            yield from batch.split(self._test_rows())

    def _batches(self, source: Any, argument: str, show_progress: bool, what: str) -> Iterator[ExampleBatch]:
        """Batches on the working device, with a bar; those of the training set know their places in it."""
        device = self._work_device()
        for batch in self._batches_as_they_are(source, argument, show_progress, what):
            yield batch.to(device)

    def _batches_as_they_are(
        self, source: Any, argument: str, show_progress: bool, what: str
    ) -> Iterator[ExampleBatch]:
        """Batches with a bar, where the source has put them."""
        total: int | None = 1
        if is_batch(source):
            batches = iter([self._example_batch(source, argument)])
        elif source is self.train_dataset:
            batches = self._training_passes().walk()
            total = data.count_batches(source, self.batch_size)
        else:
            found = data.raw_batches(source, self.batch_size, argument)
            batches = (self._example_batch(content, argument) for content in found)
            total = data.count_batches(source, self.batch_size)
        batch = None
        for batch in tqdm(batches, total=total, desc=what, disable=not show_progress):
            yield batch
        if batch is None:
            raise bad_value(argument, "hold at least one example", "an empty one")

    def _example_batch(self, content: Any, argument: str) -> ExampleBatch:
        """A batch of examples outside the training set, read as those of the training set are."""
        if isinstance(content, ExampleBatch):
            return content
        return ExampleBatch(content, self._training_reading(), argument=argument)

    def _training_reading(self) -> Reading:
        """How batches of the training set are read, as far as it is known."""
        weights = self.batch.sample_weight
        if isinstance(weights, int) and weights < 0:  # a place that the training set tells
            self._training_passes().first()
        reading = None if self._passes is None else self._passes.reading
        return reading or self._reading()

    def _reading(self) -> Reading:
        return Reading(self.batch, self.loss)

    def _check_model(self, model: nn.Module) -> None:
        """Refuse a model whose outputs for an example depend on chance or on the other examples."""
        check_deterministic(model, self._first_train_batch())

    def _training_passes(self) -> Passes:
        """Passes over the present training set."""
        if self._passes is None or self._passes.source is not self.train_dataset:
            self._passes = Passes(self.train_dataset, self.batch_size, self._reading())
        return self._passes

    def _first_train_batch(self) -> ExampleBatch:
        """The first training examples on the working device; the next pass gives them again."""
        return self._training_passes().first().to(self._work_device())
