"""The structure of the packages: no import circles, and folders that depend on one another one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "stride_captum": "stride_captum",
    "stride_captum.adapters": "adapters",
    "stride_captum.evaluation": "evaluation",
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Modules of ours that a module imports, also inside of functions, but not for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    known = (found & modules().keys()) - {name}
    # A package is named beside the module in it that is meant.
    return {
        n
        for n in known
        if modules()[n].name != "__init__.py" or not any(m.startswith(n + ".") for m in known)
    }


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from run_time_nodes(child)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or none."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = visit(following, [*way, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


@pytest.mark.slow
def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle({name: imports(name, path) for name, path in modules().items()}) == []


def test_no_folders_import_one_another_in_a_circle() -> None:
    def place(name: str) -> str:
        if modules()[name].name == "__init__.py":
            return name
        folder = name.rpartition(".")[0]
        return name if folder in PACKAGES else folder

    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        if path.name != "__init__.py":  # which gathers what its folder exports
            graph.setdefault(place(name), set()).update(
                {place(n) for n in imports(name, path)} - {place(name)}
            )
    assert circle(graph) == []


def test_the_tests_mirror_the_folders() -> None:
    places = [path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    folders = {place for place in places if place.parts and not place.parts[0].startswith("in_")}
    assert len(folders) > 15
    for folder in folders:  # of the core, or with its package
        assert any((ROOT / parent / folder).is_dir() for parent in ("stride_captum", ".")), folder


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    "measure", sorted((ROOT / "evaluation/measures").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_measures_know_no_model_of_ours(measure: Path) -> None:
    found = imports(f"stride_captum.evaluation.measures.{measure.stem}", measure)
    allowed = ("stride_captum.evaluation.measures.", "stride_captum.errors", "stride_captum.responses")
    if measure.stem != "cost":  # which times methods
        assert {name for name in found if not name.startswith(allowed)} <= {
            "stride_captum.subsets",
            "stride_captum.recovery",
            "stride_captum.recovery.solver",
        }


def test_reports_are_made_of_plain_values() -> None:
    for path in (ROOT / "evaluation/report").glob("*.py"):
        found = imports(f"stride_captum.evaluation.report.{path.stem}", path)
        allowed = (
            "stride_captum.evaluation.report",
            "stride_captum.evaluation.system",
            "stride_captum.errors",
        )
        assert {name for name in found if not name.startswith(allowed)} == set(), path.name


@pytest.mark.parametrize("circular", [{"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"a": {"a"}}])
def test_a_circle_is_found(circular: dict[str, set[str]]) -> None:
    assert circle(circular)
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
