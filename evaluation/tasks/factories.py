"""Import of what an option names as "module:factory"."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import bad_value


def import_factory(argument: str, path: str) -> Callable[..., Any]:
    """Import what "module:factory" names.

    Args:
        argument: The option, for errors.
        path: "module:factory".

    Raises:
        ValueError: The module or the factory does not exist, or an installed package has the name of the
            module and is imported instead.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute or not module_name:
        raise bad_value(argument, "be written as module:factory", repr(path))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise bad_value(
            argument,
            "name a module that can be imported",
            f"{module_name!r} ({_said(error)})",
            "Run from the folder that holds it, or put that folder on PYTHONPATH.",
        ) from error
    _check_is_here(argument, module)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = {name: value for name, value in vars(module).items() if callable(value) and name[0] != "_"}
        own = [name for name, value in public.items() if getattr(value, "__module__", None) == module_name]
        has = f"It has {', '.join(map(repr, own or public))}." if public else "It has none."
        raise bad_value(argument, f"name a callable of {module_name!r}", repr(attribute), has)
    found: Callable[..., Any] = factory
    return found


def _check_is_here(argument: str, module: ModuleType) -> None:
    """Refuse an installed package that was imported in place of a module of that name in this folder."""
    top = module.__name__.partition(".")[0]
    here = [path for path in (Path(f"{top}.py"), Path(top, "__init__.py")) if path.is_file()]
    if top == __name__.partition(".")[0] or not here:
        return
    file = getattr(module, "__file__", None)
    if file is not None:
        path = Path(file).resolve()
        of_python = path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())
        installed = of_python or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        if not installed or path.is_relative_to(Path.cwd().resolve()):
            return
    raise bad_value(
        argument,
        "name a module of your own",
        f"{top!r}, which is {here[0]} here and also {file or 'a module of Python'}",
        "Installed packages come first: give yours another name, or install it with pip install -e.",
    )


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
