"""Cost of a feature store: memory for a large training set, and speed against plain reads and writes.

There are five parts. Files are in a temporary folder, which is removed.

    large  fit and top-k of `STRIDE.from_features` on files, in a process whose data segment is limited. The
           limit is RLIMIT_DATA, in which Linux counts all anonymous memory (the heap and private writable
           mappings), but no read-only map of a file. (RLIMIT_AS would count the map, RLIMIT_RSS has no
           effect.)
    build  filling a store, against one forward pass plus one plain write of the same size.
    query  top-k from a mapped store, against reading the file, with and without the page cache.
    precision  features in bfloat16 and float16, against float32: bytes, time, and agreement of the scores.
    example  memory for each additional training example with 1,000 classes, in memory and mapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ...errors import bad_choice
from ...features.store import FeatureStore
from ...stride import STRIDE
from ..measures.cost import median_seconds
from ..measures.statistics import spearman
from .feature_files import (
    drop_from_cache,
    mapped,
    plain_write,
    random_points,
    read_all,
    stored_as,
    write_features,
)
from .limited_process import in_own_process

#: Names of the parts.
PARTS = ("large", "build", "query", "precision", "example")


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
    """Rows with the part, the name of a figure, and its value.

    Args:
        parts: From `PARTS`.
        n_train: N of "large"; the others use a tenth of it, "example" a twentieth and a tenth.
        n_features: d.
        n_classes: C, except for "example".
        n_test: Test points of a query.
        k: Training examples returned for each test point.
        limit: RLIMIT_DATA of "large", in bytes.

    Raises:
        ValueError: There is no such part.
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
    """Fit and query files of a given size in a process with limited memory.

    Args:
        n_train: N.
        n_features: d.
        n_classes: C.
        n_test: Test points of one query.
        k: Training examples returned for each test point.
        limit: RLIMIT_DATA of the process, in bytes.

    Returns:
        The sizes, and the figures of `limited_process.fit_and_query`.
    """
    shape = {"n_train": n_train, "n_features": n_features, "n_classes": n_classes}
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder), **shape)
        found = in_own_process({**shape, "folder": folder, "n_test": n_test, "k": k, "limit": limit})
    return {**shape, "n_test": n_test, "k": k, "limit": limit, **found}


def example_bytes(n_train: int, n_features: int, n_classes: int, n_test: int, k: int) -> dict[str, Any]:
    """Anonymous memory that each additional training example needs, in fit and in query.

    It is the peak with 2 n examples minus that with n, divided by n.

    Returns:
        By place of the features and `memory_budget`: `fit` and `query`, in bytes.
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
                write_features(Path(folder), **shape)
                asked = {"n_test": n_test, "k": k, "limit": -1, "in_memory": in_memory, "budget": budget}
                found = in_own_process({**shape, **asked, "folder": folder})
            peaks.append([found[f"{phase}_peak_anonymous_bytes"] for phase in ("fit", "query")])
        fit, query = ((b - a) / n_train for a, b in zip(*peaks, strict=True))
        figures[name] = {"fit": fit, "query": query}
    return figures


def build(n_train: int, width: int, dtype: str) -> dict[str, Any]:
    """Fill a store with one layer of `width` features.

    Returns:
        Seconds, and ratios to a forward pass and a plain write.
    """
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
        written = median_seconds(lambda: plain_write(Path(folder) / "plain", size))
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
    """Top-k from mapped features, against a sequential read of their file.

    Returns:
        Seconds and their ratio, for one and for `n_test` test points, with and without the page cache.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder, n_train, n_features, 10)
        features, logits, labels = mapped(folder, n_train, n_features, 10)
        method = STRIDE.from_features(features, logits, labels).fit()
        path, figures = folder / "features", {}
        for points in (1, n_test):
            test = random_points(points, n_features, 10)
            for state, before in (("cached", lambda: None), ("uncached", lambda: drop_from_cache(path))):
                read = median_seconds(lambda: read_all(path), before=before)
                asked = median_seconds(lambda: method.influence(test, k), before=before)  # noqa: B023
                figures[f"{points} points, {state}"] = {
                    "read_seconds": read,
                    "query_seconds": asked,
                    "ratio": asked / read,
                }
        size = path.stat().st_size
    return {"n_train": n_train, "n_features": n_features, "k": k, "bytes": size, **figures}


def precision(n_train: int, n_features: int, n_test: int, k: int) -> dict[str, Any]:
    """Fit and query on the same features in three precisions, all mapped from files.

    Returns:
        By dtype: `bytes`, `fit_seconds`, `query_seconds` (all scores of `n_test` points) and
        `one_point_seconds`, their ratios to float32, and of the scores `spearman` with those of float32
        (mean over test points) and `top_overlap`, the share of the k best that are the same.
    """
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder, n_train, n_features, 10)
        features, logits, labels = mapped(folder, n_train, n_features, 10)
        test = random_points(n_test, n_features, 10)
        exact, first = None, None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            stored = stored_as(folder, features, dtype)
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


def _network(n_train: int, width: int) -> tuple[nn.Module, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_train, 784, generator=generator)
    y = torch.randint(10, (n_train,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).eval()
    return model, TensorDataset(x, y)
