"""Stage 2 of the paper (Algorithm 1, line 10; equation 7): sparse regression of responses on the membership.

`lasso` minimizes `1/2 ||y - X w||^2 + alpha ||w||_1` for every test point at once; `refine` corrects scores
of any method by the responses of models that were retrained on subsets.
"""

from .alpha import choose_alpha
from .refinement import RefinedScores, refine
from .ridge_regression import ridge, ridge_scale
from .solver import LassoFit, alpha_max, lasso, lasso_path, soft_threshold

__all__ = [
    "LassoFit",
    "RefinedScores",
    "alpha_max",
    "choose_alpha",
    "lasso",
    "lasso_path",
    "refine",
    "ridge",
    "ridge_scale",
    "soft_threshold",
]
