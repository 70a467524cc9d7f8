"""The tutorials: they run from top to bottom, and what is kept in them is fit to be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
#: A rerun keeps its file small enough to be shown by code hosts.
LARGEST = 400_000
KEPT_METADATA = {"kernelspec", "language_info"}


def test_there_are_nine_in_the_order_of_reading():
    assert [path.name[0] for path in TUTORIALS] == list("123456789")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
class TestEach:
    @pytest.fixture
    def notebook(self, path: Path) -> Any:
        return nbformat.read(path, as_version=4)

    def test_it_runs_without_an_error_or_a_warning(self, path, notebook, tmp_path, monkeypatch):
        # The networks are small: threads cost more than they bring, most of all where cores are shared.
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
        assert code_cells(notebook)
        assert said_on_stderr(notebook) == []

    def test_it_opens_with_a_question_and_closes_with_what_to_be_careful_about(self, notebook):
        first, last = notebook.cells[0], notebook.cells[-1]
        assert first.cell_type == last.cell_type == "markdown"
        title, question = first.source.split("\n\n")[:2]
        assert title.startswith("# ")
        assert re.fullmatch(r"\*\*.*\?( .*)?\*\*", question.replace("\n", " "))
        assert last.source.startswith("## What to be careful about\n")
        assert last.source.count("\n- **") >= 3

    def test_outputs_are_kept_from_one_run_in_order(self, notebook):
        cells = code_cells(notebook)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        kinds = {kind for o in outputs(notebook) for kind in o.get("data", {})}
        assert "image/png" in kinds
        assert kinds <= {"image/png", "text/plain", "text/html"}, "no state of widgets"
        assert not [o for o in outputs(notebook) if o.output_type == "error"]
        assert said_on_stderr(notebook) == []

    def test_nothing_in_it_is_of_the_machine_that_ran_it(self, path, notebook):
        assert set(notebook.metadata) == KEPT_METADATA
        assert notebook.metadata.kernelspec.name == "python3"
        assert all(cell.metadata == {} for cell in notebook.cells)
        pictures = re.compile(r'"image/png": "[^"]*"')
        text = pictures.sub("", json.dumps(notebook))
        assert re.findall(r"(?<![\w.<:])/(?:home|root|tmp|work|usr|var|Users|opt)/[^\s\"]*", text) == []
        assert path.stat().st_size < LARGEST

    def test_its_code_is_formatted_as_the_package_is(self, path):
        ruff = shutil.which("ruff") or str(ROOT / ".venv" / "bin" / "ruff")
        for arguments in (["check"], ["format", "--check"]):
            done = subprocess.run([ruff, *arguments, str(path)], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def said_on_stderr(notebook: Any) -> list[str]:
    """Warnings and progress bars."""
    return [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
