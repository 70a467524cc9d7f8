"""A method on every attributed model, and the choice among its grid on the tuning half of the test points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ....subsets import Membership
from ...measures.linear_datamodeling import lds
from ..shared.methods import MethodSpec
from ..shared.score_cache import Answer, CachedMethod
from ..shared.shared import Shared


@dataclass(frozen=True)
class Retrained:
    """What the retrained halves say of the test points, tuning and reported.

    Attributes:
        membership: Of the halves that converged, CSR `(n_subsets, n_train)`.
        margins: Of the true class, `(n_seeds, n_subsets, n_test)`; of another loss its first response.
        left_out: Halves of which a retraining diverged.
        n_tuning: Test points that options are chosen on, the first ones.
    """

    membership: Membership
    margins: NDArray[Any]
    left_out: list[int]
    n_tuning: int

    @property
    def reported(self) -> NDArray[Any]:
        """Margins of the reported test points."""
        return self.margins[..., self.n_tuning :]


@dataclass(frozen=True)
class OnModels:
    """A method on every attributed model.

    Attributes:
        spec: The method, with the grid that is chosen from.
        shared: The attributed models.
        forward: Seconds of one forward pass over the training set.
        checkpoints: For the name of an attributed model, what the method is given as `checkpoints`; None
            gives it the model alone.
        normalize: As for `influence`.
    """

    spec: MethodSpec
    shared: Shared
    forward: float
    checkpoints: Callable[[str], Sequence[Any] | None] = lambda name: None
    normalize: str | None = None

    def build(self, options: Mapping[str, Any]) -> list[CachedMethod]:
        """With these options."""
        question, found = self.shared.question, []
        for name, model in self.shared.models.items():
            kept = self.checkpoints(name)
            every = {**options, **({} if kept is None else {"checkpoints": list(kept)})}
            found.append(CachedMethod(self.spec, model, question.task, every, question.store, self.forward))
        return found

    def set(self, methods: Sequence[CachedMethod], options: Mapping[str, Any]) -> None:
        """Set what needs no new fit."""
        for kept in methods:
            for name in self.spec.settable & options.keys():
                setattr(kept.method, name, options[name])

    def answers(self, methods: Sequence[CachedMethod], points: range) -> list[Answer]:
        """`(n_test, n_train)` of each model for some test points."""
        x, y = (t[points.start : points.stop] for t in self.shared.question.task.test.tensors)
        return [method.margins((x, y), self.normalize) for method in methods]


@dataclass(frozen=True)
class Chosen:
    """The best point of a grid.

    Attributes:
        options: The point.
        methods: The method with it on every model.
        value: By what it was chosen: whether it ranks anything, and its LDS on the tuning half.
    """

    options: Mapping[str, Any]
    methods: list[CachedMethod]
    value: tuple[bool, float] = (False, 0.0)


def choose(method: OnModels, halves: Retrained, *, always: bool = False) -> Chosen:
    """The grid point with the highest LDS on the tuning half.

    Undefined correlations count as 0, so that silence is not the best answer; a point that ranks nothing at
    all is below every other one. A point that a method refuses, such as a damping that leaves nothing but
    rounding errors, is skipped.

    Args:
        method: With a grid.
        halves: What LDS is measured against.
        always: Whether to measure a single point, too.

    Raises:
        ValueError: The method refuses every point.
    """
    spec, tuning = method.spec, halves.margins[..., : halves.n_tuning]
    best: Chosen | None = None
    methods: list[CachedMethod] = []
    built: Mapping[str, Any] | None = None
    refused: ValueError | None = None
    for options in spec.grid:
        fixed = {name: value for name, value in options.items() if name not in spec.settable}
        try:
            if fixed != built:
                methods, built = method.build(options), fixed
            method.set(methods, options)
            measured = always or len(spec.grid) > 1
            scores = [a.values for a in method.answers(methods, range(halves.n_tuning))] if measured else []
        except ValueError as error:
            refused, built = error, None
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
