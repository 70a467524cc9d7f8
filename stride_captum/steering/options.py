"""`Trained`: options of the paper's operators (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..designs import Partition, RandomSubsets, Subsets
from ..errors import bad_choice, bad_type, bad_value
from ..features.options import Features
from ..losses import Loss
from ..losses.summed_positions import SummedPositions
from ..operators import Operators, TrainingSet
from ..options import check_choice, check_count, check_number
from ..recovery.estimators import Lasso, Recovery
from ..system.saved_values import saved_as
from .estimate import from_fewer_steps
from .operators import Encoder, Steering
from .trained import TrainedOperators, fit_trained

if TYPE_CHECKING:
    from ..influence.estimate import Estimate
    from ..stride import STRIDE

Linearity = Literal["example", "subset"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "tf32", "bfloat16"]

_TABLE_4: dict[str, dict[str, Any]] = {
    "mnist": {"rank": 32, "learning_rate": 0.005, "iterations": 250, "linearity_weight": 10.0},
    "cifar10": {"rank": 64, "learning_rate": 0.001, "iterations": 200, "linearity_weight": 1.0},
}


@saved_as("options.trained")
@dataclass(frozen=True, kw_only=True)
class Trained(Operators):
    """Steering operators trained on subsets, and the recovery of scores from their responses (Algorithm 1).

    The loss of an example with several positions is the sum over those that have a label, times their
    weights; all losses are divided by the mean weight of an example. Subsets are of examples.

    Attributes:
        rank: r, the width of phi (Table 4).
        encoder: "shared": one phi for all subsets, trained jointly (Appendix A, E.1); "per-subset": one for
            each (Algorithm 1, line 5).
        steering: "logits": z + a_k^T phi(h) (section 3); "representation": the features change,
            h + phi(h)^T alpha_k (E.1, equation 6).
        learning_rate: Adam's step size (Table 4).
        schedule: "constant" (the paper states no schedule), or "cosine": the step size falls to 0 along half
            a cosine, which removes most of the batches' noise from the operators.
        iterations: Steps of stage 1 (Table 4).
        batch_size: |B_S| = |B_R| of Algorithm 1, line 6. With positions, the examples of a batch are as many
            as have so many rows on average, at least one, so that a step costs as much as without.
        fidelity_weight: Factor of equation (1): 1 in the paper, small for first-order operators.
        stability_weight: lambda_stab (Table 4).
        linearity_weight: lambda_lin (Table 4: 10 for MNIST, 1 for CIFAR-10).
        weight_decay: Factor of `1/2 |a_k|^2`; 0 in the paper.
        linearity: How equation (4) is read: "example" (y_k holds the responses of the members) or "subset" (y
            holds the responses of all subsets; F.3).
        sketch_width: Width of R (A.3).
        sketch_ridge: gamma of equation (4).
        precision: "float32", "tf32" or "bfloat16" for stage 1.
        subsets: `RandomSubsets`, `Partition` (section 3) or `LeftRegular`.
        recovery: `Lasso` (Algorithm 1, line 10) or `Ridge`.
        seed: Of subsets, initial values and batches.
        preset: Data of Table 4, set by `paper`: `STRIDE` then reads the penultimate layer and attributes the
            logit of the predicted class by default, as section 3 does.

    >>> Trained(rank=32, subsets=Partition(50, size=100), recovery=Lasso(alpha="bic")).recovery.alpha
    'bic'
    """

    name: ClassVar[str] = "trained"
    takes_positions: ClassVar[bool] = True
    all_columns: ClassVar[bool] = True

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
    precision: Precision = "float32"
    subsets: Subsets = field(default_factory=RandomSubsets)
    recovery: Recovery = field(default_factory=Lasso)
    seed: int = 0
    preset: Literal["mnist", "cifar10"] | None = None

    def check(self) -> None:
        """Refuse values out of their range."""
        for name, kind in (
            ("encoder", Encoder),
            ("steering", Steering),
            ("linearity", Linearity),
            ("schedule", Schedule),
            ("precision", Precision),
        ):
            check_choice(name, getattr(self, name), get_args(kind))
        for name in ("learning_rate", "sketch_ridge"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("fidelity_weight", "stability_weight", "linearity_weight", "weight_decay"):
            check_number(name, getattr(self, name), positive=False)
        for name in ("rank", "iterations", "batch_size", "sketch_width"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        if not isinstance(self.subsets, Subsets):
            raise bad_type("subsets", "be RandomSubsets, Partition or LeftRegular", self.subsets)
        if not isinstance(self.recovery, Recovery):
            raise bad_type("recovery", "be Lasso(...) or Ridge(...)", self.recovery)
        if self.preset is not None:
            check_choice("preset", self.preset, list(_TABLE_4))

    def check_loss(self, loss: Loss) -> None:
        """Refuse every loss but plain cross-entropy, which stage 1 trains with."""
        of_one = loss.position if isinstance(loss, SummedPositions) else loss
        if not of_one.plain:
            must = (
                "be ClosedForm(...) for a loss other than cross-entropy of one class an example or position"
            )
            raise bad_value("operators", must, repr(self.name), "Leave `operators` out.")

    @classmethod
    def paper(cls, data: str, **changes: Any) -> Trained:
        """The paper's setting: Algorithm 1 with Table 4 and B.2.

        Choices that the paper leaves open: one phi for all subsets, trained jointly (E.1);
        |B_S| = |B_R| = 100; alpha = 0.01 alpha_max; gamma = 1; equation (4) read per example.

        Args:
            data: "mnist" or "cifar10".
            **changes: Options that replace the preset's.

        >>> Trained.paper("mnist").rank
        32
        """
        if data not in _TABLE_4:
            raise bad_choice("data", data, list(_TABLE_4))
        preset: dict[str, Any] = {
            "schedule": "constant",
            "stability_weight": 1.0,
            "linearity": "example",
            "subsets": Partition(50, size=100),
            "recovery": Lasso(alpha=0.01, center=False),
            "preset": data,
        }
        return cls(**{**preset, **_TABLE_4[data], **changes})

    def defaults(self) -> dict[str, Any]:
        """Section 3 for the paper's presets: logit of the predicted class, penultimate layer."""
        if self.preset is None:
            return {}
        return {"response": "logit", "target": "predicted", "features": Features(select="penultimate")}

    def fit(self, training: TrainingSet) -> TrainedOperators:
        """Draw the subsets and train their operators."""
        return fit_trained(self, training)

    def estimate(self, method: STRIDE, n_test: int, k: int | None) -> Estimate | None:
        """Extrapolate from runs with few steps."""
        return from_fewer_steps(method, self, n_test, k)
