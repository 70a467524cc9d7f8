from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = ("typer", "rich", "joblib", "sklearn", "jinja2", "torchvision")

USE = f"""
import sys

class WithoutExtras:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ImportError(name + " is an extra")

sys.meta_path.insert(0, WithoutExtras())
import stride_captum, stride_captum.adapters, torch
assert stride_captum.__file__.startswith(sys.argv[1]), stride_captum.__file__
assert stride_captum.adapters.__file__.startswith(sys.argv[1])
x = torch.randn(20, 4)
data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
for method in (stride_captum.STRIDE, stride_captum.adapters.Similarity):
    assert method(torch.nn.Linear(4, 2), data).influence(data[:3], 2).indices.shape == (3, 2)
loaded = [name for name in {EXTRAS} if name in sys.modules]
assert not loaded, loaded
"""


def test_only_one_copy_of_each_module_is_imported():
    import stride_captum.adapters
    import stride_captum.evaluation
    import stride_captum.stride  # noqa: F401

    ours: dict[str, list[str]] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent in (ROOT / "stride_captum", ROOT / "adapters", ROOT / "evaluation"):
            ours.setdefault(file, []).append(name)
    assert len(ours) > 20
    assert {file: names for file, names in ours.items() if len(names) > 1} == {}
    assert [name for names in ours.values() for name in names if not name.startswith("stride_captum")] == []
    assert "adapters" not in sys.modules
    assert "evaluation" not in sys.modules


WITHOUT_POSIX = """
import importlib, pkgutil, sys
import captum.influence, filelock, joblib, sklearn, torch, torchvision, typer  # may need what we may not

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
import signal, os
for name in ("SIGALRM", "SIGKILL", "setitimer"):
    vars(signal).pop(name, None)
for name in ("fork", "geteuid", "O_NOFOLLOW", "sched_getaffinity", "sysconf"):
    vars(os).pop(name, None)
import stride_captum

absent = ("cleanlab", "dattri", "kronfluence", "quanda")
names = []
for part in ("", ".adapters", ".evaluation"):
    package = importlib.import_module("stride_captum" + part)
    names += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
assert len(names) > 150, len(names)
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:  # of an extra
        if str((error.__cause__ or error).name).split(".")[0] not in absent:
            raise
data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.arange(20) % 2)
store = stride_captum.features.store.FeatureStore(sys.argv[1])
stride_captum.STRIDE(torch.nn.Linear(4, 2), data, feature_store=store).fit()
"""


@pytest.mark.slow
def test_every_module_is_imported_on_a_system_without_posix(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_POSIX, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "manifest.json").exists()


WITHOUT_TORCHVISION = """
import sys
from pathlib import Path

class WithoutTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

sys.meta_path.insert(0, WithoutTorchvision())
import stride_captum.evaluation.cli.app
from stride_captum.__main__ import main
from stride_captum.evaluation import load_task
from stride_captum.evaluation.benchmarks.networks import network

for needs, call in {
    "The task 'mnist'": lambda: load_task("mnist", data_root="."),
    "The task 'cifar10'": lambda: load_task("cifar10", data_root="."),
    "The network 'resnet18'": lambda: network("resnet18"),
    "The network 'vit_b_16'": lambda: network("vit_b_16"),
}.items():
    try:
        call()
    except ImportError as error:
        assert str(error).startswith(needs + ' needs torchvision: pip install "'), error
    else:
        raise AssertionError(needs + " does without torchvision")
sys.argv[1:] = ["explain", "--task", "digits", "--preset", "smoke", "--out", sys.argv[1]]
main()
"""


@pytest.mark.slow
def test_the_command_line_and_the_digits_need_no_torchvision(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCHVISION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "report.html").exists()


def test_only_the_extra_vision_installs_torchvision():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^(\w+) = \["torchvision[^"]*"\]', settings, re.MULTILINE) == ["vision"]
    assert settings.count('"torchvision>=') == 1


@pytest.mark.slow
def test_the_wheel_installs_and_works_without_the_extras(tmp_path):
    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    here = ("--no-build-isolation",) if find_spec("setuptools") and find_spec("wheel") else ()
    run(*pip, "wheel", "--no-deps", *here, "--wheel-dir", str(tmp_path), source_copy(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"stride_captum"}
    for source, package in (("stride_captum", ""), ("adapters", "adapters/"), ("evaluation", "evaluation/")):
        for file in (ROOT / source).rglob("*.py"):
            assert f"stride_captum/{package}{file.relative_to(ROOT / source).as_posix()}" in names
    for template in (ROOT / "evaluation/report").glob("templates/*"):
        assert f"stride_captum/evaluation/report/templates/{template.name}" in names
    assert "stride_captum/py.typed" in names
    run(*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    (tmp_path / "use.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path / 'site')!r})\n{USE}")
    run("use.py", str(tmp_path / "site"))


def source_copy(tmp_path: Path) -> str:
    """What a wheel is built from, so that the build leaves nothing in the repository."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("stride_captum", "adapters", "evaluation"):
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=skip)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "source" / file)
    return str(tmp_path / "source")


def test_every_folder_with_modules_is_a_package_that_is_installed():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^  "(stride_captum[\w.]*)",$', settings, flags=re.MULTILINE))
    found = set()
    for folder, package in (("stride_captum", ""), ("adapters", ".adapters"), ("evaluation", ".evaluation")):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join(("stride_captum" + package, *inside)))
            assert (path.parent / "__init__.py").exists(), path
    assert listed == found
