"""Base class of all attribution methods: Captum's contract around a method's own three functions.

A method is a subclass of `InfluenceMethod` that implements

    _fit_checkpoint(model, show_progress) -> state             what it learns from the training set
    _prepare(state, model, batch, ask) -> prepared             what it needs of one batch of test points
    _scores(state, prepared, columns) -> (n_test, n_columns)   scores against a slice of the training set

(or, with `reads_training_data`, `_scores_of_batch`, which is given the training examples themselves)

and gets from here: batches and devices, checkpoints, streamed top-k, normalisation, subsets, progress,
saving, cost accounting, and the promise that the caller's model and random state are left as they were.

Sign: a positive score means that the training example raises the response of the test point.
"""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from captum.influence import DataInfluence
from captum.influence._core.tracincp import KMostInfluentialResults
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import inputs as data
from ..data.batch import Batch, ExampleBatch, Reading, is_batch
from ..data.digests import Digests
from ..data.passes import Passes
from ..data.places import groups_of_places
from ..errors import bad_choice, bad_type, bad_value, whole_number
from ..layers.probes import check_deterministic
from ..losses import CrossEntropy, OutputCheck, loss_of
from ..residuals import DEFAULT_TEMPERATURE, match_temperature, mean_residual
from ..responses import RESPONSES, class_labels
from ..subsets import membership_from_indices
from ..system.devices import check_placed, device_of, existing_device, full_precision
from ..system.fingerprints import weights_fingerprint, weights_version
from ..system.locks import exclusive
from ..system.memory import parse_bytes, rows_that_fit
from ..system.peak_memory import PeakMemory
from ..system.preserve_state import preserve_state
from ..system.processes import SINGLE_PROCESS, SingleProcess
from .checkpoints import LoadCheckpoint, checkpoint_list, load_checkpoint, load_with, warn_of_equal
from .estimate import Estimate, from_small_runs
from .persistence import load_method, save_method
from .top_k import Collector, DenseScores, GroupSums, StreamedTopK

Self = TypeVar("Self", bound="InfluenceMethod")

#: Test points that are scored together, at most.
_TEST_ROWS = 1024
#: Scores of one block, at most: small enough for the last level of cache.
_BLOCK_SCORES = 2**22


@dataclass(frozen=True)
class Query:
    """What is asked about a batch of test points.

    Attributes:
        response: The scalar that is attributed.
        target: "label", "predicted", or the class of each test point of the batch, `(n,)` int64.
    """

    response: str
    target: str | Tensor

    def classes(self, logits: Tensor, batch: ExampleBatch) -> Tensor:
        """The class c of each test point, `(n,)` int64.

        Args:
            logits: `(n, n_classes)`.
            batch: The batch that gave them.
        """
        if isinstance(self.target, Tensor):
            return class_labels(self.target.to(logits.device), logits.shape[1], "target")
        if self.target == "predicted":
            return logits.argmax(1)
        labels = batch.labels
        if labels is None:
            raise bad_value(
                "inputs",
                "carry labels, as in (x, y), when target='label'",
                "a batch without labels",
                "Add them, or ask for target='predicted' or a class index.",
            )
        if len(labels) != len(logits):
            raise bad_value("inputs", f"carry one label for each of {len(logits)} examples", len(labels))
        return class_labels(labels.to(logits.device), logits.shape[1], "inputs")


