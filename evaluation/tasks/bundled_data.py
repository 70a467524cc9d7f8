"""Data sets made from what ships with scikit-learn and Python: no download."""

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

#: Tags of the characters of source code, by index; spaces and other characters have none (`IGNORED`).
TAGS = ("name", "keyword", "number", "string", "comment", "operator")
IGNORED = -100
#: Modules of Python's standard library whose lines are tagged.
_TRAIN_MODULES = ("json.decoder", "heapq", "textwrap", "configparser", "string", "fractions")
_TEST_MODULES = ("bisect", "shlex")
#: Length of a line. Characters are 1 to 95 (printable ASCII), or 0: any other character, and padding.
LINE = 48
#: Side of a canvas in pixels.
CANVAS = 12
#: Pixels of a digit above this are its strokes.
_STROKE = 0.3


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 8 x 8 digits in a fixed random order: 1,397 for training, 400 for test.

    Inputs are `(n, 1, 8, 8)` in [0, 1], labels `(n,)` int64.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = torch.tensor(bunch.images[order] / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(bunch.target[order], dtype=torch.int64)
    return TensorDataset(x[:1397], y[:1397]), TensorDataset(x[1397:], y[1397:])


def diabetes() -> tuple[TensorDataset, TensorDataset]:
    """442 patients: ten measurements `(n, 10)`, and the progression of the disease in a year `(n, 1)`.

    Both are standardized with the mean and standard deviation of the 342 training examples.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = torch.tensor(bunch.data[order]).float(), torch.tensor(bunch.target[order]).float()[:, None]
    x, y = (x - x[:342].mean(0)) / x[:342].std(0), (y - y[:342].mean(0)) / y[:342].std(0)
    return TensorDataset(x[:342], y[:342]), TensorDataset(x[342:], y[342:])


def digit_pairs(n_train: int = 1000, n_test: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """Two digits side by side, `(n, 1, 8, 16)`; labels `(n, 10)`: is each of the ten digits there?

    Training and test pairs share no image.
    """
    found = []
    for seed, (n, source) in enumerate(zip((n_train, n_test), digits(), strict=True)):
        images, labels = source.tensors
        pairs = torch.from_numpy(np.random.default_rng(seed).choice(len(labels), (n, 2)))
        x = torch.cat([images[pairs[:, 0]], images[pairs[:, 1]]], 3)
        found.append(TensorDataset(x, torch.zeros(n, 10).scatter_(1, labels[pairs], 1.0)))
    return found[0], found[1]


def digit_canvases(n_train: int = 1000, n_test: int = 300) -> tuple[TensorDataset, TensorDataset]:
    """A digit at a random place of a canvas `(n, 1, 12, 12)`, with a label for each pixel `(n, 12, 12)`.

    The label of a stroke is the digit; all other pixels have none (`IGNORED`). Training and test canvases
    share no image.
    """
    found = []
    for seed, (n, source) in enumerate(zip((n_train, n_test), digits(), strict=True)):
        images, labels = source.tensors
        random = np.random.default_rng(seed)
        x = torch.zeros(n, 1, CANVAS, CANVAS)
        y = torch.full((n, CANVAS, CANVAS), IGNORED)
        for i, digit in enumerate(random.permutation(len(labels))[:n]):
            top, left = random.integers(CANVAS - 8 + 1, size=2)
            place = slice(top, top + 8), slice(left, left + 8)
            x[i, 0][place] = images[digit, 0]
            y[i][place][images[digit, 0] > _STROKE] = labels[digit]
        found.append(TensorDataset(x, y))
    return found[0], found[1]


def source_lines(n_train: int = 800, n_test: int = 200) -> tuple[TensorDataset, TensorDataset]:
    """Lines of Python's standard library, `(n, 48)` characters, with a tag for each: `TAGS` or `IGNORED`.

    Training and test lines come from different modules.
    """
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
                tags.append(found)
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
