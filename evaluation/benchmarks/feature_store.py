"""Cost of a feature store: memory of a large training set, speed against the disk's own.

Five measurements. Files go to a temporary folder that is removed.

    large  `STRIDE.from_features` on files of any size: fit and top-k in a process of its own whose data
           segment is limited. RLIMIT_DATA is the limit that suits memory maps: Linux counts in it the
           heap and every private writable mapping, so all anonymous memory, but no map of a file that is
           only read. (RLIMIT_AS would count the map, RLIMIT_RSS does nothing.)
    build  filling a store against one forward pass plus one plain write of the same bytes.
    query  top-k from a mapped store against reading the file from start to end, in and out of the page cache.
    precision  features in bfloat16 and float16 against float32: bytes, time, and whether the ranks agree.
    example  memory that each further training example takes at C = 1,000, in memory and mapped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from ...errors import bad_choice
from ...features.store import FeatureStore
from ...stride import STRIDE
from ..measures.cost import median_seconds
from ..measures.statistics import spearman

#: The measurements.
PARTS = ("large", "build", "query", "precision", "example")
_BLOCK = 8192
_READ = 2**24


def bench_store(
    parts: Sequence[str] = PARTS,
    *,
    n_train: int = 2_000_000,
    n_features: int = 512,
    n_classes: int = 10,
    n_test: int = 200,
    k: int = 100,
    limit: int = 2 * 2**30,
) -> list[dict[str, Any]]:
    """The measurements as rows: which, the figure's name and its value.

    Args:
        parts: From `PARTS`.
        n_train: N of "large"; the others take a tenth of it, "example" a twentieth and a tenth.
        n_features: d.
        n_classes: C, but for "example".
        n_test: Test points of a query.
        k: Training examples returned for each.
        limit: RLIMIT_DATA of "large", in bytes.

    Raises:
        ValueError: Another part.
    """
    few = max(n_train // 10, 1)
    run = {
        "large": lambda: large(n_train, n_features, n_classes, n_test, k, limit),
        "build": lambda: build(few, n_features, "float32"),
        "query": lambda: query(few, n_features, n_test, k),
        "precision": lambda: precision(few, n_features, n_test, k),
        "example": lambda: example_bytes(max(n_train // 20, 1), n_features, 1000, n_test, k),
    }
    rows = []
    for part in parts:
        if part not in run:
            raise bad_choice("part", part, PARTS)
        for figure, value in run[part]().items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            rows += [{"part": part, "figure": f"{figure} {name}".strip(), "value": v} for name, v in inner]
    return rows


def large(n_train: int, n_features: int, n_classes: int, n_test: int, k: int, limit: int) -> dict[str, Any]:
    """Fit and query files of the given size under a limit of `limit` bytes; a dict of figures.

    Args:
        n_train: N.
        n_features: d.
        n_classes: C.
        n_test: Test points, asked at once.
        k: Training examples returned for each.
        limit: RLIMIT_DATA of the process that does it.
    """
    shape = {"n_train": n_train, "n_features": n_features, "n_classes": n_classes}
    with tempfile.TemporaryDirectory() as folder:
        _write_features(Path(folder), **shape)
        found = _in_own_process({**shape, "folder": folder, "n_test": n_test, "k": k, "limit": limit})
    return {**shape, "n_test": n_test, "k": k, "limit": limit, **found}


def example_bytes(n_train: int, n_features: int, n_classes: int, n_test: int, k: int) -> dict[str, Any]:
    """What each further training example takes of a process's anonymous memory, in a fit and in a query.

    The peak with 2 n examples less that with n, over n.

    Returns:
        By where features and logits are, and by `memory_budget`: `fit` and `query`, in bytes.
    """
    figures: dict[str, Any] = {"n_train": n_train, "n_features": n_features, "n_classes": n_classes}
    ways = {
        "in memory, residuals kept": (True, "64GiB"),
        "in memory": (True, "64MiB"),
        "mapped": (False, "64MiB"),
    }
    for name, (in_memory, budget) in ways.items():
        peaks = []
        for n in (n_train, 2 * n_train):
            with tempfile.TemporaryDirectory() as folder:
                shape = {"n_train": n, "n_features": n_features, "n_classes": n_classes}
                _write_features(Path(folder), **shape)
                asked = {"n_test": n_test, "k": k, "limit": -1, "in_memory": in_memory, "budget": budget}
                found = _in_own_process({**shape, **asked, "folder": folder})
            peaks.append([found[f"{phase}_peak_anonymous_bytes"] for phase in ("fit", "query")])
        fit, query = ((b - a) / n_train for a, b in zip(*peaks, strict=True))
        figures[name] = {"fit": fit, "query": query}
    return figures


def _in_own_process(options: dict[str, Any]) -> dict[str, Any]:
    """What `_limited` finds in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, json.dumps(options)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"the process ended with {ended.returncode}: {ended.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def build(n_train: int, width: int, dtype: str) -> dict[str, Any]:
    """Fill a store with one layer of `width` features; seconds, and the ratio to forward pass plus write."""
    model, dataset = _network(n_train, width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store = FeatureStore(Path(folder) / "store", dtype=dtype)
        method = STRIDE(model, dataset, layers=["1"], feature_store=store)

        def fill() -> None:
            for file in Path(store.path).glob("*"):
                file.unlink()
            method._training_features(model, False)

        filled = median_seconds(fill)
        reopened = median_seconds(lambda: method._training_features(model, False))
        forward = median_seconds(lambda: [model(x) for x in dataset.tensors[0].split(method.batch_size)])
        size = store.disk_bytes
        written = median_seconds(lambda: _plain_write(Path(folder) / "plain", size))
    return {
        "n_train": n_train,
        "width": width,
        "dtype": dtype,
        "bytes": size,
        "forward_seconds": forward,
        "write_seconds": written,
        "build_seconds": filled,
        "build_ratio": filled / (forward + written),
        "own_seconds": filled - forward,
        "own_ratio": (filled - forward) / written,
        "reopen_seconds": reopened,
        "reopen_ratio": reopened / filled,
    }


def query(n_train: int, n_features: int, n_test: int, k: int) -> dict[str, Any]:
    """Top-k of mapped features against a sequential read of their file; seconds and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_features(folder, n_train, n_features, 10)
        features, logits, labels = _mapped(folder, n_train, n_features, 10)
        method = STRIDE.from_features(features, logits, labels).fit()
        path, figures = folder / "features", {}
        for points in (1, n_test):
            test = _test_points(points, n_features, 10)
            for state, before in (("cached", lambda: None), ("uncached", lambda: _drop(path))):
                read = median_seconds(lambda: _read_all(path), before=before)
                asked = median_seconds(lambda: method.influence(test, k), before=before)  # noqa: B023
                figures[f"{points} points, {state}"] = {
                    "read_seconds": read,
                    "query_seconds": asked,
                    "ratio": asked / read,
                }
        size = path.stat().st_size
    return {"n_train": n_train, "n_features": n_features, "k": k, "bytes": size, **figures}


def precision(n_train: int, n_features: int, n_test: int, k: int) -> dict[str, Any]:
    """Fit and query of the same features in three precisions, all mapped from files.

    Returns:
        By dtype: `bytes`, `fit_seconds`, `query_seconds` (all scores of `n_test` points) and
        `one_point_seconds`, their ratios to float32, and of the scores `spearman` with those of float32
        (mean over test points) and `top_overlap`, the share of the k best that are the same.
    """
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_features(folder, n_train, n_features, 10)
        features, logits, labels = _mapped(folder, n_train, n_features, 10)
        test = _test_points(n_test, n_features, 10)
        exact, first = None, None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            stored = _stored_as(folder, features, dtype)
            found, scores = _timed_scores(STRIDE.from_features(stored, logits, labels), test)
            found["bytes"] = float(stored.nbytes)
            exact, first = scores if exact is None else exact, first or dict(found)
            figures[str(dtype).removeprefix("torch.")] = {
                **found,
                **{f"{key.removesuffix('_seconds')}_ratio": found[key] / first[key] for key in first},
                "spearman": float(spearman(scores.numpy(), exact.numpy()).mean()),
                "top_overlap": _overlap(scores, exact, k),
            }
            del stored
    return {"n_train": n_train, "n_features": n_features, "n_test": n_test, "k": k, **figures}


def _timed_scores(method: STRIDE, test: tuple[torch.Tensor, ...]) -> tuple[dict[str, float], torch.Tensor]:
    one = tuple(part[:1] for part in test)
    found = {
        "fit_seconds": median_seconds(method.fit),
        "query_seconds": median_seconds(lambda: method.influence(test)),
        "one_point_seconds": median_seconds(lambda: method.influence(one)),
    }
    scores: Any = method.influence(test)
    return found, scores


def _overlap(scores: torch.Tensor, exact: torch.Tensor, k: int) -> float:
    """The share of the k best of each row that are the same."""
    both = zip(scores.topk(k).indices.tolist(), exact.topk(k).indices.tolist(), strict=True)
    return float(np.mean([len({*a} & {*b}) / k for a, b in both]))


class PeakAnonymous:
    """The highest RssAnon of this process inside a `with` block, in `bytes`, read every five milliseconds."""

    def __enter__(self) -> PeakAnonymous:
        self.bytes = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, rss_anon())

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, rss_anon())


def rss_anon() -> int:
    """RssAnon of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def _limited(options: dict[str, Any]) -> dict[str, Any]:
    """What a process does that is looked at: the limit first (-1 is none), then fit and query."""
    import resource  # which Windows does not have

    if options["limit"] > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (options["limit"], options["limit"]))
    shape = (options["n_train"], options["n_features"], options["n_classes"])
    started_with = rss_anon()
    with PeakAnonymous() as fitting:
        arrays = _mapped(Path(options["folder"]), *shape)
        if options.get("in_memory"):
            arrays = [np.array(array) for array in arrays]
        method = STRIDE.from_features(*arrays, memory_budget=options.get("budget", "256MiB")).fit()
    with PeakAnonymous() as asking:
        best: Any = method.influence(_test_points(options["n_test"], *shape[1:]), options["k"])
    return {
        "anonymous_bytes_at_start": started_with,
        "fit_peak_anonymous_bytes": fitting.bytes,
        "query_peak_anonymous_bytes": asking.bytes,
        "fit_seconds": method.fit_seconds_,
        "query_seconds": method.query_seconds_,
        "result_shape": list(best.indices.shape),
    }


