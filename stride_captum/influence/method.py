"""Base class of all attribution methods: Captum's contract around a method's own three functions.

A method is a subclass of `InfluenceMethod` that implements

    fit_checkpoint(model, show_progress) -> state               what it learns from the training set
    prepare_query(state, model, batch, query) -> prepared       what it needs of one batch of test points
    score_columns(state, prepared, columns) -> scores           against a slice of the training set

(or, with `reads_training_data`, `score_batch`, which is given the training examples themselves)

and gets from here: batches and devices, checkpoints, streamed top-k, normalization, subsets, progress,
saving, cost accounting, and the promise that the caller's model and random state are left as they were.

Sign: a positive score means that the training example raises the response of the test point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from captum.influence._core.tracincp import KMostInfluentialResults
from torch import Tensor, nn

from ..data import inputs as data
from ..data.places import groups_of_places
from ..data.reading import Batch
from ..errors import bad_choice, whole_number
from ..losses import Loss
from ..subsets import membership_from_indices
from ..system.locks import exclusive
from .checkpoints.checkpoint import LoadCheckpoint, load_checkpoint
from .estimate import Estimate, from_small_runs
from .per_position import check_plain, check_whole, position_scores
from .query import DEFAULT, Default, Query, check_query, checked_target
from .rows import checked_ids
from .saving import SavedMethod
from .top_k import Collector, ColumnSums, DenseScores, GroupSums, StreamedTopK
from .vectors import test_vectors, train_vectors

#: The class of the response: None for that of the constructor.
Target = str | int | Sequence[int] | Tensor | None


class InfluenceMethod(SavedMethod):
    """Base class of all attribution methods; a subclass of Captum's `DataInfluence`.

    Args:
        model: A trained classifier. It is evaluated in eval mode and left as it was.
        train_dataset: Dataset or (not shuffling) DataLoader of the examples that it was trained on. An
            item is `(inputs..., label)` or a dict with the key "labels".
        layers: Names of submodules; None selects them. Methods that read features (STRIDE, Similarity,
            KNNShapley) take the outputs of these submodules ("name:input" for what one reads); gradient
            methods take their parameters.
        batch_size: Examples a forward pass, if a data set is given instead of a loader.
        device: Where the work is done; None takes the device of the model. For another device the
            model is copied.
        checkpoints: State dicts or paths, or a folder of them: scores are averaged over these instead of
            the weights in `model`. They may be checkpoints of one training, models of parts of the training
            set (`retrain`), or both. With P partitions, the parts together have sqrt(P) times the weight of
            the checkpoints (TracIn sums all of them).
        checkpoints_load_func: `f(model, checkpoint)` loads one and returns a learning rate.
        held_out: Labeled data that the model has not seen, for methods that can use it.
        response: Default response; None takes the first of the loss ("margin", or "output" of a regression).
        target: Default class of the response.
        normalize: Default normalization, None, "cosine" or "deviation".
        memory_budget: Memory of one block of work: bytes, "512MiB", or "auto". Methods that hold a gradient
            of all parameters for each example are faster with more.
        loss: What the model was trained with: "cross_entropy" (one output is binary),
            "binary_cross_entropy" (several labels an example), "mse" (regression), one of
            `stride_captum.losses` with its options, or one of yours (`losses.Loss`).
        batch: How a batch is read, if it is not `(inputs..., labels)` or a dict with "labels".
        ids: A name for each training example (a path, a row id, a text), for `result_rows` and reports; None
            takes the attribute `ids` of the data set, if it has one.

    The training set is read in passes (`stride_captum.data.passes`): column i of the scores is its i-th
    example, and a pass that gives other examples, or another order, is refused. The model is given copies of
    inputs.

    Threads: methods may be shared between threads, and models between methods; one thread at a time works
    with a model. Other code that uses the model meanwhile sees it in eval mode. Global random states are put
    back where the data set or the model has drawn from them (`stride_captum.system.random_states`).

    Attributes:
        digests_: A number for the label and one for the inputs of each training example, as they were read.
        n_train_: Number of training examples.
        fit_seconds_: Duration of `fit`.
        query_seconds_: Duration of the last query.
        peak_bytes_: Most memory that `fit` or the last query has added (`PeakMemory`).
        compared_: After `load`: what of the training set was compared with that of the saved method.

    >>> class SameClass(InfluenceMethod):
    ...     def fit_checkpoint(self, model, show_progress):
    ...         labels = torch.cat([batch.labels for batch in self.train_batches(show_progress)])
    ...         self.n_train_ = len(labels)
    ...         return labels
    ...     def prepare_query(self, state, model, batch, query):
    ...         return query.classes(self.batch_logits(model, batch), batch)
    ...     def score_columns(self, state, prepared, columns):
    ...         return (prepared[:, None] == state[columns]).float()
    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> SameClass(model, train).influence(test.tensors, 3).influence_scores.min()
    tensor(1.)
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        layers: Sequence[str] | None = None,
        batch_size: int = 1024,
        device: torch.device | str | None = None,
        checkpoints: Iterable[Any] | str | Path | None = None,
        checkpoints_load_func: LoadCheckpoint = load_checkpoint,
        held_out: Any = None,
        response: str | None = None,
        target: str | int | Sequence[int] | Tensor = "label",
        normalize: str | None = None,
        memory_budget: int | str = "256MiB",
        loss: str | Loss = "cross_entropy",
        batch: Batch | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            batch_size,
            loss,
            batch,
            device,
            checkpoints,
            checkpoints_load_func,
            memory_budget,
        )
        self.response = self.loss.responses[0] if response is None else response
        check_query(self.loss, self.response, normalize)
        self.layers = layers
        self.held_out = held_out
        self.target = checked_target(target)
        self.normalize = normalize
        self.ids = checked_ids(ids, train_dataset)
        self._states = None
        self._weights = []
        self._fit_bytes = None
        self._checkpoint_index = 0

    @overload
    def influence(
        self,
        inputs: Any,
        k: None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        response: str | None = None,
        target: Target = None,
        normalize: str | Default | None = DEFAULT,
        per_position: bool = False,
    ) -> Tensor: ...

    @overload
    def influence(
        self,
        inputs: Any,
        k: int,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        response: str | None = None,
        target: Target = None,
        normalize: str | Default | None = DEFAULT,
        per_position: bool = False,
    ) -> KMostInfluentialResults: ...

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        response: str | None = None,
        target: Target = None,
        normalize: str | Default | None = DEFAULT,
        per_position: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """Influence of every training example on each test point; fits on first use.

        Args:
            inputs: A batch `(inputs..., labels)` or dict, or a DataLoader or Dataset of them.
            k: None for all scores, or how many training examples to return per test point.
            proponents: With k: the highest scores, descending; otherwise the lowest, ascending.
            show_progress: Whether to show a bar over the test batches.
            aggregate: Whether to return one row, the sum over all test points (in float64, then rounded), or
                with k the best of that row.
            response: The scalar that is attributed (see the loss).
            target: Its class: "label", "predicted", or an index (one, or one per test point). Of several
                labels or outputs, an index names one, and "label" is the sum over all.
            normalize: None; "cosine": divide by the norms of both sides, a zero norm gives 0; or
                "deviation": bring the scores of each checkpoint, for each test point, to unit standard
                deviation over the training set before they are averaged, so that a checkpoint whose scores
                are large does not count more (in two passes over the training set). What is not given is
                that of the constructor.
            per_position: Of a model with several positions an example (tokens, pixels): whether to return the
                scores of the test points' positions instead of their sums, `(n_test, P, n_train)`, 0 where
                there is no label.

        Returns:
            Scores `(n_test, n_train)`, or with k a `KMostInfluentialResults` of indices (int64) and
            scores, both `(n_test, min(k, n_train))`; ties by lower index. With `aggregate` n_test is 1.

        Raises:
            ValueError: An argument out of its range, or a model that has changed since `fit`.
            TypeError: Inputs of another kind.
        """
        if per_position:
            chosen = self.normalize if isinstance(normalize, Default) else normalize
            check_whole(k, aggregate, chosen)
            return position_scores(self, inputs, None, response, target)
        best = None if k is None else whole_number("k", k, or_else=", or None for all scores")

        def collector() -> Collector:
            if aggregate:
                return ColumnSums(self.n_train_, best, proponents)
            return DenseScores(self.n_train_) if best is None else StreamedTopK(best, proponents)

        results = self._collect(inputs, collector, show_progress, response, target, normalize)
        return results[0] if best is None else KMostInfluentialResults(*results)

    def positions_of(
        self, inputs: Any, train_index: int, *, response: str | None = None, target: Target = None
    ) -> Tensor:
        """Scores of one training example, split over its positions.

        Args:
            inputs: As for `influence`.
            train_index: Place in the training set.
            response: As for `influence`.
            target: As for `influence`.

        Returns:
            `(n_test, P)`, whose rows add up to column `train_index` of `influence(inputs)`; P is the last
            position of the example that has a label.

        Raises:
            ValueError: A method without scores of positions, or one that normalizes or thresholds scores.
        """
        return position_scores(self, inputs, train_index, response, target)

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
        *,
        inputs_dataset: Any = None,
    ) -> Tensor:
        """How much each example lowers its own loss by being in the training set.

        The loss gradient stands on both sides, whatever the response is: this is the diagonal of
        `-influence(train, response="loss")`.

        Args:
            inputs: Other examples, as for `influence`; None for the training set.
            show_progress: Whether to show a bar over the batches.
            outer_loop_by_checkpoints: Accepted for compatibility with Captum; changes nothing.
            inputs_dataset: Captum's other name for `inputs`.

        Returns:
            `(n_train,)`, or `(n_inputs,)`.
        """
        inputs = inputs_dataset if inputs is None else inputs
        if inputs is not None:
            data.check_source(inputs, "inputs")
        with exclusive(self):
            if self._states is None:
                self.fit(show_progress)
            return self._total_self_influence(inputs, show_progress)

    def mislabel_scores(self) -> Tensor:
        """How suspect each training label is, `(n_train,)`; here the self-influence. High means suspect."""
        return self.self_influence()

    def subset_influence(
        self,
        inputs: Any,
        groups: Sequence[Any],
        *,
        response: str | None = None,
        target: Target = None,
    ) -> Tensor:
        """Predicted effect of whole groups of training examples: the sum of their scores.

        These are plain scores, in units of the response, whatever `normalize` of the constructor is: cosines
        of several examples do not add up to an effect.

        Args:
            inputs: As for `influence`.
            groups: One for each group, which may overlap: indices, a boolean mask over the training set, or
                a slice.
            response: As for `influence`.
            target: As for `influence`.

        Returns:
            `(n_test, n_groups)`.
        """
        with exclusive(self):
            if self._states is None:
                self.fit()
            membership = membership_from_indices(groups_of_places(groups, self.n_train_), self.n_train_)
            return self._collect(inputs, lambda: GroupSums(membership), False, response, target, None)[0]

    def compute_intermediate_quantities(
        self,
        inputs: Any,
        aggregate: bool = False,
        *,
        side: str = "test",
        response: str | None = None,
        target: Target = None,
    ) -> Tensor:
        """Vectors whose products are the scores: `test @ train.T` equals `influence(inputs)`.

        Nearest neighbors of a vector, or clusters of them, are those of influence. Checkpoints stand side by
        side in a vector.

        Args:
            inputs: Test points as for `influence`; for `side="train"`, places in the training set.
            aggregate: Whether to return the sum over all inputs.
            side: "test" or "train".
            response: As for `influence`.
            target: As for `influence`.

        Returns:
            `(n_inputs, width)`, or `(1, width)`. The width of the closed form is
            `(n_features + 1) n_classes`; that of gradient methods is the number of coordinates.

        Raises:
            ValueError: Scores of this method are no products of vectors (trained operators, a threshold,
                KNNShapley, wrapped methods), they are normalized by default, or a vector does not fit
                `memory_budget`.
        """
        check_plain("compute_intermediate_quantities", self.normalize)
        if side not in ("test", "train"):
            raise bad_choice("side", side, ("test", "train"))
        if side == "train":
            return train_vectors(self, inputs, aggregate)
        response, target = response or self.response, self.target if target is None else target
        return test_vectors(self, inputs, aggregate, response, target)

    def estimate(self, n_test: int = 100, k: int | None = None) -> Estimate:
        """What `fit` and a query will cost, before they run; printing it gives a small table.

        Small runs on the first training examples are extrapolated in a straight line, where the method has
        no better way. Seconds are those of this machine under its present load
        (`stride_captum.evaluation.benchmarks.estimate` compares them with what is then measured).

        Args:
            n_test: Test points of the query.
            k: As for `influence`.

        Raises:
            ValueError: `n_test` or `k` is below 1, or the training set has no length.
        """
        k = None if k is None else whole_number("k", k, or_else=", or None for all scores")
        return self._estimate(whole_number("n_test", n_test), k)

    def _estimate(self, n_test: int, k: int | None) -> Estimate:
        return from_small_runs(self, n_test, k)


__all__ = ["InfluenceMethod", "Query"]
