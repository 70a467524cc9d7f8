"""Other attribution methods behind the interface of `stride_captum.influence`."""

from .controls import ClassRandom, Random
from .similarity import ClassSimilarity, Similarity

__all__ = ["ClassRandom", "ClassSimilarity", "Random", "Similarity"]
