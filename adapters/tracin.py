"""TracIn (Pruthi et al., 2020; equation 8 of the paper), computed by Captum's own classes.

    score(x, i) = sum_t eta_t (J_x^T g)^T (J_i^T r_i)   at checkpoint t with learning rate eta_t

Captum is asked one checkpoint at a time for the products of the gradients of two linear losses,
`-<logits, r_i>` and `-<logits, g>`, whose gradients are those of the loss and of the response. This
avoids its traps: the learning rate that its default loader sets to 1, checkpoints that stay loaded,
frozen parameters, layers that its fast per-example gradients skip, dict batches and devices. `fit`
compares Captum's shortcuts with plain gradients on three examples: they are wrong for tied weights, for
layers whose first dimension is not the example, and, with `fast`, where anything follows the last layer.

What remains: `fast=True` reads the last linear layer only and ignores its bias; without it, a network
that Captum has no right shortcut for is done one example at a time, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from ..data.batch import ExampleBatch
from ..data.inputs import PrivateLoader
from ..errors import bad_value
from ..influence.method import Query
from ._captum import check_same_parts, parts_by_position, quiet
from ._captum_losses import (
    Positional,
    ResidualsAsLabels,
    has_batched_gradients,
    linear_loss,
    linear_losses,
    owners,
)
from .gradients.checks import agree, check_gradients
from .gradients.method import GradientMethod, GradientState
from .gradients.per_example import flat, gradients_one_by_one
from .gradients.traces import attributes_put_back


class TracIn(GradientMethod):
    """`captum.influence.TracInCP`, or `TracInCPFast`, behind the interface of all methods.

    Args:
        model: As for every method.
        train_dataset: As for every method.
        learning_rates: eta_t of each checkpoint; None takes what `checkpoints_load_func` returns (1
            where the checkpoint does not know it, which is right up to a factor where the rate was
            constant).
        fast: Use `TracInCPFast`: the last linear layer without its bias.
        **options: Those of `GradientMethod`; `layers` are the submodules whose parameters take part (with
            `fast`: the one last layer), None takes all.

    Attributes:
        batched_: Whether Captum does a batch at a time, not an example.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> TracIn(model, train, fast=True).influence(test.tensors).shape  # the last layer only
    torch.Size([7, 48])
    >>> several = TracIn(model, train, checkpoints=[model.state_dict()] * 2, learning_rates=[0.1, 0.01])
    >>> several.self_influence().shape
    torch.Size([48])
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

    @override
    def combine_weights(self, learning_rates: list[float]) -> list[float]:
        return learning_rates if self.learning_rates is None else self.learning_rates

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> GradientState:
        state = super().fit_checkpoint(model, show_progress)
        if self.fast:
            self.parameters_ = [name for name in self.parameters_ if name.endswith("weight")]
        known = dict(model.named_modules())
        modules = [known[name] for name in owners(self.parameters_)]
        shortcut = self.fast or all(has_batched_gradients(module) for module in modules)
        fault = self._fault_of_shortcut(model) if shortcut and modules else None
        self.batched_ = shortcut and fault is None
        if self.fast and (fault is not None or not modules):
            raise bad_value(
                "layers",
                "name the Linear layer, with a weight, whose outputs are those of `model` with fast=True",
                repr(self.layers),
                "Leave `fast` out if there is none.",
            ) from fault
        return state

    def _fault_of_shortcut(self, model: nn.Module) -> Exception | None:
        """What is wrong with Captum's products of the gradients of a few examples, None if nothing is."""
        batch, vectors = self._probe, self._probe_vectors(model)
        rows = flat(gradients_one_by_one(model, self.parameters_, batch, vectors))
        check_gradients(rows, 0)
        training = [(*parts_by_position(batch), vectors)]
        try:
            found = self._ask_captum(model, batch, vectors, training, batched=True)
        except Exception as error:  # of many kinds: a layer of another layout, a text, ...
            return error
        right = agree(found, rows @ rows.T, self._rounding)
        return None if right else ArithmeticError("other products of gradients than those of autograd")

    def holds_all_columns(self) -> bool:
        """Yes: Captum gives all columns."""
        return True

    @override
    def prepare_query(self, state: GradientState, model: nn.Module, batch: Any, query: Query) -> TracInQuery:
        check_same_parts(batch, self._first_train_batch())
        vectors = self._response_gradients(model, batch, query)
        training = ResidualsAsLabels(self, state.residuals, None if self.batched_ else 1)
        scores = self._ask_captum(model, batch, vectors, training, self.batched_)
        # The column of a training example whose gradient is not finite; a row belongs to a test point.
        check_gradients(scores[scores.isfinite().any(1)].T, 0)
        return TracInQuery(scores, lambda: flat(self._gradients(model, batch, vectors)))

    def _ask_captum(
        self, model: nn.Module, batch: ExampleBatch, vectors: Tensor, training: Any, batched: bool
    ) -> Tensor:
        """Products of the gradients of a batch with those of training batches `(inputs..., residuals)`."""
        asked: Any = [(*parts_by_position(batch), vectors)]
        if not batched:  # Captum's loop runs every gradient of an example through its whole batch
            asked = [(*parts_by_position(batch[i : i + 1]), v[None]) for i, v in enumerate(vectors)]
        named = dict(model.named_parameters())
        network = Positional(model, batch, [] if batched else [named[name] for name in self.parameters_])
        with quiet(), attributes_put_back(model):
            captum = self._captum(network, _as_they_are(training), batched)
            scores: Tensor = captum.influence(asked[0] if self.fast else _as_they_are(asked))
        return scores

    @override
    def test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(prepared.sides(), dim=1)
        return norms

    def _captum(self, network: Positional, loader: DataLoader[Any], batched: bool) -> Any:
        checkpoint = {"checkpoints": ["loaded"], "checkpoints_load_func": lambda network, name: 1.0}
        if self.fast:
            assert self.layers is not None
            last = network.network.get_submodule(self.layers[0])
            return TracInCPFast(network, last, loader, loss_fn=partial(linear_loss, self.loss), **checkpoint)
        if batched:
            layers = [f"network.{name}" if name else "network" for name in owners(self.parameters_)]
        else:
            layers = ["chosen"]
        return TracInCP(
            network,
            loader,
            layers=layers,
            loss_fn=partial(linear_loss if batched else linear_losses, self.loss),
            sample_wise_grads_per_batch=batched,
            **checkpoint,
        )

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "learning_rates": self.learning_rates, "fast": self.fast}


def _as_they_are(batches: Any) -> DataLoader[Any]:
    """Batches for Captum, in a loader that draws nothing from the global random state."""
    return PrivateLoader(batches, batch_size=None)


@dataclass
class TracInQuery:
    """A batch of test points.

    Attributes:
        scores: `(n_test, n_train)`.
        sides: Gives the gradients of the response, `(n_test, n_parameters)`.
    """

    scores: Tensor
    sides: Callable[[], Tensor]
