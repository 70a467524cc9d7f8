"""A method on every attributed model, and the choice of its options on the first half of the test points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ....subsets import Membership
from ...measures.linear_datamodeling import lds
from ..shared.answers import Answer
from ..shared.methods import MethodSpec
from ..shared.one_training import with_checkpoints
from ..shared.score_cache import CachedMethod
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

    def value(self, scores: Sequence[NDArray[Any]]) -> tuple[bool, float]:
        """What options are chosen by, the higher the better.

        These are whether LDS is defined at all, and LDS, on the test points that options are chosen on.
        Undefined correlations count as 0, so that constant scores are not the best.

        Args:
            scores: `(n_tuning, n_train)` for each attributed model.
        """
        result = lds(scores, self.membership, self.margins[..., : self.n_tuning], n_resamples=0)
        return not result.ranks_nothing, result.undefined_as_zero


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
        self,
        methods: Sequence[CachedMethod],
        points: range,
        normalizations: Sequence[str | None] = (None,),
        *,
        trying: bool = False,
    ) -> dict[str | None, list[Answer]]:
        """Scores `(n_points, n_train)` of the margins of some test points, for each model.

        Args:
            methods: From `at`.
            points: The test points.
            normalizations: The keys of the result.
            trying: Whether a refusal of the options is kept in the store.
        """
        x, y = (t[points.start : points.stop] for t in self.shared.question.task.test.tensors)
        found = [(m.tried if trying else m.margins_each_way)((x, y), normalizations) for m in methods]
        return dict(zip(normalizations, map(list, zip(*found, strict=True)), strict=True))


@dataclass(frozen=True)
class Chosen:
    """The best point of a grid.

    Attributes:
        options: The point.
        normalize: The best normalization with it.
        methods: The method with it on every model.
        value: `Retrained.value` of it.
        tried: Scores of that half with these options, for each model, by normalization; {} if there was no
            choice.
    """

    options: Mapping[str, Any]
    normalize: str | None
    methods: list[CachedMethod]
    value: tuple[bool, float] = (False, 0.0)
    tried: Mapping[str | None, Sequence[NDArray[Any]]] = field(default_factory=dict)


def choose(method: OnModels, halves: Retrained) -> Chosen:
    """The grid point, and normalization, with the highest LDS on the first half of the test points.

    A point that the method refuses, such as a damping that is too small for its precision, is skipped.

    Args:
        method: With a grid.
        halves: The retrained halves.

    Raises:
        ValueError: The method refuses every point.
    """
    grid, normalizations = method.spec.grid, method.normalizations
    points, measured = range(halves.n_tuning), len(grid) * len(normalizations) > 1
    best: Chosen | None = None
    refused: ValueError | None = None
    for options in grid:
        try:
            methods = method.at(options)
            answers = method.answers(methods, points, normalizations, trying=True) if measured else {}
        except ValueError as error:
            refused = error
            continue
        tried = {how: [answer.values for answer in found] for how, found in answers.items()}
        for normalize in normalizations:
            value = halves.value(tried[normalize]) if measured else (False, 0.0)
            if best is None or value > best.value:
                best = Chosen(options, normalize, methods, value, tried)
    if best is None:
        assert refused is not None, "a grid has at least one point"
        raise refused
    method.keep(best.methods, best.options)
    return best
