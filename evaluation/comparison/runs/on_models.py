"""A method on every attributed model, and the choice of its options on the first half of the test points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from ....subsets import Membership
from ...measures.linear_datamodeling import lds
from ..shared.methods import MethodSpec
from ..shared.one_training import with_checkpoints
from ..shared.score_cache import Answer, CachedMethod
from ..shared.shared import Shared


@dataclass(frozen=True)
class Retrained:
    """Responses of the retrained halves to all test points.

    Attributes:
        membership: Of the halves that converged, CSR `(n_subsets, n_train)`.
        margins: Margins of the true class, `(n_seeds, n_subsets, n_test)`; for other losses their first
            response.
        left_out: Indices of the halves with a retraining that diverged.
        n_tuning: Number of test points that options are chosen on; they are the first ones.
    """

    membership: Membership
    margins: NDArray[Any]
    left_out: list[int]
    n_tuning: int

    @property
    def reported(self) -> NDArray[Any]:
        """Margins of the reported test points, `(n_seeds, n_subsets, n_reported)`."""
        return self.margins[..., self.n_tuning :]


@dataclass
class OnModels:
    """A method on every attributed model.

    Attributes:
        spec: The method, with its grid.
        shared: The attributed models.
        forward: Seconds of one forward pass over the training set.
        checkpoints: Called with the name of an attributed model, gives the `checkpoints` of the method;
            None for the model alone.
        normalizations: Those of `influence` that are tried with each point of the grid.
    """

    spec: MethodSpec
    shared: Shared
    forward: float
    checkpoints: Callable[[str], Sequence[Any] | None] = lambda name: None
    normalizations: Sequence[str | None] = (None,)
    _built: tuple[Any, list[CachedMethod]] = field(default=(None, []), init=False, repr=False)

    def at(self, options: Mapping[str, Any]) -> list[CachedMethod]:
        """The method with these options on every model.

        If only options that need no new fit differ from those before, it is the same methods, set anew.
        """
        fixed, methods = self._built
        return self.keep(methods if fixed == self._fixed(options) else self._build(options), options)

    def keep(self, methods: list[CachedMethod], options: Mapping[str, Any]) -> list[CachedMethod]:
        """Set the options of methods from `at` that need no new fit; `at` starts with them next."""
        self._built = self._fixed(options), methods
        for kept in methods:
            for name in self.spec.settable & options.keys():
                setattr(kept.method, name, options[name])
        return methods

    def _fixed(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
        """Options that need a new fit, and which others there are: those left out have their defaults."""
        settable = self.spec.settable & options.keys()
        return {name: value for name, value in options.items() if name not in settable}, settable

    def _build(self, options: Mapping[str, Any]) -> list[CachedMethod]:
        question, found = self.shared.question, []
        for name, model in self.shared.models.items():
            every = with_checkpoints(options, self.checkpoints(name))
            found.append(CachedMethod(self.spec, model, question.task, every, question.store, self.forward))
        return found

    def answers(
        self, methods: Sequence[CachedMethod], points: range, normalize: str | None = None
    ) -> list[Answer]:
        """Scores `(n_points, n_train)` of the margins of some test points, for each model."""
        x, y = (t[points.start : points.stop] for t in self.shared.question.task.test.tensors)
        return [method.margins((x, y), normalize) for method in methods]


@dataclass(frozen=True)
class Chosen:
    """The best point of a grid.

    Attributes:
        options: The point.
        normalize: The best normalization with it.
        methods: The method with it on every model.
        value: What it was chosen by: whether LDS is defined at all, and LDS on the first half of the test
            points.
    """

    options: Mapping[str, Any]
    normalize: str | None
    methods: list[CachedMethod]
    value: tuple[bool, float] = (False, 0.0)


def choose(method: OnModels, halves: Retrained) -> Chosen:
    """The grid point, and normalization, with the highest LDS on the first half of the test points.

    Undefined correlations count as 0, so that constant scores are not the best; a point whose LDS is
    undefined for all test points comes last. A point that the method refuses, such as a damping that is too
    small for its precision, is skipped.

    Args:
        method: With a grid.
        halves: The retrained halves.

    Raises:
        ValueError: The method refuses every point.
    """
    grid, normalizations = method.spec.grid, method.normalizations
    tuning, measured = halves.margins[..., : halves.n_tuning], len(grid) * len(normalizations) > 1
    best: Chosen | None = None
    refused: ValueError | None = None
    for options in grid:
        try:
            methods = method.at(options)
            points = range(halves.n_tuning)
            tried = [method.answers(methods, points, how) if measured else [] for how in normalizations]
        except ValueError as error:
            refused = error
            continue
        for normalize, answers in zip(normalizations, tried, strict=True):
            found = Chosen(options, normalize, methods)
            if measured:
                result = lds([a.values for a in answers], halves.membership, tuning, n_resamples=0)
                found = replace(found, value=(not result.ranks_nothing, result.undefined_as_zero))
            if best is None or found.value > best.value:
                best = found
    if best is None:
        assert refused is not None, "a grid has at least one point"
        raise refused
    method.keep(best.methods, best.options)
    return best
