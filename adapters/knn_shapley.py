"""KNN-Shapley: the exact Shapley value of every training example for a nearest-neighbor classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_value
from ..influence.method import Query
from ..losses import Loss
from ..system.devices import as_float64
from ._weights import refuse_weights
from .similarity import Similarity, SimilarityQuery, SimilarityState, check_classes


@dataclass
class KNNShapleyTest(SimilarityQuery):
    """A batch of test points with the values that the training examples have for each.

    Attributes:
        values: `(n_test, n_train)`; NaN in the row of a test point whose features are.
    """

    values: Tensor


class KNNShapley(Similarity):
    """Shapley values of the training examples in the k-nearest-neighbor classifier on the features.

    The utility of a set S of training examples for a test point with the class c of the response is

        v(S) = 1/k sum of [y_j = c] over the min(k, |S|) nearest j in S

    and the score of i is its Shapley value, the mean of `v(S + i) - v(S)` over the sizes of S and over the
    sets of each size: the scores of a row add up to v of the whole training set. Distances are Euclidean
    between unit features, the order of `Similarity`; equal ones go by lower index. Neighbors that follow one
    another and are all of class c, or all not, have exactly one value: lists of the best examples hold many
    ties, in the order of the training set. Features are those of the penultimate layer unless `layers` says
    otherwise, as in Jia et al., "Efficient task-specific data valuation for nearest neighbor algorithms"
    (VLDB 2019), Theorem 1.

    It does not depend on the response, but its sign does: what helps the class lowers the "loss". Weights of
    examples or of classes, which the Shapley value does not know, are refused. The
    values of a batch of test points are held at once, `(n_batch, n_train)`.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        k: Neighbors that vote; may exceed n_train.
        **options: Those of `InfluenceMethod`.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> values = KNNShapley(model, train, k=3).influence(test.tensors)
    >>> bool((values.sum(1) <= 1.0001).all())  # the share of the three votes that are for the class
    True
    """

    def __init__(self, model: nn.Module, train_dataset: Any, *, k: int = 5, **options: Any) -> None:
        super().__init__(model, train_dataset, **options)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise bad_value("k", "be an integer of at least 1", repr(k))
        self.k = k
        why = "each neighbor has one vote"
        refuse_weights("KNNShapley", self.batch, self.loss, why, "Take another method, or leave them out.")

    @override
    def check_loss(self, loss: Loss) -> None:
        self.need_classes(loss, "whose neighbors vote for a class")

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> SimilarityState:
        return check_classes(self, super().fit_checkpoint(model, show_progress))

    def holds_all_columns(self) -> bool:
        """Yes: a value depends on the order of all examples."""
        return True

    @override
    def prepare_query(
        self, state: SimilarityState, model: nn.Module, batch: Any, query: Query
    ) -> KNNShapleyTest:
        test = super().prepare_query(state, model, batch, query)
        similarity = test.features @ state.features.T
        order = similarity.argsort(dim=1, descending=True, stable=True)
        classes = test.classes if test.classes.ndim == 1 else test.classes.argmax(1)
        matches = state.labels[order] == classes[:, None]
        values = test.sign * knn_shapley(matches, self.k).to(similarity)
        values = torch.empty_like(values).scatter_(1, order, values)
        values = values.masked_fill(similarity.isnan().any(1, keepdim=True), float("nan"))
        return KNNShapleyTest(test.features, test.classes, test.sign, values)

    @override
    def score_columns(self, state: SimilarityState, prepared: SimilarityQuery, columns: slice) -> Tensor:
        assert isinstance(prepared, KNNShapleyTest)
        return prepared.values[:, columns]

    @override
    def query_vectors(self, state: SimilarityState, prepared: SimilarityQuery) -> Tensor | None:
        return None  # a value depends on the order of all examples

    @override
    def train_vectors(self, state: SimilarityState, rows: Tensor) -> Tensor | None:
        return None

    @override
    def train_norms(self, state: SimilarityState) -> Tensor:
        raise self.no_norms()

    @override
    def test_norms(self, state: SimilarityState, prepared: Any) -> Tensor:
        raise self.no_norms()

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k}


def knn_shapley(matches: Tensor, k: int) -> Tensor:
    """Theorem 1 of Jia et al. (2019), for training examples in the order of their distance.

    With m_j = 1 where the j-th nearest of N has the class of the test point (else 0), from the far end:

        s_N = m_N min(k, N) / (k N)
        s_j = s_{j+1} + (m_j - m_{j+1}) min(k, j) / (k j)

    The theorem has k <= N, where s_N = m_N / N.

    Args:
        matches: m, `(..., N)` bool.
        k: Neighbors that vote.

    Returns:
        s, `(..., N)` float64.

    >>> knn_shapley(torch.tensor([True, False]), 1).tolist()
    [1.0, 0.0]
    """
    m = as_float64(matches)
    rank = torch.arange(1, m.shape[-1] + 1, dtype=m.dtype, device=m.device)
    steps = m.clone()
    steps[..., :-1] -= m[..., 1:]
    steps *= rank.clamp_max(k) / (k * rank)
    return steps.flip(-1).cumsum(-1).flip(-1)
