"""`Lasso` and `Ridge`: options of stage 2, with penalties relative to the problem."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..errors import bad_choice, bad_value
from ..options import Options, check_flag, is_number
from ..subsets import Membership
from ..system.saved_values import saved_as
from .alpha import choose_alpha
from .ridge_regression import ridge, ridge_scale
from .solver import alpha_max, lasso

AlphaRule = Literal["bic", "aic", "cross-validation"]


class Recovery(Options):
    """Base class: recovery of scores from responses of subsets.

    Attributes:
        linear: Whether the scores of a sum of responses are the sum of their scores.
    """

    linear: ClassVar[bool] = False

    def weights(self, responses: Tensor, membership: Membership) -> Tensor:
        """Scores `(n_test, n_train)` from Y `(n_test, n_subsets)` and X `(n_subsets, n_train)`.

        A test point with NaN gets NaN for every example and does not affect the others.
        """
        finite = torch.isfinite(responses).all(1)
        if bool(finite.all()):
            return self.solve(responses, membership)
        scores = responses.new_full((len(responses), membership.shape[1]), float("nan"))
        if bool(finite.any()):
            scores[finite] = self.solve(responses[finite], membership)
        return scores

    @abstractmethod
    def solve(self, responses: Tensor, membership: Membership) -> Tensor:
        """`weights` for finite responses."""


@saved_as("options.lasso")
@dataclass(frozen=True, kw_only=True)
class Lasso(Recovery):
    """The Lasso of Algorithm 1, line 10: `1/2 ||y - X w||^2 + alpha ||w||_1`.

    Attributes:
        alpha: Fraction of alpha_max, above which all weights are 0; or the rule that chooses it for each test
            point: "bic", "aic" or "cross-validation" over subsets.
        center: Whether means over subsets are removed from responses and memberships (an intercept). The
            paper has none.

    >>> Lasso(alpha="bic").to_dict()
    {'name': 'lasso', 'alpha': 'bic', 'center': True}
    """

    name: ClassVar[str] = "lasso"

    alpha: float | AlphaRule = 0.03
    center: bool = True

    def check(self) -> None:
        """Refuse values out of their range."""
        if isinstance(self.alpha, str):
            if self.alpha not in get_args(AlphaRule):
                raise bad_choice("alpha", self.alpha, get_args(AlphaRule))
        else:
            _check_penalty(self.alpha, "a fraction of alpha_max above 0, or a rule")
        check_flag("center", self.center)

    def solve(self, responses: Tensor, membership: Membership) -> Tensor:
        """Weights at the optimum, certified by the duality gap."""
        if isinstance(self.alpha, str):
            alpha = choose_alpha(responses, membership, self.alpha, center=self.center)
        else:
            alpha = self.alpha * alpha_max(responses, membership, center=self.center)
        return lasso(responses, membership, alpha, center=self.center).weights


@saved_as("options.ridge")
@dataclass(frozen=True, kw_only=True)
class Ridge(Recovery):
    """Ridge regression: `1/2 ||y - X w||^2 + penalty/2 ||w||^2`.

    Attributes:
        alpha: The penalty as a multiple of `recovery.ridge_scale`.
        center: As for `Lasso`.

    >>> Ridge(alpha=2.0).name
    'ridge'
    """

    name: ClassVar[str] = "ridge"
    linear: ClassVar[bool] = True

    alpha: float = 0.03
    center: bool = True

    def check(self) -> None:
        """Refuse values out of their range."""
        alpha: Any = self.alpha
        if isinstance(alpha, str):
            remedy = "The rules choose among fractions of the Lasso's alpha_max."
            raise bad_value("alpha", "be a number for Ridge", repr(alpha), remedy)
        _check_penalty(self.alpha, "a multiple of `recovery.ridge_scale` above 0")
        check_flag("center", self.center)

    def solve(self, responses: Tensor, membership: Membership) -> Tensor:
        """Weights at the optimum."""
        penalty = self.alpha * ridge_scale(membership, center=self.center)
        return ridge(responses, membership, penalty, center=self.center)


def _check_penalty(alpha: Any, must: str) -> None:
    if not (is_number(alpha) and 0 < alpha < float("inf")):
        remedy = "Without a penalty many weights fit: use Ridge with a small one." if alpha == 0 else None
        raise bad_value("alpha", f"be {must}", repr(alpha), remedy)
