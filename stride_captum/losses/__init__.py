"""Losses that a model was trained with: what a score needs to know of each is in one object."""

from .base import Loss
from .binary_cross_entropy import BinaryCrossEntropy
from .cross_entropy import CrossEntropy
from .named import loss_of
from .separate_outputs import SeparateOutputs
from .squared_error import MSE

__all__ = ["MSE", "BinaryCrossEntropy", "CrossEntropy", "Loss", "SeparateOutputs", "loss_of"]
