"""Data for tasks beyond one label an example, from what ships with scikit-learn and Python."""

from __future__ import annotations

import importlib
import inspect
import io
import keyword
import tokenize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

#: Kinds of characters of source text; other characters, as spaces, have none.
TAGS = ("name", "keyword", "number", "string", "comment", "operator")
IGNORED = -100
#: Modules of Python whose lines are tagged, the last two for test examples.
_TRAIN_MODULES = ("json.decoder", "heapq", "textwrap", "configparser", "string", "fractions")
_TEST_MODULES = ("bisect", "shlex")
#: Characters of a line: the printable ones of ASCII, and 0 for all others and what is behind the line.
LINE, N_CHARACTERS = 48, 96
#: Side of a canvas with a digit, and how dark the strokes of one are.
CANVAS = 12
_STROKE = 0.3


def diabetes() -> tuple[TensorDataset, TensorDataset]:
    """442 patients, 10 measurements, and how their illness was a year later; all with unit deviation."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = torch.tensor(bunch.data[order]).float(), torch.tensor(bunch.target[order]).float()[:, None]
    x, y = (x - x[:342].mean(0)) / x[:342].std(0), (y - y[:342].mean(0)) / y[:342].std(0)
    return TensorDataset(x[:342], y[:342]), TensorDataset(x[342:], y[342:])


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32)
    return images, torch.tensor(bunch.target)


def digit_pairs(n_train: int = 1000, n_test: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """Two digits side by side, `(n, 1, 8, 16)`; a label for each of the ten digits: is it there?

    Test examples are made of images that no training example has.
    """
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(labels))
    found = []
    for seed, (n, pool) in enumerate(((n_train, order[:1397]), (n_test, order[1397:]))):
        pairs = np.random.default_rng(seed).choice(pool, (n, 2))
        x = torch.cat([images[pairs[:, 0]], images[pairs[:, 1]]], 2)[:, None]
        y = torch.zeros(n, 10).scatter_(1, labels[torch.from_numpy(pairs)], 1.0)
        found.append(TensorDataset(x, y))
    return found[0], found[1]


def digit_canvases(n_train: int = 1000, n_test: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """A digit somewhere on a canvas, `(n, 1, 12, 12)`; the label of a pixel of its strokes is the digit.

    Other pixels have no label (`IGNORED`). Test examples are made of images that no training example has.
    """
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(labels))
    found = []
    for seed, (n, pool) in enumerate(((n_train, order[:1397]), (n_test, order[1397:]))):
        random = np.random.default_rng(seed)
        x = torch.zeros(n, 1, CANVAS, CANVAS)
        y = torch.full((n, CANVAS, CANVAS), IGNORED)
        for i, digit in enumerate(random.permutation(pool)[:n]):
            top, left = random.integers(CANVAS - 8 + 1, size=2)
            place = slice(top, top + 8), slice(left, left + 8)
            x[i, 0][place] = images[digit]
            y[i][place][images[digit] > _STROKE] = labels[digit]
        found.append(TensorDataset(x, y))
    return found[0], found[1]


def source_lines(n_train: int = 800, n_test: int = 200) -> tuple[TensorDataset, TensorDataset]:
    """Lines of Python's own modules, `(n, 48)` characters; each has a tag of `TAGS`, or `IGNORED`."""
    parts = (_TRAIN_MODULES, n_train), (_TEST_MODULES, n_test)
    return tuple(_tagged(modules, n, seed) for seed, (modules, n) in enumerate(parts))  # type: ignore[return-value]


def _tagged(modules: tuple[str, ...], n: int, seed: int) -> TensorDataset:
    lines: list[str] = []
    tags: list[Tensor] = []
    for module in modules:
        text = inspect.getsource(importlib.import_module(module))
        of_lines = _tags_of(text)
        for line, found in zip(text.splitlines(), of_lines, strict=True):
            if line.strip() and len(line) <= LINE:
                lines.append(line)
                tags.append(found[:LINE])
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(lines))[:n])
    x = torch.zeros(len(lines), LINE, dtype=torch.int64)
    for i, line in enumerate(lines):
        codes = torch.tensor([ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in line])
        x[i, : len(line)] = codes
    return TensorDataset(x[rows], torch.stack(tags)[rows])


def _tags_of(text: str) -> list[Tensor]:
    """Tags of the characters of each line, `(LINE,)`."""
    found = [torch.full((LINE,), IGNORED) for _ in text.splitlines()]
    kinds = {tokenize.NUMBER: 2, tokenize.STRING: 3, tokenize.COMMENT: 4, tokenize.OP: 5}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = int(keyword.iskeyword(token.string)) if token.type == tokenize.NAME else kinds.get(token.type)
        if kind is None:
            continue
        (first, start), (last, stop) = token.start, token.end
        for row in range(first, last + 1):
            left = start if row == first else 0
            right = stop if row == last else len(text.splitlines()[row - 1])
            found[row - 1][left : min(right, LINE)] = kind
    return found
