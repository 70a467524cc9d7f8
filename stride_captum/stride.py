"""`STRIDE`: training data attribution in activation space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .closed_form.estimate import estimate_closed_form
from .closed_form.incremental import (
    Changed,
    new_examples,
    rows_to_keep,
    with_examples,
    with_others,
    without_examples,
)
from .closed_form.operators import ClosedForm, fit_closed_form
from .config import STRIDEConfig, html_table
from .data import inputs as data
from .data.batch import Batch, ExampleBatch
from .data.digests import Digests
from .errors import bad_type, bad_value
from .features.projection import Projection, fit_projection
from .features.store import FeatureStore
from .features.store_files import as_tensor
from .features.store_writer import Computed
from .influence.checkpoints import LoadCheckpoint, load_checkpoint
from .influence.estimate import Estimate, from_fewer_steps
from .influence.method import InfluenceMethod, Query
from .layers.activations import Tap, check_finite, default_taps, named_taps, recording
from .layers.probes import check_deterministic
from .losses import CrossEntropy, OutputCheck
from .recovery.solver import soft_threshold
from .responses import class_labels, response_gradient
from .steering.trained import TrainedSteering, fit_steering
from .subsets import coverage
from .system.devices import as_float64
from .system.fingerprints import weights_fingerprint
from .system.memory import MOST_ROWS, blocks
from .system.saved_values import saved_as
from .system.to_device import working_dtype

Self = TypeVar("Self", bound="STRIDE")


@saved_as("stride")
@dataclass
class STRIDEState:
    """What `fit` learns at one checkpoint.

    Attributes:
        taps: Where features are read.
        operators: Closed-form or trained operators.
        projection: Of wide layers, where `STRIDEConfig.projection` asks for it.
    """

    taps: list[Tap]
    operators: ClosedForm | TrainedSteering
    projection: Projection | None = None


class STRIDE(InfluenceMethod):
    """Which training examples made the model say this? One forward pass over the training set answers.

    By default the operators are the closed form (`stride_captum.closed_form`), which needs no subsets, no
    training and no gradient of the network. `config=STRIDEConfig.paper("mnist")` gives the paper's
    trained operators and Lasso recovery.

    A score is the predicted change of the response (by default the margin of the test label) when the
    training example is among the n_train: positive for proponents.

    Args:
        model: A trained classifier with logits `(n, n_classes)`; it is left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of `(inputs..., label)` or dicts.
        layers: Submodules whose outputs are features ("name:input" for what one reads); None takes
            what every weight layer reads, see `layers_`.
        batch_size: Examples a forward pass, where a data set is given.
        device: Where the work is done; None takes the device of the model.
        checkpoints: State dicts or paths over which scores are averaged.
        checkpoints_load_func: `f(model, checkpoint)` loads one.
        held_out: Labelled data that the model has not seen: sets the temperature.
        config: All other options.
        feature_store: A folder, or a `FeatureStore`, for what a pass over the training set gives. The
            first `fit` fills it; later ones, also of other processes and with other options, start
            from it without the pass. The closed form reads it chunk by chunk and never holds all of
            it; trained operators hold the features in memory.
        loss: What the model was trained with (see `InfluenceMethod`).
        batch: How a batch is read (see `InfluenceMethod`).

    Attributes:
        layers_: Names of the layers that were read.
        temperature_: T of the tempered residuals (the last checkpoint's).
        coverage_: Which training examples can have a score, `(n_train,)` bool.
        projection_error_: Relative error of the features' kernel that `STRIDEConfig.projection` makes (the
            last checkpoint's); 0 without a projection.

    Example:
        >>> x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(5, 2)
        >>> scores = STRIDE(model, TensorDataset(x, y)).influence((x[:3], y[:3]))
        >>> scores.shape
        torch.Size([3, 40])
    """

    fits_in_one_pass = True

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int = 1024,
        device: torch.device | str | None = None,
        checkpoints: Sequence[Any] | None = None,
        checkpoints_load_func: LoadCheckpoint = load_checkpoint,
        held_out: Any = None,
        config: STRIDEConfig | None = None,
        feature_store: str | Path | FeatureStore | None = None,
        loss: str | CrossEntropy = "cross_entropy",
        batch: Batch | None = None,
    ) -> None:
        config = STRIDEConfig() if config is None else config
        if not isinstance(config, STRIDEConfig):
            raise bad_type("config", "be a STRIDEConfig", config)
        super().__init__(
            model,
            train_dataset,
            layers=layers,
            batch_size=batch_size,
            device=device,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
            held_out=held_out,
            response=config.response,
            target=config.target,
            normalize=config.normalize,
            memory_budget=config.memory_budget,
            loss=loss,
            batch=batch,
        )
        self.config = config
        if feature_store is not None and not isinstance(feature_store, FeatureStore):
            feature_store = FeatureStore(feature_store)
        self.feature_store = feature_store
        self._precomputed: tuple[Tensor, Tensor, Tensor, list[int]] | None = None
        self._changed = False

    @classmethod
    def from_features(
        cls: type[Self],
        features: Any,
        logits: Any,
        labels: Any,
        *,
        widths: Sequence[int] | None = None,
        config: STRIDEConfig | None = None,
        loss: str | CrossEntropy = "cross_entropy",
    ) -> Self:
        """STRIDE on precomputed features, without a model.

        Test batches are `(features, logits, labels)`.

        Args:
            features: `(n_train, n_features)`, tensor or numpy array, may be memory-mapped.
            logits: `(n_train, n_classes)`.
            labels: `(n_train,)`.
            widths: Widths of the layers that the columns come from; None means one layer.
            config: Options.
            loss: What `logits` are: probabilities in their place are refused unless it says so.

        Raises:
            ValueError: Shapes that do not fit one another, or probabilities that are not declared.
        """
        features, logits, labels = (as_tensor(a) for a in (features, logits, labels))
        for name, value, ndim in (("features", features, 2), ("logits", logits, 2), ("labels", labels, 1)):
            if value.ndim != ndim or len(value) != len(features):
                raise bad_value(
                    name,
                    f"have {ndim} dimensions and n_train = {len(features)} rows",
                    f"shape {tuple(value.shape)}",
                )
        widths = [features.shape[1]] if widths is None else list(widths)
        if sum(widths) != features.shape[1]:
            raise bad_value("widths", f"add up to n_features = {features.shape[1]}", sum(widths))
        dataset = TensorDataset(features, logits, labels)
        method = cls(PrecomputedFeatures(), dataset, layers=["features"], config=config, loss=loss)
        check = OutputCheck(method.loss, None)
        for rows in blocks(len(logits), MOST_ROWS):
            check.look(logits[rows], rows.start)
        check.finish()
        multiclass = method.loss.logits(logits)
        classes = class_labels(labels, multiclass.shape[1], "labels")
        method._precomputed = (features, multiclass, classes, widths)
        return method

    def _state(self, taps: list[Tap], operators: ClosedForm | TrainedSteering) -> STRIDEState:
        return STRIDEState(taps, operators)

    # The three functions of a method.

    def _fit_checkpoint(self, model: nn.Module, show_progress: bool) -> STRIDEState:
        taps, features, logits, labels, widths = self._training_features(model, show_progress)
        self._changed = False
        projection = self._fit_projection(features, widths, labels.device)
        self.projection_error_ = 0.0
        if projection is not None:
            features, widths = projection.whole(features, labels.device), projection.new_widths
            self.projection_error_ = projection.error
        if self.config.operators == "newton":
            self.temperature_ = self._choose_temperature(model, logits, labels, self.config.temperature)
            form = fit_closed_form(
                features, logits, labels, widths, self.config, self.temperature_, self.ranks
            )
            self.n_train_ = form.n_train
            self.coverage_ = torch.ones(self.n_train_, dtype=torch.bool, device="cpu")
            return STRIDEState(taps, form, projection)
        self.n_train_ = len(labels)
        check_finite(features)
        check_finite(logits, "logits")
        features = features.to(working_dtype(features))
        head = _head(model, taps, features, logits) if self.config.steering == "representation" else None
        scale = features.new_ones(features.shape[1]) if head else _unit_scale(features, widths)
        with torch.enable_grad():  # reading the features needs none
            steering = fit_steering(features, logits, labels, scale, self.config, head, show_progress)
        self.coverage_ = torch.from_numpy(coverage(steering.membership))
        self.history_ = steering.history
        return STRIDEState(taps, steering, projection)

    def _prepare(self, state: STRIDEState, model: nn.Module, batch: Any, ask: Query) -> Any:
        if isinstance(state.operators, ClosedForm):
            return state.operators.prepare(*self._query(state, model, batch, ask))
        features, logits, classes, response = self._asked(state, model, batch, ask)
        responses = state.operators.subset_responses(features, logits, classes, response)
        return state.operators.weights(responses, self.config)

    def _query(self, state: STRIDEState, model: nn.Module, batch: Any, ask: Query) -> tuple[Tensor, Tensor]:
        """What the closed form needs to know of test points: raw features, gradients of the response."""
        features, logits, classes, response = self._asked(state, model, batch, ask)
        return features, response_gradient(logits, classes, response)

    def _asked(
        self, state: STRIDEState, model: nn.Module, batch: Any, ask: Query
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        features, logits, outputs = self._read_batch(model, state.taps, batch, state.projection)
        return features, logits, ask.classes(logits, batch), self.loss.response_of(outputs, ask.response)

    def _scores(self, state: STRIDEState, prepared: Any, columns: slice) -> Tensor:
        if isinstance(state.operators, TrainedSteering):
            weights: Tensor = prepared[:, columns]
            return weights
        scores = state.operators.scores(prepared[0], columns)
        return soft_threshold(scores, self.config.threshold) if self.config.threshold else scores

    def _train_norms(self, state: STRIDEState) -> Tensor:
        if isinstance(state.operators, TrainedSteering):
            raise self._no_norms()
        return state.operators.train_norms()

    def _test_norms(self, state: STRIDEState, prepared: Any) -> Tensor:
        if isinstance(state.operators, TrainedSteering):
            raise self._no_norms()
        return state.operators.test_norms(*prepared[1:])

    def _train_self_influence(self, state: STRIDEState) -> Tensor | None:
        return state.operators.self_influence() if isinstance(state.operators, ClosedForm) else None

    def _self_influence(self, state: STRIDEState, model: nn.Module, batch: Any, rows: slice | None) -> Tensor:
        if rows is not None or isinstance(state.operators, TrainedSteering):
            return super()._self_influence(state, model, batch, rows)
        features, logits, _ = self._read_batch(model, state.taps, batch, state.projection)
        return state.operators.self_influence_of(
            features, logits, Query("loss", "label").classes(logits, batch)
        )

    def mislabel_scores(self) -> Tensor:
        """How suspect each training label is, `(n_train,)`: high means suspect.

        With closed-form operators this is the norm of the leave-one-out residual of a ridge head on
        the features: how far the label is from what the other examples say. With trained operators it
        is the self-influence.
        """
        if self.config.operators == "trained":
            return self.self_influence()
        if self._states is None:
            self.fit()
        norms = [
            state.operators.suspicion() * w
            for state, w in zip(self._states or [], self._weights, strict=True)
        ]
        return torch.stack(norms).sum(0)

    def _estimate(self, n_test: int, k: int | None) -> Estimate:
        by_counting = self.config.curvature in ("identity", "kronecker") and self.config.projection is None
        if self.config.operators == "trained":
            return from_fewer_steps(self, n_test, k)
        return estimate_closed_form(self, n_test, k) if by_counting else super()._estimate(n_test, k)

    @property
    def layers_(self) -> list[str]:
        """Names of the layers whose activations are the features."""
        if self._states is None:
            raise bad_value("layers_", "be read after fit()", "a method that is not fitted")
        return [str(tap) for tap in self._states[0].taps]

    def __repr__(self) -> str:
        fitted = "not fitted"
        if self._states is not None:
            fitted = f"n_train={self.n_train_}, layers={self.layers_}"
        return f"STRIDE(operators={self.config.operators!r}, {fitted})"

    def _repr_html_(self) -> str:
        facts: dict[str, Any] = {"operators": self.config.operators, "fitted": self._states is not None}
        if self._states is not None:
            facts |= {"n_train": self.n_train_, "layers": ", ".join(self.layers_)}
        return f"<b>{type(self).__name__}</b>{html_table(facts)}{self.config._repr_html_()}"

    # Training examples that come and go.

    def add_examples(self: Self, examples: Any) -> Self:
        """Add training examples behind those that were fitted, without reading those again.

        Only the new examples go through the model. Scores equal those of a refit up to rounding
        (`stride_captum.closed_form.incremental`). `train_dataset` becomes the longer one. Features that were
        read from a store are in memory from then on; the store stays as it is. The features must be those of
        the same model: where training has gone on, fit again.

        Args:
            examples: Dataset, DataLoader or tensors `(inputs..., labels)`.

        Returns:
            The method itself; fitted first, where it was not.

        Raises:
            ValueError: Trained operators, or a model that has changed since `fit`.
            TypeError: Examples of another kind, or without a length.
        """
        examples = new_examples(examples)
        reader = self._reader_of(examples)
        return self._change(
            lambda state, model, form: with_examples(form, *reader._read_as_fitted(state, model)),
            lambda dataset: data.joined(dataset, examples),
            lambda digests: Digests.joined([digests, reader._digests_read()]),
        )

    def remove_examples(self: Self, indices: Sequence[int] | Tensor) -> Self:
        """Remove training examples, without a pass through the model; the others keep their order.

        Args:
            indices: Places in the training set, each once; not all of them.

        Returns:
            The method itself; fitted first, where it was not.

        Raises:
            ValueError: Trained operators, a model that has changed since `fit`, or wrong indices.
            TypeError: Indices that are no integers.
        """
        if self._states is None:
            self.fit()
        keep = rows_to_keep(indices, self.n_train_)
        return self._change(
            lambda state, model, form: without_examples(form, keep),
            lambda dataset: data.some_examples(dataset, keep),
            lambda digests: digests.rows(keep),
        )

    def _read_again(self: Self, rows: Tensor) -> Self:
        """Take in training examples that have changed in `train_dataset`, at their places."""
        if data.count_examples(self.train_dataset) is None:
            must = "have a length, and examples that can be read one by one, for changed='update'"
            raise bad_value("train_dataset", must, type(self.train_dataset).__name__, "Fit again.")
        reader = self._reader_of(data.some_examples(self.train_dataset, rows))
        return self._change(
            lambda state, model, form: with_others(form, rows, *reader._read_as_fitted(state, model)),
            lambda dataset: dataset,
            lambda digests: digests.replaced(rows, reader._digests_read()),
        )

    def _reader_of(self: Self, examples: Any) -> Self:
        """A copy of the method that reads other examples."""
        reader = copy.copy(self)
        reader.train_dataset, reader._precomputed = examples, None
        return reader

    def _read_as_fitted(self, state: STRIDEState, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Features as the operators have them, logits and labels."""
        features, logits, labels, _ = self._read(model, state.taps, False)
        return features if state.projection is None else state.projection(features), logits, labels

    def _digests_read(self) -> Digests:
        """Of the examples that `_read_as_fitted` has read."""
        digests = self._training_passes().digests
        assert digests is not None, "a pass is done"
        return digests

    def _check_changeable(self) -> None:
        """Refuse operators that cannot take in a change.

        Raises:
            ValueError: Trained operators, or principal directions, which depend on all examples.
        """
        if self.config.operators == "trained":
            raise bad_value(
                "operators", "be 'newton' for adding or removing examples", "'trained'", "Fit again."
            )
        if self.config.projection == "pca":
            must = "be None or 'random' for adding or removing examples"
            raise bad_value("projection", must, "'pca', which depends on them", "Fit again.")

    def _change(
        self: Self,
        change: Callable[[STRIDEState, nn.Module, ClosedForm], Changed],
        dataset: Callable[[Any], Any],
        digests: Callable[[Digests], Digests],
    ) -> Self:
        """Fit the changed training set from what is known; nothing is changed where that fails."""
        self._check_changeable()
        if self._states is None:
            self.fit()
        states: list[Any] = []
        with self._session() as model:
            self._check_unchanged()
            for checkpoint, state in zip(self._checkpoints(), self._states or [], strict=True):
                self._load(model, checkpoint)
                widths = state.operators.widths
                new = change(state, model, state.operators)
                t = self._choose_temperature(model, new.logits, new.labels, self.config.temperature)
                form = fit_closed_form(
                    new.features, new.logits, new.labels, widths, self.config, t, moments=new.moments
                )
                states.append(STRIDEState(state.taps, form, state.projection))
        known: Digests | None = getattr(self, "digests_", None)
        self.digests_ = None if known is None else digests(known)
        self._states, self.train_dataset = states, dataset(self.train_dataset)
        self.n_train_, self.temperature_ = form.n_train, t
        self.coverage_ = torch.ones(self.n_train_, dtype=torch.bool, device="cpu")
        self._changed = True
        if self._precomputed is not None:
            self._precomputed = new.features, new.logits, new.labels, widths
        return self

    # Reading features.

    def _training_features(
        self, model: nn.Module, show_progress: bool
    ) -> tuple[list[Tap], Tensor, Tensor, Tensor, list[int]]:
        """Taps, features, logits, labels and the widths of the layers: given, stored or read."""
        if self._precomputed is not None:
            return self._choose_taps(model), *self._precomputed
        if self.feature_store is None:
            taps = self._choose_taps(model)
            return taps, *self._read(model, taps, show_progress)
        store, key = self._store(self._checkpoint_index, weights_fingerprint(model))
        taps = store.taps(key) or self._choose_taps(model)
        what = f"fitting {type(self).__name__}"
        batches = self._batches_as_they_are(self.train_dataset, "train_dataset", show_progress, what)
        with recording(model, taps) as run:
            stored = store.fill(key, taps, batches, partial(self._compute, run))
        device = self._work_device()
        return (
            stored.taps,
            self._placed(stored.features),
            self._placed(stored.logits),
            stored.labels.to(device),
            [tap.width for tap in stored.taps],
        )

    def _store(self, index: int, weights: str) -> tuple[FeatureStore, dict[str, Any]]:
        """The store of a checkpoint with these weights, and its key."""
        assert self.feature_store is not None
        asked = f"{self.config.feature_layers}, at most {self.config.max_width}"
        layers = asked if self.layers is None else ", ".join(map(str, self.layers))
        key = self.feature_store.key(weights, self.model, self.train_dataset, layers)
        store = self.feature_store if self.checkpoints is None else self.feature_store.for_checkpoint(index)
        return store, key

    def _placed(self, stored: Tensor) -> Tensor:
        """Stored features or logits as the operators read them: mapped by the closed form, else in memory."""
        if self.config.operators == "trained":
            return stored.to(self._work_device(), torch.float32)
        return stored

    def _compute(self, run: Any, batch: ExampleBatch) -> Computed:
        """Rows of each tap, logits and labels of one batch of training examples."""
        outputs, rows = run(batch.to(self._work_device()))
        logits = self._as_logits(outputs, batch)
        return rows, logits, self._train_labels(batch, logits.shape[1])

    def _check_model(self, model: nn.Module) -> None:
        """Nothing: the model is checked where layers are chosen, which a filled store has done."""

    def _choose_taps(self, model: nn.Module) -> list[Tap]:
        few = self._first_train_batch()
        if self._precomputed is None:
            check_deterministic(model, few)
        if self.layers is not None:
            return named_taps(model, self.layers, few)
        return default_taps(model, few, self.config.max_width, self.config.feature_layers == "penultimate")

    def _fit_projection(self, features: Tensor, widths: list[int], device: torch.device) -> Projection | None:
        config = self.config
        if config.projection is None or max(widths) <= config.projection_width:
            return None
        return fit_projection(
            features, widths, config.projection, config.projection_width, config.seed, device
        )

    def _read_batch(
        self, model: nn.Module, taps: Sequence[Tap], batch: Any, projection: Projection | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits and outputs of one batch."""
        with recording(model, taps) as run:
            outputs, rows = run(batch)
        logits = self._as_logits(outputs.detach(), batch)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        features = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        if projection is not None:
            features = projection(features)
        return features, logits, outputs

    def _read(
        self, model: nn.Module, taps: Sequence[Tap], show_progress: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """One forward pass over the training set: features, logits, labels and the widths of the taps."""
        width = sum(tap.width for tap in taps)
        expected = data.count_examples(self.train_dataset)
        features: Tensor | None = None
        parts, logits, labels, seen = [], [], [], 0
        with recording(model, taps) as run:
            what = f"fitting {type(self).__name__}"
            for batch in self._batches_as_they_are(self.train_dataset, "train_dataset", show_progress, what):
                rows, z, y = self._compute(run, batch)
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
        return features[:seen], torch.cat(logits).to(features), torch.cat(labels), [tap.width for tap in taps]

    def _settings(self) -> dict[str, Any]:
        settings = {**super()._settings(), "config": self.config.to_dict()}
        if self.feature_store is not None:
            settings["feature_store"] = {**asdict(self.feature_store), "path": str(self.feature_store.path)}
        return settings

    def _states_to_save(self) -> list[Any]:
        """Features that are in a store stay there."""
        states = super()._states_to_save()
        if not self._features_are_stored():
            return states
        return [
            replace(
                s,
                operators=replace(
                    s.operators,
                    features=s.operators.features[:0].clone(),
                    logits=s.operators.logits[:0].clone(),
                ),
            )
            for s in states
        ]

    def _features_are_stored(self) -> bool:
        """Whether the features that the operators read are those of the store, as they are."""
        config = self.config
        stored = self.feature_store is not None and not self._changed
        return stored and config.operators == "newton" and not config.projection

    def _loaded_states(self, states: list[Any], fingerprints: list[str]) -> list[Any]:
        """Put the stored features back in their place."""
        if not self._features_are_stored():
            return states
        for index, (state, weights) in enumerate(zip(states, fingerprints, strict=True)):
            if len(state.operators.features) == 0:
                store, key = self._store(index, weights)
                stored = store.open(key)
                state.operators.features = self._placed(stored.features)
                state.operators.logits = self._placed(stored.logits)
            else:  # saved after examples had come or gone
                self._changed = True
        return states


class PrecomputedFeatures(nn.Module):
    """Stands for a network whose features and logits are known: `forward(features, logits) -> logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Pass both through."""
        self.features(features)
        return logits


def _unit_scale(features: Tensor, widths: Sequence[int]) -> Tensor:
    """Factor of each feature that gives every layer unit mean square per feature, `(n_features,)`."""
    scales = []
    for part in features.split(list(widths), dim=1):
        # Squares of float32 leave its range.
        squares = torch.stack([as_float64(rows).square().sum() for rows in part.split(8192)]).sum()
        scale = (part.numel() / squares).sqrt() if squares > 0 else torch.ones_like(squares)
        scales.append(scale.to(features).expand(part.shape[1]))
    return torch.cat(scales)


def _head(model: nn.Module, taps: Sequence[Tap], features: Tensor, logits: Tensor) -> nn.Linear:
    """The Linear that turns the features of the only tap into the logits.

    Raises:
        ValueError: There is none: equation (6) would need backward passes through the model's tail.
    """
    few = slice(0, 64)
    if len(taps) == 1:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.shape == (logits.shape[1], features.shape[1]):
                with torch.no_grad():
                    outputs = module(features[few].to(module.weight))
                if torch.allclose(outputs.to(logits), logits[few], rtol=1e-3, atol=1e-3):
                    return module
    raise bad_value(
        "steering",
        "be 'logits' unless one layer is read and a single Linear makes the logits of it",
        f"'representation' with layers {[str(tap) for tap in taps]}",
        "Read the penultimate layer (feature_layers='penultimate'), or steer the logits.",
    )
