"""Options: small frozen values that validate themselves, print themselves and survive JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from html import escape
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from .errors import bad_choice, bad_type, bad_value, nearest

Kind = TypeVar("Kind", bound="Options")


class Options:
    """Base class of option objects, which are frozen dataclasses.

    A family of them (`Operators`, `Subsets`, `Recovery`) is a subclass without a name, and its members are
    subclasses of that with one. A new member is known as soon as its module is imported.

    Attributes:
        name: What results and the command line call the kind.
        aliases: Other names that are understood.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # numbers of NumPy would not be saved as they are
                object.__setattr__(self, field.name, value.item())
        self.check()

    def check(self) -> None:
        """Refuse values out of their range.

        Raises:
            ValueError: It names the option.
        """

    def to_dict(self) -> dict[str, Any]:
        """The name and all options as plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {key: v.to_dict() if isinstance(v, Options) else v for key, v in values.items()}
        return {"name": self.name, **plain} if self.name else plain

    @classmethod
    def from_dict(cls: type[Kind], values: dict[str, Any]) -> Kind:
        """The inverse of `to_dict`; options that are left out have their defaults.

        Raises:
            ValueError: A name or an option that does not exist.
        """
        values = dict(values)
        kind = cls if cls.name else cls.named(str(values.pop("name", "")))
        values.pop("name", None)
        known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                remedy = nearest(name, known)
                raise bad_value("options", f"be options of {kind.__name__}", repr(name), remedy)
        plain = {k: Options.from_dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        return kind(**plain)

    @classmethod
    def named(cls: type[Kind], name: str, argument: str = "name") -> type[Kind]:
        """The member of a family with this name, or the class itself if it is no family.

        Args:
            name: The name or an alias.
            argument: What an error calls it.

        Raises:
            ValueError: There is none.
        """
        known = {n: kind for kind in cls._members() for n in (kind.name, *kind.aliases)}
        if not known:
            return cls
        if name not in known:
            raise bad_choice(argument, name, [kind.name for kind in cls._members()])
        return known[name]

    @classmethod
    def _members(cls: type[Kind]) -> Iterator[type[Kind]]:
        for kind in cls.__subclasses__():
            yield from (kind, *kind._members()) if kind.name else kind._members()

    def _repr_html_(self) -> str:
        every, default = self.to_dict(), type(self)().to_dict()
        changed = {name: value for name, value in every.items() if value != default[name]}
        return (
            f"<b>{type(self).__name__}</b>{html_table(changed) if changed else ', all defaults'}"
            f"<details><summary>all {len(every)} options</summary>{html_table(every)}</details>"
        )


def html_table(values: dict[str, Any]) -> str:
    """A table of names and values, for a notebook."""
    left = 'style="text-align:left"'
    rows = (
        f"<tr><th {left}>{name}</th><td {left}><code>{escape(repr(v))}</code></td></tr>"
        for name, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise bad_choice(name, value, choices)


def check_number(name: str, value: Any, *, positive: bool, otherwise: str | None = None) -> None:
    """Refuse what is no finite number above 0, or of at least 0.

    An error also names what may be given `otherwise`.
    """
    above = is_number(value) and (value > 0 if positive else value >= 0)
    if not above or value > sys.float_info.max:
        must = "be a positive number" if positive else "be a number of at least 0"
        raise bad_value(name, must if otherwise is None else f"{must}, or {otherwise}", repr(value))


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise bad_value(name, f"be an integer of at least {least}", repr(value))


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise bad_value(name, "be True or False", repr(value))


def checked_weights(name: str, values: Any) -> tuple[float, ...]:
    """Weights of classes as plain numbers, which can be saved and compared.

    Raises:
        TypeError: They are no numbers.
        ValueError: One of them is negative or not finite, or all are 0.
    """
    try:
        flat = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_type(name, "hold a number for each class", values) from error
    if flat.ndim != 1 or not bool((torch.isfinite(flat) & (flat >= 0)).all()) or not bool(flat.any()):
        raise bad_value(name, "hold numbers of at least 0, not all 0, one for each class", flat.tolist())
    return tuple(flat.tolist())


def is_number(value: Any) -> bool:
    """Whether the value is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
