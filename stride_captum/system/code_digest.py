"""Digests of code: functions, closures, modules, classes; installed code by its version."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from .code_references import codes, globals_read, imported, is_installed, is_there, version_of

Parts = Iterator[bytes | memoryview | str]

#: Members of a class that do nothing, or that repeat what other members say.
_NOT_CODE = frozenset(
    (
        *("__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "_abc_impl"),
        *("__annotations_cache__", "__dataclass_fields__", "__dataclass_params__", "__dict__", "__doc__"),
        *("__firstlineno__", "__module__", "__orig_bases__", "__parameters__", "__qualname__"),
        *("__static_attributes__", "__weakref__"),
    )
)


class CodeParts:
    """The part of the walk through a value that reads code."""

    packages: frozenset[str]
    names: list[str]

    @abstractmethod
    def of(self, value: Any, name: str) -> bytes:
        """Digest of a part; an error calls it by its name."""

    @abstractmethod
    def unstable(self, what: str) -> TypeError:
        """Error for the part that is being read."""

    def code(self, value: CodeType) -> Parts:
        """Bytecode, names and constants."""
        yield from ("code", value.co_name, value.co_code, getattr(value, "co_exceptiontable", b""))
        yield f"{value.co_flags} {value.co_argcount} {value.co_posonlyargcount} {value.co_kwonlyargcount}"
        for names in (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars):
            yield " ".join(names)
        yield self.of(value.co_consts, "constants")

    def function(self, value: FunctionType) -> Parts:
        """Code, globals, defaults, closure and attributes; what is installed by its name."""
        yield from ("function", value.__qualname__)
        module = value.__globals__.get("__name__")  # `__module__` may be that of a function it wraps
        if self.by_name(module):
            yield from (str(module), version_of(module))
        else:
            yield self.of(value.__code__, "code")
            yield from self.globals_of(value)
        yield self.of(value.__defaults__, "defaults")
        yield self.of(value.__kwdefaults__, "defaults")
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            yield self.of(content, name)
        yield self.of({k: v for k, v in vars(value).items() if k != "__wrapped__"}, "attributes")

    def globals_of(self, value: FunctionType) -> Parts:
        """The global values that a function reads; of a module, what the function may name of it."""
        every = list(codes(value.__code__))
        names = {name for code in every for name in code.co_names}
        for name in sorted({name for code in every for name in globals_read(code)}):
            if name in value.__globals__:
                yield name
                content = value.__globals__[name]
                if isinstance(content, ModuleType):
                    yield from self.named_of(content, names, set())
                else:
                    yield self.of(content, name)
        for module in (m for code in every for m in imported(code, value.__globals__)):
            yield from self.named_of(module, names, set())

    def named_of(self, module: ModuleType, names: set[str], seen: set[str]) -> Parts:
        """What `names` mean in a module of the user."""
        yield from ("module", module.__name__)
        if self.by_name(module.__name__):
            yield version_of(module.__name__)
            return
        seen.add(module.__name__)
        for name in sorted(names & vars(module).keys()):
            content = vars(module)[name]
            if not isinstance(content, ModuleType):
                yield name
                yield self.of(content, f"{module.__name__}.{name}")
            elif content.__name__ not in seen:
                yield from self.named_of(content, names, seen)

    def method(self, value: MethodType) -> Parts:
        """Function and object."""
        yield "method"
        yield self.of(value.__func__, value.__name__)
        yield self.of(value.__self__, value.__name__)

    def builtin(self, value: Any) -> Parts:
        """Name and version of its module."""
        yield from ("builtin", value.__qualname__, str(value.__module__), version_of(value.__module__))
        if not isinstance(value.__self__, ModuleType | None):
            yield self.of(value.__self__, value.__name__)

    def partial(self, value: Any) -> Parts:
        """Function and arguments."""
        yield "partial"
        yield self.of(value.func, "func")
        yield self.of(value.args, "args")
        yield self.of(value.keywords, "keywords")

    def descriptor(self, value: Any) -> Parts:
        """A property, a static method and the like."""
        yield type(value).__name__
        for name in ("fget", "fset", "fdel", "__func__", "func"):
            yield self.of(getattr(value, name, None), name)

    def slot(self, value: Any) -> Parts:
        """Name of a slot."""
        yield from ("slot", value.__name__)

    def module(self, value: ModuleType) -> Parts:
        """Name and version, and the file of a module of the user."""
        yield from ("module", value.__name__, version_of(value.__name__))
        if not self.by_name(value.__name__):
            if getattr(value, "__file__", None) is None:
                raise self.unstable(f"the module {value.__name__!r}, which has no file")
            yield Path(str(value.__file__)).read_bytes()

    def cls(self, value: type) -> Parts:
        """Bases and members; what is installed by its name."""
        yield from ("class", value.__qualname__)
        module = (
            value.__module__ if isinstance(value.__module__, str) else "builtins"
        )  # a type of an extension
        if self.by_name(module) and is_there(value, module):
            yield from (module, version_of(module))
            return
        yield self.of(type(value), "metaclass")
        for base in value.__bases__:
            yield self.of(base, base.__name__)
        for name, member in sorted(vars(value).items()):
            if name not in _NOT_CODE:
                yield name
                yield self.of(member, name)

    def by_name(self, module: str | None) -> bool:
        """Whether code counts by the name of its module and its version."""
        return module is not None and (module.partition(".")[0] in self.packages or is_installed(module))
