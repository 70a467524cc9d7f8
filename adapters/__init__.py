"""Other attribution methods behind the interface of `stride_captum.influence.method`."""

from .captum_influence import CaptumInfluence
from .controls import ClassRandom, Random
from .diagonal_ekfac import DiagonalEKFAC
from .ekfac import EKFAC
from .knn_shapley import KNNShapley
from .label_noise import ConfidentLearning, LabelNoiseDetector, LossDetector
from .similarity import ClassSimilarity, Similarity
from .tracin import TracIn
from .trak import TRAK

__all__ = [
    "EKFAC",
    "TRAK",
    "CaptumInfluence",
    "ClassRandom",
    "ClassSimilarity",
    "ConfidentLearning",
    "DiagonalEKFAC",
    "KNNShapley",
    "LabelNoiseDetector",
    "LossDetector",
    "Random",
    "Similarity",
    "TracIn",
]
