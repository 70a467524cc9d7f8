"""Base class of the methods that are a kernel between per-example gradients.

With the Jacobian J_x of the logits with respect to the parameters, the gradient g of the response and
the residual r_i of a training example (`e_y - p`, minus the loss gradient with respect to the logits),

    score(x, i) = (J_x^T g)^T M (J_i^T r_i)

times the weight omega_i of the training example where examples have weights. M is what distinguishes the
methods. A positive score is a proponent for every positive definite M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...data.batch import ExampleBatch
from ...errors import bad_value
from ...influence.method import Query
from ...system.memory import rows_that_fit
from ...system.saved_values import saved_as
from .checks import check_gradients, check_layers, check_model, probe_of
from .per_example import Gradients, chosen_parameters, example_gradients, flat
from .residuals import WithResiduals
from .working_copies import widened


@saved_as("gradients")
@dataclass
class GradientState:
    """What a gradient method keeps.

    Attributes:
        residuals: r_i times the weight of the example, `(n_train, n_classes)`.
        loss_residuals: Minus the gradient of the loss (`e_y - p`), without the weight.
        temperature: T of tempered residuals.
        kernel: What the method needs to apply M.
        norms: `|J_i^T r_i|_M`, `(n_train,)`; None until they are asked for.
    """

    residuals: Tensor
    loss_residuals: Tensor
    temperature: float
    kernel: Any
    norms: Tensor | None = None


@dataclass
class GradientQuery:
    """A batch of test points.

    Attributes:
        sides: `J_x^T g`, as `_side` gives it, `(n_test, n_coordinates)`.
        preconditioned: M times it.
    """

    sides: Tensor
    preconditioned: Tensor


class GradientMethod(WithResiduals):
    """Base class of gradient methods; a subclass says what M is.

    It implements `_fit_kernel` and `_precondition`, and may replace `_side`, which maps gradients to the
    coordinates in which M acts.

    Args:
        model: As for every method; its frozen parameters are left out (unless all are). Of a model in half
            precision gradients are taken in a float32 copy, which is kept.
        train_dataset: As for every method.
        residuals: "training" as published, or "temperature", "leave-one-out" and "both", which take the
            example out of its own sample (`stride_captum.residuals`).
        temperature: T of tempered residuals; None matches `held_out`, or takes the default.
        memory_budget: Memory for the gradients of one block of examples.
        **options: Those of `InfluenceMethod`; `layers` are the submodules whose parameters take part, None
            takes all.

    Attributes:
        parameters_: Names of the parameters that gradients are taken of.
        weight_: W, the sum of the weights of the training examples; n_train without weights. Where these
            are weights of positions, that of an example is the mean of those that count, with a label and
            above 0; where none does, it is 0.
    """

    needs_gradients: ClassVar[bool] = True
    reads_training_data: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        residuals: str = "training",
        temperature: float | None = None,
        memory_budget: int | str = "1GiB",
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            residuals=residuals,
            temperature=temperature,
            memory_budget=memory_budget,
            **options,
        )

    # What a subclass says.

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> Any:
        """Learn what M needs; None for the identity."""
        return None

    def _side(self, kernel: Any, gradients: Gradients) -> Tensor:
        """Gradients in the coordinates of M, `(n, n_coordinates)`."""
        return flat(gradients)

    def _precondition(self, kernel: Any, sides: Tensor) -> Tensor:
        """M times each row, `(n, n_coordinates)`."""
        return sides

    # What it has.

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> GradientState:
        check_layers(model)
        self.parameters_ = list(chosen_parameters(model, self.layers))
        self._probe = probe_of(self._first_train_batch())
        self._check_gradients(model)
        with torch.no_grad():
            residuals, loss_residuals, temperature = self._read_residuals(model, show_progress)
        self.n_train_ = len(residuals)
        self.weight_ = float(self.n_train_ if self._omega is None else self._omega.sum())
        kernel = self._fit_kernel(model, residuals, show_progress)
        return GradientState(residuals, loss_residuals, temperature, kernel)

    def _check_weight(self) -> None:
        """Refuse a training set of which no label counts."""
        if not self.weight_ > 0:
            must = "have at least one label that is not ignored, with a weight above 0"
            raise bad_value("train_dataset", must, "none")

    def _check_gradients(self, model: nn.Module) -> None:
        """Refuse a model whose gradients would be wrong, by a look at a few examples."""
        self._rounding = check_model(model, self.parameters_, self._probe)

    def _probe_vectors(self, model: nn.Module) -> Tensor:
        """Vectors v that tell the examples of the probe apart: rows of the identity, `(n, n_classes)`."""
        with torch.no_grad():
            logits = self.batch_logits(model, self._probe)
        return torch.eye(logits.shape[1]).to(logits).repeat(len(logits), 1)[: len(logits)]

    def _find_bad_gradient(self, model: nn.Module, residuals: Tensor) -> None:
        """Refuse the first training example whose gradient is not finite, if there is one."""
        for rows, batch in self.train_blocks(self.n_train_, False):
            check_gradients(flat(self._gradients(model, batch, residuals[rows])), rows.start)

    # Gradients and products of them.

    def _gradients(self, model: nn.Module, batch: ExampleBatch, vectors: Tensor) -> Gradients:
        every = dict(model.named_parameters())
        parameters = {name: every[name].detach() for name in self.parameters_}
        return example_gradients(model, parameters, batch, vectors)

    def _response_gradients(self, model: nn.Module, batch: ExampleBatch, query: Query) -> Tensor:
        """G of each test point, `(n, n_classes)`."""
        with torch.no_grad():
            outputs = batch.outputs(model)
        logits = widened(batch.logits_of(outputs))
        response = self.loss.response_of(outputs, query.response)
        return self.loss.response_gradient(logits, query.asked(logits, batch), response)

    @override
    def prepare_query(self, state: GradientState, model: nn.Module, batch: Any, query: Query) -> Any:
        vectors = self._response_gradients(model, batch, query)
        sides = self._side(state.kernel, self._gradients(model, batch, vectors))
        return GradientQuery(sides, self._precondition(state.kernel, sides))

    @override
    def score_columns(self, state: GradientState, prepared: Any, columns: slice) -> Tensor:
        if self.reads_training_data:
            raise NotImplementedError("gradient methods score batches of training examples")
        scores: Tensor = prepared.scores[:, columns]  # `prepare_query` has given all columns
        return scores

    @override
    def score_batch(
        self, state: GradientState, prepared: Any, columns: slice, model: nn.Module, batch: Any
    ) -> Tensor:
        if not self.reads_training_data:
            return self.score_columns(state, prepared, columns)
        scores: Tensor = prepared.preconditioned @ self._train_side(state, model, batch, columns).T
        return scores

    @override
    def query_vectors(self, state: GradientState, prepared: Any) -> Tensor | None:
        return prepared.preconditioned if isinstance(prepared, GradientQuery) else None

    @override
    def train_vectors_of(
        self, state: GradientState, model: nn.Module, batch: Any, rows: Tensor
    ) -> Tensor | None:
        residuals = state.residuals[rows.to(state.residuals.device)]
        return self._side(state.kernel, self._gradients(model, batch, residuals))

    def _train_side(
        self, state: GradientState, model: nn.Module, batch: ExampleBatch, columns: slice
    ) -> Tensor:
        """`J_i^T r_i` of training examples, as `_side` gives it, `(n, n_coordinates)`."""
        sides = self._side(state.kernel, self._gradients(model, batch, state.residuals[columns]))
        check_gradients(sides, columns.start)
        return sides

    @override
    def batch_self_influence(
        self, state: GradientState, model: nn.Module, batch: Any, rows: slice | None
    ) -> Tensor:
        left, right = self._both_residuals(state, model, batch, rows)
        sides = self._side(state.kernel, self._gradients(model, batch, right))
        if rows is not None:
            check_gradients(sides, rows.start)
        other = sides
        if left is not right:
            other = self._side(state.kernel, self._gradients(model, batch, left))
        return (other * self._precondition(state.kernel, sides)).sum(1)

    def _inverse_norms(self, state: GradientState, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        if state.norms is None:
            norms = []
            for rows, batch in self.train_blocks(self.n_train_, False):
                sides = self._train_side(state, model, batch, rows)
                norms.append(self._norms(state, sides, self._precondition(state.kernel, sides)))
            state.norms = torch.cat(norms)
        return super()._inverse_norms(state, prepared, model)

    @staticmethod
    def _norms(state: GradientState, sides: Tensor, preconditioned: Tensor) -> Tensor:
        return (sides * preconditioned).sum(1).clamp_min(0).sqrt()

    @override
    def train_norms(self, state: GradientState) -> Tensor:
        assert state.norms is not None
        return state.norms

    @override
    def test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        return self._norms(state, prepared.sides, prepared.preconditioned)

    def max_rows(self) -> int:
        """Examples whose gradients, in four copies, fit the memory budget."""
        parameters = chosen_parameters(self.model, self.layers)
        size = sum(p.numel() * max(p.element_size(), 4) for p in parameters.values())
        return rows_that_fit(self.memory_budget, 4 * size, None)
