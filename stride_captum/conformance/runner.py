"""Runs every law on a method, and compares the outcomes with its stated exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..errors import bad_choice, bad_value
from . import invariance_checks, position_checks, score_checks, usage_checks  # noqa: F401  (they hold laws)
from .registry import Build, Check, Violation, laws_of
from .toy_problems import posed_with

_PASS, _FAIL, _EXCEPTION, _NEEDLESS = "pass", "fail: ", "exception: ", "needless exception: "
_MARKS = {_PASS: "+", _FAIL: "F", _EXCEPTION: "e", _NEEDLESS: "?"}


@dataclass(frozen=True)
class ConformanceReport:
    """What became of every law for one method.

    Attributes:
        method: Its name.
        outcomes: For each law "pass", "fail: why", "exception: stated reason", or "needless exception:
            stated reason" where the law holds after all.

    >>> report = ConformanceReport("MyMethod", {"ties_go_to_the_lower_index": "fail: ties are shuffled"})
    >>> report.passed, report.failures
    (False, {'ties_go_to_the_lower_index': 'ties are shuffled'})
    """

    method: str
    outcomes: Mapping[str, str]

    @property
    def failures(self) -> dict[str, str]:
        """Laws that do not hold and are no stated exception, and why."""
        return self._beginning_with(_FAIL)

    @property
    def needless_exceptions(self) -> dict[str, str]:
        """Stated exceptions to laws that hold, and the stated reason."""
        return self._beginning_with(_NEEDLESS)

    @property
    def passed(self) -> bool:
        """Whether every law holds or is an exception, and every exception is one."""
        return not self.failures and not self.needless_exceptions

    def _beginning_with(self, start: str) -> dict[str, str]:
        return {law: v.removeprefix(start) for law, v in self.outcomes.items() if v.startswith(start)}

    def __str__(self) -> str:
        return matrix([self])


@dataclass(frozen=True)
class Subject:
    """A method to be checked.

    Attributes:
        name: What the matrix calls it.
        build: `build(model, train_dataset, **options)`.
        exceptions: Laws that it does not keep, and why.
        loss: Name of the loss that the laws pose their problems with, which `build` must have too; or
            "positions", for cross-entropy at several positions of each example.

    >>> from stride_captum.adapters import Random
    >>> Subject("Random", Random, {"self_influence_is_not_negative": "scores are random"}).name
    'Random'
    """

    name: str
    build: Build
    exceptions: Mapping[str, str] = field(default_factory=dict)
    loss: str = "cross_entropy"


def run_check(law: Check, build: Build, reason: str | None = None, loss: str = "cross_entropy") -> str:
    """The outcome of one law (see `ConformanceReport.outcomes`).

    Args:
        law: One of `laws_of(loss)`.
        build: `build(model, train_dataset, **options)`.
        reason: Why the law need not hold; None where it must.
        loss: Name of the loss that it poses its problems with, or "positions".

    >>> from stride_captum.adapters import Similarity
    >>> run_check(laws_of("cross_entropy")["the_top_k_are_the_best_of_all"], Similarity)
    'pass'
    """
    try:
        with posed_with(loss):
            law(build)
    except Exception as error:
        if reason is not None:
            return _EXCEPTION + reason
        kind = "" if isinstance(error, Violation) else f"{type(error).__name__}: "
        return _FAIL + kind + str(error).partition("\n")[0]
    return _PASS if reason is None else _NEEDLESS + reason


def check(
    build: Build,
    *,
    exceptions: Mapping[str, str] | None = None,
    name: str | None = None,
    loss: str = "cross_entropy",
) -> ConformanceReport:
    """Run every law on a method.

    Args:
        build: The class of the method, or a factory `build(model, train_dataset, **options)`; the options
            are `batch_size`, `checkpoints` and, for positions, `batch`.
        exceptions: Laws that the method does not keep, with the reason. They are run all the same: one
            that holds is reported.
        name: What the report calls the method; None takes the name of `build`.
        loss: "cross_entropy", "binary_cross_entropy" or "mse": what the problems are posed with. `build` must
            have it too, as in `partial(MyMethod, loss="mse")`. Or "positions", for cross-entropy at several
            positions (tokens, pixels) of each example, with laws of their own beside the others.

    Raises:
        ValueError: An exception to a law that does not exist, or without a reason.

    >>> from stride_captum.adapters import Similarity
    >>> check(Similarity).passed
    True
    """
    exceptions, laws = {} if exceptions is None else exceptions, laws_of(loss)
    for law, reason in exceptions.items():
        if law not in laws:
            raise bad_choice("exceptions", law, list(laws))
        if not reason:
            raise bad_value("exceptions", "give a reason for each law", f"{reason!r} for {law!r}")
    if name is None:
        name = getattr(build.func if isinstance(build, partial) else build, "__name__", repr(build))
    outcomes = {law: run_check(function, build, exceptions.get(law), loss) for law, function in laws.items()}
    return ConformanceReport(name, outcomes)


def matrix(reports: Sequence[ConformanceReport]) -> str:
    """Methods by laws as plain text: + holds, F fails, e stated exception, ? needless exception.

    Below the matrix stand the laws by number, and the reason of everything that is not a plus.

    >>> print(matrix([ConformanceReport("MyMethod", {"ties_go_to_the_lower_index": "pass"})]))
              1
    MyMethod  +
    <BLANKLINE>
      1  ties go to the lower index
    """
    laws = list(dict.fromkeys(law for report in reports for law in report.outcomes))
    width = max([len(report.method) for report in reports], default=0)
    lines = [" " * width + "".join(f"{i:3}" for i in range(1, len(laws) + 1))]
    notes = []
    for report in reports:
        cells = ""
        for i, law in enumerate(laws, 1):
            outcome = report.outcomes.get(law, "")
            mark = next((mark for start, mark in _MARKS.items() if outcome.startswith(start)), " ")
            cells += f"{mark:>3}"
            if mark not in "+ ":
                notes.append(f"{report.method}, {i}: {outcome}")
        lines.append(f"{report.method:{width}}{cells}")
    numbered = [f"{i:3}  {law.replace('_', ' ')}" for i, law in enumerate(laws, 1)]
    return "\n".join([*lines, "", *numbered, *([""] if notes else []), *notes])
