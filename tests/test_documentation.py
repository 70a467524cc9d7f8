"""What the documents say of the repository is so: files, links, commands and targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("stride_captum", "adapters", "evaluation")


@pytest.fixture(scope="module")
def map_of_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = set()
    for line in re.findall(r"^\| (`[^|]+) \|", text, flags=re.MULTILINE):
        names = re.findall(r"`([^`]+)`", line)
        folder = names[0].rpartition("/")[0]
        found |= {name if "/" in name or not folder else f"{folder}/{name}" for name in names}
    return found


def test_every_file_of_the_map_exists(map_of_files):
    for name in map_of_files:
        assert any((ROOT / folder / name).exists() for folder in (".", *FOLDERS)), name


def test_every_file_of_the_core_is_on_the_map(map_of_files):
    for path in (ROOT / "stride_captum").glob("[!_]*.py"):
        assert path.name in {Path(name).name for name in map_of_files}, path.name


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_commands_of_the_readme_exist():
    from typer.main import get_command

    from stride_captum.evaluation.cli import app

    commands = get_command(app).commands
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)stride-captum ([a-z-]+)", text, re.MULTILINE))
    assert named <= set(commands), named - set(commands)
    assert {"explain", "compare", "reproduce"} <= named


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(
            r"^make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
