"""Shell completion: the names that an option can take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable

from ...losses.named import LOSSES
from ..benchmarks.feature_store import PARTS
from ..benchmarks.retraining import CASES
from ..benchmarks.scalability.case import SCALED_METHODS
from ..comparison.plan import MEASURES
from ..comparison.shared.methods import METHODS
from ..tasks.built_in import TASKS
from ..tasks.loading import PRESETS
from ..tasks.paper_tables import TABLES

ENGINES = ("auto", "processes", "stacked")
PAPER_PRESETS = ("mnist", "cifar10")
DEVICES = ("cpu", "cuda", "mps")


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The function that typer calls to complete a name: it gives those that start with what was typed.

    >>> tasks("m")
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


tasks = one_of(TASKS)
presets = one_of(PRESETS)
methods = one_of(METHODS)
measures = one_of((*MEASURES, "all"))
tables = one_of(TABLES)
engines = one_of(ENGINES)
losses = one_of(LOSSES)
paper_presets = one_of(PAPER_PRESETS)
devices = one_of(DEVICES)
cases = one_of(CASES)
parts = one_of(PARTS)
scalable_methods = one_of(SCALED_METHODS)
