"""Feature store: activations, logits and labels of a training set on disk, read through memory maps.

A store has a key: weights and modules of the model, examples, layers, and settings of the store. A different
key is refused, with the differences.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.digests import STREAM, data_fingerprint
from ..errors import bad_choice, bad_type, bad_value
from ..layers.activations import Tap
from ..positions import Positions
from ..system.memory import parse_bytes, rows_that_fit
from .store_files import Manifest, Part, StoreFiles
from .store_writer import Run, StoreWriter

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StoredFeatures:
    """A training set read from a store; everything is a read-only memory map.

    Attributes:
        features: Raw features `(n_train, n_features)` in the dtype of the store.
        logits: `(n_train, n_classes)` float32.
        labels: As the loss has them: `(n_train,)` int64, or `(n_train, n_classes)` float64.
        taps: Places that were read.
        positions: Where all of these have one row for each position: which rows are those of an example, in
            memory.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    taps: list[Tap]
    positions: Positions | None = None


@dataclass(frozen=True)
class FeatureStore:
    """A folder for the activations, logits and labels of one training set, and how it is written.

    The first `fit` writes it chunk by chunk; an interrupted one resumes after the last complete chunk; later
    ones read it without a forward pass. Each time the examples are compared with the digests of those that
    the store was built from, unless `check_examples` is off.

    Half precision halves the disk space and the bytes that a query reads; products are still in float32.
    Measured on the 400 test points of digits (MLP 64-128-64-10): the rank correlation of each point's scores
    with those of float32 is at least .99997 with bfloat16 and .999999 with float16, and the top 100 share at
    least 99 examples. Activations beyond 65,504 do not fit float16 and are refused. The features of a float64
    model are rounded to float32. Of examples with several positions every position that has a label is a row.

    Args:
        path: The folder; created if needed.
        dtype: "float32", "bfloat16" or "float16" of the features. Logits are always float32.
        chunk: Size of a chunk: the most that an interruption loses, and that is held in memory.
        verify: Whether to compare all checksums when the store is opened. That reads every byte once:
            a CRC-32 of 4 to 5 GB a second, or the speed of the disk where the store is not in the page cache.
        check_examples: Whether to read every training example, to compare it with what the store was built
            from (SHA-256, 1.3 GB a second, and what the data set takes to give them). Without it a change is
            seen only in the length and in 64 examples spread evenly over the set; an iterable data set needs
            it, because nothing of it can be looked at alone. Sample weights stand with the examples, so all
            are read where there are any. Examples that differ from one reading to the next (random
            augmentation) cannot be stored.
    """

    path: str | Path
    dtype: str = "float32"
    chunk: int | str = "64MiB"
    verify: bool = True
    check_examples: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise bad_type("feature_store", "be the path of a folder, or a FeatureStore", self.path)
        if Path(self.path).exists() and not Path(self.path).is_dir():
            raise bad_value("feature_store", "name a folder", f"the file {str(self.path)!r}")
        if self.dtype not in _DTYPES:
            raise bad_choice("dtype", self.dtype, _DTYPES)
        parse_bytes(self.chunk, name="chunk")

    def for_checkpoint(self, index: int) -> FeatureStore:
        """Store of one of several checkpoints, a folder inside this one."""
        return replace(self, path=Path(self.path) / f"checkpoint-{index}")

    def key(self, weights: str, model: nn.Module, dataset: Any, layers: str) -> dict[str, Any]:
        """Key of the content.

        Args:
            weights: `weights_fingerprint` of the model.
            model: Its modules and their options are in the key, the code of its `forward` is not.
            dataset: The training set.
            layers: The requested layers.

        Raises:
            ValueError: Reading an example twice gives different values, or a stream without `check_examples`.
        """
        examples = data_fingerprint(dataset)
        if examples == STREAM and not self.check_examples:
            must = "be True for an iterable data set, whose examples cannot be looked at one by one"
            raise bad_value("check_examples", must, False)
        modules = re.sub(r"0x[0-9a-f]+", "", repr(model))  # addresses are not content
        return {
            "weights": weights,
            "modules": hashlib.sha256(modules.encode()).hexdigest(),
            "data": examples,
            "layers": layers,
            "dtype": self.dtype,
            "chunk": parse_bytes(self.chunk),
        }

    def taps(self, key: dict[str, Any]) -> list[Tap] | None:
        """Taps of the store with this key; None if nothing is stored yet.

        Raises:
            ValueError: The store has another key, or is damaged.
        """
        manifest = self._files.read_manifest()
        if manifest is None:
            return None
        _check_key(manifest.key, key, self.path)
        return [Tap.of_plain(tap) for tap in manifest.taps]

    def fill(
        self, key: dict[str, Any], taps: Sequence[Tap], batches: Iterable[Any], run: Run
    ) -> StoredFeatures:
        """Complete the store and open it.

        Args:
            key: From `key`.
            taps: Places that are read.
            batches: The whole training set in order, on the CPU.
            run: `f(batch) -> (features, logits, labels, kept)`, called only for batches with examples that
                are not stored.

        Raises:
            ValueError: The store has another key, was built from other examples, or is damaged; or
                features overflow in float16.
        """
        with self._files.locked():
            manifest = self._files.read_manifest()
            if manifest is not None:
                _check_key(manifest.key, key, self.path)
                if self.verify:
                    self._files.verify(manifest)
            if manifest is None or not manifest.complete or self.check_examples:
                new = partial(self._new_manifest, key, taps)
                manifest = StoreWriter(self._files, manifest, new).through(batches, run)
        return self._stored(manifest)

    def open(self, key: dict[str, Any]) -> StoredFeatures:
        """Open a complete store, without reading the examples.

        Raises:
            ValueError: There is no store with this key, or it is incomplete or damaged.
        """
        manifest = self._files.read_manifest()
        if manifest is None or not manifest.complete:
            what = "nothing" if manifest is None else f"only the first {manifest.rows} examples"
            raise bad_value("feature_store", f"hold a whole store in {str(self.path)!r}", what, "Fit again.")
        _check_key(manifest.key, key, self.path)
        if self.verify:
            self._files.verify(manifest)
        return self._stored(manifest)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the store on disk."""
        return sum(file.stat().st_size for file in Path(self.path).glob("*") if file.is_file())

    @property
    def _files(self) -> StoreFiles:
        return StoreFiles(Path(self.path))

    def _new_manifest(
        self, key: dict[str, Any], taps: Sequence[Tap], logits: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Manifest:
        parts = {
            "features": Part(self.dtype, sum(tap.width for tap in taps)),
            "logits": Part("float32", logits.shape[1]),
            "labels": Part("int64", 1) if labels.ndim == 1 else Part("float64", labels.shape[1]),
        }
        if kept is not None:
            parts |= {"places": Part("int32", 1), "counts": Part("int32", 1, per_example=True)}
        n_positions = 1 if kept is None else kept.shape[1]
        row_bytes = sum(part.row_bytes * (1 if part.per_example else n_positions) for part in parts.values())
        rows = rows_that_fit(parse_bytes(self.chunk), row_bytes, None)
        return Manifest(key, [asdict(tap) for tap in taps], parts, rows)

    def _stored(self, manifest: Manifest) -> StoredFeatures:
        features, logits, labels = (self._files.mapped(manifest, n) for n in ("features", "logits", "labels"))
        if manifest.parts["labels"].dtype == "int64":
            labels = labels[:, 0]
        positions = None
        if "counts" in manifest.parts:
            counts, places = (self._files.mapped(manifest, n)[:, 0] for n in ("counts", "places"))
            positions = Positions(counts.long(), places.clone())
        return StoredFeatures(
            features, logits, labels, [Tap.of_plain(tap) for tap in manifest.taps], positions
        )


def _check_key(there: dict[str, Any], here: dict[str, Any], path: str | Path) -> None:
    different = [
        f"other {name} ({_short(there.get(name))} there, {_short(here.get(name))} here)"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if different:
        raise bad_value(
            "feature_store",
            "hold features of this model, these data and these settings",
            f"a folder, {str(path)!r}, with {'; '.join(different)}",
            "Give another folder, or delete this one.",
        )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


__all__ = ["FeatureStore", "StoredFeatures"]