def _write_features(folder: Path, n_train: int, n_features: int, n_classes: int) -> None:
    generator = np.random.default_rng(0)
    with open(folder / "features", "wb") as features, open(folder / "logits", "wb") as logits:
        for start in range(0, n_train, _BLOCK):
            rows = min(_BLOCK, n_train - start)
            features.write(generator.standard_normal((rows, n_features), dtype=np.float32).data)
            logits.write((3 * generator.standard_normal((rows, n_classes), dtype=np.float32)).data)
    generator.integers(n_classes, size=n_train).tofile(folder / "labels")


def _mapped(folder: Path, n_train: int, n_features: int, n_classes: int) -> list[NDArray[Any]]:
    return [
        np.memmap(folder / "features", np.float32, "r", shape=(n_train, n_features)),
        np.memmap(folder / "logits", np.float32, "r", shape=(n_train, n_classes)),
        np.memmap(folder / "labels", np.int64, "r", shape=(n_train,)),
    ]


def _stored_as(folder: Path, features: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The features in another precision, mapped from a file of their own."""
    path = folder / str(dtype)
    stored = torch.from_file(str(path), shared=True, size=features.size, dtype=dtype).view(features.shape)
    for start in range(0, len(features), _BLOCK):
        stored[start : start + _BLOCK] = torch.from_numpy(features[start : start + _BLOCK].copy())
    return stored


def _test_points(n: int, n_features: int, n_classes: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, width, generator=generator) for width in (n_features, n_classes))
    return x, z, z.argmax(1)


def _network(n_train: int, width: int) -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_train, 784, generator=generator)
    y = torch.randint(10, (n_train,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).eval()
    return model, TensorDataset(x, y)


def _plain_write(path: Path, size: int) -> None:
    block = bytes(_READ)
    with open(path, "wb") as file:
        for start in range(0, size, _READ):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def _read_all(path: Path) -> None:
    block = bytearray(_READ)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(_limited(json.loads(sys.argv[1]))))
