"""Data and networks of the user's, named as module:factory."""

from __future__ import annotations

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ...errors import bad_value
from ...influence.rows import checked_ids
from ...system.fingerprints import bits
from .example_reading import Reader, check_finite
from .image_data import holds_raw_images, image_tensors
from .new_network import seeded

Pair = tuple[Tensor, Tensor]


def import_factory(argument: str, path: str) -> Callable[..., Any]:
    """Import what "module:factory" names.

    Raises:
        ValueError: The module or the factory is not there, or a package of the same name comes before it.

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


def own_data(
    path: str, data_root: str | Path | None = None, label_key: str | None = None
) -> tuple[Pair, Pair, list[str], Sequence[Any] | None]:
    """Call a factory for the training set and for the test set, and read both.

    What is drawn on the way is the same every time: random states are seeded, and put back after.

    Args:
        path: "module:factory".
        data_root: First argument of the factory, if there is one.
        label_key: As for `load_task`.

    Returns:
        Training inputs and labels, test inputs and labels, what a reader must know, and the attribute `ids`
        of the training set.

    Raises:
        ValueError: The factory cannot be called, or does not return examples of one input and one label.
        FileNotFoundError: It finds no data.
    """
    factory = import_factory("data", path)
    _check_takes(factory, path, data_root)
    reader = Reader("data", f" of {path!r}", label_key)
    notes: list[str] = []
    with seeded(0):
        dataset = _called(factory, path, data_root, train=True)
        train, changes = _read(reader, dataset)
        test, _ = _read(reader, _called(factory, path, data_root, train=False))
    if changes:
        notes.append(
            "Inputs change whenever they are read (augmentation): one draw of each is used throughout."
        )
    shapes = [tuple(inputs.shape[1:]) for inputs, _ in (train, test)]
    if shapes[0] != shapes[1]:
        came = f"{shapes[0]} for training and {shapes[1]} for test examples of {path!r}"
        raise bad_value("data", "have inputs of one shape", came)
    shared = _n_shared(train, test)
    if shared:
        of = "All" if shared == len(test[0]) else f"{shared} of the"
        notes.append(f"{of} {len(test[0])} test examples are training examples too.")
        if shared == len(test[0]):
            notes[-1] += " Does the factory heed `train`?"
    return train, test, notes, checked_ids(None, dataset)


def _read(reader: Reader, dataset: Any) -> tuple[Pair, bool]:
    """Inputs and labels, and whether inputs change when they are read again."""
    if holds_raw_images(dataset):
        inputs, labels = image_tensors(dataset).tensors
        return (inputs, labels), False
    pair = reader.tensors(dataset)
    check_finite(pair[0], "data", reader.source)
    return pair, reader.changes(dataset, pair[0])


def _called(factory: Callable[..., Any], path: str, data_root: str | Path | None, *, train: bool) -> Any:
    root = () if data_root is None else (data_root,)
    try:
        return factory(*root, train=train)
    except (RuntimeError, OSError) as error:
        where = "its own place" if data_root is None else Path(data_root).resolve()
        raise FileNotFoundError(
            f"The data factory '{path}' found no data in {where} ({error}). "
            "Name the folder that it reads with --data-root DIR (in Python: data_root=)."
        ) from error
    except Exception as error:
        raise bad_value("data", "name a factory that returns data", f"{path!r}, {_raised(error)}") from error


def _check_takes(factory: Callable[..., Any], path: str, data_root: str | Path | None) -> None:
    root = () if data_root is None else (data_root,)
    try:
        inspect.signature(factory).bind(*root, train=True)
    except ValueError:  # a callable without a signature
        return
    except TypeError as error:
        name = path.rpartition(":")[2]
        if data_root is not None:
            remedy = f"Write it as def {name}(data_root, train), or leave out --data-root."
        elif "train" in str(error):
            remedy = f"Write it as def {name}(train): it is called for the training set and for the test set."
        else:
            remedy = "If it reads a folder, name it with --data-root DIR (in Python: data_root=)."
        raise bad_value(
            "data",
            f"name a factory that can be called with ({'data_root, ' if root else ''}train=...)",
            f"{path!r} ({error})",
            remedy,
        ) from error


def _check_is_here(argument: str, module: ModuleType) -> None:
    """Whether a module of the current folder is what was imported, and not an installed one of its name."""
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


def _n_shared(train: Pair, test: Pair) -> int:
    """How many test examples have the inputs and the label of a training example."""
    known = set(_rows(train))
    return sum(row in known for row in _rows(test))


def _rows(pair: Pair) -> Iterator[tuple[int, ...]]:
    """A 64-bit hash of the inputs and one of the label of each example."""
    n = len(pair[0])
    parts = [bits(tensor).numpy().reshape(n, -1) for tensor in pair]
    return (tuple(hash(part[i].tobytes()) for part in parts) for i in range(n))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def _raised(error: Exception) -> str:
    """What was raised, and the line of the user's code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"which raised {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
