"""STRIDE: training data attribution in activation space, as a Captum plugin."""

from .closed_form.options import ClosedForm
from .data.reading import Batch
from .designs import LeftRegular, Partition, RandomSubsets
from .features.options import Features
from .influence.checkpoints.checkpoint import Checkpoint, along_training
from .influence.method import InfluenceMethod
from .influence.rows import result_rows
from .recovery.estimators import Lasso, Ridge
from .recovery.refinement import RefinedScores, refine
from .score_agreement import reliability
from .steering.options import Trained
from .stride import STRIDE

__version__ = "0.1.0"

__all__ = [
    "STRIDE",
    "Batch",
    "Checkpoint",
    "ClosedForm",
    "Features",
    "InfluenceMethod",
    "Lasso",
    "LeftRegular",
    "Partition",
    "RandomSubsets",
    "RefinedScores",
    "Ridge",
    "Trained",
    "__version__",
    "along_training",
    "refine",
    "reliability",
    "result_rows",
]
