"""What holds of the plugins without quanda and dattri; tests/in_quanda and tests/in_dattri do the rest."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PLUGINS = ("quanda", "dattri")


@pytest.mark.parametrize("library", PLUGINS)
def test_without_the_library_the_plugin_names_the_extra(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    plugin = f"stride_captum.adapters.{library}_plugin"
    monkeypatch.delitem(sys.modules, plugin, raising=False)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "{library}[<>]\S+"'):
        importlib.import_module(plugin)


@pytest.mark.slow
def test_the_adapters_import_neither_library():
    code = "import sys, stride_captum.adapters, stride_captum.evaluation; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in run.stdout.split()} & set(PLUGINS)
