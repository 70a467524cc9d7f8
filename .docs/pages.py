"""Pages of the site, made from the documents, the notebooks and the modules of the checkout.

MkDocs calls `on_files` when it has looked for pages, `on_page_markdown` for each page as it is written, and
`on_page_content` for each page in HTML.
"""

from __future__ import annotations

import html
import importlib
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    "Results": "RESULTS.md",
    "Performance": "PERFORMANCE.md",
    "Contributing": "CONTRIBUTING.md",
    "Changelog": "CHANGELOG.md",
}
PACKAGES = {
    "stride_captum": "stride_captum",
    "stride_captum.adapters": "adapters",
    "stride_captum.evaluation": "evaluation",
    "stride_captum.losses": "stride_captum/losses",
    "stride_captum.recovery": "stride_captum/recovery",
    "stride_captum.conformance": "stride_captum/conformance",
}
#: Public members that classes inherit from parts of their own, shown on the pages of packages.
INHERITED = (
    *("fit", "save", "load", "mislabel_scores", "add_examples", "remove_examples"),
    *("operators_", "layers_", "n_features_", "temperature_", "history_"),
)
#: Folders whose modules have a page each.
SOURCES = {
    name: PACKAGES[name] for name in ("stride_captum", "stride_captum.adapters", "stride_captum.evaluation")
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add all pages, and say in which order they stand."""
    files.append(File.generated(config, "README.md", abs_src_path=str(ROOT / "README.md")))
    for name in DOCUMENTS.values():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name in sorted({"README.md", *DOCUMENTS.values()}):
        for target in linked_files(ROOT / name):
            if files.get_file_from_path(target) is None and not target.endswith(".ipynb"):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    tutorials = [page for path in sorted(ROOT.glob("tutorials/*.ipynb")) for page in notebook(path)]
    reference = [(f"reference/{name}.md", public(name)) for name in PACKAGES]
    modules = [(f"modules/{name}.md", f"::: {name}\n") for name in module_names()]
    pages = [*tutorials, ("command-line.md", command_line()), *reference, *modules]
    for path, content in pages:
        files.append(File.generated(config, path, content=content))
    config.nav = [
        {"Home": "README.md"},
        {"Guide": "guide.md"},
        *([{"Tutorials": [p for p, _ in tutorials if p.endswith(".md")]}] if tutorials else []),
        {"Command line": "command-line.md"},
        {"API": [{Path(path).stem: path} for path, _ in reference]},
        {"Modules": by_package([path for path, _ in modules])},
        *({title: path} for title, path in DOCUMENTS.items()),
    ]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to notebooks and the guide to their pages; drop badges, which would be fetched."""
    markdown = re.sub(r"^\[!\[.*\n", "", markdown, flags=re.MULTILINE)
    markdown = markdown.replace("](.docs/", "](")
    if page.file.src_uri == "guide.md":
        markdown = markdown.replace("](../", "](")
    return re.sub(r"(\]\(tutorials/[^)\s]+)\.ipynb\)", r"\1.md)", markdown)


def on_page_content(content: str, **_: object) -> str:
    r"""Turn formulas into MathML, which browsers show by themselves; name sources as they are imported."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    return re.sub(
        r'<(div|span) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>',
        mathml,
        content.replace("<code>build/docs/", "<code>"),
        flags=re.DOTALL,
    )


def linked_files(document: Path) -> list[str]:
    """Files of the checkout that a document links to or shows, other than itself."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    local = {target for target in found if "://" not in target and not target.startswith(".docs/")}
    return sorted(target for target in local if (ROOT / target).is_file())


def notebook(path: Path) -> list[tuple[str, str | bytes]]:
    """The page of a notebook as it was run, and its pictures."""
    body, resources = MarkdownExporter().from_filename(str(path))
    pictures = {f"{path.stem}-{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        body = body.replace(f"]({name})", f"]({path.stem}-{name})")
    return [(f"tutorials/{path.stem}.md", body), *((f"tutorials/{n}", d) for n, d in pictures.items())]


def command_line() -> str:
    """The page of the console script."""
    from stride_captum.evaluation.cli.app import app

    command: Any = get_command(app)
    for each in command.commands.values():  # or the list of commands cuts their first sentences off
        each.short_help = each.help.partition("\n\n")[0].replace("\n", " ")
    context = Context(command, info_name="stride-captum")
    return get_docs_for_click(obj=command, ctx=context, name="stride-captum", title="Command line")


def public(name: str) -> str:
    """The page of a package: what it exports."""
    folder = ROOT / PACKAGES[name]
    exported = getattr(importlib.import_module(name), "__all__", [])
    # A function that is called as its module is found under the module's name only.
    shadowed = [f"::: {name}.{e}.{e}\n" for e in exported if (folder / f"{e}.py").exists()]
    options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    if name == "stride_captum":
        options += f"      inherited_members: [{', '.join(INHERITED)}]\n"
    return "\n".join([f"# `{name}`\n", f"::: {name}\n{options}", *shadowed])


def module_names() -> list[str]:
    """All modules, in the order of their names within a package."""
    found = []
    for package, folder in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("[!_]*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append(".".join((package, *parts)))
    return [name for name in found if name not in PACKAGES]


def by_package(paths: list[str]) -> list[dict[str, list[dict[str, str]]]]:
    """Pages of modules, grouped by their package."""
    groups: dict[str, list[dict[str, str]]] = {}
    for path in paths:
        package, _, name = Path(path).stem.rpartition(".")
        groups.setdefault(package, []).append({name: path})
    return [{package: group} for package, group in groups.items()]
