"""Calls of `captum.influence`: the loss, the inputs by position, and the quirks of its classes."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.influence._utils.nearest_neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..data.batch import ExampleBatch
from ..data.containers import place_name
from ..errors import bad_choice, bad_value
from ..influence.method import InfluenceMethod
from ..losses import Loss, loss_of
from ..system.random_states import same_random_state
from .gradients.traces import process_wide


class ResidualLoss(nn.Module):
    """`A(z) - <z, v + A'(z)>` with A' held constant, for logits z and "labels" v.

    A is `Loss.potential`, `log sum exp z` with cross-entropy, where A' = softmax(z). The gradient is -v. For
    residuals v it is the loss up to a constant, its curvature included; for `v = g` it stands for minus a
    response with the gradient g.

    Args:
        reduction: "sum" or "none", as Captum's class demands.
        loss: What the model was trained with, that of `CaptumInfluence`.
    """

    def __init__(self, reduction: str = "none", loss: str | Loss = "cross_entropy") -> None:
        super().__init__()
        if reduction not in ("none", "sum"):
            raise bad_choice("reduction", reduction, ["none", "sum"])
        self.reduction, self.loss = reduction, loss_of(loss)

    def forward(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """The losses `(n,)`, or their sum; both arguments are `(n, n_classes)`."""
        slope: Tensor = torch.func.grad(lambda z: self.loss.potential(z).sum())(logits.detach())
        losses: Tensor = self.loss.potential(logits) - (logits * (vectors + slope)).sum(1)
        return losses.sum() if self.reduction == "sum" else losses


def keep_weights(model: nn.Module, checkpoint: Any) -> float:
    """`checkpoints_load_func` for Captum that keeps the weights of the model; learning rate 1."""
    return 1.0


class NoIndex(NearestNeighbors):  # type: ignore[misc]
    """Null search index for `TracInCPFastRandProj(nearest_neighbors=)`; top-k is computed here."""

    def setup(self, data: Tensor) -> None:
        """Index nothing."""

    def get_nearest_neighbors(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Not available."""
        raise NotImplementedError("ask CaptumInfluence.influence for the top k")


def parts_by_position(batch: ExampleBatch) -> list[Any]:
    """Inputs with one row per example, in the same order for all batches."""
    return [part for _, part in _ordered(batch)]


def check_same_parts(batch: ExampleBatch, training: ExampleBatch) -> None:
    """Refuse test points whose parts have other names than those of training examples.

    Captum passes parts by position. One part has one position, whatever its name.

    Raises:
        ValueError: A part is missing, or there is one more.
    """
    own, wanted = ([place_name(path) for path, _ in _ordered(of)] for of in (batch, training))
    if own != wanted and not len(own) == len(wanted) == 1:
        must = f"have the parts of training examples, {', '.join(wanted)}, which Captum gets by position"
        raise bad_value(batch.argument, must, ", ".join(own), "Give all of them, under these names.")


def outputs_by_position(template: ExampleBatch, model: Callable[..., Any], parts: Sequence[Any]) -> Tensor:
    """Outputs of a model for parts by position; other parts are those of a batch of the same source."""
    places = _ordered(template)
    given = {path: _like(kind, part) for (path, kind), part in zip(places, parts, strict=True)}
    return template.copied().with_parts(given).outputs_of_these(model)


def _like(kind: Any, part: Any) -> Any:
    """Copy of a collated part, in the form in which the data set gives it."""
    if isinstance(kind, list | tuple):
        return type(kind)(part.tolist() if isinstance(part, Tensor) else part)
    if not isinstance(part, Tensor):
        return part
    if isinstance(kind, np.ndarray):
        return part.detach().cpu().numpy().copy()
    return part.clone()  # stays in the graph: Captum's hooks want inputs that require a gradient


def _ordered(batch: ExampleBatch) -> list[tuple[Any, Any]]:
    return sorted(batch.example_parts(), key=lambda found: str(found[0]))


