"""Checks of installed packages: requirements and extras."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement

PACKAGE = "stride-captum"
#: What each extra gives, and the module that shows whether it can be imported.
EXTRAS = {
    "eval": ("the command line, the harness and the reports", "stride_captum.evaluation.cli.app"),
    "vision": ("the tasks mnist and cifar10, and two networks of the benchmarks", "torchvision"),
    "kronfluence": ("the method EKFAC", "stride_captum.adapters._kronfluence.calls"),
    "cleanlab": ("the detector ConfidentLearning", "cleanlab"),
    "quanda": ("our methods inside quanda", "stride_captum.adapters.quanda_plugin"),
    "dattri": ("our methods inside dattri", "stride_captum.adapters.dattri_plugin"),
}


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        what: A package, an extra, a device or a method.
        status: "ok", "absent" (optional and not installed) or "broken".
        detail: What was found.
        remedy: What to do about it; None if there is nothing to do.
    """

    what: str
    status: Literal["ok", "absent", "broken"]
    detail: str
    remedy: str | None = None

    def __str__(self) -> str:
        mark = {"ok": "+", "absent": "-", "broken": "BROKEN"}[self.status]
        return " ".join(part for part in (mark, f"{self.what}: {self.detail}.", self.remedy) if part)


def check_packages() -> list[Finding]:
    """Check required packages and extras."""
    if version(PACKAGE) is None:
        detail = "it is imported from a folder and not installed, so its requirements are not known"
        return [Finding(PACKAGE, "broken", detail, 'Run `pip install ".[eval]"` in its folder.')]
    needed = [r for r in requirements() if not _satisfied(r)]
    broken = [Finding(r.name, "broken", *_wrong(r)) for r in needed]
    return [*broken, *map(check_extra, EXTRAS)]


def check_extra(name: str) -> Finding:
    """Check that the packages of an extra are installed in the right versions and can be imported."""
    gives, module = EXTRAS[name]
    install = f"Run `{install_command(name)}`."
    wanted = requirements(name)
    missing = [r.name for r in wanted if version(r.name) is None]
    if not wanted:
        return Finding(f"extra {name}", "absent", f"{gives}; the installed version does not know it", install)
    if missing:
        return Finding(f"extra {name}", "absent", f"{gives}; missing {', '.join(missing)}", install)
    for requirement in wanted:
        if not _satisfied(requirement):
            return Finding(f"extra {name}", "broken", f"{gives}; {_wrong(requirement)[0]}", install)
    try:
        importlib.import_module(module)
    except Exception as error:
        detail = f"{gives}; importing it fails: {type(error).__name__}: {error}".rstrip(".")
        return Finding(f"extra {name}", "broken", detail, f"Reinstall it. {install}")
    return Finding(f"extra {name}", "ok", gives)


def install_command(extra: str) -> str:
    """Shell command that installs the packages of an extra, however this package was installed.

    >>> install_command("kronfluence").startswith('pip install "kronfluence>=')
    True
    """
    packages = [f'"{requirement.name}{requirement.specifier}"' for requirement in requirements(extra)]
    return " ".join(["pip install", *(packages or [f'"{PACKAGE}[{extra}]"'])])


def requirements(extra: str = "") -> list[Requirement]:
    """Requirements of this package, or those that an extra adds."""
    try:
        every = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return []
    always = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [r for r in every if r.marker and r not in always and r.marker.evaluate({"extra": extra})]


def version(package: str) -> str | None:
    """Installed version; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement) -> bool:
    found = version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _wrong(requirement: Requirement) -> tuple[str, str]:
    """Problem of a package and its remedy."""
    wanted = f"{requirement.name}{requirement.specifier}"
    found = version(requirement.name)
    detail = f"{wanted} is needed, {'none' if found is None else found} is installed"
    return detail, f'Run `pip install "{wanted}"`.'
