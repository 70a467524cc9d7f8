"""Evaluation of attribution methods: fidelity, cost, controls and ceilings, in the same way for all."""

from .comparison.compare import compare
from .comparison.explain import Explanation, explain
from .comparison.plan import MEASURES
from .comparison.results import Comparison
from .comparison.runs.counterfactual import measure_counterfactual
from .comparison.runs.leakage import measure_leakage
from .comparison.runs.mislabel import measure_mislabel
from .comparison.shared.measure import Measure
from .comparison.shared.methods import METHODS, MethodSpec
from .measures.calibration import CalibrationResult, calibration
from .measures.cost import Cost, measure_cost
from .measures.counterfactual_drop import CounterfactualResult, counterfactual
from .measures.leakage_rank import LeakageResult, leakage
from .measures.linear_datamodeling import LDSResult, lds
from .measures.linearized_influence import LinearizedInfluenceResult, linearized_influence_correlation
from .measures.mislabel_precision import MislabelResult, mislabel
from .retraining.attributed_models import train_attributed
from .retraining.cross_fitting import CrossFitted, retrain
from .retraining.plan import RetrainingPlan
from .retraining.task_parts import TaskTraining
from .retraining.training import train_model
from .tasks.loading import load_task
from .tasks.task import Task

__all__ = [
    "MEASURES",
    "METHODS",
    "CalibrationResult",
    "Comparison",
    "Measure",
    "MethodSpec",
    "Cost",
    "CounterfactualResult",
    "CrossFitted",
    "Explanation",
    "LDSResult",
    "LeakageResult",
    "LinearizedInfluenceResult",
    "MislabelResult",
    "RetrainingPlan",
    "Task",
    "TaskTraining",
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
    "retrain",
    "train_attributed",
    "train_model",
]
