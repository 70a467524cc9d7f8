"""Incremental updates of `STRIDE`: training examples added, removed or changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .data import inputs as data
from .data.batch import is_batch
from .data.digests import Digests
from .data.places import places
from .data.reading import Batch
from .errors import bad_type, bad_value
from .features.precomputed import Precomputed, check_some_rows
from .influence.checkpoints.checkpoint import seen_among
from .influence.rows import checked_ids
from .operator_scores import OperatorScores
from .operators import Changed, STRIDEState

Self = TypeVar("Self", bound="ChangingTrainingSet")


class ChangingTrainingSet(OperatorScores):
    """The part of `STRIDE` that updates the training set; its operators must be `changeable`."""

    def add_examples(self: Self, examples: Any) -> Self:
        """Append training examples, without reading the others again.

        The result equals a fit of the longer training set, up to rounding. From then on the method holds its
        features in memory; the store is not changed. The model must be the fitted one: if it has been trained
        further, fit again. Ids are kept if the examples have the attribute `ids`.

        An example with several positions comes with all of them. The form "matrix" of `ClosedForm` keeps no
        rows to update: all examples are read again in one pass.

        Args:
            examples: Dataset, DataLoader or tensors `(inputs..., labels)`.

        Returns:
            The method itself, fitted if it was not.

        Raises:
            ValueError: Trained operators, a model that has changed since `fit`, or examples of another shape.
            TypeError: Examples of another type, or without a length.
        """
        examples = new_examples(examples)
        if isinstance(self.batch.sample_weight, Tensor):
            must = "be a part of the batch for examples that come later"
            raise bad_value("sample_weight", must, "a tensor", "Name the part, or fit again.")
        reader, own_ids = self._reader_of(examples, self.batch), checked_ids(None, examples)
        self._change(
            lambda state, model: state.operators.with_examples(reader._read_as_fitted(state, model)),
            lambda dataset: data.joined(dataset, examples),
            lambda digests: Digests.joined([digests, reader._digests_read()]),
        )
        self.ids = None if self.ids is None or own_ids is None else [*self.ids, *own_ids]
        return self

    def remove_examples(self: Self, indices: Sequence[int] | Tensor) -> Self:
        """Remove training examples, without a pass through the model; the others keep their order.

        An example with several positions goes with all of them. The form "matrix" of `ClosedForm` keeps no
        rows to update: the others are read again in one pass.

        Args:
            indices: Places in the training set, each once; not all of them.

        Returns:
            The method itself, fitted if it was not.

        Raises:
            ValueError: Trained operators, a model that has changed since `fit`, or wrong indices.
            TypeError: Indices are not integers.
        """
        if self._states is None:
            self.fit()
        keep, n = rows_to_keep(indices, self.n_train_), self.n_train_
        before = self.checkpoints
        if before is not None:  # what each has seen has other places now
            self.checkpoints = [seen_among(checkpoint, keep, n) for checkpoint in before]
        try:
            self._change(
                lambda state, model: state.operators.without_examples(keep),
                lambda dataset: data.some_examples(dataset, keep),
                lambda digests: digests.rows(keep),
                self.batch.with_weights_of(keep),
            )
        except BaseException:
            self.checkpoints = before
            raise
        self.ids = None if self.ids is None else [self.ids[i] for i in keep.tolist()]
        return self

    def _read_again(self: Self, rows: Tensor) -> Self:
        """Update the training examples at these places, which have changed in `train_dataset`."""
        if data.count_examples(self.train_dataset) is None:
            must = "have a length, and examples that can be read one by one, for changed='update'"
            raise bad_value("train_dataset", must, type(self.train_dataset).__name__, "Fit again.")
        changed = data.some_examples(self.train_dataset, rows)
        reader = self._reader_of(changed, self.batch.with_weights_of(rows))
        return self._change(
            lambda state, model: state.operators.with_others(rows, reader._read_as_fitted(state, model)),
            lambda dataset: dataset,
            lambda digests: digests.replaced(rows, reader._digests_read()),
        )

    def _reader_of(self: Self, examples: Any, batch: Batch) -> Self:
        """A copy of the method that reads other examples."""
        reader = copy.copy(self)
        if isinstance(batch.sample_weight, int):  # the others may have fewer parts
            batch = replace(batch, sample_weight=self._training_reading().weight_key)
        reader.train_dataset, reader.batch, reader._precomputed, reader._passes = examples, batch, None, None
        return reader

    def _read_as_fitted(self, state: STRIDEState, model: nn.Module) -> Precomputed:
        """Features (projected as fitted), logits, labels, weights and positions."""
        read = self._read(model, state.taps, False)
        if state.projection is None:
            return read
        projected, widths = state.projection(read.features), state.projection.new_widths
        return replace(read, features=projected, widths=widths)

    def _digests_read(self) -> Digests:
        """Digests of the examples that `_read_as_fitted` has read."""
        digests = self._training_passes().digests
        assert digests is not None, "a pass is done"
        return digests

    def _check_changeable(self) -> None:
        """Refuse operators that cannot be updated.

        Raises:
            ValueError: Trained operators, or principal directions, which depend on all examples.
        """
        if not self.operators.changeable:
            must = "be ClosedForm() for adding or removing examples"
            raise bad_value("operators", must, repr(self.operators.name), "Fit again.")
        if self.features.projection and self._precomputed is not None:
            must = "be None for adding or removing examples of precomputed features"
            raise bad_value("projection", must, repr(self.features.projection), "Fit again.")
        if self.features.projection == "pca":
            must = "be None or 'random' for adding or removing examples"
            raise bad_value("projection", must, "'pca', which depends on them", "Fit again.")

    def _change(
        self: Self,
        change: Callable[[STRIDEState, nn.Module], Changed],
        dataset: Callable[[Any], Any],
        digests: Callable[[Digests], Digests],
        batch: Batch | None = None,
    ) -> Self:
        """Fit the changed training set incrementally; the method is unchanged if that fails.

        Args:
            change: Gives it, from operators that keep rows.
            dataset: Gives its examples.
            digests: Gives theirs.
            batch: How they are read; None for no change.
        """
        self._check_changeable()
        if self._states is None:
            self.fit()
        states: list[Any] = []
        batch = self.batch if batch is None else batch
        whole: Self | None = None
        with self._session() as model:
            self._check_unchanged()
            for index, (checkpoint, state, _) in enumerate(self._fitted()):
                self._checkpoint_index = index
                self._load_fitted(model, checkpoint)
                if state.operators.keeps_rows:
                    new = change(state, model)
                else:
                    if whole is None:
                        whole = self._reader_of(dataset(self.train_dataset), batch)
                    new = Changed(**vars(whole._read_as_fitted(state, model)))
                if new.positions is not None:
                    check_some_rows(len(new.labels))
                training = self._training_set(model, state.taps, new)
                states.append(replace(state, operators=self.operators.fit(training)))
        examples = dataset(self.train_dataset) if whole is None else whole.train_dataset
        seen: Digests | None = getattr(self, "digests_", None)
        if seen is not None:
            seen = digests(seen) if whole is None else whole._digests_read()
        self.digests_ = seen
        self._states, self.train_dataset, self.batch = states, examples, batch
        self._mark_data()
        self._learned(states[-1])
        self._weights = self.combine_weights([1.0] * len(states))
        self._changed = True
        if self._precomputed is not None:
            self._precomputed = replace(new, known=None)
        return self


def rows_to_keep(indices: Any, n_train: int) -> Tensor:
    """Rows that remain if `indices` are removed, `(n_kept,)` int64.

    Raises:
        TypeError: Not places in the training set (`places`).
        ValueError: Out of range, twice the same, none at all, or every example.
    """
    gone = places(indices, n_train, "indices")
    if not 0 < gone.size < n_train:
        raise bad_value("indices", f"name between 1 and {n_train - 1} examples", gone.size)
    keep = np.ones(n_train, dtype=bool)
    keep[gone] = False
    return torch.from_numpy(keep.nonzero()[0])


def new_examples(examples: Any) -> Any:
    """Added examples as a data set: a Dataset or DataLoader as it is, or tensors `(inputs..., labels)`."""
    if isinstance(examples, tuple | list) and len(examples) > 1 and all(map(torch.is_tensor, examples)):
        examples = TensorDataset(*examples)
    if is_batch(examples) or data.count_examples(examples) is None:
        must = "be a Dataset or DataLoader with a length, or tensors (inputs..., labels)"
        raise bad_type("examples", must, examples)
    data.check_source(examples, "examples")
    return examples
