"""Owns the way kronfluence is called: its functions on loaders and tensors, not its `Analyzer`.

Nothing is written to disk or cached by name, a copy of the model is wrapped, the process-wide state (which
would fix the device at its first use) is neither read nor set, and nothing is logged or shown.

Batches are dicts: "examples", and beside them what the losses need of each example, `(n, ...)`.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import ExampleBatch
from ..errors import bad_value
from ..residuals import tempered_residuals

Batch = dict[str, Any]
Factors = dict[str, dict[str, Tensor]]


class Kronfluence:
    """A wrapped copy of a model, ready for the functions of kronfluence.

    Args:
        model: In eval mode, on its device; it is not changed.
        layers: Names of the layers to track (`tracked_layers`).
        strategy: Of `FactorArguments`.
        empirical: Use training labels for the Fisher matrix instead of drawn ones.
        damping: Of `ScoreArguments`; None is a tenth of the mean eigenvalue.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], strategy: str, empirical: bool, damping: float | None
    ) -> None:
        from kronfluence import FactorArguments, ScoreArguments, prepare_model
        from kronfluence.utils.state import State

        first = next(model.parameters())
        # The wrapper of a layer needs a parent to be put into, also where the model is a layer itself.
        self.losses = LinearLosses([f"0.{name}".rstrip(".") for name in layers])
        self.model = prepare_model(nn.Sequential(copy.deepcopy(model)), self.losses).to(first.device)
        dtype = torch.promote_types(first.dtype, torch.float32)
        of_factors = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        of_scores = ("per_sample_gradient", "precondition", "score")
        self.factor_args = FactorArguments(
            strategy, use_empirical_fisher=empirical, **{f"{name}_dtype": dtype for name in of_factors}
        )
        self.score_args = ScoreArguments(damping, **{f"{name}_dtype": dtype for name in of_scores})
        self.state = State.__new__(State)  # without __init__, which makes it the one of the process
        vars(self.state).update(device=first.device, num_processes=1, process_index=0, local_process_index=0)

    def fit(self, batches: Callable[[int], Iterable[Batch]]) -> Factors:
        """The factors of a strategy, by kind and layer.

        Args:
            batches: The training set for the first and the second pass, with "residuals" for the empirical
                Fisher matrix, otherwise "uniforms".
        """
        from kronfluence.factor.config import FactorConfig
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

        needs, factors = FactorConfig.CONFIGS[self.factor_args.strategy], {}
        if needs.requires_covariance_matrices:
            loader = Batches(batches(0))
            _, covariances = self._call(fit_covariance_matrices_with_loader, task=self.losses, loader=loader)
            factors = self._call(perform_eigendecomposition, covariance_factors=covariances)
        if needs.requires_lambda_matrices:
            _, corrected = self._call(
                fit_lambda_matrices_with_loader,
                task=self.losses,
                loader=Batches(batches(1)),
                eigen_factors=factors or None,
            )
            factors = {**factors, **corrected}
        return factors

    def scores(self, factors: Factors, query: Batch, train: Iterable[Batch]) -> Tensor:
        """`(J_x^T g)^T M (J_i^T r_i)`, `(n_query, n_train)`, of "gradients" g and "residuals" r."""
        from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

        size = len(query["gradients"])
        loaders = {"query_loader": Batches([query]), "train_loader": Batches(train)}
        return self._score(
            compute_pairwise_scores_with_loaders, factors, per_device_query_batch_size=size, **loaders
        )

    def self_scores(self, factors: Factors, batches: Iterable[Batch]) -> Tensor:
        """`(J_i^T g_i)^T M (J_i^T r_i)`, `(n,)`, of "gradients" g and "residuals" r."""
        from kronfluence.score.self import compute_self_measurement_scores_with_loaders

        return self._score(
            compute_self_measurement_scores_with_loaders, factors, train_loader=Batches(batches)
        )

    def _score(self, function: Callable[..., Any], factors: Factors, **loaders: Any) -> Tensor:
        fixed = {"task": self.losses, "score_args": self.score_args, "tracked_module_names": None}
        scores: Tensor = self._call(function, loaded_factors=factors, **fixed, **loaders)["all_modules"]
        return scores.to(self.state.device)

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        fixed = {"model": self.model, "state": self.state, "factor_args": self.factor_args}
        with warnings.catch_warnings(), _cheap_collections():
            warnings.filterwarnings("ignore", message=".*GradScaler", category=FutureWarning)
            return function(**fixed, **arguments, disable_tqdm=True)


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Spare the garbage collections of kronfluence, several a call, what was there before the call."""
    ours = gc.get_freeze_count() == 0  # what the caller has frozen stays so
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class LinearLosses:
    """What kronfluence calls a task: `-<logits, r>` in training and `-<logits, g>` as measurement.

    With `sample=True` r is `e_y - p` for a label y that the model draws.
    """

    enable_post_process_per_sample_gradient = False

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed over the batch."""
        logits = _logits(model, batch)
        if not sample:
            return _minus_product(logits, batch["residuals"])
        labels = drawn_labels(logits.detach(), batch["uniforms"])
        return _minus_product(logits, tempered_residuals(logits.detach(), labels))

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """Summed over the batch."""
        return _minus_product(_logits(model, batch), batch["gradients"])

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the layers to wrap."""
        return self.layers

    def get_attention_mask(self, batch: Batch) -> None:
        """None: padding is the model's own affair."""


def _minus_product(logits: Tensor, vectors: Tensor) -> Tensor:
    product: Tensor = (logits * vectors).sum()
    return -product


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(model, nn.Sequential)
    logits: Tensor = batch["examples"].logits(model[0])
    return logits


def drawn_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Labels from softmax(logits) by inversion of its distribution function, `(n,)` int64.

    Args:
        logits: `(n, n_classes)`.
        uniforms: In [0, 1), `(n,)`.

    >>> drawn_labels(torch.zeros(3, 2), torch.tensor([0.2, 0.5, 0.9])).tolist()
    [0, 1, 1]
    """
    below = logits.double().softmax(1).cumsum(1) <= uniforms.double()[:, None]
    labels: Tensor = below[:, :-1].sum(1)  # without the last: a sum may round to less than 1
    return labels


class Batches:
    """What kronfluence reads instead of a DataLoader; its length only feeds bars that are not shown."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.dataset = batches, self

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return 1


def tracked_layers(model: nn.Module, parameters: Collection[str], batch: ExampleBatch) -> list[str]:
    """Names of the layers that kronfluence can track: Linear and Conv2d that a forward pass calls.

    Args:
        model: In eval mode.
        parameters: Names of parameters; a layer takes part if its weight is among them.
        batch: Some examples to call the model with.

    Raises:
        ValueError: A layer that is called more than once (kronfluence would keep one of the calls), or none.
    """
    calls: Counter[str] = Counter()
    hooks = []
    for name, module in model.named_modules():
        if _supported(module) and f"{name}.weight".lstrip(".") in parameters:
            hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    try:
        with torch.no_grad():
            batch.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    remedy = "Leave it out with `layers`."
    for name, count in calls.items():
        if count > 1:
            raise bad_value("model", "call each layer once for EKFAC", f"{count} calls of {name!r}", remedy)
    if not calls:
        raise bad_value("model", "have Linear or Conv2d layers with chosen weights for EKFAC", "none")
    return [name for name, _ in model.named_modules() if name in calls]


def _supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear
