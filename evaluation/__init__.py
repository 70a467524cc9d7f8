"""One harness that measures every method the same way: fidelity, cost, controls and ceilings."""

from .calibration import CalibrationResult, calibration
from .comparison import Comparison, compare
from .contenders import CONTENDERS, Contender
from .cost import Cost, measure_cost
from .counterfactual_drop import CounterfactualResult, counterfactual
from .counterfactual_retraining import measure_counterfactual
from .explanation import Explanation, explain
from .leakage_benchmark import measure_leakage
from .leakage_detection import LeakageResult, leakage
from .linear_datamodeling import LDSResult, lds
from .linearized_influence import LinearizedInfluenceResult, linearized_influence_correlation
from .mislabel_benchmark import measure_mislabel
from .mislabel_detection import MislabelResult, mislabel
from .retraining import RetrainingPlan, train_attributed, train_model
from .tasks import Task, load_task

__all__ = [
    "CONTENDERS",
    "CalibrationResult",
    "Comparison",
    "Contender",
    "Cost",
    "CounterfactualResult",
    "Explanation",
    "LDSResult",
    "LeakageResult",
    "LinearizedInfluenceResult",
    "MislabelResult",
    "RetrainingPlan",
    "Task",
    "calibration",
    "compare",
    "counterfactual",
    "explain",
    "lds",
    "leakage",
    "linearized_influence_correlation",
    "load_task",
    "measure_cost",
    "measure_counterfactual",
    "measure_leakage",
    "measure_mislabel",
    "mislabel",
    "train_attributed",
    "train_model",
]
