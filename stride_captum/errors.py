"""Error messages: which argument, what it must be, what came, the remedy."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any


def _sentence(name: str, must: str, got: object, remedy: str | None) -> str:
    message = f"`{name}` must {must}; got {got}."
    return f"{message} {remedy}" if remedy else message


def bad_value(name: str, must: str, got: object, remedy: str | None = None) -> ValueError:
    """A `ValueError` to raise: which argument, what it must be, what came and the remedy.

    >>> str(bad_value("damping", "be positive", -1.0, "Leave it out for the default 0.3."))
    '`damping` must be positive; got -1.0. Leave it out for the default 0.3.'
    """
    return ValueError(_sentence(name, must, got, remedy))


def bad_type(name: str, must: str, got: object, remedy: str | None = None) -> TypeError:
    """The same sentence as `bad_value`, as a `TypeError`; `got` is shown by its type.

    >>> str(bad_type("k", "be an int or None", "three"))
    '`k` must be an int or None; got str.'
    """
    return TypeError(_sentence(name, must, type(got).__name__, remedy))


def bad_choice(name: str, got: object, choices: Sequence[str]) -> ValueError:
    """A `ValueError` for an argument with a closed list of values.

    >>> str(bad_choice("response", "margn", ["margin", "loss"]))
    "`response` must be one of 'margin', 'loss'; got 'margn'. Nearest: 'margin'."
    """
    return bad_value(
        name, "be one of " + ", ".join(map(repr, choices)), repr(got), nearest(str(got), choices)
    )


class NotFitted(ValueError, AttributeError):
    """A learned attribute is read before `fit`: `hasattr` is then False."""


def not_fitted(name: str) -> NotFitted:
    """The error for a learned attribute that is read before `fit`."""
    return NotFitted(_sentence(name, "be read after fit()", "a method that is not fitted", None))


def whole_number(name: str, value: Any, least: int = 1, or_else: str = "") -> int:
    """An argument that is an integer of any type (of NumPy or a tensor, too) as an `int`.

    Raises:
        ValueError: It is none, or below `least`.

    >>> whole_number("k", 3)
    3
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise bad_value(name, f"be an integer of at least {least}{or_else}", repr(value))
    return number


def nearest(name: str, known: Iterable[str], at_most: int = 3) -> str | None:
    """The remedy "Nearest: ..." for a name that is not in `known`; None if nothing is like it.

    >>> nearest("fc9", ["conv1", "fc1", "fc2"])
    "Nearest: 'fc2', 'fc1'."
    """
    close = difflib.get_close_matches(name, list(known), n=at_most, cutoff=0.3)
    return "Nearest: " + ", ".join(map(repr, close)) + "." if close else None
