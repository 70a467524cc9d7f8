"""True EKFAC (George et al., 2018; Grosse et al., 2023; E.2 of the paper), computed by kronfluence.

    score(x, i) = 1/W (J_x^T g)^T (F + lambda I)^-1 (J_i^T r_i),    F = Q diag(Lambda) Q^T, layer by layer

where Q is the eigenbasis of the Kronecker factors of a layer's Fisher matrix and Lambda holds the mean
squares of gradients in it. Weights of examples multiply r_i and their terms in all of these means, class
weights and weights of positions those of the positions of an example; an example whose labels are all ignored
has weight 0.
kronfluence is asked for products of the gradients of two linear losses, `-<logits, r_i>` and `-<logits, g>`,
whose gradients are those of the loss and of the response.

kronfluence knows Linear and Conv2d layers, each with its bias. Norm layers, embeddings, convolutions that
are grouped or not padded with zeros, and subclasses of the two (as inside attention) take no part. What it
makes of the gradients of a few examples is compared with autograd. Positions that no label depends on, as
padding, are left out of the Kronecker factors of Linear layers; those of Conv2d layers are over all pixels,
each with the mean weight of its example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import bad_choice, bad_value
from ..influence.method import Query
from ..system.devices import float64_device
from ..system.packages import install_command
from ._kronfluence.calls import Batch, Kronfluence, spectra
from ._kronfluence.layers import LAYOUTS, tracked_layers
from .controls import input_keys
from .gradients.checks import agree, check_gradients
from .gradients.damped import DampedMethod
from .gradients.method import GradientState
from .gradients.per_example import flat, gradients_one_by_one
from .gradients.safe_damping import check_damping, given_damping, least_lambda, rounding_of

STRATEGIES = ("ekfac", "kfac", "diagonal", "identity")
FISHERS = ("sampled", "empirical")


class EKFAC(DampedMethod[float | None]):
    """Influence functions with the eigenvalue-corrected Kronecker factors of kronfluence.

    `fit` makes two passes over the training set; every batch of test points one more, because no gradients
    are stored. Self-influence, and the norms of `normalize="cosine"`, take two backward passes. In a layer of
    i inputs and o outputs, each pair of a test point and an example takes `i o` products, in the eigenbasis
    (`_kronfluence.eigenbasis`). `damping` may be set anew without another `fit`.

    Args:
        model: As for every method; a Linear or Conv2d layer must not be called twice in a forward pass.
        train_dataset: As for every method.
        damping: lambda, absolute. None takes a tenth of each layer's mean eigenvalue: Lambda spans many
            decades, and its lower end, which kronfluence's own 1e-8 takes in, is noise that 1/Lambda
            would blow up.
        strategy: "ekfac"; "kfac", without the corrected eigenvalues (for a convolution off in scale by its
            number of positions); "diagonal", without the eigenbasis; "identity", gradients alone.
        fisher: "sampled" draws every label from the model, once for Q and once for Lambda; "empirical"
            takes the training labels.
        seed: Of the drawn labels, which depend on it and on the inputs of the example alone.
        **options: Those of `GradientMethod`. A layer takes part, with its bias, if its weight is chosen.

    Attributes:
        parameters_: Names of the parameters that take part.
        layout_: How the rows that layers see follow the examples (`_kronfluence.layers`); "alone" is slow.

    Raises:
        ImportError: kronfluence is not installed.
        ValueError: A device without float64, such as mps; in `fit`, a training set of which no label counts.

    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> method = EKFAC(model, train, residuals="temperature")
    >>> method.influence(test.tensors).shape
    torch.Size([7, 48])
    """

    # kronfluence reads the training set itself and returns all columns at once.
    reads_training_data = False

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        *,
        damping: float | None = None,
        strategy: str = "ekfac",
        fisher: str = "sampled",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, **options)
        try:
            import kronfluence  # noqa: F401
        except ImportError as error:
            hint = f"EKFAC needs kronfluence: {install_command('kronfluence')}"
            raise ImportError(f"{hint} ({error}).") from error
        device = self._work_device()
        if float64_device(device) != device:
            must = "have float64, which kronfluence computes with"
            raise bad_value("device", must, repr(str(device)), "Pass device='cpu'.")
        for name, value, choices in (("strategy", strategy, STRATEGIES), ("fisher", fisher, FISHERS)):
            if value not in choices:
                raise bad_choice(name, value, choices)
        if not isinstance(seed, int) or seed < 0:
            raise bad_value("seed", "be an integer of at least 0", repr(seed))
        self.damping, self.strategy, self.fisher, self.seed = damping, strategy, fisher, seed

    @override
    def _checked_damping(self, value: Any) -> float | None:
        if value is None:
            return None
        return given_damping(value, positive=False, otherwise="None for a tenth of the mean eigenvalue")

    @override
    def _damped(self, state: GradientState, damping: float | None) -> Any:
        self._check_damping(damping, state)
        return state.kernel  # kronfluence damps it in each query

    def _check_damping(self, damping: float | None, state: GradientState) -> None:
        """Refuse a lambda at which rounding errors would decide."""
        rounding = rounding_of(state.residuals.dtype)
        parts = []
        for spectrum, rotated in spectra(state.kernel):
            given = 0.1 * float(spectrum.mean()) if damping is None else damping
            if float(spectrum.min().clamp_min(0)) + given <= 0:
                raise bad_value("damping", "be above 0 where gradients are 0 in all examples", damping)
            parts.append((least_lambda(spectrum, rounding) if rotated else 0.0, given, 1.0))
        check_damping(damping, parts, rounding, "Or take strategy='diagonal'.")

    @override
    def fit_checkpoint(self, model: nn.Module, show_progress: bool) -> GradientState:
        state = super().fit_checkpoint(model, show_progress)
        self._check_weight()
        layers = tracked_layers(model, self.parameters_, self._probe)
        self.parameters_ = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in layers]
        kinds = {str(p.dtype) for n, p in model.named_parameters() if n in self.parameters_}
        if len(kinds) > 1:
            got, remedy = ", ".join(sorted(kinds)), "Cast it (`model.float()`), or choose by `layers`."
            raise bad_value("model", "have parameters of one precision for EKFAC", got, remedy)
        self.layout_ = self._layout_of(model, layers)
        try:
            state.kernel = self._kronfluence(model).fit(
                lambda draw: self._fisher_batches(state.loss_residuals, draw, show_progress),
                None if self._omega is None else self.weight_,
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # what eigh says of NaN
            self._find_bad_gradient(model, state.loss_residuals)
            raise
        self._check_damping(self.damping, state)
        return state

    def _layout_of(self, model: nn.Module, layers: list[str]) -> str:
        """The layout in which products of the gradients of a few examples are those of autograd."""
        vectors = self._probe_vectors(model)
        wanted = self._plain_products(model, layers, vectors)
        few: Batch = {"gradients": vectors, "residuals": vectors, "examples": self._probe}
        wrong: list[str] = layers
        fault: Exception | None = None
        for layout in LAYOUTS:
            try:
                found = Kronfluence(model, layers, layout=layout).scores_by_layer(few, [few])
            except Exception as error:  # of kronfluence or of a reshape: not in this layout
                fault = fault or error
                continue
            wrong = [
                n for n, a, b in zip(layers, found, wanted, strict=True) if not agree(a, b, self._rounding)
            ]
            if not wrong:
                return layout
        raise bad_value(
            "model",
            "use a layer on rows that are each of one example, and its weight nowhere else, for EKFAC",
            f"{wrong[0]!r}, whose gradients kronfluence gets wrong",
            "Leave it out with `layers`.",
        ) from fault

    def _plain_products(self, model: nn.Module, layers: list[str], vectors: Tensor) -> list[Tensor]:
        """Products of the gradients of a few examples by autograd, `(n, n)` for each layer."""
        gradients = gradients_one_by_one(model, self.parameters_, self._probe, vectors)
        check_gradients(flat(gradients), 0)
        rows = [
            flat({name: g for name, g in gradients.items() if name.rpartition(".")[0] == layer})
            for layer in layers
        ]
        return [part @ part.T for part in rows]

    def _kronfluence(self, model: nn.Module) -> Kronfluence:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in self.parameters_)
        empirical = self.fisher == "empirical"
        return Kronfluence(model, layers, self.strategy, empirical, self.damping, self.layout_, self.loss)

    def _fisher_batches(self, residuals: Tensor, draw: int, show_progress: bool) -> Iterator[Batch]:
        weights = {} if self._omega is None else {"weights": self._omega}
        for batch in self._train_sides(show_progress, residuals=residuals, **weights):
            # By the inputs, so that neither batches nor the order of the examples change the labels.
            keys = input_keys(batch["examples"])
            k = self.loss.n_draws(residuals.shape[1])
            uniforms = np.stack([np.random.default_rng([self.seed, draw, key]).random(k) for key in keys])
            labels = self.train_labels(batch["examples"], residuals.shape[1])
            drawn = residuals.new_tensor(uniforms, dtype=torch.float64)
            own = self._position_weights(labels, batch["examples"].columns)
            positions = {} if own is None else {"positions": own}
            yield {**batch, "uniforms": drawn, "labels": labels, **positions}

    def _train_sides(self, show_progress: bool = False, **vectors: Tensor) -> Iterator[Batch]:
        for rows, batch in self.train_blocks(self.n_train_, show_progress):
            # kronfluence takes the number of examples from what stands first.
            yield {**{name: every[rows] for name, every in vectors.items()}, "examples": batch}

    def holds_all_columns(self) -> bool:
        """Yes: kronfluence gives all columns."""
        return True

    @override
    def prepare_query(self, state: GradientState, model: nn.Module, batch: Any, query: Query) -> EKFACTest:
        vectors = self._response_gradients(model, batch, query)
        points = {"gradients": vectors, "examples": batch}
        train = self._train_sides(residuals=state.residuals)
        scores = self._kronfluence(model).scores(state.kernel, points, train, self.n_train_)
        scores = scores / self.weight_
        return EKFACTest(scores, lambda: self._norms_of(state, model, [{**points, "residuals": vectors}]))

    def _self_scores(self, state: GradientState, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        return self._kronfluence(model).self_scores(state.kernel, batches) / self.weight_

    @override
    def batch_self_influence(
        self, state: GradientState, model: nn.Module, batch: Any, rows: slice | None
    ) -> Tensor:
        left, right = self._both_residuals(state, model, batch, rows)
        return self._self_scores(state, model, [{"gradients": left, "residuals": right, "examples": batch}])

    def _norms_of(self, state: GradientState, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        return self._self_scores(state, model, batches).clamp_min(0).sqrt()

    def _inverse_norms(self, state: GradientState, prepared: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
        if state.norms is None:
            both = self._train_sides(gradients=state.residuals, residuals=state.residuals)
            state.norms = self._norms_of(state, model, both)
        return super()._inverse_norms(state, prepared, model)

    @override
    def test_norms(self, state: GradientState, prepared: Any) -> Tensor:
        norms: Tensor = prepared.norms()
        return norms

    @override
    def settings(self) -> dict[str, Any]:
        options = ("damping", "strategy", "fisher", "seed")
        return {**super().settings(), **{name: getattr(self, name) for name in options}}


@dataclass
class EKFACTest:
    """A batch of test points.

    Attributes:
        scores: `(n_test, n_train)`.
        norms: Gives the norms of the gradients of the response, `(n_test,)`.
    """

    scores: Tensor
    norms: Callable[[], Tensor]
