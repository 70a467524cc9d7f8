"""Feature similarity: the cosine between activations, with the sign of class agreement on request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_value
from ..influence.method import InfluenceMethod, Query
from ..layers.activations import Tap, check_finite, default_taps, named_taps, recording
from ..losses import Loss
from ..system.saved_values import saved_as


@saved_as("similarity")
@dataclass
class SimilarityState:
    """Unit features of the training set.

    Attributes:
        taps: Where they are read.
        features: `(n_train, n_features)`, each row of norm 1.
        labels: As the loss has them: `(n_train,)` int64 with cross-entropy.
    """

    taps: list[Tap]
    features: Tensor
    labels: Tensor


@dataclass
class SimilarityQuery:
    """A batch of test points.

    Attributes:
        features: `(n_test, n_features)`, each row of norm 1.
        classes: What the response is about: its class, `(n_test,)` int64, with cross-entropy.
        sign: -1 for the response "loss", which similar examples lower.
    """

    features: Tensor
    classes: Tensor
    sign: int


class Similarity(InfluenceMethod):
    """Cosine similarity of features; of the penultimate layer unless `layers` says otherwise.

    It does not depend on the response, but its sign does: similar examples lower the "loss". Nor does it
    depend on weights of examples or of classes.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> alike = Similarity(model, train, layers=["relu1", "relu2"]).influence(test.tensors)
    >>> bool((alike.abs() < 1.0001).all())
    True
    """

    fits_in_one_pass = True

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> SimilarityState:
        first = self._first_train_batch()
        taps = (
            default_taps(model, first, 2**31, penultimate=True)
            if self.layers is None
            else named_taps(model, self.layers, first)
        )
        features, labels = [], []
        with recording(model, taps) as run:
            for batch in self.train_batches(show_progress):
                outputs, rows = run(batch)
                features.append(_unit(torch.cat(rows, dim=1)))
                n_classes = self._as_logits(outputs, batch).shape[1]
                labels.append(self.train_labels(batch, n_classes))
        self.n_train_ = sum(map(len, labels))
        every = torch.cat(features)
        check_finite(every)
        return SimilarityState(taps, every, torch.cat(labels))

    @override
    def prepare_query(
        self, state: SimilarityState, model: nn.Module, batch: Any, query: Query
    ) -> SimilarityQuery:
        with recording(model, state.taps) as run:
            outputs, rows = run(batch)
        classes = query.asked(batch.logits_of(outputs), batch)
        return SimilarityQuery(_unit(torch.cat(rows, dim=1)), classes, -1 if query.response == "loss" else 1)

    @override
    def score_columns(self, state: SimilarityState, prepared: SimilarityQuery, columns: slice) -> Tensor:
        scores: Tensor = (prepared.features * prepared.sign) @ state.features[columns].T
        return scores

    @override
    def query_vectors(self, state: SimilarityState, prepared: SimilarityQuery) -> Tensor | None:
        return prepared.features * prepared.sign

    @override
    def train_vectors(self, state: SimilarityState, rows: Tensor) -> Tensor | None:
        return state.features[rows.to(state.features.device)]

    @override
    def train_norms(self, state: SimilarityState) -> Tensor:
        return _norms(state.features)

    @override
    def test_norms(self, state: SimilarityState, prepared: SimilarityQuery) -> Tensor:
        return _norms(prepared.features)


def check_classes(method: InfluenceMethod, state: SimilarityState) -> SimilarityState:
    """Refuse labels that are not class indices for a method that compares classes.

    Raises:
        ValueError: Distributions over classes.
    """
    if state.labels.ndim != 1:
        must = f"hold class indices for {type(method).__name__}, which compares classes"
        raise bad_value("train_dataset", must, "distributions over classes", "Write labels.argmax(1).")
    return state


class ClassSimilarity(Similarity):
    """Cosine similarity of features, kept for training examples of the target's class and 0 for others.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> x, y = test.tensors
    >>> other_class = y[:, None] != train.tensors[1]
    >>> float(ClassSimilarity(model, train).influence((x, y))[other_class].abs().max())
    0.0
    """

    @override
    def check_loss(self, loss: Loss) -> None:
        self.need_classes(loss, "which compares classes")

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> SimilarityState:
        return check_classes(self, super().fit_checkpoint(model, show_progress))

    @override
    def prepare_query(
        self, state: SimilarityState, model: nn.Module, batch: Any, query: Query
    ) -> SimilarityQuery:
        test = super().prepare_query(state, model, batch, query)
        return test if test.classes.ndim == 1 else replace(test, classes=test.classes.argmax(1))

    @override
    def score_columns(self, state: SimilarityState, prepared: SimilarityQuery, columns: slice) -> Tensor:
        same = prepared.classes[:, None] == state.labels[columns]
        scores: Tensor = super().score_columns(state, prepared, columns) * same
        return scores

    @override
    def query_vectors(self, state: SimilarityState, prepared: SimilarityQuery) -> Tensor | None:
        return None  # scores are 0 for other classes

    @override
    def train_vectors(self, state: SimilarityState, rows: Tensor) -> Tensor | None:
        return None


def _norms(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1)
    return norms


def _unit(features: Tensor) -> Tensor:
    norms = _norms(features)[:, None]
    # Not where(norms > 0): NaN must stay NaN.
    return torch.where(norms == 0, torch.zeros_like(features), features / norms)
