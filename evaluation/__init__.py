"""One harness that measures every method the same way: fidelity, cost, controls and ceilings."""

from .comparison import Comparison, Contender, compare
from .explanation import Explanation, explain
from .linear_datamodeling import LDSResult, lds
from .retraining import RetrainingPlan, train_attributed, train_model
from .tasks import Task, load_task

__all__ = [
    "Comparison",
    "Contender",
    "Explanation",
    "LDSResult",
    "RetrainingPlan",
    "Task",
    "compare",
    "explain",
    "lds",
    "load_task",
    "train_attributed",
    "train_model",
]
