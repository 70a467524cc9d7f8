"""Wrapper of any `captum.influence` object in the interface of all methods.

    CaptumInfluence(model, train_dataset, build=lambda model, train: TracInCPFastRandProj(
        model, model.fc3, train, [""], keep_weights, ResidualLoss("sum"), 256, nearest_neighbors=NoIndex()))

Captum's classes score a test point by minus the change of its loss, or by its similarity:

    class                       answers            sign  loss of `build`        cosine
    TracInCP                    "every"            1     ResidualLoss(*)        yes
    TracInCPFast                "every"            1     ResidualLoss("sum")    yes
    TracInCPFastRandProj        "every"            1     ResidualLoss("sum")    yes
    NaiveInfluenceFunction      "every"            1     ResidualLoss(*)        yes
    ArnoldiInfluenceFunction    "every"            1     ResidualLoss(*)        yes
    any of these                "log-probability"  1     cross-entropy          no
    any of these                a response f       1     -f of the test points  no
    any of these                a response f       -1    f of the test points   no
    SimilarityInfluence         "similarity"       1     a similarity           no
    SimilarityInfluence         "similarity"       -1    a distance             no

    * "none", or "sum" with `sample_wise_grads_per_batch=True`.

Weights of examples and of classes multiply residuals, so that they need the answers "every" and a class
without a Hessian; a similarity does not depend on them.

All of them give `(n_test, n_train)`, other subclasses of `DataInfluence` may not: see `orientation`.
TracInCPFast and TracInCPFastRandProj read the last linear layer without its bias, and the latter uses its
test loss on training examples too: with losses of your own, give it one. SimilarityInfluence reads the
activations of one layer, of a model with one input.

Captum is given a copy of the model, which takes dicts by position and in which every parameter requires a
gradient: leave some out by Captum's own `layers`. It returns all columns of a batch of test points at
once; top-k, groups, devices, checkpoints and normalization come from the base class. What Captum computes
is not checked: `TracIn` is, against plain gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.influence import DataInfluence, SimilarityInfluence
from captum.influence._core.influence_function import InfluenceFunctionBase
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_choice, bad_type, bad_value
from ..influence.method import InfluenceMethod, Query
from ..losses import loss_of
from ._captum import (
    Examples,
    NoIndex,
    ResidualLoss,
    check_losses,
    check_parts,
    check_same_parts,
    keep_weights,
    mend_similarity,
    outputs_by_position,
    parts_by_position,
    response_factor,
    similarities,
    squared_norms,
    traceless,
)
from ._weights import refuse_weights
from .gradients.method import GradientMethod, GradientState
from .gradients.working_copies import check_copy, independent_copy, widened


@dataclass
class CaptumTest:
    """A batch of test points.

    Attributes:
        scores: `(n_test, n_train)`.
        asked: What Captum was given: the inputs, and the gradients of the response or the labels.
    """

    scores: Tensor
    asked: tuple[Any, ...]


class CaptumInfluence(GradientMethod):
    """A `captum.influence` object with the interface, sign and shapes of all methods.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        build: `build(model, train_dataset)` makes Captum's object of a copy of the model and a data set
            of examples `(inputs..., label)` on its device, whose labels are residuals with
            `answers="every"`. It is called once for each of `checkpoints`.
        answers: "every" response, where `build` uses `ResidualLoss` and `keep_weights`; the one response
            that the test loss of `build` stands for; or "similarity", the same for every response.
        sign: 1 where Captum's positive scores raise what it `answers`, -1 where they lower it.
        orientation: "test-train" or "train-test", of what Captum returns.
        **options: Those of `GradientMethod` but `layers`; `residuals` with `answers="every"` only.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> from captum.influence import SimilarityInfluence
    >>> def build(model, train):
    ...     return SimilarityInfluence(model, "relu2", train, "not used", batch_size=16)
    >>> method = CaptumInfluence(model, train, build=build, answers="similarity")
    >>> method.influence(test.tensors, 3).indices.shape
    torch.Size([7, 3])
    """

    # Captum reads the training set itself and returns all columns at once.
    reads_training_data = False

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        build: Callable[[Any, Any], Any],
        answers: str = "every",
        sign: int = 1,
        orientation: str = "test-train",
        **options: Any,
    ) -> None:
        responses = loss_of(options.get("loss", "cross_entropy")).responses
        if answers not in ("every", "similarity", *responses):
            raise bad_choice("answers", answers, ["every", "similarity", *responses])
        if sign not in (1, -1):
            raise bad_value("sign", "be 1 or -1", repr(sign))
        if orientation not in ("test-train", "train-test"):
            raise bad_choice("orientation", orientation, ["test-train", "train-test"])
        if answers in responses:
            options.setdefault("response", answers)
        super().__init__(model, train_dataset, **options)
        if self.layers is not None:
            raise bad_value(
                "layers", "be None", list(self.layers), "Give them to Captum's object in `build`."
            )
        if answers != "every" and self.residuals != "training":
            raise bad_value("residuals", "be 'training' unless answers='every'", repr(self.residuals))
        self.build, self.answers, self.sign, self.orientation = build, answers, sign, orientation
        if answers in responses:
            why = "the loss of `build` stands for the residuals that they multiply"
            refuse_weights(f"answers={answers!r}", self.batch, self.loss, why, "Take answers='every'.")

    def _check_gradients(self, model: nn.Module) -> None:
        if self.answers != "similarity":  # which takes no gradients
            super()._check_gradients(model)

    def _fit_kernel(self, model: nn.Module, residuals: Tensor, show_progress: bool) -> Any:
        network = self._network(model)
        with traceless():
            captum = self.build(network, Examples(self, residuals if self.answers == "every" else None))
        if not isinstance(captum, DataInfluence):
            raise bad_type("build", "return an object of captum.influence", captum)
        if getattr(captum, "model", getattr(captum, "module", network)) is not network:
            raise bad_value("build", "give Captum's object the model that `build` is given", "another one")
        if self.answers == "every":
            check_losses(captum, self.loss)
        if isinstance(captum, InfluenceFunctionBase):
            name, why = type(captum).__name__, "its Hessian counts every example once"
            refuse_weights(name, self.batch, self.loss, why, "Take a TracIn class, or DiagonalEKFAC.")
        if isinstance(captum, SimilarityInfluence):
            mend_similarity(captum, len(residuals))
        return captum

    def _network(self, model: nn.Module) -> nn.Module:
        """Copy that takes and returns tensors, which Captum may modify freely."""
        network = independent_copy(model)
        check_copy(model, network, self._probe)
        for parameter in network.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        template, run = self._probe, network.forward

        def forward(*values: Any) -> Tensor:
            outputs = outputs_by_position(template, run, values)
            return self.loss.logits(outputs) if self.answers == "every" else outputs

        vars(network)["forward"] = forward
        return network

    def holds_all_columns(self) -> bool:
        """True: Captum computes all columns."""
        return True

    @override
    def prepare_query(self, state: GradientState, model: nn.Module, batch: Any, query: Query) -> CaptumTest:
        check_same_parts(batch, self._probe)
        with torch.no_grad():
            outputs = batch.outputs(model)
        logits, response = widened(batch.logits_of(outputs)), query.response
        if response != self.answers:
            response = self.loss.response_of(outputs, response)
        asked_for, factor = query.asked(logits, batch), response_factor(self.answers, self.sign, response)
        labels = batch.labels
        if self.answers == "every":
            labels = self.loss.response_gradient(logits, asked_for, response)
        elif labels is None:
            labels = asked_for
        elif not isinstance(query.target, str) or query.target != "label":
            labels = asked_for.to(labels.dtype).reshape(labels.shape)
        asked = (*parts_by_position(batch), labels)
        check_parts(state.kernel, asked[:-1])
        with traceless():
            if isinstance(state.kernel, SimilarityInfluence):
                scores = similarities(state.kernel, asked[:-1], self.n_train_)
            else:
                scores = state.kernel.influence(asked, k=None)
        scores = scores if self.orientation == "test-train" else scores.T
        if scores.shape != (len(logits), self.n_train_):
            raise bad_value(
                "build",
                f"make an object whose scores have the shape {(len(logits), self.n_train_)}",
                f"shape {tuple(scores.shape)}",
                "It must read the whole training set that it is given, in order; see also `orientation`.",
            )
        return CaptumTest(factor * scores.detach().to(logits.device), asked)

    def _inverse_norms(self, state: GradientState, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        if self.answers != "every":
            raise self.no_norms()
        if state.norms is None:
            squares = [
                squared_norms(state.kernel, (*parts_by_position(batch), state.residuals[rows]))
                for rows, batch in self.train_blocks(self.n_train_, False)
            ]
            state.norms = torch.cat(squares).sqrt()
        return super()._inverse_norms(state, prepared, model)

    @override
    def test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        return squared_norms(state.kernel, prepared.asked).sqrt()

    @override
    def batch_self_influence(
        self, state: GradientState, model: nn.Module, batch: Any, rows: slice | None
    ) -> Tensor:
        if self.answers != "every":
            return InfluenceMethod.batch_self_influence(self, state, model, batch, rows)
        left, right = self._both_residuals(state, model, batch, rows)
        inputs = parts_by_position(batch)
        if left is right:
            return squared_norms(state.kernel, (*inputs, left))
        plus, minus = (squared_norms(state.kernel, (*inputs, v)) for v in (left + right, left - right))
        return (plus - minus) / 4  # the kernel is bilinear in the two residuals

    def save(self, path: str | Path) -> None:
        """Refused, because Captum's objects cannot be written.

        Args:
            path: File name.

        Raises:
            TypeError: Always.
        """
        raise bad_type("method", "hold nothing but tensors to be saved", self, "Fit it again instead.")


__all__ = ["CaptumInfluence", "NoIndex", "ResidualLoss", "keep_weights"]
