"""What the documents say of the repository is so: files, links, commands and targets exist."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import TensorDataset

from stride_captum.evaluation import load_task, train_attributed

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


def test_every_name_on_the_map_exists(map_of_files):
    for name in map_of_files:
        assert any((ROOT / folder / name).exists() for folder in (".", *FOLDERS)), name


def test_every_folder_and_every_file_at_the_top_is_on_the_map(map_of_files):
    core = (ROOT / "stride_captum").iterdir()
    names = {path.name + "/" * path.is_dir() for path in core if path.suffix in ("", ".py")}
    names |= {f"evaluation/{path.name}/" for path in (ROOT / "evaluation").iterdir() if path.is_dir()}
    left_out = {name for name in names if Path(name).name.startswith("_") or name == "py.typed"}
    assert names - left_out - map_of_files == set()


DOCUMENTS = ["README.md", "RESULTS.md", "PERFORMANCE.md", "CONTRIBUTING.md", ".docs/guide.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists(), target


def test_commands_of_the_documents_exist():
    from typer.main import get_command

    from stride_captum.evaluation.cli.app import app

    commands = get_command(app).commands
    text = "\n".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)stride-captum ([a-z-]+)", text, re.MULTILINE))
    assert named <= set(commands), named - set(commands)
    assert {"explain", "compare", "reproduce"} <= named


def test_make_targets_of_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in (*DOCUMENTS, ".ci/run"):
        for target in re.findall(
            r"^make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


class TestTheWorkflow:
    @pytest.fixture(scope="class")
    @classmethod
    def jobs(cls):
        return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]

    @staticmethod
    def commands(job):
        """What the steps of a job run, once for each target of its matrix."""
        runs = [step["run"] for step in job["steps"] if "run" in step]
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        return [run.replace("${{ matrix.target }}", target) for target in targets for run in runs]

    def test_it_runs_every_target_of_ci_and_none_that_is_not_there(self, jobs):
        every = "\n".join(run for job in jobs.values() for run in self.commands(job))
        called = set(re.findall(r"^make ([a-z-]+)", every, re.MULTILINE))
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in called:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        wanted = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(wanted) <= called

    def test_it_tests_every_python_from_the_first_that_is_promised(self, jobs):
        settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (first,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', settings, re.MULTILINE)
        versions = jobs["test"]["strategy"]["matrix"]["python"]
        assert versions == [f"3.{minor}" for minor in range(int(first), int(first) + len(versions))]

    def test_windows_runs_the_core_tests_of_the_makefile(self, jobs):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
        (core,) = re.findall(r"^CORE_TESTS := (.*)$", makefile, re.MULTILINE)
        (run,) = (run for run in self.commands(jobs["windows"]) if "pytest tests/" in run)
        assert run.split()[3:] == core.split()
        assert all((ROOT / path).is_file() for path in core.split())


def section(document: str, title: str) -> str:
    """The text of a document between a heading that begins so and the next heading of the same kind."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def module_of(name: str) -> str:
    """The longest part of a dotted name that can be imported."""
    while True:
        try:
            return importlib.import_module(name).__name__
        except ModuleNotFoundError:
            name = name.rpartition(".")[0]


def look_up(name: str) -> Any:
    """What a dotted name stands for; raises where it stands for nothing."""
    found: Any = importlib.import_module(module_of(name))
    for part in name.removeprefix(f"{found.__name__}.").split("."):
        found = getattr(found, part)
    return found


def names_of(cell: str) -> list[str]:
    """The dotted names of a cell: one without its module is in that of the last one that has it."""
    full: list[str] = []
    for name in re.findall(r"`([A-Za-z_.]+)`", cell):
        full.append(name if name.startswith("stride_captum.") else f"{module_of(full[-1])}.{name}")
    return full


class TestArchitecture:
    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls):
        cells = re.findall(r"^\| ([^|`]+) \| (.+) \|$", section("CONTRIBUTING.md", "Architecture"), re.M)
        return [(what, names_of(cell)) for what, cell in cells if not what.startswith("the paper")]

    def test_every_function_of_the_map_exists(self, rows):
        for what, names in rows:
            assert names, what
            for name in names:
                assert callable(look_up(name)), name

    @pytest.mark.parametrize("equation", range(1, 14))
    def test_every_equation_of_the_paper_is_on_the_map(self, rows, equation):
        covered: set[int] = set()
        for what, _ in rows:
            for first, last in re.findall(r"\((\d+)\)(?: to \((\d+)\))?", what):
                covered |= set(range(int(first), int(last or first) + 1))
        assert equation in covered


