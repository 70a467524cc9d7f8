"""Shell completion: the names that an option can take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The function that typer calls to complete a name: it gives those that start with what was typed.

    >>> one_of(["digits", "mnist"])("m")
    ['mnist']
    """
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        found = [name for name in known if name.startswith(incomplete)]
        return [_for_bash(name) for name in found] if _asked_by_bash() else found

    return complete


def _asked_by_bash() -> bool:
    return os.environ.get("_STRIDE_CAPTUM_COMPLETE") == "complete_bash"


def _for_bash(name: str) -> str:
    """Escape spaces and brackets, since bash inserts a name unchanged."""
    return re.sub(r"([^\w.,=+-])", r"\\\1", name)


devices = one_of(("cpu", "cuda", "mps"))
