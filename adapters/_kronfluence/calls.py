"""Calls of kronfluence: its functions on loaders and tensors, not its `Analyzer`.

Nothing is written to disk or cached by name, a copy of the model is wrapped, the process-wide state (which
would fix the device at its first use) is neither read nor set, and nothing is logged or shown.

Batches are dicts: "examples", and beside them what the losses need of each example, `(n, ...)`. Those that
factors are made of have "labels", and "weights" w where examples count differently: F is a mean of w times
outer products of gradients, so that the loss has the root of w. So it has those of "positions", the weights
of several positions beside w, `(n, P)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...losses import CrossEntropy, Loss
from ...losses.summed_positions import SummedPositions
from ...losses.weights import times_root
from ...system.garbage import cheap_collections
from ..gradients.dense_sides import mean_weights, weights_of_rows
from ..gradients.traces import process_wide
from ..gradients.working_copies import independent_copy, widened
from .eigenbasis import in_eigenbasis
from .layers import Grouped, group_rows, replace_modules
from .rows import WeighedRows, divided_by_weights

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
        layout: How the rows that a layer sees follow the examples, one of `LAYOUTS`.
        loss: What the model was trained with; None for cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        strategy: str = "identity",
        empirical: bool = False,
        damping: float | None = None,
        layout: str = "rows",
        loss: Loss | None = None,
    ) -> None:
        from kronfluence import FactorArguments, ScoreArguments, prepare_model
        from kronfluence.module import TrackedModule
        from kronfluence.utils.state import State

        layers = list(layers)
        self.plain = model, {model.get_submodule(name): name for name in layers}
        first = next(model.parameters())
        # The wrapper of a layer needs a parent to be put into, also where the model is a layer itself.
        root, names = nn.Sequential(independent_copy(model)), [f"0.{name}".rstrip(".") for name in layers]
        groups, names = ([], names) if layout == "rows" else group_rows(root, names)
        self.losses = LinearLosses(names, groups, CrossEntropy() if loss is None else loss)
        self.alone = layout == "alone"
        self.model = prepare_model(root, self.losses).to(first.device)
        self.tracked = [module for module in self.model.modules() if isinstance(module, TrackedModule)]
        replace_modules(self.model, {module.original_module: module for module in self.tracked})
        self.losses.weighed = {str(module.name): WeighedRows(module) for module in self.tracked}
        dtype = torch.promote_types(first.dtype, torch.float32)
        of_factors = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        of_scores = ("per_sample_gradient", "precondition", "score")
        self.factor_args = FactorArguments(
            strategy, use_empirical_fisher=empirical, **{f"{name}_dtype": dtype for name in of_factors}
        )
        self.score_args = ScoreArguments(damping, **{f"{name}_dtype": dtype for name in of_scores})
        self.state = State.__new__(State)  # without __init__, which makes it the one of the process
        vars(self.state).update(device=first.device, num_processes=1, process_index=0, local_process_index=0)

    def fit(self, batches: Callable[[int], Iterable[Batch]], weight: float | None = None) -> Factors:
        """Factors of a strategy, by kind and layer.

        Args:
            batches: The training set for the first and the second pass, with "residuals" for the empirical
                Fisher matrix, otherwise "uniforms".
            weight: Sum of the "weights" of a pass; None where there are none.
        """
        from kronfluence.factor.config import FactorConfig
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

        needs, factors = FactorConfig.CONFIGS[self.factor_args.strategy], {}
        if needs.requires_covariance_matrices:
            loader = Batches(self._with_rows(self._pieces(batches(0))))
            _, covariances = self._call(fit_covariance_matrices_with_loader, task=self.losses, loader=loader)
            if self._weighs_rows or weight is not None:
                covariances = divided_by_weights(covariances, self.losses.weighed)
            factors = self._call(perform_eigendecomposition, covariance_factors=covariances)
        if needs.requires_lambda_matrices:
            with self._in_basis(factors):
                _, corrected = self._call(
                    fit_lambda_matrices_with_loader,
                    task=self.losses,
                    loader=Batches(self._pieces(batches(1))),
                )
            if weight is not None:
                seen = corrected["num_lambda_processed"]
                corrected["num_lambda_processed"] = {
                    n: torch.full_like(seen[n], weight, dtype=torch.float64) for n in seen
                }
            factors = {**factors, **corrected}
        return factors

    @contextmanager
    def _in_basis(self, factors: Factors, n_train: int = 0) -> Iterator[None]:
        """Inside, a strategy with eigenvectors and Lambda is the diagonal one in the eigenbasis."""
        given = self.factor_args
        if given.strategy != "ekfac":
            yield
            return
        self.factor_args = replace(given, strategy="diagonal")
        try:
            with in_eigenbasis(self.tracked, factors, n_train):
                yield
        finally:
            self.factor_args = given

    @property
    def _weighs_rows(self) -> bool:
        return isinstance(self.losses.loss, SummedPositions)

    def scores(self, factors: Factors, query: Batch, train: Iterable[Batch], n_train: int) -> Tensor:
        """`(J_x^T g)^T M (J_i^T r_i)`, `(n_query, n_train)`, of "gradients" g and "residuals" r."""
        with self._in_basis(factors, n_train):
            return self._pairwise(factors, query, train)["all_modules"].to(self.state.device)

    def scores_by_layer(self, query: Batch, train: Iterable[Batch]) -> list[Tensor]:
        """Terms of `scores` per layer, for strategies without factors."""
        self.score_args.compute_per_module_scores = True
        return list(self._pairwise({}, query, train).values())

    def _pairwise(self, factors: Factors, query: Batch, train: Iterable[Batch]) -> dict[str, Tensor]:
        from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

        queries = Batches(list(self._pieces([query])))
        self.score_args.query_gradient_accumulation_steps = len(queries)
        return self._score(
            compute_pairwise_scores_with_loaders,
            factors,
            per_device_query_batch_size=len(query["gradients"]),
            query_loader=queries,
            train_loader=Batches(self._pieces(train)),
        )

    def self_scores(self, factors: Factors, batches: Iterable[Batch]) -> Tensor:
        """`(J_i^T g_i)^T M (J_i^T r_i)`, `(n,)`, of "gradients" g and "residuals" r."""
        from kronfluence.score.self import compute_self_measurement_scores_with_loaders

        loader = Batches(self._pieces(batches))
        with self._in_basis(factors):
            found = self._score(compute_self_measurement_scores_with_loaders, factors, train_loader=loader)
        return found["all_modules"].to(self.state.device)

    def _pieces(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Batches, or single examples."""
        if not self.alone:
            return batches
        return (
            {name: part[i : i + 1] for name, part in batch.items()}
            for batch in batches
            for i in range(len(batch["examples"]))
        )

    def _with_rows(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches with weights of the rows of each layer in its covariances.

        Those of Linear layers are `weights_of_rows`; every row of a Conv2d layer has the mean weight of its
        example.
        """
        model, layers = self.plain
        inside = dict(zip(layers.values(), self.losses.layers, strict=True))
        linear: dict[nn.Module, str] = {
            layer: name for layer, name in layers.items() if isinstance(layer, nn.Linear)
        }
        for batch in batches:
            own = batch.get("positions")
            if own is not None:
                n, width = len(own), batch["residuals"].shape[1]
                rows = weights_of_rows(model, linear, batch["examples"], own, width)
                batch = {"weights": own.new_ones(n), **batch}
                batch["rows"] = dict.fromkeys(inside.values(), mean_weights(own)[:, None])
                batch["rows"].update({inside[name]: each.reshape(n, -1) for name, each in rows.items()})
            yield batch

    def _score(self, function: Callable[..., Any], factors: Factors, **loaders: Any) -> dict[str, Tensor]:
        fixed = {"task": self.losses, "score_args": self.score_args, "tracked_module_names": None}
        if self.factor_args.strategy == "diagonal":  # eigenvectors are in the layers
            factors = {name: factors[name] for name in ("lambda_matrix", "num_lambda_processed")}
        found: dict[str, Tensor] = self._call(function, loaded_factors=factors, **fixed, **loaders)
        return found

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        fixed = {"model": self.model, "state": self.state, "factor_args": self.factor_args}
        with process_wide, warnings.catch_warnings(), cheap_collections():
            warnings.filterwarnings("ignore", message=".*GradScaler", category=FutureWarning)
            return function(**fixed, **arguments, disable_tqdm=True)


def spectra(factors: Factors) -> Iterator[tuple[Tensor, bool]]:
    """Eigenvalues of F of each layer, `(n_out, n_in)`, and whether the layer has an eigenbasis."""
    for layer, total in factors.get("lambda_matrix", {}).items():
        seen = factors["num_lambda_processed"][layer]
        yield total.double() / seen, "activation_eigenvectors" in factors
    if "lambda_matrix" not in factors:
        for layer, a in factors.get("activation_eigenvalues", {}).items():
            b = factors["gradient_eigenvalues"][layer]
            yield torch.outer(b.double(), a.double()), True


class LinearLosses:
    """kronfluence `Task`: loss `-<logits, r>` in training, `-<logits, g>` as measurement.

    With `sample=True` r is that of a label that the model draws (`Loss.drawn_residuals`). Where a batch has
    weights, r is multiplied by their roots.

    Args:
        layers: Names of the layers to wrap.
        groups: Layers that must know the size of a batch.
        loss: What the model was trained with.
    """

    enable_post_process_per_sample_gradient = False

    def __init__(self, layers: Sequence[str], groups: Sequence[Grouped], loss: Loss) -> None:
        self.layers, self.groups, self.loss = list(layers), list(groups), loss
        self.weighed: dict[str, WeighedRows] = {}

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed over the batch."""
        weights = batch.get("weights")
        for name, layer in self.weighed.items():
            layer.weights, layer.rows = weights, batch.get("rows", {}).get(name)
        logits = self._logits(model, batch)
        vectors = batch["residuals"]
        if sample:
            vectors = self.loss.drawn_residuals(logits.detach(), batch["uniforms"])
        if "labels" in batch and not sample:
            vectors = self.loss.rooted(vectors, batch["labels"].to(vectors.device))
        for factor in (weights, batch.get("positions")):
            vectors = times_root(vectors, factor)
        return _minus_product(logits, vectors)

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """Summed over the batch."""
        return _minus_product(self._logits(model, batch), batch["gradients"])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, nn.Sequential)
        for group in self.groups:
            group.n = len(batch["examples"])
        return widened(batch["examples"].logits(model[0]))

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the layers to wrap."""
        return self.layers

    def get_attention_mask(self, batch: Batch) -> dict[str, Tensor] | None:
        """None: rows have weights (`WeighedRows`)."""
        return None


def _minus_product(logits: Tensor, vectors: Tensor) -> Tensor:
    product: Tensor = (logits * vectors).sum()
    return -product


class Batches:
    """Batches that kronfluence reads instead of a DataLoader; the length of a stream is arbitrary."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.dataset = batches, self

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, list) else 1
