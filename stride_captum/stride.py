"""Owns `STRIDE`: training data attribution in activation space, wired from the files beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import inputs as data
from .activations import Tap, check_finite, default_taps, named_taps, recording
from .checkpoints import LoadCheckpoint, load_checkpoint
from .closed_form import ClosedForm, fit_closed_form
from .config import STRIDEConfig
from .errors import bad_type, bad_value
from .influence import Ask, InfluenceMethod
from .recovery import soft_threshold
from .responses import class_labels, multiclass_logits, response_gradient
from .steering import TrainedSteering, fit_steering
from .subsets import coverage
from .update import Changed, new_examples, rows_to_keep, with_examples, without_examples

Self = TypeVar("Self", bound="STRIDE")


@dataclass
class STRIDEState:
    """What `fit` learns at one checkpoint.

    Attributes:
        taps: Where features are read.
        operators: Closed-form or trained operators.
    """

    taps: list[Tap]
    operators: ClosedForm | TrainedSteering


class STRIDE(InfluenceMethod):
    """Which training examples made the model say this? One forward pass over the training set answers.

    By default the operators are the closed form (`stride_captum.newton`), which needs no subsets, no
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

    Attributes:
        layers_: Names of the layers that were read.
        temperature_: T of the tempered residuals (the last checkpoint's).
        coverage_: Which training examples can have a score, `(n_train,)` bool.

    Example:
        >>> x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(5, 2)
        >>> scores = STRIDE(model, TensorDataset(x, y)).influence((x[:3], y[:3]))
        >>> scores.shape
        torch.Size([3, 40])
    """

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
        )
        self.config = config
        self._precomputed: tuple[Tensor, Tensor, Tensor, list[int]] | None = None

    @classmethod
    def from_features(
        cls: type[Self],
        features: Any,
        logits: Any,
        labels: Any,
        *,
        widths: Sequence[int] | None = None,
        config: STRIDEConfig | None = None,
    ) -> Self:
        """STRIDE on precomputed features, without a model.

        Test batches are `(features, logits, labels)`.

        Args:
            features: `(n_train, n_features)`, tensor or numpy array, may be memory-mapped.
            logits: `(n_train, n_classes)`.
            labels: `(n_train,)`.
            widths: Widths of the layers that the columns come from; None means one layer.
            config: Options.

        Raises:
            ValueError: Shapes that do not fit one another.
        """
        features, logits, labels = (_as_tensor(a) for a in (features, logits, labels))
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
        method = cls(PrecomputedFeatures(), dataset, layers=["features"], config=config)
        multiclass = multiclass_logits(logits)
        classes = class_labels(labels, multiclass.shape[1], "labels")
        method._precomputed = (features, multiclass, classes, widths)
        return method

    # The three functions of a method.

    def _fit_checkpoint(self, model: nn.Module, show_progress: bool) -> STRIDEState:
        taps = self._choose_taps(model)
        features, logits, labels, widths = self._precomputed or self._read(model, taps, show_progress)
        if self.config.operators == "newton":
            self.temperature_ = self._choose_temperature(model, logits, labels, self.config.temperature)
            form = fit_closed_form(
                features, logits, labels, widths, self.config, self.temperature_, self.ranks
            )
            self.n_train_ = form.n_train
            self.coverage_ = torch.ones(self.n_train_, dtype=torch.bool)
            return STRIDEState(taps, form)
        self.n_train_ = len(labels)
        check_finite(features)
        check_finite(logits, "logits")
        head = _head(model, taps, features, logits) if self.config.steering == "representation" else None
        scale = torch.ones(features.shape[1]).to(features) if head else _unit_scale(features, widths)
        with torch.enable_grad():  # reading the features needs none
            steering = fit_steering(features, logits, labels, scale, self.config, head, show_progress)
        self.coverage_ = torch.from_numpy(coverage(steering.membership))
        self.history_ = steering.history
        return STRIDEState(taps, steering)

    def _prepare(self, state: STRIDEState, model: nn.Module, batch: Any, ask: Ask) -> Any:
        if isinstance(state.operators, ClosedForm):
            return state.operators.prepare(*self._query(state, model, batch, ask))
        features, logits, classes, response = self._asked(state, model, batch, ask)
        responses = state.operators.subset_responses(features, logits, classes, response)
        return state.operators.weights(responses, self.config)

    def _query(self, state: STRIDEState, model: nn.Module, batch: Any, ask: Ask) -> tuple[Tensor, Tensor]:
        """What the closed form needs to know of test points: raw features, gradients of the response."""
        features, logits, classes, response = self._asked(state, model, batch, ask)
        return features, response_gradient(logits, classes, response)

    def _asked(
        self, state: STRIDEState, model: nn.Module, batch: Any, ask: Ask
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        features, logits, one_logit = self._read_batch(model, state.taps, batch)
        classes = ask.classes(logits, batch)
        # The logit of a binary model with one output is, up to its sign, the margin.
        response = "margin" if one_logit and ask.response == "logit" else ask.response
        return features, logits, classes, response

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
        features, logits, _ = self._read_batch(model, state.taps, batch)
        return state.operators.self_influence_of(
            features, logits, Ask("loss", "label").classes(logits, batch)
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

    # Training examples that come and go.

    def add_examples(self: Self, examples: Any) -> Self:
        """Add training examples behind those that were fitted, without reading those again.

        Only the new examples go through the model. Scores equal those of a refit up to rounding; what is
        done instead, and what it costs, is in `stride_captum.update`. `train_dataset` becomes the longer one.
        The features must be those of the same model: where training has gone on, fit again.

        Args:
            examples: Dataset, DataLoader or tensors `(inputs..., labels)`.

        Returns:
            The method itself; fitted first, where it was not.

        Raises:
            ValueError: Trained operators, or a model that has changed since `fit`.
            TypeError: Examples of another kind, or without a length.
        """
        examples = new_examples(examples)
        reader = copy.copy(self)
        reader.train_dataset, reader._precomputed = examples, None

        def change(state: STRIDEState, model: nn.Module, form: ClosedForm) -> Changed:
            features, logits, labels, _ = reader._read(model, state.taps, False)
            return with_examples(form, features, logits, labels)

        return self._change(change, lambda dataset: data.joined(dataset, examples))

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
        )

    def _change(
        self: Self,
        change: Callable[[STRIDEState, nn.Module, ClosedForm], Changed],
        dataset: Callable[[Any], Any],
    ) -> Self:
        """Fit the changed training set from what is known; nothing is changed where that fails."""
        if self.config.operators == "trained":
            raise bad_value(
                "operators", "be 'newton' for adding or removing examples", "'trained'", "Fit again."
            )
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
                states.append(STRIDEState(state.taps, form))
        self._states, self.train_dataset = states, dataset(self.train_dataset)
        self.n_train_, self.temperature_ = form.n_train, t
        self.coverage_ = torch.ones(self.n_train_, dtype=torch.bool)
        if self._precomputed is not None:
            self._precomputed = new.features, new.logits, new.labels, widths
        return self

    # Reading features.

    def _choose_taps(self, model: nn.Module) -> list[Tap]:
        batch = next(iter(self._batches(self.train_dataset, "train_dataset", False, "")))
        few = data.slice_batch(batch, slice(0, 2))
        if self.layers is not None:
            return named_taps(model, self.layers, few)
        return default_taps(model, few, self.config.max_width, self.config.feature_layers == "penultimate")

    def _read_batch(self, model: nn.Module, taps: Sequence[Tap], batch: Any) -> tuple[Tensor, Tensor, bool]:
        """Features and logits of one batch, and whether the model has a single logit."""
        with recording(model, taps) as run:
            outputs, rows = run(batch)
        logits = multiclass_logits(outputs.detach())
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        features = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return features, logits, outputs.shape[-1] == 1 or outputs.ndim == 1

    def _read(
        self, model: nn.Module, taps: Sequence[Tap], show_progress: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """One forward pass over the training set: features, logits, labels and the widths of the taps."""
        width = sum(tap.width for tap in taps)
        expected = data.count_examples(self.train_dataset)
        features: Tensor | None = None
        parts, logits, labels, seen = [], [], [], 0
        with recording(model, taps) as run:
            for batch in self._train_batches(show_progress):
                outputs, rows = run(batch)
                n = len(outputs)
                if expected is not None and seen + n <= expected:
                    if features is None:
                        features = rows[0].new_empty(expected, width)
                    start = 0
                    for tap, row in zip(taps, rows, strict=True):
                        features[seen : seen + n, start : start + tap.width] = row
                        start += tap.width
                else:
                    parts.append(torch.cat(rows, dim=1))
                logits.append(multiclass_logits(outputs))
                labels.append(self._train_labels(batch, logits[-1].shape[1], n))
                seen += n
        if seen == 0:
            raise bad_value("train_dataset", "hold at least one example", "an empty one")
        if features is None:
            features = torch.cat(parts)
        return features[:seen], torch.cat(logits).to(features), torch.cat(labels), [tap.width for tap in taps]

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "config": self.config.to_dict()}


class PrecomputedFeatures(nn.Module):
    """Stands for a network whose features and logits are known: `forward(features, logits) -> logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Pass both through."""
        self.features(features)
        return logits


def _as_tensor(values: Any) -> Tensor:
    if isinstance(values, np.ndarray):
        array: NDArray[Any] = values
        # torch warns about read-only memory maps; nothing here writes to them.
        return torch.from_numpy(array if array.flags.writeable else _writeable_view(array))
    return torch.as_tensor(values)


def _writeable_view(array: NDArray[Any]) -> NDArray[Any]:
    interface = dict(array.__array_interface__, data=(array.__array_interface__["data"][0], False))

    class View:
        __array_interface__ = interface
        keep_alive = array

    return np.asarray(View())


def _unit_scale(features: Tensor, widths: Sequence[int]) -> Tensor:
    """Factor of each feature that gives every layer unit mean square per feature, `(n_features,)`."""
    scales = []
    for part in features.split(list(widths), dim=1):
        mean_square = torch.stack([rows.square().sum() for rows in part.split(8192)]).sum() / part.numel()
        factor = mean_square.rsqrt() if mean_square > 0 else torch.ones_like(mean_square)
        scales.append(factor.expand(part.shape[1]))
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
