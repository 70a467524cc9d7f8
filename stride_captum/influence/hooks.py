"""What a method implements: a fit, and the scores of prepared test points against training examples."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import bad_value
from ..system.memory import rows_that_fit
from .checkpoints.averages import checkpoint_weights
from .query import Query
from .reading import BatchReader


class MethodHooks(BatchReader):
    """Functions of a method that the scoring loop calls; three of them are abstract."""

    #: Whether scores need the training examples again, so that blocks of columns are training batches.
    reads_training_data: ClassVar[bool] = False

    @abstractmethod
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> Any:
        """Learn from the training set what the scores need; must set `n_train_`."""

    @abstractmethod
    def prepare_query(self, state: Any, model: nn.Module, batch: Any, query: Query) -> Any:
        """Compute once what the scores of a batch of test points need."""

    @abstractmethod
    def score_columns(self, state: Any, prepared: Any, columns: slice) -> Tensor:
        """Scores `(n_test, n_columns)` against a slice of the training set."""

    def score_batch(self, state: Any, prepared: Any, columns: slice, model: nn.Module, batch: Any) -> Tensor:
        """`score_columns`, given the examples of the columns and the model (`reads_training_data`)."""
        return self.score_columns(state, prepared, columns)

    def holds_all_columns(self) -> bool:
        """Whether `prepare_query` computes the scores of all columns at once.

        Test batches are then so small that their scores fit `memory_budget`; other methods hold one block of
        columns at a time.
        """
        return False

    def train_norms(self, state: Any) -> Tensor:
        """Norm of each training example in the method's kernel, `(n_train,)`."""
        raise self.no_norms()

    def test_norms(self, state: Any, prepared: Any) -> Tensor:
        """Norm of each test point in the method's kernel, `(n_test,)`."""
        raise self.no_norms()

    def no_norms(self) -> ValueError:
        """Error of a method without a kernel."""
        return bad_value("normalize", f"be None for {type(self).__name__}, which has no norms", "'cosine'")

    def batch_self_influence(self, state: Any, model: nn.Module, batch: Any, rows: slice | None) -> Tensor:
        """Self-influence of one batch; `rows` are its places in the training set, None for other data."""
        if rows is None:
            raise NotImplementedError(
                f"{type(self).__name__} gives the self-influence of training examples only: pass no inputs."
            )
        prepared = self.prepare_query(state, model, batch, Query("loss", "label"))
        return -self.score_batch(state, prepared, rows, model, batch).diagonal()

    def train_self_influence(self, state: Any) -> Tensor | None:
        """Self-influence of the training set if the state has it, `(n_train,)`; else None."""
        return None

    def combine_weights(self, learning_rates: list[float]) -> list[float]:
        """Weight of each checkpoint in the score: `checkpoint_weights`, unless a method says otherwise."""
        return checkpoint_weights(self._checkpoints(), self.n_train_)

    def _test_rows(self) -> int:
        """Most test points per batch; limited by the budget if all their scores are held."""
        rows = super()._test_rows()
        if not self.holds_all_columns():
            return rows
        return min(rows, rows_that_fit(self.memory_budget, 2 * 4 * self.n_train_, rows))

    def position_scores(self, state: Any, prepared: Any, example: int | None) -> Tensor:
        """The terms of scores that are sums over positions.

        Args:
            state: What was learned at a checkpoint.
            prepared: A batch of test points.
            example: None for the positions of the test points, `(n_test, P, n_train)`; a training example for
                its own, `(n_test, P)`.
        """
        must = "be a method that knows scores of positions: STRIDE with closed-form operators"
        raise bad_value("per_position", must, type(self).__name__)

    def query_vectors(self, state: Any, prepared: Any) -> Tensor | None:
        """Vectors of test points whose products with `train_vectors` are scores; None if there are none."""
        return None

    def train_vectors(self, state: Any, rows: Tensor) -> Tensor | None:
        """Vectors of training examples, `(n, width)`; their places are in order."""
        return None

    def train_vectors_of(self, state: Any, model: nn.Module, batch: Any, rows: Tensor) -> Tensor | None:
        """`train_vectors`, given the examples and the model (`reads_training_data`)."""
        return self.train_vectors(state, rows)
