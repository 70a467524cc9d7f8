"""STRIDE: training data attribution in activation space, as a Captum plugin."""

from .batch import Batch
from .config import STRIDEConfig
from .influence import InfluenceMethod
from .stride import STRIDE

__version__ = "0.1.0"

__all__ = ["STRIDE", "Batch", "InfluenceMethod", "STRIDEConfig", "__version__"]
