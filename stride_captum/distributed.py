"""`DistributedSTRIDE`: `STRIDE` in a `torch.distributed` process group, with one shard of the data a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from .data import inputs as data
from .data.batch import is_batch
from .data.reading import Batch
from .errors import bad_type, bad_value
from .features.precomputed import Precomputed
from .influence.method import Query
from .influence.rows import checked_ids
from .influence.top_k import Collector, ColumnSums, DenseScores, GroupSums, StreamedTopK, merge_top_k
from .operators import STRIDEState
from .shared_points import points_of_rank_0
from .stride import STRIDE
from .system.memory import blocks
from .system.processes import Ranks

Self = TypeVar("Self", bound="DistributedSTRIDE")


class DistributedSTRIDE(STRIDE):
    """STRIDE on the training set of all processes together.

        # torchrun --nproc-per-node 8 attribute.py
        torch.distributed.init_process_group()
        method = DistributedSTRIDE(model, train_dataset)
        top = method.influence((x, y), k=100)

    A class of its own and not a keyword, as `DistributedDataParallel` and `DistributedSampler` are: where a
    call is one that all processes must make, its name says so. Everything else is as with `STRIDE`. Every
    rank makes the same calls with the same arguments and gets the same results, those of a single process
    up to rounding: 1e-5 of the largest score, and 1e-4 of the largest cosine, which magnifies what is left of
    examples that the model is sure of.

    Each rank passes the whole training set and reads its share of it alone: rows
    `rank * N // world_size` and following. What is summed over the training set (Gram matrix, class
    moments, norms, the mean residual that sets the temperature) is all-reduced in float64. The test
    points are those of rank 0: it runs the model on them and broadcasts features and gradients. Lists of the
    k best are merged, ties by the lower index in the whole training set; dense scores, which are what
    `influence` without k asks for, are gathered on every rank, so ask for k where N is large.

    gloo and nccl run the same code; with nccl, call `torch.cuda.set_device` first and put the model there.

    A rank that dies or stops with an exception ends the call on all others with a `RuntimeError` that says
    which collective, which rank where that is known, and what to do. Start all of them again: `fit` is
    one forward pass, which with a `feature_store` (one folder a rank) goes on behind the last whole chunk;
    and what `save` has written (one file a rank) is read by `load` with as many ranks.

    Args:
        model: As for `STRIDE`; the same weights on every rank.
        train_dataset: The whole training set: a Dataset with a length, or a DataLoader of one.
        process_group: The processes; None means all.
        **options: As for `STRIDE`; every rank reads the whole of `held_out`.

    Attributes:
        train_dataset: The share of this rank.
        columns: Its places in the whole training set.

    Raises:
        ValueError: No group has been initialized; fewer examples than ranks; operators or a curvature that
            need the whole training set in one place.
    """

    ranks: Ranks

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self.ranks = Ranks(process_group)
        n, share = _share(train_dataset, self.ranks)
        self._n_whole, self.columns, self._whole_dataset = n, self.ranks.shard(n), train_dataset
        ids = checked_ids(options.pop("ids", None), train_dataset)
        batch = options.pop("batch", None)
        if isinstance(batch, Batch):
            batch.check_weights_of(n)
            batch = batch.with_weights_of(self.columns)
        super().__init__(model, share, batch=batch, **options)
        self.ids = ids
        self.operators.check_shared()
        if self.features.projection is not None:
            raise bad_value("projection", "be None in a process group", repr(self.features.projection))
        if self.feature_store is not None:  # every rank keeps its share
            folder = f"rank{self.ranks.rank}-of-{self.ranks.size}"
            self.feature_store = replace(self.feature_store, path=Path(self.feature_store.path) / folder)

    @classmethod
    def from_features(cls: type[Self], features: Any, logits: Any, labels: Any, **options: Any) -> Self:
        """As `STRIDE.from_features`: every rank passes all of it (memory-mapped) and reads its rows."""
        method = super().from_features(features, logits, labels, **options)
        known, rows = method._precomputed, method.columns
        assert known is not None
        method._precomputed = Precomputed(
            known.features[rows],
            known.logits[rows],
            known.labels[rows],
            known.widths,
            None if known.weights is None else known.weights[rows],
        )
        return method

    def fit(self: Self, show_progress: bool = False) -> Self:
        """Learn from the training set; a bar shows the share of rank 0."""
        with self.ranks.call("fit"):
            self.ranks.agree(
                f"{self._n_whole} {self.layers} {self.operators} {self.features}",
                "operators",
                "be the same on every rank, as the layers and the length of the training set must",
            )
            super().fit(show_progress and self.ranks.rank == 0)
            if self.n_train_ != self._n_whole:
                raise bad_value("train_dataset", f"give {self._n_whole} examples", self.n_train_)
            self._agree_on_weights()
        return self

    def self_influence(self, inputs: Any = None, *args: Any, **options: Any) -> Tensor:
        """As `STRIDE.self_influence`, gathered on every rank."""
        with self.ranks.call("self_influence"):
            own = super().self_influence(inputs, *args, **options)
            whole = inputs is None and options.get("inputs_dataset") is None
            return self.ranks.all_gather(own, "self-influence") if whole else own

    def mislabel_scores(self, per_label: bool = False) -> Tensor:
        """As `STRIDE.mislabel_scores`, gathered on every rank."""
        with self.ranks.call("mislabel_scores"):
            return self.ranks.all_gather(super().mislabel_scores(per_label), "mislabel scores")

    def compute_intermediate_quantities(self, *args: Any, **options: Any) -> Tensor:
        """As `STRIDE.compute_intermediate_quantities`, the vectors of all training examples on every rank."""
        with self.ranks.call("compute_intermediate_quantities"):
            return super().compute_intermediate_quantities(*args, **options)

    def save(self, path: str | Path) -> None:
        """Write what this rank has learned to a file of its own, `path.rank0-of-4` and so on."""
        super().save(_file_of_rank(path, self.ranks))

    @classmethod
    def load(cls: type[Self], path: str | Path, model: nn.Module, train_dataset: Any, **options: Any) -> Self:
        """As `STRIDE.load`, by as many processes as have saved."""
        ranks = Ranks(options.get("process_group"))
        file = _file_of_rank(path, ranks)
        with ranks.call("load"):
            if not file.exists():
                must = f"have been written by `save` in a group of {ranks.size} processes"
                raise bad_value("path", must, f"no file {str(file)!r}", "Use as many, or fit again.")
            method = super().load(file, model, train_dataset, **options)
            method._agree_on_weights()
        return method

    @override
    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.feature_store is not None:  # of all ranks: `load` finds the folder of this one again
            settings["feature_store"]["path"] = str(Path(self.feature_store.path).parent)
        return settings

    def _check_changeable(self) -> None:
        must = "be changed in a single process"
        raise bad_value("train_dataset", must, f"a group of {self.ranks.size}", "Fit again.")

    # The seams of the base class.

    @override
    def _own_columns(self) -> slice:
        return self.columns

    @override
    def _every_example(self) -> Any:
        return self._whole_dataset

    def _collect(
        self, inputs: Any, collector: Callable[[], Collector], show_progress: bool, *args: Any
    ) -> tuple[Tensor, ...]:
        def merged() -> Collector:
            return _Merged(collector(), self.ranks, self.columns)

        with self.ranks.call("influence"):
            return super()._collect(inputs, merged, show_progress and self.ranks.rank == 0, *args)

    @override
    def prepare_query(self, state: STRIDEState, model: nn.Module, batch: Any, query: Query) -> Any:
        operators, n = state.operators, len(batch)
        self.ranks.agree(f"{n} {query.response}", "inputs", "be the same test points on every rank")
        points = self._points(state, model, batch, query) if self.ranks.rank == 0 else None
        n_features = sum(tap.width for tap in state.taps)
        return operators.prepare(
            points_of_rank_0(self.ranks, points, n, n_features, operators, query.response)
        )

    @override
    def position_scores(self, state: STRIDEState, prepared: Any, example: int | None) -> Tensor:
        own = self.columns
        if example is None:
            part = super().position_scores(state, prepared, None)
            return self.ranks.all_gather(part, "scores of positions", dim=2)
        mine = own.start <= example < own.stop
        part = super().position_scores(state, prepared, example - own.start if mine else 0)
        n_positions = int(self.ranks.sums("positions of an example", part.shape[1] if mine else 0)[0])
        part = part if mine else part.new_zeros(len(part), n_positions)
        return self.ranks.all_reduce(part, "scores of positions")

    def _for_each_query(self, *args: Any, **options: Any) -> list[Any]:
        with self.ranks.call("scores of parts"):
            return super()._for_each_query(*args, **options)

    def _column_blocks(self, size: int) -> Iterator[tuple[slice, Any]]:
        for columns in blocks(self.columns.stop - self.columns.start, max(size, 1)):
            yield columns, None

    def _agree_on_weights(self) -> None:
        assert self._fitted_on is not None
        self.ranks.agree(self._fitted_on[1], "model", "have the same weights on every rank")


class _Merged:
    """A collector of the columns of this rank, whose result is that of all ranks."""

    def __init__(self, whole: Collector, ranks: Ranks, columns: slice) -> None:
        self._dense = isinstance(whole, DenseScores)
        self._inner = DenseScores(columns.stop - columns.start) if self._dense else whole
        self._ranks, self._start = ranks, 0 if self._dense else columns.start
        self.keeps_all, self.over_all_batches = self._inner.keeps_all, self._inner.over_all_batches

    def update(self, block: Tensor, start: int) -> None:
        """Take in the scores of columns `start, start + 1, ...` of the share, `(n_rows, n_block)`."""
        self._inner.update(block, self._start + start)

    def result(self) -> tuple[Tensor, ...]:
        """What all ranks have collected."""
        if isinstance(self._inner, ColumnSums):
            return self._inner.result_of(self._ranks.all_reduce(self._inner.sums(), "sums of columns"))
        found = self._inner.result()
        if isinstance(self._inner, GroupSums):
            return (self._ranks.all_reduce(found[0], "sums of groups"),)
        parts = [self._ranks.all_gather(part, "scores", dim=1) for part in found]
        if not isinstance(self._inner, StreamedTopK):
            return tuple(parts)
        return merge_top_k(parts[0], parts[1], self._inner.k, self._inner.largest)


def _file_of_rank(path: str | Path, ranks: Ranks) -> Path:
    return Path(f"{path}.rank{ranks.rank}-of-{ranks.size}")


def _share(dataset: Any, ranks: Ranks) -> tuple[int, Any]:
    """The number of examples of a training set, and what one rank reads of it."""
    if is_batch(dataset):
        return 0, dataset  # which the base class refuses
    data.check_source(dataset, "train_dataset")
    n = data.count_examples(dataset)
    if n is None:
        raise bad_type(
            "train_dataset", "have a length in a process group", dataset, "Use a map-style Dataset."
        )
    if n < ranks.size:
        raise bad_value(
            "train_dataset", f"hold an example for each of {ranks.size} ranks", n, "Start fewer processes."
        )
    return n, data.some_examples(dataset, ranks.shard(n))


__all__ = ["DistributedSTRIDE"]