class InfluenceMethod(DataInfluence):  # type: ignore[misc]
    """Base class of all attribution methods; a subclass of Captum's `DataInfluence`.

    Args:
        model: A trained classifier. It is evaluated in eval mode and left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of the examples that it was trained on. An
            item is `(inputs..., label)` or a dict with the key "labels".
        layers: Names of submodules; None selects them. Methods that read features (STRIDE, Similarity,
            KNNShapley) take the outputs of these submodules ("name:input" for what one reads); gradient
            methods take their parameters.
        batch_size: Examples a forward pass, where a data set is given instead of a loader.
        device: Where the work is done; None takes the device of the model. For another device the
            model is copied.
        checkpoints: State dicts or paths, or a folder of them: scores are averaged over these instead of
            the weights in `model`. They may be checkpoints of one training or independent models.
        checkpoints_load_func: `f(model, checkpoint)` loads one and returns a learning rate.
        held_out: Labelled data that the model has not seen, for methods that can use it.
        response: Default response.
        target: Default class of the response.
        normalize: Default normalisation, None or "cosine".
        memory_budget: Memory for one block of scores.
        loss: What the model was trained with: "cross_entropy", or `stride_captum.losses.CrossEntropy` with
            what its outputs are.
        batch: How a batch is read, where it is not `(inputs..., labels)` or a dict with "labels".

    The training set is read in passes (`stride_captum.data.passes`): column i of the scores is its i-th
    example, and a pass that gives other examples, or another order, is refused. The model is given copies of
    inputs.

    Threads: methods may be shared between threads, and models between methods; one thread at a time works
    with a model. Other code that uses the model meanwhile sees it in eval mode. Global random states are put
    back where the data set or the model has drawn from them (`stride_captum.system.random_states`).

    Attributes:
        digests_: A number for the label and one for the inputs of each training example, as they were read.
        n_train_: Number of training examples.
        fit_seconds_: Duration of `fit`.
        query_seconds_: Duration of the last `influence`.
        peak_bytes_: Most memory that `fit` or the last `influence` has added (`PeakMemory`).
        compared_: After `load`: what of the training set was compared with that of the saved method.

    >>> class SameClass(InfluenceMethod):
    ...     def _fit_checkpoint(self, model, show_progress):
    ...         labels = torch.cat([batch.labels for batch in self._train_batches(show_progress)])
    ...         self.n_train_ = len(labels)
    ...         return labels
    ...     def _prepare(self, state, model, batch, ask):
    ...         return ask.classes(self._logits(model, batch), batch)
    ...     def _scores(self, state, prepared, columns):
    ...         return (prepared[:, None] == state[columns]).float()
    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> SameClass(model, train).influence(test.tensors, 3).influence_scores.min()
    tensor(1.)
    """

    #: Whether the method takes gradients of the network.
    needs_gradients: ClassVar[bool] = False
    #: Whether scores need the training examples again, so that blocks of columns are training batches.
    reads_training_data: ClassVar[bool] = False
    #: Whether `fit` reads the training set once (for each checkpoint), and queries never do.
    fits_in_one_pass: ClassVar[bool] = False
    #: The processes that share the training set.
    ranks: SingleProcess = SINGLE_PROCESS
    digests_: Digests | None
    compared_: str

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int = 1024,
        device: torch.device | str | None = None,
        checkpoints: Iterable[Any] | str | Path | None = None,
        checkpoints_load_func: LoadCheckpoint = load_checkpoint,
        held_out: Any = None,
        response: str = "margin",
        target: str = "label",
        normalize: str | None = None,
        memory_budget: int | str = "256MiB",
        loss: str | CrossEntropy = "cross_entropy",
        batch: Batch | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise bad_type("model", "be a torch.nn.Module", model)
        if is_batch(train_dataset):
            raise bad_type(
                "train_dataset",
                "be a Dataset or a DataLoader",
                train_dataset,
                "Write TensorDataset(inputs, labels).",
            )
        if response not in RESPONSES:
            raise bad_choice("response", response, RESPONSES)
        data.check_source(train_dataset, "train_dataset")
        data.check_places(train_dataset, "train_dataset")
        # Captum's own constructor is misspelt and cannot be called.
        self.model = model
        self.train_dataset = train_dataset
        self.layers = layers
        self.batch_size = whole_number("batch_size", batch_size)
        check_placed(model, device is None)
        self.device = None if device is None else existing_device(device)
        self.checkpoints = None if checkpoints is None else checkpoint_list(checkpoints)
        self.checkpoints_load_func = checkpoints_load_func
        self.held_out = held_out
        self.response = response
        self.target = target
        self.normalize = normalize
        self.memory_budget = parse_bytes(memory_budget, self._work_device())
        if batch is not None and not isinstance(batch, Batch):
            raise bad_type("batch", "be a stride_captum.Batch", batch, "Write Batch(label_key=...).")
        self.loss = loss_of(loss)
        self.batch = Batch() if batch is None else batch
        self._passes: Passes | None = None
        self._device_copy: tuple[Any, nn.Module] | None = None
        self._output_check: OutputCheck | None = None
        self._states: list[Any] | None = None
        self._weights: list[float] = []
        self._fitted_on: tuple[Any, str, torch.device] | None = None
        self._fit_bytes: int | None = None
        self._checkpoint_index = 0  # the one that `fit` is at

    # What a method implements.

    @abstractmethod
    def _fit_checkpoint(self, model: nn.Module, show_progress: bool) -> Any:
        """Learn from the training set what the scores need; must set `n_train_`."""

    @abstractmethod
    def _prepare(self, state: Any, model: nn.Module, batch: Any, ask: Query) -> Any:
        """Compute once what the scores of a batch of test points need."""

    @abstractmethod
    def _scores(self, state: Any, prepared: Any, columns: slice) -> Tensor:
        """Scores `(n_test, n_columns)` against a slice of the training set."""

    def _scores_of_batch(
        self, state: Any, prepared: Any, columns: slice, model: nn.Module, batch: Any
    ) -> Tensor:
        """`_scores`, given the training examples of the columns and the model (`reads_training_data`)."""
        return self._scores(state, prepared, columns)

    def _max_rows(self) -> int | None:
        """Examples that the method takes at a time, None for as many as a batch has."""
        return None

    def _train_norms(self, state: Any) -> Tensor:
        """Norm of each training example in the method's kernel, `(n_train,)`."""
        raise self._no_norms()

    def _test_norms(self, state: Any, prepared: Any) -> Tensor:
        """Norm of each test point in the method's kernel, `(n_test,)`."""
        raise self._no_norms()

    def _no_norms(self) -> ValueError:
        return bad_value("normalize", f"be None for {type(self).__name__}, which has no norms", "'cosine'")

    def _self_influence(self, state: Any, model: nn.Module, batch: Any, rows: slice | None) -> Tensor:
        """Self-influence of one batch; `rows` are its places in the training set, None for other data."""
        if rows is None:
            raise NotImplementedError(
                f"{type(self).__name__} gives the self-influence of training examples only: pass no inputs."
            )
        prepared = self._prepare(state, model, batch, Query("loss", "label"))
        return -self._scores_of_batch(state, prepared, rows, model, batch).diagonal()

    def _train_self_influence(self, state: Any) -> Tensor | None:
        """Self-influence of the whole training set where the state knows it, `(n_train,)`; else None."""
        return None

    def _combine_weights(self, learning_rates: list[float]) -> list[float]:
        """Weight of each checkpoint in the score: the mean, unless a method says otherwise."""
        return [1 / len(learning_rates)] * len(learning_rates)

    # What every method has.

    def fit(self: Self, show_progress: bool = False) -> Self:
        """Learn from the training set.

        Args:
            show_progress: Whether to show a bar over its batches.

        Returns:
            The method itself.
        """
        with exclusive(self):
            started = time.perf_counter()
            self._states = None
            passes = self._training_passes()
            with self._session() as model, PeakMemory(self._work_device()) as memory:
                passes.restart(not self.fits_in_one_pass or len(self._checkpoints()) > 1)
                states, rates, fingerprints = [], [], []
                try:
                    for index, checkpoint in enumerate(self._checkpoints()):
                        self._checkpoint_index = index
                        rates.append(self._load(model, checkpoint))
                        fingerprints.append(weights_fingerprint(model))
                        states.append(self._fit_one(model, show_progress))
                finally:
                    passes.release()
            warn_of_equal(self._checkpoints(), fingerprints)
            self._states, self._weights = states, self._combine_weights(rates)
            self._mark_fitted(" ".join(fingerprints))
            self.digests_ = passes.digests
            self.fit_seconds_, self._fit_bytes = time.perf_counter() - started, memory.bytes
            self.peak_bytes_ = memory.bytes
        return self

    def _fit_one(self, model: nn.Module, show_progress: bool) -> Any:
        """`_fit_checkpoint`, with a look at the model before and at its outputs for the training set."""
        self._check_model(model)
        self._output_check = OutputCheck(self.loss, model)
        try:
            state = self._fit_checkpoint(model, show_progress)
            self._output_check.finish()
        finally:
            self._output_check = None
        return state

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        *,
        response: str | None = None,
        target: str | int | Sequence[int] | Tensor | None = None,
        normalize: str | None = "default",
    ) -> Tensor | KMostInfluentialResults:
        """Influence of every training example on each test point; fits on first use.

        Args:
            inputs: A batch `(inputs..., labels)` or dict, or a DataLoader or Dataset of them.
            k: None for all scores, or how many training examples to return per test point.
            proponents: With k: the highest scores, descending; otherwise the lowest, ascending.
            show_progress: Whether to show a bar over the test batches.
            response: The scalar that is attributed (see `stride_captum.responses`).
            target: Its class: "label", "predicted", or an index (one, or one per test point).
            normalize: None or "cosine": divide by the norms of both sides; a zero norm gives 0.

        Returns:
            Scores `(n_test, n_train)`, or with k a `KMostInfluentialResults` of indices (int64) and
            scores, both `(n_test, min(k, n_train))`; ties by lower index.

        Raises:
            ValueError: An argument out of its range, or a model that has changed since `fit`.
            TypeError: Inputs of another kind.
        """
        k = None if k is None else whole_number("k", k, or_else=", or None for all scores")

        def collector() -> Collector:
            return DenseScores(self.n_train_) if k is None else StreamedTopK(k, proponents)

        results = self._collect(inputs, collector, show_progress, response, target, normalize)
        return results[0] if k is None else KMostInfluentialResults(*results)

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
        *,
        inputs_dataset: Any = None,
    ) -> Tensor:
        """How much each example lowers its own loss by being in the training set.

        The loss gradient stands on both sides, whatever the response is: this is the diagonal of
        `-influence(train, response="loss")`.

        Args:
            inputs: Other examples, as for `influence`; None for the training set.
            show_progress: Whether to show a bar over the batches.
            outer_loop_by_checkpoints: Accepted for compatibility with Captum; changes nothing.
            inputs_dataset: Captum's other name for `inputs`.

        Returns:
            `(n_train,)`, or `(n_inputs,)`.
        """
        inputs = inputs_dataset if inputs is None else inputs
        if inputs is not None:
            data.check_source(inputs, "inputs")
        with exclusive(self):
            if self._states is None:
                self.fit(show_progress)
            return self._total_self_influence(inputs, show_progress)

    def _total_self_influence(self, inputs: Any, show_progress: bool) -> Tensor:
        total: Tensor | None = None
        with self._session() as model:
            self._check_unchanged()
            for checkpoint, state, weight in zip(
                self._checkpoints(), self._states or [], self._weights, strict=True
            ):
                part = self._train_self_influence(state) if inputs is None else None
                if part is None:
                    self._load(model, checkpoint)
                    part = self._self_influence_of(state, model, inputs, show_progress)
                total = part * weight if total is None else total + part * weight
        assert total is not None, "there is at least one checkpoint"
        return total

    def _self_influence_of(self, state: Any, model: nn.Module, inputs: Any, show_progress: bool) -> Tensor:
        """Self-influence of other inputs, or batch by batch of the training set (None)."""
        source, argument = (self.train_dataset, "train_dataset") if inputs is None else (inputs, "inputs")
        parts = []
        for batch in self._batches(source, argument, show_progress, "self-influence"):
            for piece in batch.split(self._max_rows() or len(batch)):
                rows = piece.columns if inputs is None else None
                parts.append(self._self_influence(state, model, piece, rows))
        return torch.cat(parts)

    def mislabel_scores(self) -> Tensor:
        """How suspect each training label is, `(n_train,)`; here the self-influence. High means suspect."""
        return self.self_influence()

    def subset_influence(
        self,
        inputs: Any,
        groups: Sequence[Any],
        *,
        response: str | None = None,
        target: str | int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Predicted effect of whole groups of training examples: the sum of their scores.

        Args:
            inputs: As for `influence`.
            groups: One for each group, which may overlap: indices, a boolean mask over the training set, or
                a slice.
            response: As for `influence`.
            target: As for `influence`.

        Returns:
            `(n_test, n_groups)`.
        """
        with exclusive(self):
            if self._states is None:
                self.fit()
            membership = membership_from_indices(groups_of_places(groups, self.n_train_), self.n_train_)
            return self._collect(inputs, lambda: GroupSums(membership), False, response, target, None)[0]

    def estimate(self, n_test: int = 100, k: int | None = None) -> Estimate:
        """What `fit` and a query will cost, before they run; printing it gives a small table.

        Small runs on the first training examples are extrapolated in a straight line, where the method has
        no better way. Seconds are those of this machine under its present load
        (`stride_captum.evaluation.benchmarks.estimate` compares them with what is then measured).

        Args:
            n_test: Test points of the query.
            k: As for `influence`.

        Raises:
            ValueError: `n_test` or `k` is below 1, or the training set has no length.
        """
        k = None if k is None else whole_number("k", k, or_else=", or None for all scores")
        return self._estimate(whole_number("n_test", n_test), k)

    def _estimate(self, n_test: int, k: int | None) -> Estimate:
        return from_small_runs(self, n_test, k)

    # Plumbing.

    def _collect(
        self,
        inputs: Any,
        collector: Callable[[], Collector],
        show_progress: bool,
        response: str | None,
        target: Any,
        normalize: str | None,
    ) -> tuple[Tensor, ...]:
        """Score all test batches; `collector` makes what takes in the blocks of one batch."""
        response = self.response if response is None else response
        if response not in RESPONSES:
            raise bad_choice("response", response, RESPONSES)
        normalize = self.normalize if normalize == "default" else normalize
        if normalize not in (None, "cosine"):
            raise bad_value("normalize", "be None or 'cosine'", repr(normalize))
        wanted = self._check_target(self.target if target is None else target)
        data.check_source(inputs, "inputs")
        with exclusive(self):
            if self._states is None:
                self.fit(show_progress)
            return self._collected(inputs, collector, show_progress, response, wanted, normalize)

    def _collected(
        self,
        inputs: Any,
        collector: Callable[[], Collector],
        show_progress: bool,
        response: str,
        wanted: str | Tensor,
        normalize: str | None,
    ) -> tuple[Tensor, ...]:
        started = time.perf_counter()
        results: list[tuple[Tensor, ...]] = []
        with self._session() as model, PeakMemory(self._work_device()) as memory:
            self._check_unchanged()
            seen = 0
            for batch in self._test_batches(inputs, show_progress):
                n = len(batch)
                ask = Query(response, _slice_target(wanted, seen, n))
                seen += n
                taken = collector()
                for block, start in self._score_blocks(model, batch, ask, n, normalize, taken.keeps_all):
                    taken.update(block, start)
                results.append(taken.result())
        if isinstance(wanted, Tensor) and wanted.ndim and len(wanted) != seen:
            raise bad_value("target", f"hold one class for each of the {seen} test points", len(wanted))
        self.query_seconds_ = time.perf_counter() - started
        if memory.bytes is not None:
            self.peak_bytes_ = max(memory.bytes, self._fit_bytes or 0)
        return (
            results[0]
            if len(results) == 1
            else tuple(torch.cat(parts) for parts in zip(*results, strict=True))
        )

    def _score_blocks(
        self, model: nn.Module, batch: Any, ask: Query, n: int, normalize: str | None, keeps_all: bool
    ) -> Iterator[tuple[Tensor, int]]:
        """Blocks of scores of one test batch with the column where each starts."""
        parts = []
        for checkpoint, state, weight in zip(
            self._checkpoints(), self._states or [], self._weights, strict=True
        ):
            self._load(model, checkpoint)
            prepared = self._prepare(state, model, batch, ask)
            norms = self._inverse_norms(state, prepared, model) if normalize else None
            parts.append((checkpoint, state, prepared, weight, norms))
        bytes_per_score = max((p.element_size() for p in model.parameters()), default=8)
        if len(parts) > 1 or normalize or not keeps_all:
            size = rows_that_fit(self.memory_budget, 4 * bytes_per_score, _BLOCK_SCORES)
        else:  # the block is the result itself
            size = rows_that_fit(self.memory_budget, bytes_per_score, None)
        for columns, train_batch in self._column_blocks(size // max(n, 1)):
            block: Tensor | None = None
            for checkpoint, state, prepared, weight, norms in parts:
                if self.reads_training_data and len(parts) > 1:
                    self._load(model, checkpoint)
                scores = self._scores_of_batch(state, prepared, columns, model, train_batch).detach()
                if norms is not None:
                    scores = scores * norms[0][:, None] * norms[1][columns]
                if weight != 1:
                    scores = scores * weight
                block = scores if block is None else block + scores
            assert block is not None, "there is at least one checkpoint"
            yield block, columns.start

    def _inverse_norms(self, state: Any, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        test, train = self._test_norms(state, prepared), self._train_norms(state)
        # Not where(x > 0): the norm of a point with NaN is NaN, and its scores must be.
        return tuple(torch.where(x == 0, torch.zeros_like(x), 1 / x) for x in (test, train))  # type: ignore[return-value]

    def _column_blocks(self, size: int) -> Iterator[tuple[slice, Any]]:
        """Slices of the training set, each with its examples (None unless the method reads them)."""
        size = max(size, 1)
        if self.reads_training_data:
            yield from self._train_blocks(size, False)
            return
        for start in range(0, self.n_train_, size):
            yield slice(start, min(start + size, self.n_train_)), None

    def _train_blocks(self, size: int, show_progress: bool) -> Iterator[tuple[slice, Any]]:
        """Batches of the training set, cut to `size` and `_max_rows`, with their places in it."""
        for batch in self._train_batches(show_progress):
            for piece in batch.split(min(size, self._max_rows() or size)):
                assert piece.columns is not None, "a batch of the training set"
                yield piece.columns, piece

    def _logits(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """Logits of a batch, `(n, n_classes)`."""
        return self._as_logits(batch.outputs(model), batch)

    def _as_logits(self, outputs: Tensor, batch: ExampleBatch) -> Tensor:
        """Outputs for a batch as logits; those for training examples are looked at in `fit`."""
        if self._output_check is not None and batch.columns is not None:
            self._output_check.look(outputs, batch.columns.start)
        return batch.logits_of(outputs)

    def _choose_temperature(
        self, model: nn.Module, logits: Tensor, labels: Tensor, temperature: float | None
    ) -> float:
        """T of tempered residuals: as given, matched to `held_out`, or the default.

        Args:
            model: The model.
            logits: Of the training set, `(n_train, n_classes)`.
            labels: `(n_train,)`.
            temperature: As given, or None.
        """
        if temperature is not None:
            return float(temperature)
        if self.held_out is None:
            return DEFAULT_TEMPERATURE
        residual, seen = 0.0, 0
        for batch in self._batches(self.held_out, "held_out", False, ""):
            outputs = self._logits(model, batch)
            classes = Query("loss", "label").classes(outputs, batch)
            residual += mean_residual(outputs, classes) * len(outputs)
            seen += len(outputs)
        whole, n = self.ranks.sums("held-out residual", residual, seen)
        return match_temperature(logits, labels, whole / n, ranks=self.ranks)

    def _train_batches(self, show_progress: bool) -> Iterator[Any]:
        return self._batches(
            self.train_dataset, "train_dataset", show_progress, f"fitting {type(self).__name__}"
        )

    def _train_labels(self, batch: ExampleBatch, n_classes: int) -> Tensor:
        """Labels of a batch of training examples, `(n,)` int64 in `[0, n_classes)`, on the working device.

        They are checked where they are: those of a batch that is not on a GPU wait for none.
        """
        if batch.labels is None:
            raise bad_value(
                "train_dataset",
                "give one label per example, last in (inputs..., label) or under 'labels'",
                "none",
            )
        return class_labels(batch.labels, n_classes, "train_dataset").to(self._work_device())

    def _test_batches(self, inputs: Any, show_progress: bool) -> Iterator[ExampleBatch]:
        size = max(self.batch_size, _TEST_ROWS)
        for batch in self._batches(inputs, "inputs", show_progress, type(self).__name__):
            yield from batch.split(self._max_rows() or size)

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
        reading = None if self._passes is None else self._passes.reading
        return ExampleBatch(content, reading or self._reading(), argument=argument)

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

    def _work_device(self) -> torch.device:
        if self.device is not None:
            return self.device
        return device_of(self.model)

    @contextmanager
    def _session(self) -> Iterator[nn.Module]:
        """The model on the working device, in eval mode, for this thread alone; put back at the end."""
        with (
            exclusive(self, self.model),
            preserve_state(self._model_on_device(), weights=self.checkpoints is not None) as model,
            torch.inference_mode(False),
            torch.set_grad_enabled(self.needs_gradients),
            full_precision(self._work_device()),
        ):
            yield model

    def _model_on_device(self) -> nn.Module:
        """The model, or a copy on another device, which is made anew when the weights have changed."""
        first = next(self.model.parameters(), None)
        if self.device is None or first is None or first.device == self.device:
            return self.model
        version = weights_version(self.model)
        if self._device_copy is None or self._device_copy[0] != version:
            self._device_copy = version, copy.deepcopy(self.model).to(self.device)
        return self._device_copy[1]

    def _checkpoints(self) -> Sequence[Any]:
        return [None] if self.checkpoints is None else self.checkpoints

    def _load(self, model: nn.Module, checkpoint: Any) -> float:
        if checkpoint is None:
            return 1.0
        rate = load_with(self.checkpoints_load_func, model, checkpoint)
        model.eval()
        return rate

    def _fingerprint(self) -> str:
        """Of the weights of `model`, or of all checkpoints."""
        with self._session() as model:
            found = []
            for checkpoint in self._checkpoints():
                self._load(model, checkpoint)
                found.append(weights_fingerprint(model))
        return " ".join(found)

    def _mark_fitted(self, fingerprint: str) -> None:
        self._fitted_on = (weights_version(self.model), fingerprint, self._work_device())

    def _check_unchanged(self) -> None:
        if self._fitted_on is None:
            return
        version, fingerprint, device = self._fitted_on
        if self._work_device() != device:
            remedy = "Move it back, or call fit() again."
            must = f"be on {device}, as it was when the method was fitted"
            raise bad_value("model", must, str(self._work_device()), remedy)
        if self.checkpoints is not None:
            return
        now = weights_version(self.model)
        if now != version:
            if weights_fingerprint(self.model) != fingerprint:
                raise bad_value(
                    "model",
                    "have the weights that the method was fitted on",
                    "other weights",
                    "Call fit() again, or build a new object for the new model.",
                )
            self._fitted_on = (now, fingerprint, device)

    def _check_target(self, target: Any) -> str | Tensor:
        if isinstance(target, str):
            if target not in ("label", "predicted"):
                raise bad_value("target", "be 'label', 'predicted' or class indices", repr(target))
            return target
        numeric = isinstance(target, int | Sequence | Tensor | np.ndarray | np.integer)
        if isinstance(target, bool) or not numeric:
            raise bad_type("target", "be 'label', 'predicted' or class indices", target)
        try:
            return torch.as_tensor(target)
        except (TypeError, ValueError) as error:
            raise bad_value("target", "be 'label', 'predicted' or class indices", repr(target)) from error

    def save(self, path: str | Path) -> None:
        """Write what `fit` has learnt to one safetensors file.

        Args:
            path: File name.

        Raises:
            ValueError: Nothing has been fitted, or `path` is a folder.
            OSError: The file cannot be written.
        """
        save_method(self, path)

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path,
        model: nn.Module,
        train_dataset: Any,
        *,
        changed: str = "refuse",
        **options: Any,
    ) -> Self:
        """Read a method that `save` has written, without a pass of the training set through the model.

        The labels of all training examples are compared with those that the method was fitted on, and their
        inputs up to `stale_data.INPUT_BYTES`; `compared_` says what was. That reads the data set, unless its
        labels can be had alone and its inputs are more than that.

        Args:
            path: File name.
            model: The model that it was fitted on.
            train_dataset: The training set that it was fitted on.
            changed: What to do about examples that have changed: "refuse" them; "update" the method by these
                alone (closed-form STRIDE: what a refit would give); or "ignore", which compares nothing but
                the length, for data that are slow to read and sure to be the same.
            **options: Constructor arguments that are not saved (device, checkpoints, ...), or another
                batch_size.

        Raises:
            ValueError: The file is damaged, or belongs to other weights, other data or another class.
        """
        return load_method(cls, path, model, train_dataset, options, changed)

    def _states_to_save(self) -> list[Any]:
        """What `save` keeps of each checkpoint."""
        return list(self._states or [])

    def _loaded_states(self, states: list[Any], fingerprints: list[str]) -> list[Any]:
        """The states that `save` had kept, whole again; `fingerprints` are those of the checkpoints."""
        return states

    def _settings(self) -> dict[str, Any]:
        """Constructor arguments that `save` keeps, as plain values."""
        loss = {} if self.loss == CrossEntropy() else {"loss": asdict(self.loss)}
        layers = None if self.layers is None else list(self.layers)
        return {"layers": layers, "batch_size": self.batch_size, **loss}


def _slice_target(target: str | Tensor, start: int, n: int) -> str | Tensor:
    if isinstance(target, str):
        return target
    if target.ndim == 0:
        return target.expand(n)
    piece = target[start : start + n]
    if len(piece) != n:
        raise bad_value(
            "target", "hold one class per test point", f"{len(target)} classes for more test points"
        )
    return piece


__all__ = ["Query", "InfluenceMethod"]