@pytest.mark.slow
class TestTheMethodOfTheGuide:
    """The fences of CONTRIBUTING, one after the other, as a reader would run them."""

    @pytest.fixture(scope="class")
    @classmethod
    def after(cls, tmp_path_factory):
        fences = re.findall(r"```python\n(.*?)```", section("CONTRIBUTING.md", "How a method is added"), re.S)
        names: dict[str, Any] = {"__name__": "agreement"}
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("guide"))
            for fence in fences:
                exec(compile(fence, "CONTRIBUTING.md", "exec"), names)
        return names

    def test_it_keeps_every_law(self, after):
        assert after["report"].passed, after["report"]
        assert f"{len(after['report'].outcomes)} laws" in section("CONTRIBUTING.md", "How a method is added")

    def test_it_is_in_every_table_and_beats_chance(self, after):
        names = ["STRIDE", "Agreement", "Random"]
        fidelity = {row.name: row.lds.value for row in after["table"].rows}
        assert list(fidelity) == names
        assert fidelity["Agreement"] > fidelity["Random"]
        assert list(dict.fromkeys(row.name for row in after["table"].leakage)) == names


PUBLIC = [
    (package, name)
    for package in ("", ".adapters", ".evaluation", ".losses", ".recovery", ".conformance")
    for name in importlib.import_module(f"stride_captum{package}").__all__
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_class_and_function_has_an_example(package, name):
    found = getattr(importlib.import_module(f"stride_captum{package}"), name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert ">>> " in (vars(found).get("__doc__", found.__doc__) or ""), name
    else:  # a constant, or the name of a type
        assert name in {"__version__", "MEASURES", "METHODS", "CHECKS", "Check"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_and_the_guide_runs_as_printed(tmp_path, monkeypatch):
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".docs/guide.md")]
    blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(texts), re.MULTILINE | re.DOTALL)
    script = "".join(block for block in blocks if "torchrun" not in block)
    torch.manual_seed(0)
    digits = load_task("digits")
    yours: dict[str, Any] = {
        "model": train_attributed(digits, seed=0),
        "train_dataset": digits.train,
        "more": digits.test,
        "features": torch.randn(30, 4),
        "logits": torch.randn(30, 3),
        "labels": torch.arange(30) % 3,
        "files": ["a.pt", "b.pt"],
        "rates": [0.1, 0.1],
        "train_function": lambda indices, seed: digits.build_model(),
    }
    yours["x"], yours["y"] = digits.test[:5]
    tokens = torch.randint(9, (30, 6)), torch.randint(4, (30, 6))
    yours |= {
        "regressor": torch.nn.Linear(4, 1),
        "measurements": TensorDataset(torch.randn(30, 4), torch.randn(30)),
        "tagger": torch.nn.Linear(4, 5),
        "songs": TensorDataset(torch.randn(30, 4), torch.rand(30, 5).round()),
        "token_model": torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 4)),
        "sentences": TensorDataset(*tokens),
        "tokens": tuple(part[:2] for part in tokens),
    }
    yours["measured"], yours["song"] = (yours[name][:3] for name in ("measurements", "songs"))
    monkeypatch.chdir(tmp_path)
    for name in yours["files"]:
        torch.save(digits.build_model().state_dict(), name)
    exec(script, yours)
    assert Path("stride.safetensors").exists()


def words_and_numbers(text: str) -> tuple[int, int]:
    """How many words and numbers a document has outside its blocks of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return len(prose.split()), len(re.findall(r"\d[\d.,]*\d|\d", prose))


def test_the_readme_is_short():
    words, numbers = words_and_numbers((ROOT / "README.md").read_text(encoding="utf-8"))
    assert words < 900
    assert numbers < 60


def test_words_and_numbers_are_counted_outside_code():
    text = "One .5, 1,397 and -3.\n\n```python\nscores = [1, 2, 3]\n```\n[link](tutorials/6_own.ipynb)\n"
    assert words_and_numbers(text) == (6, 4)


def test_the_table_of_the_readme_is_small():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]  # one table: all lines with cells
    assert head.count("|") <= 4
    assert len(rows) <= 6
    assert sum("(control)" in row for row in rows) == 1
