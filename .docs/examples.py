"""Docstrings as the site reads them: doctests become blocks of code, and `#:` comments count."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Fence the doctests of every docstring, and take the comment above a constant for its docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is None and obj.is_attribute and obj.lineno is not None:
            text = comment_above(obj.lines_collection[obj.filepath], obj.lineno)
            if text:
                obj.docstring = griffe.Docstring(text, lineno=obj.lineno, parent=obj)
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)


def comment_above(lines: list[str], lineno: int) -> str:
    """The text of the `#:` comment that ends above a line, which is counted from 1; "" without one."""
    first = lineno - 1
    while first and lines[first - 1].lstrip().startswith("#:"):
        first -= 1
    return "\n".join(line.lstrip().removeprefix("#:").strip() for line in lines[first : lineno - 1])


def fenced(text: str) -> str:
    """A docstring whose doctests stand in fences; they end at the first empty line after them."""
    out: list[str] = []
    indent: str | None = None
    for line in [*text.splitlines(), ""]:
        if indent is None and line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            out.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            out.append(f"{indent}```")
            indent = None
        out.append(line)
    return "\n".join(out)
