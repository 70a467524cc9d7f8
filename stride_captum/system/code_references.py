"""References of code: globals and modules that a function reads, and versions of installed modules."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .packages import version

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those of the functions and classes defined within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def globals_read(code: CodeType) -> set[str]:
    """Names that a code object looks up among the globals of its module."""
    return {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
    }


def imported(code: CodeType, namespace: Mapping[str, Any]) -> Iterator[ModuleType]:
    """Modules of the user that a function imports when it runs."""
    steps = list(dis.get_instructions(code))
    for level, step in zip(steps, steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            relative = "." * level.argval + step.argval
            try:
                name = importlib.util.resolve_name(relative, namespace.get("__package__"))
                if not (is_installed(name) if name in sys.modules else _is_library(_origin(name))):
                    yield importlib.import_module(name)
            except (ImportError, ValueError):  # not there: the function would fail, or does without
                continue


def _origin(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    return None if spec is None else spec.origin


def is_installed(module: str) -> bool:
    """Whether a module is of the standard library or an installed package; its version tells its code."""
    found = sys.modules.get(module) or sys.modules.get(module.partition(".")[0])
    if module == "__main__" or found is None:
        return False
    spec = getattr(found, "__spec__", None)
    if spec is not None and spec.origin in ("built-in", "frozen"):
        return True
    return _is_library(getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", [])), None))


def is_there(value: type, module: str) -> bool:
    """Whether a class is the one of that name in a module, or is not made by Python code.

    One that was made while a program runs may claim any module: typed at a prompt it claims `builtins`.
    """
    found: Any = sys.modules.get(module)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value or not value.__flags__ & _HEAP_TYPE


@cache
def _is_library(file: str | None) -> bool:
    if file is None or file in ("built-in", "frozen"):
        return file is not None
    path = Path(file)
    of_python = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(
        path.is_relative_to(root) for root in of_python
    )


@cache
def version_of(module: str | None) -> str:
    """Version of the package that a module belongs to; Python's for its own library, "" if there is none."""
    top = str(module).partition(".")[0]
    if top in sys.stdlib_module_names or module is None:
        return platform.python_version()
    return str(getattr(sys.modules.get(top), "__version__", None) or version(top) or "")
