"""Features of the training set for `STRIDE`: from one pass, a store, or the user; and their projection."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from .data import inputs as data
from .data.batch import ExampleBatch
from .errors import bad_value
from .features.options import Features
from .features.precomputed import Precomputed, check_positions_finite
from .features.projection import Projection, fit_projection
from .features.reader import (
    Rows,
    Run,
    TrainingRows,
    all_weights,
    read_batch,
    read_training_set,
    weights_of_rows,
)
from .features.store import FeatureStore
from .features.store_writer import Computed
from .influence.method import InfluenceMethod
from .layers.activations import Tap, default_taps, named_taps, recording
from .layers.probes import check_deterministic
from .operators import Operators
from .system.devices import float64_device
from .system.fingerprints import weights_fingerprint
from .system.stable_digest import NoStableDigest, stable_digest

Self = TypeVar("Self", bound="TrainingFeatures")


class TrainingFeatures(InfluenceMethod):
    """The part of `STRIDE` that reads features."""

    operators: Operators
    features: Features
    feature_store: FeatureStore | None
    _precomputed: Precomputed | None
    _changed: bool

    def _training_features(self, model: nn.Module, show_progress: bool) -> tuple[list[Tap], Precomputed]:
        """Taps, and features, logits and labels: precomputed, from the store, or read."""
        if self._precomputed is not None:
            return self._choose_taps(model), self._precomputed
        if self.feature_store is None:
            taps = self._choose_taps(model)
            return taps, self._read(model, taps, show_progress)
        store, key = self._store(self._checkpoint_index, weights_fingerprint(model))
        if self.batch.sample_weight is not None:  # which the store does not hold
            store = replace(store, check_examples=True)
        taps = store.taps(key) or self._choose_taps(model)
        weights: list[Tensor | None] = []
        sizes: list[int] = []

        def compute(batch: ExampleBatch) -> Computed:
            rows = self._compute(taps, run, batch)
            return rows.features, rows.logits, rows.labels, rows.kept

        with recording(model, taps) as run:
            batches = self._weighed(self._passing(show_progress), weights, sizes)
            stored = store.fill(key, taps, batches, compute)
        labels, positions = stored.labels.to(self._work_device()), stored.positions
        width = 1 if labels.ndim == 1 else labels.shape[1]
        own = weights_of_rows(weights, [size // width for size in sizes], positions)
        read = Precomputed(
            self._placed(stored.features),
            self._placed(stored.logits),
            labels,
            [tap.width for tap in stored.taps],
            self._all_weights(own, labels),
            positions,
        )
        if positions is not None:
            check_positions_finite(read)
        return stored.taps, read

    def _read(self, model: nn.Module, taps: Sequence[Tap], show_progress: bool) -> Precomputed:
        """One forward pass over the training set."""
        expected = data.count_examples(self.train_dataset)
        compute = partial(self._compute, taps)
        read = read_training_set(model, taps, self._passing(show_progress), compute, expected)
        if read.positions is not None:
            check_positions_finite(read)
        return read

    @staticmethod
    def _weighed(
        batches: Iterable[ExampleBatch], weights: list[Tensor | None], sizes: list[int]
    ) -> Iterator[ExampleBatch]:
        """Yield the batches; collect their sample weights and how many numbers label an example."""
        for batch in batches:
            weights.append(batch.weights)
            sizes.append(0 if batch.labels is None else batch.labels[:1].numel())
            yield batch

    def _all_weights(self, weights: list[Tensor | None], labels: Tensor) -> Tensor | None:
        """Omega of the training set, `(n_train,)`: sample weights times those of the loss; None for 1."""
        of_loss, own = self.loss.weights(labels), all_weights(weights)
        if own is None:
            return of_loss
        own = own.to(float64_device(labels.device))
        return own if of_loss is None else own * of_loss

    def _passing(self, show_progress: bool) -> Any:
        what = f"fitting {type(self).__name__}"
        return self._batches_as_they_are(self.train_dataset, "train_dataset", show_progress, what)

    def _compute(self, taps: Sequence[Tap], run: Run, batch: ExampleBatch) -> TrainingRows:
        """Rows of each tap, logits, labels and weights of one batch of training examples."""
        rows = self._checked_rows(read_batch(self, run, taps, batch.to(self._work_device())))
        # Labels are checked where the data set has them, without waiting for a device.
        own = None if rows.kept is None else rows.labels
        labels = self.train_labels(batch, rows.logits.shape[1], own)
        weights = self.train_weights(batch, labels, rows.kept)
        return TrainingRows(rows.features, rows.logits, labels, rows.outputs, rows.kept, weights)

    def _read_batch(self, model: nn.Module, taps: Sequence[Tap], batch: ExampleBatch) -> Rows:
        """Features, logits and labels of one batch of test points, which may be training examples."""
        with recording(model, taps) as run:
            return self._checked_rows(read_batch(self, run, taps, batch, asked=True))

    def _checked_rows(self, rows: Rows) -> Rows:
        """The rows, if the operators take them.

        Raises:
            ValueError: They take no positions.
        """
        if rows.kept is not None and not self.operators.takes_positions:
            must = f"give one row of outputs per example for operators={self.operators.name!r}"
            raise bad_value("model", must, f"{rows.kept.shape[1]} positions", "Take ClosedForm().")
        return rows

    def _check_model(self, model: nn.Module) -> None:
        """Skip the check here: it runs when layers are chosen, and not again with a filled store."""

    def _choose_taps(self, model: nn.Module) -> list[Tap]:
        few = self._first_train_batch()
        if self._precomputed is None:
            check_deterministic(model, few)
        if self.layers is not None:
            return named_taps(model, self.layers, few)
        return default_taps(model, few, self.features.max_width, self.features.select == "penultimate")

    def _fit_projection(self, known: Precomputed) -> Projection | None:
        wanted = self.features
        if wanted.projection is None or max(known.widths) <= wanted.projection_width:
            return None
        size = wanted.projection_width
        device = known.labels.device
        return fit_projection(known.features, known.widths, wanted.projection, size, wanted.seed, device)

    # Features in a store, and files.

    def _store(self, index: int, weights: str) -> tuple[FeatureStore, dict[str, Any]]:
        """Store of the checkpoint with these weights, and its key."""
        assert self.feature_store is not None
        asked = f"{self.features.select}, at most {self.features.max_width}"
        layers = asked if self.layers is None else ", ".join(map(str, self.layers))
        key = self.feature_store.key(weights, self.model, self.train_dataset, layers)
        outputs = getattr(self.loss, "outputs", None) or "logits"
        if (self.loss.name, outputs) != ("cross_entropy", "logits"):  # older stores do not have the key
            key["loss"] = f"{self.loss.name}, {outputs}"
        ignored, class_dim = getattr(self.loss, "ignore_index", -100), self.loss.class_dim
        if (ignored, class_dim) != (-100, None):
            key["positions"] = f"ignore_index={ignored}, class_dim={class_dim}"
        if getattr(self.loss, "uncounted", ()):  # positions with these labels are no rows
            key["classes of weight 0"] = repr(self.loss.uncounted)  # type: ignore[attr-defined]
        if not type(self.loss).__module__.startswith(f"{__package__}."):  # its labels may depend on them
            key["code or options of the loss"] = _digest_of(self.loss, "loss")
        if self.batch.label_key is not None:
            key["labels"] = f"label_key={self.batch.label_key!r}"
        if self.batch.forward is not None:
            key["forward"] = _digest_of(self.batch.forward, "forward")
        if isinstance(self.batch.sample_weight, str | int):  # the model is not given this part
            key["sample_weight"] = repr(self.batch.sample_weight)
        store = self.feature_store if self.checkpoints is None else self.feature_store.for_checkpoint(index)
        return store, key

    def without_store(self: Self) -> Self:
        """A copy that neither reads the feature store nor writes to it: for runs on a part of the data."""
        twin = copy.copy(self)
        twin.feature_store = None
        return twin

    def _placed(self, stored: Tensor) -> Tensor:
        """Stored array as the operators read it: memory-mapped if they stream, else in memory."""
        return stored if self.operators.streams else stored.to(self._work_device(), torch.float32)

    def _features_are_stored(self) -> bool:
        """Whether the operators read the features of the store unchanged."""
        stored = self.feature_store is not None and not self._changed
        return stored and self.operators.streams and not self.features.projection

    @override
    def settings(self) -> dict[str, Any]:
        settings = {**super().settings(), "operators": self.operators, "features": self.features}
        if self.feature_store is not None:
            settings["feature_store"] = {**asdict(self.feature_store), "path": str(self.feature_store.path)}
        return settings

    def _states_to_save(self) -> list[Any]:
        """States without features that are in a store."""
        states = super()._states_to_save()
        if not self._features_are_stored():
            return states
        return [replace(s, operators=s.operators.without_features()) for s in states]

    def _loaded_states(self, states: list[Any], fingerprints: list[str]) -> list[Any]:
        """States with the features of the store again."""
        if not self._features_are_stored():
            return states
        for index, (state, weights) in enumerate(zip(states, fingerprints, strict=True)):
            if not state.operators.keeps_rows:
                continue
            if len(state.operators.features) == 0:
                store, key = self._store(index, weights)
                stored = store.open(key)
                placed = self._placed(stored.features), self._placed(stored.logits)
                state.operators = state.operators.with_features(*placed)
            else:  # saved after an incremental update
                self._changed = True
        return states


def _digest_of(value: Any, name: str) -> str:
    """Digest of a function or object with all that it reads, or of its code where some has no content."""
    try:
        return stable_digest(value, name)
    except NoStableDigest:
        return stable_digest(getattr(value, "__code__", type(value)), name)
