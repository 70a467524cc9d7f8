"""`STRIDE`: training data attribution in activation space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from .changing import ChangingTrainingSet
from .closed_form.options import ClosedForm
from .data import inputs as data
from .data.batch import Batch, ExampleBatch
from .errors import bad_type, bad_value, not_fitted
from .features.options import Features
from .features.precomputed import Precomputed, PrecomputedNetwork, check_positions_finite
from .features.projection import Projection, fit_projection
from .features.reader import Rows, Run, TrainingRows, all_weights, read_batch, read_training_set
from .features.store import FeatureStore
from .features.store_writer import Computed
from .influence.checkpoints import LoadCheckpoint, load_checkpoint, unseen_by
from .influence.estimate import Estimate
from .influence.method import Query
from .influence.temperature import choose_temperature
from .layers.activations import Tap, default_taps, named_taps, recording
from .layers.probes import check_deterministic
from .losses import Loss, loss_of
from .operators import FittedOperators, Operators, STRIDEState, TestPoints, TrainingSet, operators_of
from .options import html_table
from .system.devices import float64_device
from .system.fingerprints import weights_fingerprint

Self = TypeVar("Self", bound="STRIDE")


class STRIDE(ChangingTrainingSet):
    """Which training examples made the model say this? One forward pass over the training set answers.

    By default the operators are the closed form (`ClosedForm`), which needs no subsets, no training and no
    gradient of the network. `operators=Trained.paper("mnist")` gives the paper's trained operators and Lasso
    recovery.

    A score is the predicted change of the response (by default the margin of the test label) when the
    training example is among the n_train: positive for proponents.

    Args:
        model: A trained classifier with logits `(n, n_classes)`; it is left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of `(inputs..., label)` or dicts.
        layers: Submodules whose outputs are features ("name:input" for what one reads); None takes
            what every weight layer reads, see `layers_`.
        batch_size: Examples a forward pass, if a data set is given.
        device: Where the work is done; None takes the device of the model.
        checkpoints: State dicts or paths over which scores are averaged.
        checkpoints_load_func: `f(model, checkpoint)` loads one.
        held_out: Labeled data that the model has not seen: sets the temperature.
        operators: `ClosedForm(...)`, `Trained(...)`, other `Operators`, or a name: "closed-form", "trained".
        features: Which features are read if `layers` is not given, and their projection; None means what the
            operators want, `Features()` for the closed form.
        feature_store: A folder, or a `FeatureStore`, for what a pass over the training set gives. The
            first `fit` fills it; later ones, also of other processes and with other options, start
            from it without the pass. The closed form reads it chunk by chunk and never holds all of
            it; trained operators hold the features in memory.
        response: Default response; None means the first of the loss ("margin"), or what the operators want.
        target: Default class of the response; None means "label", or what the operators want.
        normalize: Default normalization, None, "cosine" or "deviation".
        memory_budget: Memory of one block of work: bytes, "512MiB", or "auto".
        loss: What the model was trained with (see `InfluenceMethod`).
        batch: How a batch is read (see `InfluenceMethod`).
        ids: A name for each training example (see `InfluenceMethod`).

    Attributes:
        operators_: The fitted operators (the last checkpoint's).
        layers_: Names of the layers that were read.
        n_features_: Number of features that the operators see.
        temperature_: T of the tempered residuals of closed-form operators (the last checkpoint's).
        history_: Losses of stage 1 of trained operators.
        coverage_: Which training examples can have a score, `(n_train,)` bool.
        projection_error_: Relative error of the features' kernel that a projection makes (the last
            checkpoint's); 0 without a projection.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(5, 2)
        >>> scores = STRIDE(model, TensorDataset(x, y)).influence((x[:3], y[:3]))
        >>> scores.shape
        torch.Size([3, 40])
    """

    fits_in_one_pass = True
    takes_positions = True

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
        operators: Operators | str | None = None,
        features: Features | None = None,
        feature_store: str | Path | FeatureStore | None = None,
        response: str | None = None,
        target: str | None = None,
        normalize: str | None = None,
        memory_budget: int | str = "256MiB",
        loss: str | Loss = "cross_entropy",
        batch: Batch | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        self.operators = ClosedForm() if operators is None else operators_of(operators)
        usual: dict[str, Any] = {"response": None, "target": "label", "features": Features()}
        wanted = usual | self.operators.defaults()
        super().__init__(
            model,
            train_dataset,
            layers=layers,
            batch_size=batch_size,
            device=device,
            checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
            held_out=held_out,
            response=wanted["response"] if response is None else response,
            target=wanted["target"] if target is None else target,
            normalize=normalize,
            memory_budget=memory_budget,
            loss=loss,
            batch=batch,
            ids=ids,
        )
        if features is not None and not isinstance(features, Features):
            raise bad_type("features", "be Features(...)", features)
        self.features: Features = wanted["features"] if features is None else features
        if feature_store is not None and not isinstance(feature_store, FeatureStore):
            feature_store = FeatureStore(feature_store)
        self.feature_store = feature_store
        self._precomputed: Precomputed | None = None
        self._changed = False

    @classmethod
    def from_features(
        cls: type[Self],
        features: Any,
        logits: Any,
        labels: Any,
        *,
        widths: Sequence[int] | None = None,
        loss: str | Loss = "cross_entropy",
        projection: Features | None = None,
        **options: Any,
    ) -> Self:
        """STRIDE on precomputed features, without a model.

        Test batches are `(features, logits, labels)`.

        Args:
            features: `(n_train, n_features)`, tensor or numpy array, may be memory-mapped.
            logits: `(n_train, n_classes)`.
            labels: `(n_train,)`.
            widths: Widths of the layers that the columns come from; None means one layer.
            loss: What `logits` are: probabilities in their place are refused unless it says so.
            projection: `Features(projection=...)`.
            **options: As for `STRIDE`: `operators`, `response`, `memory_budget`, ...

        Raises:
            ValueError: Shapes that do not fit one another, or probabilities that are not declared.
        """
        known, dataset = Precomputed.checked(features, logits, labels, widths, loss_of(loss))
        options = {"loss": loss, "features": projection, "layers": ["features"], **options}
        method = cls(PrecomputedNetwork(), dataset, **options)
        method._precomputed = known
        return method

    # The functions of a method.

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> STRIDEState:
        taps, known = self._training_features(model, show_progress)
        self._changed = False
        projection = self._fit_projection(known)
        self.projection_error_ = 0.0 if projection is None else projection.error
        if projection is not None:
            whole = projection.whole(known.features, known.labels.device)
            known = replace(known, features=whole, widths=projection.new_widths)
        operators = self.operators.fit(self._training_set(model, taps, known, show_progress=show_progress))
        return self._learned(STRIDEState(taps, operators, projection))

    def _training_set(
        self, model: nn.Module, taps: Sequence[Tap], read: Precomputed, **more: Any
    ) -> TrainingSet:
        """What operators are fitted to."""
        return TrainingSet(
            **vars(read),
            model=model,
            layers=[str(tap) for tap in taps],
            memory_budget=self.memory_budget,
            temperature=lambda given: choose_temperature(
                self, model, read.logits, read.labels, given, read.weights, read.positions
            ),
            ranks=self.ranks,
            n_checkpoints=len(self._checkpoints()),
            loss=self.loss,
            **more,
        )

    def _learned(self, state: STRIDEState) -> STRIDEState:
        """Set what is known of the training set once operators are fitted."""
        self.n_train_ = state.operators.n_train
        self.coverage_ = state.operators.coverage()
        return state

    def holds_all_columns(self) -> bool:
        """As the operators say: the Lasso gives all columns at once."""
        return self.operators.all_columns

    @override
    def prepare_query(self, state: STRIDEState, model: nn.Module, batch: Any, query: Query) -> Any:
        return state.operators.prepare(self._points(state, model, batch, query))

    def _points(self, state: STRIDEState, model: nn.Module, batch: Any, query: Query) -> TestPoints:
        """What operators need to know of test points."""
        with recording(model, state.taps) as run:
            rows = read_batch(self, run, state.taps, batch)
        features, logits, positions = rows.side_by_side, rows.logits, rows.positions
        if positions is not None and not self.operators.takes_positions:
            raise self._one_row_only(rows)
        features = features if state.projection is None else state.projection(features)
        response = self.loss.response_of(rows.outputs, query.response)
        asked = query.asked_of_rows(self.loss, logits, rows.labels, positions)
        gradients = self.loss.response_gradient(logits, asked, response)
        n_positions = 0 if rows.kept is None else rows.kept.shape[1]
        return TestPoints(features, logits, asked, gradients, response, positions, n_positions)

    def _one_row_only(self, rows: Rows) -> ValueError:
        must = f"give one row of outputs per example for operators={self.operators.name!r}"
        got = f"{rows.positions.counts[:3].tolist()}, ... positions" if rows.positions is not None else "none"
        return bad_value("model", must, got, "Take ClosedForm().")

    def _test_rows(self) -> int:
        """As many test points as fit the budget with their positions."""
        rows = super()._test_rows()
        most = [state.operators.test_points_at_once() for state in self._states or []]
        return min([rows, *(m for m in most if m is not None)])

    @override
    def score_columns(self, state: STRIDEState, prepared: Any, columns: slice) -> Tensor:
        return state.operators.scores(prepared, columns)

    @override
    def position_scores(self, state: STRIDEState, prepared: Any, example: int | None) -> Tensor:
        found = state.operators.position_scores(prepared, example)
        return super().position_scores(state, prepared, example) if found is None else found

    @override
    def train_norms(self, state: STRIDEState) -> Tensor:
        return self._norms(state.operators.train_norms())

    @override
    def test_norms(self, state: STRIDEState, prepared: Any) -> Tensor:
        return self._norms(state.operators.test_norms(prepared))

    def _norms(self, norms: Tensor | None) -> Tensor:
        if norms is None:
            raise bad_value("normalize", f"be None for operators={self.operators.name!r}", "'cosine'")
        return norms

    @override
    def train_self_influence(self, state: STRIDEState) -> Tensor | None:
        return state.operators.self_influence()

    @override
    def batch_self_influence(
        self, state: STRIDEState, model: nn.Module, batch: Any, rows: slice | None
    ) -> Tensor:
        if rows is None:
            points = self._points(state, model, batch, Query("loss", "label"))
            found = state.operators.self_influence_of(points)
            if found is not None:
                return found
        return super().batch_self_influence(state, model, batch, rows)

    @override
    def query_vectors(self, state: STRIDEState, prepared: Any) -> Tensor | None:
        return state.operators.query_vectors(prepared)

    @override
    def train_vectors(self, state: STRIDEState, rows: Tensor) -> Tensor | None:
        return state.operators.train_vectors(rows)

    def mislabel_scores(self, per_label: bool = False) -> Tensor:
        """How suspect each training label is, `(n_train,)`: high means suspect.

        With closed-form operators this is the norm of the leave-one-out residual of a ridge head on
        the features: how far the label is from what the other examples say. With trained operators it
        is the self-influence.

        If each example is one that some of the checkpoints have not seen (`Checkpoint(seen=...)`, as of
        `retrain`), these judge it: the mean over them of `|e_y - p|`.

        Args:
            per_label: Whether to return the residual of each output without its sign, `(n_train, n_outputs)`:
                which of several labels is suspect.

        Raises:
            ValueError: `per_label` with operators that do not know it.
        """
        if self._states is None:
            self.fit()
        if per_label:
            outputs = [state.operators.mislabel_scores_of_outputs() for state in self._states or []]
            whole = [part * w for part, w in zip(outputs, self._weights, strict=True) if part is not None]
            if len(whole) != len(outputs):
                must = f"be False for operators={self.operators.name!r}"
                raise bad_value("per_label", must, True, "Take the closed form.")
            return torch.stack(whole).sum(0)
        judged = self._judged_out_of_sample()
        if judged is not None:
            return judged
        parts = [state.operators.mislabel_scores() for state in self._states or []]
        known = [part * w for part, w in zip(parts, self._weights, strict=True) if part is not None]
        return torch.stack(known).sum(0) if len(known) == len(parts) else self.self_influence()

    def _judged_out_of_sample(self) -> Tensor | None:
        """`mislabel_scores` from models that have not seen the example; None if there are none for some."""
        total: Tensor | None = None
        counts: Tensor | None = None
        for checkpoint, state, _ in self._fitted():
            unseen = unseen_by(checkpoint, self.n_train_)[self._own_columns()]
            scores = state.operators.out_of_sample_mislabel_scores() if bool(unseen.any()) else None
            if scores is None:
                continue
            mask = unseen.to(scores)
            total = scores * mask if total is None else total + scores * mask
            counts = mask if counts is None else counts + mask
        if total is None or counts is None or not bool((counts > 0).all()):
            return None
        return total / counts

    def _estimate(self, n_test: int, k: int | None) -> Estimate:
        return self.operators.estimate(self, n_test, k) or super()._estimate(n_test, k)

    # What has been learned.

    @property
    def operators_(self) -> FittedOperators:
        """The fitted operators of the last checkpoint."""
        if not self._states:
            raise not_fitted("operators_")
        operators: FittedOperators = self._states[-1].operators
        return operators

    @property
    def layers_(self) -> list[str]:
        """Names of the layers whose activations are the features."""
        if not self._states:
            raise not_fitted("layers_")
        return [str(tap) for tap in self._states[0].taps]

    @property
    def n_features_(self) -> int:
        """Number of features that the operators see."""
        if not self._states:
            raise not_fitted("n_features_")
        last = self._states[-1]
        return sum(last.projection.new_widths if last.projection else (tap.width for tap in last.taps))

    @property
    def temperature_(self) -> float:
        """T of the tempered residuals, if the operators have them."""
        return float(self.operators_.temperature)  # type: ignore[attr-defined]

    @property
    def history_(self) -> dict[str, Tensor]:
        """Losses of stage 1, if the operators are trained."""
        return dict(self.operators_.history)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        fitted = "not fitted"
        if self._states is not None:
            fitted = f"n_train={self.n_train_}, layers={self.layers_}"
        return f"{type(self).__name__}(operators={self.operators.name!r}, {fitted})"

    def _repr_html_(self) -> str:
        facts: dict[str, Any] = {"fitted": self._states is not None}
        if self._states is not None:
            facts |= {"n_train": self.n_train_, "layers": ", ".join(self.layers_)}
        return f"<b>{type(self).__name__}</b>{html_table(facts)}{self.operators._repr_html_()}"

    # Reading features.

    def _training_features(self, model: nn.Module, show_progress: bool) -> tuple[list[Tap], Precomputed]:
        """Taps, and features, logits and labels: given, stored or read."""
        if self._precomputed is not None:
            return self._choose_taps(model), self._precomputed
        if self.feature_store is None:
            taps = self._choose_taps(model)
            return taps, self._read(model, taps, show_progress)
        store, key = self._store(self._checkpoint_index, weights_fingerprint(model))
        taps = store.taps(key) or self._choose_taps(model)
        weights: list[Tensor | None] = []

        def compute(batch: ExampleBatch) -> Computed:
            rows = self._compute(taps, run, batch)
            if rows.kept is not None:
                must = "be None for a model with several positions an example"
                raise bad_value("feature_store", must, str(store.path))
            return rows.features, rows.logits, rows.labels

        with recording(model, taps) as run:
            batches = self._weighed(self._passing(show_progress), weights)
            stored = store.fill(key, taps, batches, compute)
        labels = stored.labels.to(self._work_device())
        return stored.taps, Precomputed(
            self._placed(stored.features),
            self._placed(stored.logits),
            labels,
            [tap.width for tap in stored.taps],
            self._all_weights(weights, labels),
        )

    def _read(self, model: nn.Module, taps: Sequence[Tap], show_progress: bool) -> Precomputed:
        """One forward pass over the training set."""
        expected = data.count_examples(self.train_dataset)
        compute = partial(self._compute, taps)
        read = read_training_set(model, taps, self._passing(show_progress), compute, expected)
        if read.positions is not None:
            check_positions_finite(read)
        return read

    @staticmethod
    def _weighed(batches: Iterable[ExampleBatch], weights: list[Tensor | None]) -> Iterator[ExampleBatch]:
        """The batches, whose sample weights join a list."""
        for batch in batches:
            weights.append(batch.weights)
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
        rows = read_batch(self, run, taps, batch.to(self._work_device()))
        if rows.positions is not None and not self.operators.takes_positions:
            raise self._one_row_only(rows)
        n_outputs = rows.logits.shape[1]
        # Labels are checked where the data set has them, without waiting for a device.
        labels = self.train_labels(batch, n_outputs, None if rows.kept is None else rows.labels)
        weights = self.train_weights(batch, labels, rows.kept)
        return TrainingRows(rows.features, rows.logits, labels, rows.outputs, rows.kept, weights)

    def _check_model(self, model: nn.Module) -> None:
        """Nothing: the model is checked where layers are chosen, which a filled store has done."""

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
        """The store of a checkpoint with these weights, and its key."""
        assert self.feature_store is not None
        asked = f"{self.features.select}, at most {self.features.max_width}"
        layers = asked if self.layers is None else ", ".join(map(str, self.layers))
        key = self.feature_store.key(weights, self.model, self.train_dataset, layers)
        outputs = getattr(self.loss, "outputs", None) or "logits"
        if (self.loss.name, outputs) != ("cross_entropy", "logits"):  # which older stores do not name
            key["loss"] = f"{self.loss.name}, {outputs}"
        store = self.feature_store if self.checkpoints is None else self.feature_store.for_checkpoint(index)
        return store, key

    def _placed(self, stored: Tensor) -> Tensor:
        """Stored features or logits as the operators read them: mapped if they stream, else in memory."""
        return stored if self.operators.streams else stored.to(self._work_device(), torch.float32)

    def _features_are_stored(self) -> bool:
        """Whether the features that the operators read are those of the store, as they are."""
        stored = self.feature_store is not None and not self._changed
        return stored and self.operators.streams and not self.features.projection

    @override
    def settings(self) -> dict[str, Any]:
        settings = {**super().settings(), "operators": self.operators, "features": self.features}
        if self.feature_store is not None:
            settings["feature_store"] = {**asdict(self.feature_store), "path": str(self.feature_store.path)}
        return settings

    def _states_to_save(self) -> list[Any]:
        """Features that are in a store stay there."""
        states = super()._states_to_save()
        if not self._features_are_stored():
            return states
        return [replace(s, operators=s.operators.without_features()) for s in states]

    def _loaded_states(self, states: list[Any], fingerprints: list[str]) -> list[Any]:
        """Put the stored features back in their place."""
        if not self._features_are_stored():
            return states
        for index, (state, weights) in enumerate(zip(states, fingerprints, strict=True)):
            if len(state.operators.features) == 0:
                store, key = self._store(index, weights)
                stored = store.open(key)
                placed = self._placed(stored.features), self._placed(stored.logits)
                state.operators = state.operators.with_features(*placed)
            else:  # saved after examples had come or gone
                self._changed = True
        return states
