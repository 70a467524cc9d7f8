"""A method on every attributed model, and the choice of its options on the first half of the test points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OnModels:
    """A method on every attributed model.

    Attributes:
        spec: The method, with its grid.
        shared: The attributed models.
        forward: Seconds of one forward pass over the training set.
        checkpoints: Called with the name of an attributed model, gives the `checkpoints` of the method;
            None for the model alone.
        normalize: As for `influence`.
    """

    spec: MethodSpec
    shared: Shared
    forward: float
    checkpoints: Callable[[str], Sequence[Any] | None] = lambda name: None
    normalize: str | None = None

    def build(self, options: Mapping[str, Any]) -> list[CachedMethod]:
        """The method with these options on every model."""
        question, found = self.shared.question, []
        for name, model in self.shared.models.items():
            every = with_checkpoints(options, self.checkpoints(name))
            found.append(CachedMethod(self.spec, model, question.task, every, question.store, self.forward))
        return found

    def set(self, methods: Sequence[CachedMethod], options: Mapping[str, Any]) -> None:
        """Set the options that need no new fit."""
        for kept in methods:
            for name in self.spec.settable & options.keys():
                setattr(kept.method, name, options[name])

    def answers(self, methods: Sequence[CachedMethod], points: range) -> list[Answer]:
        """Scores `(n_points, n_train)` of the margins of some test points, for each model."""
        x, y = (t[points.start : points.stop] for t in self.shared.question.task.test.tensors)
        return [method.margins((x, y), self.normalize) for method in methods]


@dataclass(frozen=True)
class Chosen:
    """The best point of a grid.

    Attributes:
        options: The point.
        methods: The method with it on every model.
        value: What it was chosen by: whether LDS is defined at all, and LDS on the first half of the test
            points.
    """

    options: Mapping[str, Any]
    methods: list[CachedMethod]
    value: tuple[bool, float] = (False, 0.0)


def choose(method: OnModels, halves: Retrained, *, always: bool = False) -> Chosen:
    """The grid point with the highest LDS on the first half of the test points.

    Undefined correlations count as 0, so that constant scores are not the best; a point whose LDS is
    undefined for all test points comes last. A point that the method refuses, such as a damping that is too
    small for its precision, is skipped.

    Args:
        method: With a grid.
        halves: The retrained halves.
        always: Whether to measure the LDS of a grid with a single point, too.

    Raises:
        ValueError: The method refuses every point.
    """
    spec, tuning = method.spec, halves.margins[..., : halves.n_tuning]
    best: Chosen | None = None
    methods: list[CachedMethod] = []
    built: tuple[Mapping[str, Any], frozenset[str]] | None = None
    refused: ValueError | None = None
    for options in spec.grid:
        fixed = {name: value for name, value in options.items() if name not in spec.settable}
        wanted = fixed, spec.settable & options.keys()  # what a point does not set keeps its own default
        try:
            if wanted != built:
                methods, built = method.build(options), wanted
            method.set(methods, options)
            measured = always or len(spec.grid) > 1
            scores = [a.values for a in method.answers(methods, range(halves.n_tuning))] if measured else []
        except ValueError as error:
            refused = error
            continue
        found = Chosen(options, methods)
        if measured:
            result = lds(scores, halves.membership, tuning, n_resamples=0)
            found = Chosen(options, methods, (not result.ranks_nothing, result.undefined_as_zero))
        if best is None or found.value > best.value:
            best = found
    if best is None:
        assert refused is not None, "a grid has at least one point"
        raise refused
    method.set(best.methods, best.options)
    return best
