"""Scores of `STRIDE` from its operators: fit, queries, norms, self-influence, suspect labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .errors import bad_value, not_fitted
from .features.precomputed import Precomputed, check_some_rows
from .influence.checkpoints.checkpoint import unseen_by
from .influence.method import Query
from .influence.temperature import choose_temperature
from .layers.activations import Tap
from .operators import FittedOperators, STRIDEState, TestPoints, TrainingSet
from .training_features import TrainingFeatures


class OperatorScores(TrainingFeatures):
    """The part of `STRIDE` that fits operators and delegates scores to them."""

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> STRIDEState:
        taps, known = self._training_features(model, show_progress)
        if known.positions is not None:
            check_some_rows(int(self.ranks.sums("labels that count", len(known.labels))[0]))
        self._changed = False
        projection = self._fit_projection(known)
        self.projection_error_ = 0.0 if projection is None else projection.error
        if projection is not None:
            whole = projection.whole(known.features, known.labels.device)
            known = replace(known, features=whole, widths=projection.new_widths)
        operators = self.operators.fit(self._training_set(model, taps, known, show_progress=show_progress))
        return self._learned(STRIDEState(taps, operators, projection))

    def _training_set(
        self, model: nn.Module, taps: Sequence[Tap], read: Precomputed, **more: Any
    ) -> TrainingSet:
        """Input of `Operators.fit`."""
        return TrainingSet(
            **vars(read),
            model=model,
            layers=[str(tap) for tap in taps],
            memory_budget=self.memory_budget,
            temperature=lambda given: choose_temperature(
                self, model, read.logits, read.labels, given, read.weights, read.positions
            ),
            ranks=self.ranks,
            n_checkpoints=len(self._checkpoints()),
            loss=self.loss,
            **more,
        )

    def _learned(self, state: STRIDEState) -> STRIDEState:
        """Set the fitted attributes of the training set."""
        self.n_train_ = state.operators.n_train
        self.coverage_ = state.operators.coverage()
        return state

    def holds_all_columns(self) -> bool:
        """Whether the operators compute all columns at once, as the Lasso does."""
        return self.operators.all_columns

    @override
    def prepare_query(self, state: STRIDEState, model: nn.Module, batch: Any, query: Query) -> Any:
        return state.operators.prepare(self._points(state, model, batch, query))

    def _points(self, state: STRIDEState, model: nn.Module, batch: Any, query: Query) -> TestPoints:
        """Test points as operators take them."""
        rows = self._read_batch(model, state.taps, batch)
        features = rows.side_by_side if state.projection is None else state.projection(rows.side_by_side)
        response = self.loss.response_of(rows.outputs, query.response)
        asked = query.asked_of_rows(self.loss, rows.logits, rows.labels, rows.positions)
        gradients = self.loss.response_gradient(rows.logits, asked, response)
        n_positions = 0 if rows.kept is None else rows.kept.shape[1]
        return TestPoints(features, rows.logits, asked, gradients, response, rows.positions, n_positions)

    def _test_rows(self) -> int:
        """As many test points as fit the budget with their positions."""
        rows = super()._test_rows()
        most: list[int | None] = [state.operators.test_points_at_once() for state in self._states or []]
        return min([rows, *(m for m in most if m is not None)])

    @override
    def score_columns(self, state: STRIDEState, prepared: Any, columns: slice) -> Tensor:
        return state.operators.scores(prepared, columns)

    @override
    def position_scores(self, state: STRIDEState, prepared: Any, example: int | None) -> Tensor:
        found = state.operators.position_scores(prepared, example)
        return super().position_scores(state, prepared, example) if found is None else found

    @override
    def train_norms(self, state: STRIDEState) -> Tensor:
        return self._norms(state.operators.train_norms())

    @override
    def test_norms(self, state: STRIDEState, prepared: Any) -> Tensor:
        return self._norms(state.operators.test_norms(prepared))

    def _norms(self, norms: Tensor | None) -> Tensor:
        if norms is None:
            raise bad_value("normalize", f"be None for operators={self.operators.name!r}", "'cosine'")
        return norms

    @override
    def train_self_influence(self, state: STRIDEState) -> Tensor | None:
        return state.operators.self_influence()

    @override
    def batch_self_influence(
        self, state: STRIDEState, model: nn.Module, batch: Any, rows: slice | None
    ) -> Tensor:
        if rows is None:
            points = self._points(state, model, batch, Query("loss", "label"))
            found = state.operators.self_influence_of(points)
            if found is not None:
                return found
        return super().batch_self_influence(state, model, batch, rows)

    @override
    def query_vectors(self, state: STRIDEState, prepared: Any) -> Tensor | None:
        return state.operators.query_vectors(prepared)

    @override
    def train_vectors(self, state: STRIDEState, rows: Tensor) -> Tensor | None:
        return state.operators.train_vectors(rows)

    def mislabel_scores(self, per_label: bool = False) -> Tensor:
        """How suspect each training label is, `(n_train,)`: high means suspect.

        With closed-form operators this is the norm of the leave-one-out residual of a ridge head on the
        features: the distance of the label from its prediction by the other examples. With trained operators
        it is the self-influence.

        Several checkpoints are averaged. If every example is unseen by some of them
        (`Checkpoint(seen=...)`, as from `retrain`), those alone judge it.

        Args:
            per_label: Whether to return the absolute residual of each output, `(n_train, n_outputs)`, which
                tells which of several labels is suspect.

        Raises:
            ValueError: `per_label` with operators that do not support it, or several positions an example.
        """
        if self._states is None:
            self.fit()
        if per_label:
            outputs = [state.operators.mislabel_scores_of_outputs() for state in self._states or []]
            whole = [part for part in outputs if part is not None]
            if len(whole) != len(outputs):
                must = f"be False for operators={self.operators.name!r}"
                raise bad_value("per_label", must, True, "Take the closed form.")
            return (torch.stack(whole) * self._judges().to(whole[0])[:, :, None]).sum(0)
        parts = [state.operators.mislabel_scores() for state in self._states or []]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return self.self_influence()
        weights = self._judges().to(known[0])
        return (torch.stack(known) * weights).sum(0)

    def _judges(self) -> Tensor:
        """Weight of each checkpoint for each example, `(n_checkpoints, n_train)`.

        Those that have not seen an example share its weight; where some example has none of them, anywhere
        in a process group, each has the weight that it has for scores.
        """
        unseen = torch.stack(
            [unseen_by(checkpoint, self.n_train_)[self._own_columns()] for checkpoint in self._checkpoints()]
        ).double()
        counts = unseen.sum(0)
        ranks, able = self.ranks.sums("examples that a model has not seen", 1, int(bool((counts > 0).all())))
        if ranks == able:
            return unseen / counts
        return torch.tensor(self._weights, dtype=torch.float64)[:, None].expand_as(unseen)

    @property
    def operators_(self) -> FittedOperators:
        """The fitted operators of the last checkpoint."""
        if not self._states:
            raise not_fitted("operators_")
        operators: FittedOperators = self._states[-1].operators
        return operators

    @property
    def layers_(self) -> list[str]:
        """Names of the layers whose activations are the features."""
        if not self._states:
            raise not_fitted("layers_")
        return [str(tap) for tap in self._states[0].taps]

    @property
    def n_features_(self) -> int:
        """Number of features that the operators see."""
        if not self._states:
            raise not_fitted("n_features_")
        last = self._states[-1]
        return sum(last.projection.new_widths if last.projection else (tap.width for tap in last.taps))

    @property
    def temperature_(self) -> float:
        """T of the tempered residuals, if the operators have them."""
        return float(self.operators_.temperature)  # type: ignore[attr-defined]

    @property
    def history_(self) -> dict[str, Tensor]:
        """Losses of stage 1, if the operators are trained."""
        return dict(self.operators_.history)  # type: ignore[attr-defined]
