"""One method at one retraining budget: a row of the ladder, and a point of its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...measures.calibration import CalibrationResult
from ...measures.cost import Cost
from ...measures.linear_datamodeling import LDSDifference, LDSResult
from .lds import plain_gap

#: Attributes of a row that are not plain values.
_NESTED = ("lds", "calibration", "cost", "against_first", "over_last")


@dataclass(frozen=True)
class BudgetRow:
    """One method at one budget.

    Attributes:
        name: The method; with its suffix if it has out-of-sample residuals in place of the published ones.
        source: What its scores are averaged over: "last checkpoint", "checkpoints", "cross-fitted" (models of
            parts), "checkpoints and parts" (the parts with `weight_of_parts`) or "refined" (the latter, or
            cross-fitted scores where there are no checkpoints, corrected by the responses of the models of
            parts).
        trainings: The budget: cost of the further models, in trainings on the whole training set.
        n_models: Models or checkpoints whose scores are averaged.
        options: The options that were chosen; those of the parts, if there are checkpoints beside them.
        checkpoint_options: Options of the checkpoints beside models of parts; None without both.
        normalize: As for `influence`, chosen likewise; of parts and checkpoints together if there are both.
        lds: Linear datamodeling score.
        calibration: Whether predicted effects have the right size on the same halves; None for scores
            without a unit (`normalize="deviation"`).
        against_first: LDS of the first method with the same models minus this one's; None for the first.
        over_last: This LDS minus that of the same method on the last checkpoint; None for the last
            checkpoint.
        cost: Medians over the attributed models.
    """

    name: str
    source: str
    trainings: float
    n_models: int
    options: Mapping[str, Any]
    checkpoint_options: Mapping[str, Any] | None
    normalize: str | None
    lds: LDSResult
    calibration: CalibrationResult | None
    against_first: LDSDifference | None
    over_last: LDSDifference | None
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{k: v for k, v in vars(self).items() if k not in _NESTED},
            "lds": self.lds.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "cost": self.cost.to_dict(),
            "first_method_less_this": _plain(self.against_first),
            "this_less_last_checkpoint": _plain(self.over_last),
        }


def _plain(gap: LDSDifference | None) -> dict[str, Any] | None:
    return None if gap is None else plain_gap(gap.value, gap.interval)
