"""Owns TracIn (Pruthi et al., 2020; equation 8 of the paper), computed by Captum's own classes.

    score(x, i) = sum_t eta_t (J_x^T g)^T (J_i^T r_i)   at checkpoint t with learning rate eta_t

Captum is asked one checkpoint at a time for the products of the gradients of two linear losses,
`-<logits, r_i>` and `-<logits, g>`, whose gradients are those of the loss and of the response. This
avoids its traps: the learning rate that its default loader sets to 1, checkpoints that stay loaded,
frozen parameters, layers that its fast per-example gradients skip, dict batches and devices.

What remains: `fast=True` reads the last linear layer only and ignores its bias; without it, a network
with other weights than those of Linear and Conv2d layers is done one example at a time, which is slow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFast
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .. import inputs as data
from ..errors import bad_value
from ..influence import Ask
from ..responses import multiclass_logits, response_gradient
from .gradients import GradientMethod, GradientState, flat


class TracIn(GradientMethod):
    """`captum.influence.TracInCP`, or `TracInCPFast`, behind the interface of all methods.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        learning_rates: eta_t of each checkpoint; None takes what `checkpoints_load_func` returns (1
            where the checkpoint does not know it, which is right up to a factor where the rate was
            constant).
        fast: Use `TracInCPFast`: the last linear layer without its bias.
        layers: Submodules whose parameters take part (with `fast`: the one last layer); None takes all.
        **options: Those of `GradientMethod`.
    """

    # Captum reads the training set itself and returns all columns at once.
    reads_training_data = False

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        learning_rates: Sequence[float] | None = None,
        fast: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, **options)
        n_checkpoints = 1 if self.checkpoints is None else len(self.checkpoints)
        if learning_rates is not None and len(learning_rates) != n_checkpoints:
            raise bad_value(
                "learning_rates", f"hold one for each of {n_checkpoints} checkpoints", len(learning_rates)
            )
        self.learning_rates = None if learning_rates is None else [float(rate) for rate in learning_rates]
        self.fast = fast
        if fast:
            self.layers = [self._last_layer()]

    def _last_layer(self) -> str:
        if self.layers is not None and len(self.layers) != 1:
            raise bad_value("layers", "name the one last layer with fast=True", list(self.layers))
        linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise bad_value("model", "end in a Linear layer with fast=True", "one without any")
        return linear[-1] if self.layers is None else self.layers[0]

    def _combine_weights(self, learning_rates: list[float]) -> list[float]:
        return learning_rates if self.learning_rates is None else self.learning_rates

    def _fit_checkpoint(self, model: nn.Module, show_progress: bool) -> GradientState:
        state = super()._fit_checkpoint(model, show_progress)
        if self.fast:
            self.parameters_ = [name for name in self.parameters_ if name.endswith("weight")]
        else:
            # Captum takes modules: one takes part with all its parameters.
            owners = [f"{name}." if name else "" for name in _owners(self.parameters_)]
            names = [name for name, _ in model.named_parameters()]
            self.parameters_ = [name for name in names if any(name.startswith(x) for x in owners)]
        return state

    def _prepare(self, state: GradientState, model: nn.Module, batch: Any, ask: Ask) -> TracInTest:
        with torch.no_grad():
            logits = self._logits(model, batch)
        vectors = response_gradient(logits, ask.classes(logits, batch), ask.response)
        network = _Positional(model, list(batch) if isinstance(batch, Mapping) else None)
        with warnings.catch_warnings():  # of progress bars of unknown length and of inputs without gradients
            warnings.simplefilter("ignore")
            scores = self._captum(network, state.residuals).influence((*_inputs(batch), vectors))
        for parameter in model.parameters():
            vars(parameter).pop("sample_grad", None)
        return TracInTest(scores, lambda: flat(self._gradients(model, batch, vectors)))

    def _scores(self, state: GradientState, prepared: Any, columns: slice) -> Tensor:
        scores: Tensor = prepared.scores[:, columns]
        return scores

    def _scores_of_batch(
        self, state: GradientState, prepared: Any, columns: slice, model: nn.Module, batch: Any
    ) -> Tensor:
        return self._scores(state, prepared, columns)

    def _test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(prepared.sides(), dim=1)
        return norms

    def _captum(self, network: _Positional, residuals: Tensor) -> Any:
        loader = DataLoader(_ResidualsAsLabels(self, residuals), batch_size=None)
        checkpoint = {"checkpoints": ["loaded"], "checkpoints_load_func": lambda network, name: 1.0}
        if self.fast:
            assert self.layers is not None
            last = network.network.get_submodule(self.layers[0])
            return TracInCPFast(network, last, loader, loss_fn=_linear_loss, **checkpoint)
        owners = _owners(self.parameters_)
        for name in owners:
            network.network.get_submodule(name).requires_grad_(True)  # Captum fails on frozen ones
        batched = all(_has_fast_gradients(network.network.get_submodule(name)) for name in owners)
        return TracInCP(
            network,
            loader,
            layers=[f"network.{name}" if name else "network" for name in owners],
            loss_fn=_linear_loss if batched else _linear_losses,
            sample_wise_grads_per_batch=batched,
            **checkpoint,
        )

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "learning_rates": self.learning_rates, "fast": self.fast}


@dataclass
class TracInTest:
    """A batch of test points.

    Attributes:
        scores: `(n_test, n_train)`.
        sides: Gives the gradients of the response, `(n_test, n_parameters)`.
    """

    scores: Tensor
    sides: Callable[[], Tensor]


class _Positional(nn.Module):
    """A network that takes tensors by position, as Captum calls it, and gives multi-class logits."""

    def __init__(self, network: nn.Module, keys: list[str] | None) -> None:
        super().__init__()
        self.network = network
        self.keys = None if keys is None else [key for key in keys if key != data.LABEL_KEY]

    def forward(self, *values: Any) -> Tensor:
        batch = (*values, None) if self.keys is None else dict(zip(self.keys, values, strict=True))
        return multiclass_logits(data.forward(self.network, batch))


class _ResidualsAsLabels(IterableDataset[Any]):
    """The training batches `(inputs..., residuals)` of a method."""

    def __init__(self, method: GradientMethod, residuals: Tensor) -> None:
        self.method, self.residuals = method, residuals

    def __iter__(self) -> Iterator[Any]:
        for rows, batch in self.method._train_blocks(len(self.residuals), False):
            yield (*_inputs(batch), self.residuals[rows])


def _inputs(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [value for key, value in batch.items() if key != data.LABEL_KEY]
    return list(batch[:-1] if len(batch) > 1 else batch)


def _owners(names: Sequence[str]) -> list[str]:
    """The outermost modules that hold these parameters directly."""
    owners = sorted({name.rpartition(".")[0] for name in names})
    inner = {o for o in owners for outer in owners if o != outer and (not outer or o.startswith(f"{outer}."))}
    return [owner for owner in owners if owner not in inner]


def _has_fast_gradients(module: nn.Module) -> bool:
    """Whether Captum has batched per-example gradients for it."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _linear_losses(logits: Tensor, vectors: Tensor) -> Tensor:
    return -(logits * vectors).sum(1)


def _linear_loss(logits: Tensor, vectors: Tensor) -> Tensor:
    return _linear_losses(logits, vectors).sum()
