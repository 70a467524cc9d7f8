"""The scoring loop: test batches against blocks of the training set, over checkpoints; and self-influence."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data import inputs as data
from ..errors import bad_value
from ..system.devices import as_float64, matching
from ..system.locks import exclusive
from ..system.memory import rows_that_fit
from ..system.peak_memory import PeakMemory
from ..system.processes import SINGLE_PROCESS, SingleProcess
from .checkpoints.averages import unit_deviation_scale
from .hooks import MethodHooks
from .query import Default, Query, check_query, checked_target, slice_target
from .top_k import Collector

T = TypeVar("T")

#: Scores of one block, at most: small enough for the last level of cache.
_BLOCK_SCORES = 2**20


@dataclass(frozen=True)
class _AtCheckpoint:
    """A batch of test points at one checkpoint.

    Attributes:
        checkpoint: As the user gave it.
        state: What `fit` learned at it.
        prepared: What the scores need of the test points.
        weight: Of its scores in the sum.
        norms: Inverse norms of test points and of training examples; None where scores are not divided.
        scale: What the scores of each test point are multiplied by, `(n_test,)` float64; None for 1.
    """

    checkpoint: Any
    state: Any
    prepared: Any
    weight: float
    norms: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None


class ScoringLoop(MethodHooks):
    """Loops over test batches, checkpoints and blocks of the training set."""

    response: str
    target: str | Tensor
    normalize: str | None
    _states: list[Any] | None
    _weights: list[float]
    _fit_bytes: int | None
    peak_bytes_: int | None
    ranks: SingleProcess

    def _fitted(self) -> Iterator[tuple[Any, Any, float]]:
        """Each checkpoint with what was learned at it, and its weight in the score."""
        return zip(self._checkpoints(), self._states or [], self._weights, strict=True)

    @abstractmethod
    def fit(self, show_progress: bool = False) -> Any:
        """Learn from the training set."""

    def checkpoint_scores(
        self,
        inputs: Any,
        show_progress: bool = False,
        *,
        response: str | None = None,
        target: Any = None,
    ) -> Tensor:
        """Scores of each checkpoint alone, which are not normalized; their spread says how far they agree.

        With `normalize` None or "deviation", `influence` is the sum of these with the weights
        `checkpoint_weights_` (`stride_captum.influence.checkpoints.averages.weighted_sum`), computed without
        holding all of them.

        Args:
            inputs: As for `influence`; fits on first use.
            show_progress: Whether to show a bar over the test batches.
            response: As for `influence`.
            target: As for `influence`.

        Returns:
            `(n_checkpoints, n_test, n_train)`, in the order of the checkpoints; for the model alone if there
            are none, n_checkpoints = 1.

        Raises:
            ValueError: As for `influence`, or a process group.
        """
        self._check_single_process()

        def of_batch(model: nn.Module, batch: Any, query: Query) -> Tensor:
            parts, found = list(self._prepared(model, batch, query)), None
            size = rows_that_fit(self.memory_budget, 8 * len(parts), _BLOCK_SCORES) // len(batch)
            for columns, train_batch in self._column_blocks(size):
                block = self._scores_of_parts(model, parts, columns, train_batch)
                if found is None:
                    found = block.new_empty(*block.shape[:2], self.n_train_)
                found[:, :, columns] = block
            assert found is not None, "there is at least one training example"
            return found

        response = self.response if response is None else response
        target = self.target if target is None else target
        found = self._for_each_query(inputs, response, target, of_batch, show_progress)
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _check_single_process(self) -> None:
        if self.ranks is not SINGLE_PROCESS:
            must = "have the whole training set in one process"
            raise bad_value("method", must, repr(self), "Use STRIDE.")

    @property
    def checkpoint_weights_(self) -> list[float]:
        """Weight of the scores of each checkpoint in the sum."""
        return list(self._weights)

    def _collect(
        self,
        inputs: Any,
        collector: Callable[[], Collector],
        show_progress: bool,
        response: str | None,
        target: Any,
        normalize: str | Default | None,
    ) -> tuple[Tensor, ...]:
        """Score all test batches; `collector` creates the collector of one batch, or of all."""
        response = self.response if response is None else response
        chosen = self.normalize if isinstance(normalize, Default) else normalize
        check_query(self.loss, response, chosen)
        wanted = checked_target(self.target if target is None else target)
        data.check_source(inputs, "inputs")
        with exclusive(self):
            if self._states is None:
                self.fit(show_progress)
            return self._collected(inputs, collector, show_progress, response, wanted, chosen)

    def _collected(
        self,
        inputs: Any,
        collector: Callable[[], Collector],
        show_progress: bool,
        response: str,
        wanted: str | Tensor,
        normalize: str | None,
    ) -> tuple[Tensor, ...]:
        taken = None
        results: list[tuple[Tensor, ...]] = []
        with self._measured_query(), self._session() as model:
            self._check_unchanged()
            for batch, query in self._queries(inputs, response, wanted, show_progress):
                n = len(batch)
                if taken is None or not taken.over_all_batches:
                    taken = collector()
                for block, start in self._score_blocks(model, batch, query, n, normalize, taken.keeps_all):
                    taken.update(block, start)
                if not taken.over_all_batches:
                    results.append(taken.result())
            if taken is not None and taken.over_all_batches:
                results.append(taken.result())
        if len(results) == 1:
            return results[0]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    @contextmanager
    def _measured_query(self) -> Iterator[None]:
        """Set the duration and the memory of a query."""
        started = time.perf_counter()
        with PeakMemory(self._work_device()) as memory:
            yield
        self.query_seconds_ = time.perf_counter() - started
        if memory.bytes is not None:
            self.peak_bytes_ = max(memory.bytes, self._fit_bytes or 0)

    def _queries(
        self, inputs: Any, response: str, wanted: str | Tensor, show_progress: bool = False
    ) -> Iterator[tuple[Any, Query]]:
        """Test batches with what is asked about each of them."""
        seen = 0
        for batch in self._test_batches(inputs, show_progress):
            yield batch, Query(response, slice_target(wanted, seen, len(batch)))
            seen += len(batch)
        if isinstance(wanted, Tensor) and wanted.ndim and len(wanted) != seen:
            raise bad_value("target", f"hold one class for each of the {seen} test points", len(wanted))

    def _for_each_query(
        self,
        inputs: Any,
        response: str,
        target: Any,
        function: Callable[[nn.Module, Any, Query], T],
        show_progress: bool = False,
    ) -> list[T]:
        """`function(model, batch, query)` of every test batch; fits on first use."""
        check_query(self.loss, response, None)
        wanted = checked_target(target)
        data.check_source(inputs, "inputs")
        with exclusive(self):
            if self._states is None:
                self.fit(show_progress)
            with self._measured_query(), self._session() as model:
                self._check_unchanged()
                queries = self._queries(inputs, response, wanted, show_progress)
                return [function(model, batch, query) for batch, query in queries]

    def _prepared(self, model: nn.Module, batch: Any, query: Query) -> Iterator[_AtCheckpoint]:
        """A batch of test points at each checkpoint, which is loaded."""
        for checkpoint, state, weight in self._fitted():
            self._load_fitted(model, checkpoint)
            yield _AtCheckpoint(checkpoint, state, self.prepare_query(state, model, batch, query), weight)

    def _score_blocks(
        self, model: nn.Module, batch: Any, query: Query, n: int, normalize: str | None, keeps_all: bool
    ) -> Iterator[tuple[Tensor, int]]:
        """Blocks of scores of one test batch with the column where each starts."""
        parts: list[_AtCheckpoint] = []
        for part in self._prepared(model, batch, query):
            cosine = normalize == "cosine"
            norms = self._inverse_norms(part.state, part.prepared, model) if cosine else None
            parts.append(replace(part, norms=norms))
        bytes_per_score = max((p.element_size() for p in model.parameters()), default=8)
        if len(parts) > 1 or normalize or not keeps_all:
            size = rows_that_fit(self.memory_budget, 4 * bytes_per_score, _BLOCK_SCORES)
        else:  # the block is the result
            size = rows_that_fit(self.memory_budget, bytes_per_score, None)
        size //= max(n, 1)
        if normalize == "deviation":
            parts = self._of_unit_deviation(model, parts, size)
        for columns, train_batch in self._column_blocks(size):
            block: Tensor | None = None
            for part in parts:
                scores = self._part_scores(model, part, columns, train_batch, len(parts) > 1)
                if part.norms is not None:
                    scores = scores * part.norms[0][:, None] * part.norms[1][columns]
                if part.scale is not None:
                    scores = scores * matching(part.scale, scores)[:, None]
                if block is not None:
                    block.add_(scores, alpha=part.weight)
                else:  # a copy: scores may be those that a method keeps
                    alone = len(parts) == 1 and part.weight == 1
                    block = scores if alone else scores * part.weight
            assert block is not None, "there is at least one checkpoint"
            yield block, columns.start

    def _part_scores(
        self, model: nn.Module, part: _AtCheckpoint, columns: slice, train_batch: Any, reload: bool
    ) -> Tensor:
        if self.reads_training_data and reload:
            self._load(model, part.checkpoint)
        return self.score_batch(part.state, part.prepared, columns, model, train_batch).detach()

    def _scores_of_parts(
        self, model: nn.Module, parts: list[_AtCheckpoint], columns: slice, train_batch: Any
    ) -> Tensor:
        """Scores at each checkpoint, `(n_checkpoints, n_test, n_columns)`."""
        several = len(parts) > 1
        return torch.stack([self._part_scores(model, part, columns, train_batch, several) for part in parts])

    def _of_unit_deviation(
        self, model: nn.Module, parts: list[_AtCheckpoint], size: int
    ) -> list[_AtCheckpoint]:
        """With the scales at which the scores of each test point have unit standard deviation."""
        sums: dict[int, Tensor] = {}
        for columns, train_batch in self._column_blocks(size):
            for i, part in enumerate(parts):
                scores = as_float64(self._part_scores(model, part, columns, train_batch, len(parts) > 1))
                found = torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(2)
                sums[i] = sums[i] + found if i in sums else found
        scaled = []
        for i, part in enumerate(parts):
            count, total, squares = self.ranks.all_reduce(sums[i], "deviations of scores")
            scaled.append(replace(part, scale=unit_deviation_scale(total / count, squares / count)))
        return scaled

    def _inverse_norms(self, state: Any, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        test, train = self.test_norms(state, prepared), self.train_norms(state)
        # Not where(x > 0): scores of a point with NaN must be NaN.
        return tuple(torch.where(x == 0, torch.zeros_like(x), 1 / x) for x in (test, train))  # type: ignore[return-value]

    def _column_blocks(self, size: int) -> Iterator[tuple[slice, Any]]:
        """Slices of the training set, each with its examples (None unless the method reads them)."""
        size = max(size, 1)
        if self.reads_training_data:
            yield from self.train_blocks(size, False)
            return
        for start in range(0, self.n_train_, size):
            yield slice(start, min(start + size, self.n_train_)), None

    def _total_self_influence(self, inputs: Any, show_progress: bool) -> Tensor:
        total: Tensor | None = None
        with self._session() as model:
            self._check_unchanged()
            for checkpoint, state, weight in self._fitted():
                part = self.train_self_influence(state) if inputs is None else None
                if part is None:
                    self._load_fitted(model, checkpoint)
                    part = self._self_influence_of(state, model, inputs, show_progress)
                total = part * weight if total is None else total + part * weight
        assert total is not None, "there is at least one checkpoint"
        return total

    def _self_influence_of(self, state: Any, model: nn.Module, inputs: Any, show_progress: bool) -> Tensor:
        """Self-influence of other inputs, or batch by batch of the training set (None)."""
        source, argument = (self.train_dataset, "train_dataset") if inputs is None else (inputs, "inputs")
        parts = []
        for batch in self._batches(source, argument, show_progress, "self-influence"):
            for piece in batch.split(self.max_rows() or len(batch)):
                rows = piece.columns if inputs is None else None
                parts.append(self.batch_self_influence(state, model, piece, rows))
        return torch.cat(parts)
