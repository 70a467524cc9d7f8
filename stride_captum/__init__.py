"""STRIDE: training data attribution in activation space, as a Captum plugin."""

from .config import STRIDEConfig
from .data.batch import Batch
from .influence.method import InfluenceMethod
from .recovery.refinement import RefinedScores, refine
from .stride import STRIDE

__version__ = "0.1.0"

__all__ = ["STRIDE", "Batch", "InfluenceMethod", "RefinedScores", "STRIDEConfig", "__version__", "refine"]