class Examples(IterableDataset[Any]):
    """Training examples of a fitted method, one by one, for Captum's loaders.

    They are on the method's device, the inputs by position.

    Args:
        method: Has read its training set, so that `n_train_` is known.
        residuals: What stands for the labels, `(n_train, n_classes)`; None keeps them.
    """

    def __init__(self, method: InfluenceMethod, residuals: Tensor | None) -> None:
        self.method, self.residuals = method, residuals

    def __len__(self) -> int:
        n_train: int = self.method.n_train_
        return n_train

    def __iter__(self) -> Iterator[Any]:
        for rows, batch in self.method.train_blocks(len(self), False):
            labels: Any = batch.labels if self.residuals is None else self.residuals[rows]
            yield from zip(*parts_by_position(batch), labels, strict=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that silences Captum's warnings about reductions, memory, bars and gradients.

    Warnings about the user's data come from our own reading of them, and are shown.
    """
    with process_wide, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"captum\.")
        yield


@contextmanager
def traceless() -> Iterator[None]:
    """`quiet`, for code that draws from the global random state of torch or sets its seed."""
    with quiet(), same_random_state():
        yield


def check_losses(captum: Any, loss: Loss) -> None:
    """Refuse an object that does not support every response.

    Raises:
        ValueError: Other losses than `ResidualLoss`, or of another loss, or weights that Captum loads itself.
    """
    losses = [getattr(captum, name, None) for name in ("loss_fn", "test_loss_fn")]
    others = [
        found.loss for found in losses if isinstance(found, ResidualLoss) and found.loss.name != loss.name
    ]
    if others:
        remedy = f"Write ResidualLoss(..., loss={loss.name!r}), or the same object."
        raise bad_value("build", f"use the loss of the method, {loss.name!r}", repr(others[0].name), remedy)
    if not all(isinstance(found, ResidualLoss) for found in losses):
        raise bad_value("build", "use ResidualLoss with answers='every'", "another loss", "Or set `answers`.")
    if getattr(captum, "checkpoints_load_func", keep_weights) is not keep_weights:
        raise bad_value(
            "build",
            "use keep_weights for `checkpoints_load_func` with answers='every'",
            "another function",
            "Residuals belong to their weights: give the checkpoints to CaptumInfluence.",
        )


def check_parts(captum: Any, parts: Sequence[Any]) -> None:
    """Refuse inputs that are not tensors for an object that copies them.

    Raises:
        ValueError: It does.
    """
    if all(isinstance(part, Tensor) for part in parts):
        return
    if getattr(captum, "sample_wise_grads_per_batch", False):
        raise bad_value(
            "build",
            "leave sample_wise_grads_per_batch at False for inputs that are no tensors",
            "an object that copies them",
        )


def squared_norms(captum: Any, batch: tuple[Any, ...]) -> Tensor:
    """`|J^T v|^2` in the kernel of an object for every example of `(inputs..., v)`, `(n,)`."""
    with traceless():
        try:
            squares: Tensor = captum.self_influence(batch)
        except NotImplementedError:  # TracInCPFastRandProj
            squares = captum.compute_intermediate_quantities(batch).square().sum(1)
    return squares.detach().to(batch[-1])


def mend_similarity(captum: Any, n_train: int) -> None:
    """Patch a `SimilarityInfluence` to return all columns.

    With one layer it hands its metric a list, on a last batch of another size it fails, and in a folder
    that has been used it reads the activations of another model.

    Raises:
        ValueError: More than one layer.
    """
    if len(captum.layers) != 1:
        raise bad_value("build", "name one layer for SimilarityInfluence", captum.layers)
    metric = captum.similarity_metric
    captum.similarity_metric = lambda test, train: metric(test[0] if isinstance(test, list) else test, train)
    captum.batch_size = math.gcd(captum.batch_size, n_train)
    captum.activation_dir = tempfile.mkdtemp()
    weakref.finalize(captum, shutil.rmtree, captum.activation_dir, ignore_errors=True)


def similarities(captum: Any, inputs: tuple[Any, ...], n_train: int) -> Tensor:
    """Similarities `(n_test, n_train)` of a patched `SimilarityInfluence`.

    Raises:
        ValueError: More than one input, of which it would read the first.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        got = f"a {type(inputs[0]).__name__}" if len(inputs) == 1 else len(inputs)
        raise bad_value("inputs", "hold one tensor beside the labels for SimilarityInfluence", got)
    indices, values = captum.influence(inputs, top_k=n_train)[captum.layers[0]]
    return torch.zeros_like(values).scatter(1, indices, values)


def response_factor(answers: str, sign: int, response: str) -> int:
    """1 or -1, which turns the scores of a Captum object into those of a response.

    Args:
        answers: "every", "similarity", or the one response that the object answers.
        sign: Of its scores for that.
        response: The response that is asked for.

    Raises:
        ValueError: Another response than it answers.
    """
    if answers in ("every", "similarity"):
        return -sign if (answers, response) == ("similarity", "loss") else sign
    if {answers, response} == {"loss", "log-probability"}:
        return -sign
    if response != answers:
        raise bad_value(
            "response",
            f"be {answers!r}, which Captum's object answers",
            repr(response),
            "Build it with ResidualLoss and answers='every' for all.",
        )
    return sign
