"""Controls for every table: random scores, with or without the labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..data.batch import ExampleBatch
from ..data.digests import digest_item
from ..errors import bad_value
from ..influence.method import InfluenceMethod, Query
from ..losses import CrossEntropy, Loss
from ..responses import class_labels
from ..system.fingerprints import bits
from ..system.saved_values import saved_as
from .gradients.working_copies import widened

#: Design that one generator serves.
_CHUNK = 1024


@saved_as("random")
@dataclass
class RandomState:
    """State of a control.

    Attributes:
        labels: Training labels as they came; `(n_train,)` int64 of classes.
        seed: Of the scores.
    """

    labels: Tensor
    seed: int


@dataclass
class RandomTest:
    """Test points of a control.

    Attributes:
        keys: One per test point, from the bits of its inputs.
        classes: What the response is about: its class, `(n_test,)` int64, with cross-entropy.
        sign: -1 for the response "loss", which what helps the class lowers, otherwise 1; in the dtype and
            on the device of the logits.
    """

    keys: list[int]
    classes: Tensor
    sign: Tensor


class Random(InfluenceMethod):
    """Standard normal scores that depend on the seed, the test point's inputs and the column alone.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        seed: Seed of the scores.
        **options: Those of `InfluenceMethod`.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> first, second = (Random(model, train, seed=1).influence(test.tensors) for _ in range(2))
    >>> first.equal(second)
    True
    """

    fits_in_one_pass = True

    def _check_model(self, model: nn.Module) -> None:
        """Skip the check: `fit` reads only labels."""

    def __init__(self, model: nn.Module, train_dataset: Any, *, seed: int = 0, **options: Any) -> None:
        super().__init__(model, train_dataset, **options)
        if not isinstance(seed, int) or seed < 0:
            raise bad_value("seed", "be an integer of at least 0", repr(seed))
        self.seed = seed

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> RandomState:
        labels = []
        for batch in self.train_batches(show_progress):
            labels.append(self._labels(batch))
        every = torch.cat(labels)
        self.n_train_ = len(every)
        return RandomState(every, self.seed)

    def _labels(self, batch: ExampleBatch) -> Tensor:
        """Labels of training examples: classes or distributions over them, if the loss has classes."""
        labels = batch.labels
        if labels is None:
            must = "give one label per example, last in (inputs..., label) or under 'labels'"
            raise bad_value("train_dataset", must, "none")
        if self.loss.has_classes and labels.ndim == 2 and labels.shape[1] > 1:
            labels = CrossEntropy().labels(labels, labels.shape[1], "train_dataset")
        elif self.loss.has_classes:
            labels = class_labels(labels, 2**62, "train_dataset")
        return labels.to(self._work_device())

    @override
    def prepare_query(self, state: RandomState, model: nn.Module, batch: Any, query: Query) -> RandomTest:
        logits = self.batch_logits(model, batch)
        sign = widened(logits).new_tensor(-1.0 if query.response == "loss" else 1.0)
        return RandomTest(input_keys(batch), query.asked(logits, batch), sign)

    @override
    def score_columns(self, state: RandomState, prepared: RandomTest, columns: slice) -> Tensor:
        rows = [_noise(state.seed, key, columns) for key in prepared.keys]
        return prepared.sign * torch.stack(rows).to(prepared.sign)

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "seed": self.seed}


class ClassRandom(Random):
    """Random scores, but every training example of the target's class stands above all others.

    Scores are `|e|` within the class and `-|e|` outside, with e standard normal (and the other way round
    for the response "loss").

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> x, y = test.tensors
    >>> (ClassRandom(model, train).influence((x, y)) > 0).equal(y[:, None] == train.tensors[1])
    True
    """

    @override
    def check_loss(self, loss: Loss) -> None:
        self.need_classes(loss, "whose scores compare classes")

    def _labels(self, batch: ExampleBatch) -> Tensor:
        """Classes of training examples."""
        return class_labels(super()._labels(batch), 2**62, "train_dataset")

    @override
    def score_columns(self, state: RandomState, prepared: RandomTest, columns: slice) -> Tensor:
        size = super().score_columns(state, prepared, columns).abs() * prepared.sign
        classes = prepared.classes if prepared.classes.ndim == 1 else prepared.classes.argmax(1)
        same = classes[:, None] == state.labels[columns]
        return torch.where(same, size, -size)


def input_keys(batch: ExampleBatch) -> list[int]:
    """Number per example that depends only on its inputs, not on batches or order."""
    batch = batch.to(torch.device("cpu"))  # at once, not row by row
    digests = [hashlib.sha256() for _ in range(len(batch))]
    for _, part in sorted(batch.example_parts(), key=lambda found: str(found[0])):
        for digest, row in zip(digests, part, strict=True):
            if isinstance(row, Tensor):  # bits alone: how the inputs are cut into parts changes nothing
                digest.update(bits(row).numpy().data)
            else:
                digest_item(row, digest)
    return [int.from_bytes(digest.digest()[:8], "little") for digest in digests]


def _noise(seed: int, key: int, columns: slice) -> Tensor:
    """Standard normal scores of one test point for some columns, chunk by chunk."""
    first, last = columns.start // _CHUNK, (columns.stop - 1) // _CHUNK
    chunks = [
        np.random.default_rng([seed, key, chunk]).standard_normal(_CHUNK, dtype=np.float32)
        for chunk in range(first, last + 1)
    ]
    start = columns.start - first * _CHUNK
    return torch.from_numpy(np.concatenate(chunks)[start : start + columns.stop - columns.start])
