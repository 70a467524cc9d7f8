"""Options of STRIDE: one frozen dataclass that validates itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any, Literal, get_args

import numpy as np

from .errors import bad_choice, bad_value, nearest
from .system.memory import parse_bytes as parse_bytes

Operators = Literal["newton", "trained"]
Response = Literal["margin", "logit", "probability", "log-probability", "loss"]
Residuals = Literal["training", "temperature", "leave-one-out", "both"]
Curvature = Literal["identity", "kronecker", "eigenvalue-corrected", "class-blocks", "gauss-newton"]
FeatureLayers = Literal["all", "penultimate"]
Encoder = Literal["shared", "per-subset"]
Steering = Literal["logits", "representation"]
Linearity = Literal["example", "subset"]
Schedule = Literal["constant", "cosine"]
Subsets = Literal["random", "partition"]
Coverage = Literal["partition", "paper"]
Recovery = Literal["lasso", "ridge"]
AlphaRule = Literal["bic", "aic", "cross-validation"]


@dataclass(frozen=True, kw_only=True)
class STRIDEConfig:
    """Every option of `STRIDE`, with the passage of the paper it follows.

    Attributes:
        operators: "newton", the closed form; or "trained", Algorithm 1.
        response: Default response of `influence`: "margin" (`z_c - log sum_{j != c} exp z_j`), "logit",
            "probability", "log-probability" or "loss".
        target: Default class c of the response: "label" of the test example, or "predicted".
        normalize: Default normalisation of `influence`: None or "cosine".
        feature_layers: Which features h(x) are read when `layers` is not given: "all" (what every
            weight layer reads) or "penultimate" (what the last one reads; B.1).
        max_width: Bound on the total width of all features that "all" selects.
        memory_budget: Memory for one block of work: bytes, "512MiB", or "auto" (see
            `stride_captum.system.memory`).

        projection: How a layer wider than `projection_width` is brought to it: None (not at all), "random" or
            "pca" (see `stride_captum.features.projection`); `projection_error_` says what that does to the
            kernel.
        projection_width: Features of such a layer afterwards.

        residuals: Closed form. What stands for `e_y - p` of a training example: "training" (the
            model's own), "temperature" (p = softmax(z / T)), "leave-one-out" (of a ridge head on all
            layers but the last) or "both" (weighted mean of the last two).
        temperature: Closed form. T; None means 2, or matched on `held_out` data where given.
        damping: Closed form. lambda, relative to the mean diagonal of the curvature.
        head_damping: Closed form. lambda of the ridge head, relative likewise.
        curvature: Closed form. How the Fisher `E[phi phi^T (x) (diag p - p p^T)]` is approximated:
            "identity" (A (x) s I), "kronecker" (A (x) Sigma), "eigenvalue-corrected" (exact diagonal in
            the eigenbasis of A (x) Sigma), "class-blocks" (one block a class) or "gauss-newton" (exact,
            by conjugate gradients). The last three cost n_classes products or more.
        threshold: Closed form. The Lasso's alpha, which for singleton subsets is a soft threshold
            on the scores; 0 keeps them dense.

        rank: Trained. r, the width of phi (Table 4).
        encoder: Trained. "shared": one phi for all subsets, trained jointly (Appendix A, E.1);
            "per-subset": a fresh one for each (Algorithm 1, line 5).
        steering: Trained. "logits": z + a_k^T phi(h) (section 3); "representation": the features are
            moved, h + phi(h)^T alpha_k (E.1, equation 6).
        learning_rate: Trained. Adam's step size (Table 4).
        schedule: Trained. "constant" (the paper states no schedule), or "cosine": the step size falls to
            0 along half a cosine, which removes most of the batches' noise from the operators.
        iterations: Trained. Steps of stage 1 (Table 4).
        batch_size: Trained. |B_S| = |B_R| of Algorithm 1, line 6.
        fidelity_weight: Trained. Factor of equation (1): 1 in the paper, small for first-order operators.
        stability_weight: Trained. lambda_stab (Table 4).
        linearity_weight: Trained. lambda_lin (Table 4: 10 for MNIST, 1 for CIFAR-10).
        weight_decay: Trained. Factor of `1/2 |a_k|^2`; 0 in the paper.
        linearity: Trained. How equation (4) is read: "example" (y_k holds the responses of the
            members) or "subset" (y holds the responses of all subsets; F.3).
        sketch_width: Trained. Design of R (A.3).
        sketch_ridge: Trained. gamma of equation (4).
        precision: Trained. "float32", "tf32" or "bfloat16" for stage 1.

        subsets: Trained. "random" (independent draws) or "partition" (section 3).
        n_subsets: Trained. K.
        subset_size: Trained. |S_k|; None means 10 n_train / K for "random", so that each example is in
            about ten subsets (at most n_train / 2), and n_train / K for "partition".
        coverage: Trained, partition. "partition" covers every example (|S_k| = n_train / K); "paper"
            takes `subset_size` examples a subset and leaves the rest with score 0 (B.2).
        recovery: Trained. "lasso" (Algorithm 1, line 10) or "ridge".
        alpha: Trained. Penalty of the recovery, relative to the problem: a fraction of alpha_max for the
            Lasso, a multiple of `recovery.ridge_scale` for ridge. Or, for the Lasso, the rule that chooses
            it: "bic", "aic" or "cross-validation" over subsets.
        center: Trained. Recover from responses and memberships with their means over subsets
            removed (an intercept). The paper has none.

        seed: Seed of subsets, initial values and batches.

    >>> STRIDEConfig(damping=0.1, residuals="temperature").damping
    0.1
    >>> STRIDEConfig.paper("mnist").rank
    32
    """

    operators: Operators = "newton"
    response: Response = "margin"
    target: Literal["label", "predicted"] = "label"
    normalize: Literal["cosine"] | None = None
    feature_layers: FeatureLayers = "all"
    max_width: int = 4096
    memory_budget: int | str = "256MiB"

    projection: Literal["random", "pca"] | None = None
    projection_width: int = 512

    residuals: Residuals = "both"
    temperature: float | None = None
    damping: float = 0.3
    head_damping: float = 0.1
    curvature: Curvature = "kronecker"
    threshold: float = 0.0

    rank: int = 64
    encoder: Encoder = "shared"
    steering: Steering = "logits"
    learning_rate: float = 0.005
    schedule: Schedule = "cosine"
    iterations: int = 250
    batch_size: int = 100
    fidelity_weight: float = 1.0
    stability_weight: float = 1.0
    linearity_weight: float = 1.0
    weight_decay: float = 0.0
    linearity: Linearity = "subset"
    sketch_width: int = 64
    sketch_ridge: float = 1.0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    subsets: Subsets = "random"
    n_subsets: int = 500
    subset_size: int | None = None
    coverage: Coverage = "partition"
    recovery: Recovery = "lasso"
    alpha: float | AlphaRule = 0.03
    center: bool = True

    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # numbers of NumPy would not be saved as they are
                object.__setattr__(self, field.name, value.item())
        choices: dict[str, Sequence[Any]] = {
            "operators": get_args(Operators),
            "response": get_args(Response),
            "target": ("label", "predicted"),
            "feature_layers": get_args(FeatureLayers),
            "residuals": get_args(Residuals),
            "curvature": get_args(Curvature),
            "encoder": get_args(Encoder),
            "steering": get_args(Steering),
            "linearity": get_args(Linearity),
            "schedule": get_args(Schedule),
            "precision": ("float32", "tf32", "bfloat16"),
            "subsets": get_args(Subsets),
            "coverage": get_args(Coverage),
            "recovery": get_args(Recovery),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise bad_choice(name, getattr(self, name), allowed)
        if self.projection not in (None, "random", "pca"):
            raise bad_value("projection", "be None, 'random' or 'pca'", repr(self.projection))
        if self.projection and self.steering == "representation":
            raise bad_value("projection", "be None where steering='representation'", repr(self.projection))
        if self.normalize not in (None, "cosine"):
            raise bad_value("normalize", "be None or 'cosine'", repr(self.normalize))
        for name in ("damping", "head_damping", "learning_rate", "sketch_ridge"):
            _check_number(name, getattr(self, name), positive=True)
        for name in ("threshold", "fidelity_weight", "stability_weight", "linearity_weight", "weight_decay"):
            _check_number(name, getattr(self, name), positive=False)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, positive=True)
        for name in (
            "max_width",
            "projection_width",
            "rank",
            "iterations",
            "batch_size",
            "sketch_width",
            "n_subsets",
        ):
            _check_count(name, getattr(self, name))
        if self.subset_size is not None:
            _check_count("subset_size", self.subset_size)
        if not isinstance(self.center, bool):
            raise bad_value("center", "be True or False", repr(self.center))
        _check_count("seed", self.seed, least=0)
        self._check_alpha()
        if self.coverage == "paper" and (self.subsets != "partition" or self.subset_size is None):
            raise bad_value(
                "coverage",
                "be 'paper' only with subsets='partition' and a subset_size",
                f"subsets={self.subsets!r}, subset_size={self.subset_size}",
                "Use STRIDEConfig.paper('mnist').",
            )
        parse_bytes(self.memory_budget)

    def _check_alpha(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha not in get_args(AlphaRule):
                raise bad_choice("alpha", self.alpha, get_args(AlphaRule))
            if self.recovery == "ridge":
                remedy = "The rules choose among fractions of the Lasso's alpha_max."
                raise bad_value("alpha", "be a number for recovery='ridge'", repr(self.alpha), remedy)
        elif not (_is_number(self.alpha) and 0 <= self.alpha < float("inf")):
            raise bad_value("alpha", "be a fraction of alpha_max of at least 0, or a rule", repr(self.alpha))
        elif self.alpha == 0:
            whose = "the Lasso" if self.recovery == "lasso" else "ridge"
            remedy = "Without a penalty many weights fit: use recovery='ridge' with a small one."
            raise bad_value("alpha", f"be above 0 for {whose}", 0, remedy)

    def _repr_html_(self) -> str:
        every, default = self.to_dict(), type(self)().to_dict()
        changed = {name: value for name, value in every.items() if value != default[name]}
        return (
            f"<b>STRIDEConfig</b>{html_table(changed) if changed else ', all defaults'}"
            f"<details><summary>all {len(every)} options</summary>{html_table(every)}</details>"
        )

    @classmethod
    def paper(cls, data: str, **changes: Any) -> STRIDEConfig:
        """The paper's own setting: Algorithm 1 with Table 4 and B.2.

        What the paper leaves open is fixed so: one phi for all subsets, trained jointly (E.1); the
        shift of the logit of the predicted class as response (section 3); |B_S| = |B_R| = 100;
        alpha = 0.01 alpha_max; gamma = 1; equation (4) read per example.

        Args:
            data: "mnist" or "cifar10".
            **changes: Options that replace the preset's.

        >>> STRIDEConfig.paper("mnist").rank
        32
        """
        table4: dict[str, dict[str, Any]] = {
            "mnist": {"rank": 32, "learning_rate": 0.005, "iterations": 250, "linearity_weight": 10.0},
            "cifar10": {"rank": 64, "learning_rate": 0.001, "iterations": 200, "linearity_weight": 1.0},
        }
        if data not in table4:
            raise bad_choice("data", data, list(table4))
        preset: dict[str, Any] = {
            "operators": "trained",
            "response": "logit",
            "target": "predicted",
            "feature_layers": "penultimate",
            "schedule": "constant",
            "stability_weight": 1.0,
            "linearity": "example",
            "subsets": "partition",
            "coverage": "paper",
            "n_subsets": 50,
            "subset_size": 100,
            "alpha": 0.01,
            "center": False,
        }
        return cls(**{**preset, **table4[data], **changes})

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> STRIDEConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: An option that does not exist.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise bad_value("options", "hold options of STRIDEConfig", repr(name), nearest(name, known))
        return cls(**options)


def html_table(values: dict[str, Any]) -> str:
    """A table of names and values, for a notebook."""
    left = 'style="text-align:left"'
    rows = (
        f"<tr><th {left}>{name}</th><td {left}><code>{escape(repr(v))}</code></td></tr>"
        for name, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    above = _is_number(value) and (value > 0 if positive else value >= 0)
    if not above or value == float("inf"):
        must = "be a positive number" if positive else "be a number of at least 0"
        raise bad_value(name, must, repr(value))


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_value(name, f"be an integer of at least {least}", repr(value))
