"""Pass over a training set that fills a feature store, or compares the examples with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..data.batch import ExampleBatch
from ..data.digests import ExampleDigest
from ..errors import bad_value
from ..positions import Positions
from .precomputed import positions_in_some
from .store_files import Manifest, StoreFiles

#: Of one batch: the rows of each tap, the logits `(n_rows, n_classes)`, the labels, and which positions have
#: a row, `(n, P)` bool; None where an example has one row.
Computed = tuple[Sequence[Tensor], Tensor, Tensor, Tensor | None]
Run = Callable[[ExampleBatch], Computed]


class StoreWriter:
    """One pass over the training set: stored chunks are compared, others are computed and written.

    Args:
        files: Files of the store.
        manifest: Of the stored chunks; None if there are none.
        new: `f(logits, labels, kept)`, an empty manifest given those of a batch.
    """

    def __init__(
        self,
        files: StoreFiles,
        manifest: Manifest | None,
        new: Callable[[Tensor, Tensor, Tensor | None], Manifest],
    ) -> None:
        self.files, self.manifest, self.new = files, manifest, new
        self.digest = ExampleDigest()
        self.stored = 0 if manifest is None else manifest.rows
        self.place = 0  # examples of completed chunks
        self.filled = 0  # examples of the current chunk
        self.buffers: dict[str, Tensor] = {}
        self.used: dict[str, int] = {}  # rows of each buffer

    def through(self, batches: Iterable[ExampleBatch], run: Run) -> Manifest:
        """Run the pass; returns the complete manifest."""
        for batch in batches:
            n = len(batch)
            # A batch is run as a whole, so that a resumed store holds the bits of an uninterrupted one.
            computed = None
            if self.place + self.filled + n > self.stored:
                if self.manifest is not None and self.manifest.complete:
                    self._refuse(f"more than {self.stored} examples")
                computed = run(batch)
                self._prepare(computed)
            self._take(batch, computed, n)
        manifest = self.manifest
        if manifest is None:
            raise bad_value("train_dataset", "hold at least one example", "an empty one")
        if self.filled:
            self._close_chunk()
        if self.place != manifest.rows:
            self._refuse(f"{self.place} examples, not {manifest.rows}")
        if not manifest.complete:
            manifest.complete = True
            self.files.write_manifest(manifest)
        return manifest

    def _prepare(self, computed: Computed) -> None:
        """Allocate what depends on the number of classes, known from the first batch."""
        if self.manifest is None:
            self.manifest = self.new(*computed[1:])
        if (computed[3] is not None) != ("counts" in self.manifest.parts):
            raise positions_in_some()
        if not self.buffers:
            for name, part in self.manifest.parts.items():
                self.buffers[name] = torch.empty(
                    self.manifest.chunk_rows, part.width, dtype=part.torch_dtype, device="cpu"
                )
                self.used[name] = 0

    def _take(self, batch: ExampleBatch, computed: Computed | None, n: int) -> None:
        """Add the examples of one batch, split at chunk boundaries."""
        assert self.manifest is not None, "nothing is stored, so the first batch was run"
        start = 0
        while start < n:
            stop = min(n, start + self._chunk_rows() - self.filled)
            self.digest.update(batch[start:stop])
            if computed is not None and self.place >= self.stored:
                self._copy(computed, slice(start, stop))
            self.filled += stop - start
            start = stop
            if self.filled == self._chunk_rows():
                self._close_chunk()

    def _chunk_rows(self) -> int:
        assert self.manifest is not None
        return self.manifest.chunk_rows

    def _copy(self, computed: Computed, examples: slice) -> None:
        taps, logits, labels, kept = computed
        rows = examples
        if kept is not None:
            positions = Positions.of_mask(kept)
            rows, few = positions.rows_of(examples), positions.of(examples)
            assert few.places is not None
            self._put("counts", [few.counts[:, None]])
            self._put("places", [few.places[:, None]])
        self._put("features", [part[rows] for part in taps])
        self._put("logits", [logits[rows]])
        self._put("labels", [labels[rows] if labels.ndim == 2 else labels[rows, None]])

    def _put(self, name: str, parts: Sequence[Tensor]) -> None:
        """Append rows, given as parts side by side, to a buffer, which grows where they do not fit."""
        buffer, first = self.buffers[name], self.used[name]
        last = self.used[name] = first + len(parts[0])
        if last > len(buffer):
            more = buffer.new_empty(max(last, 2 * len(buffer)) - first, buffer.shape[1])
            buffer = self.buffers[name] = torch.cat([buffer[:first], more])
        start = 0
        for part in parts:
            buffer[first:last, start : start + part.shape[1]] = part
            start += part.shape[1]

    def _close_chunk(self) -> None:
        assert self.manifest is not None
        examples, chunks = self.digest.finish(), self.manifest.chunks
        if self.place < self.stored:
            chunk = chunks[self.place // self._chunk_rows()]
            if chunk.examples != examples or chunk.rows != self.filled:
                self._refuse(f"others among examples {self.place} to {self.place + self.filled - 1}")
        else:
            values = {name: buffer[: self.used[name]] for name, buffer in self.buffers.items()}
            self.used = dict.fromkeys(self.used, 0)
            _check_range(values["features"])
            self.files.append(self.manifest, values, examples)
        self.place, self.filled = self.place + self.filled, 0

    def _refuse(self, got: str) -> None:
        where = f"hold the examples that the feature store {str(self.files.folder)!r} was built from"
        raise bad_value(
            "train_dataset",
            where,
            got,
            "Give another folder, or delete this one; leave `feature_store` out if examples differ from one "
            "reading to the next.",
        )


def _check_range(features: Tensor) -> None:
    if features.dtype == torch.float16 and not bool(torch.isfinite(features).all()):
        raise bad_value("dtype", "hold the features", "infinity or NaN in 'float16'", "Take 'bfloat16'.")
