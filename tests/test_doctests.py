from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import stride_captum
import stride_captum.adapters
import stride_captum.evaluation

# Each by itself: in an editable install the last two are not folders of the first.
PACKAGES = [stride_captum, stride_captum.adapters, stride_captum.evaluation]
MODULES = sorted(
    {package.__name__ for package in PACKAGES}
    | {m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")}
)


def test_adapters_and_evaluation_are_among_the_modules():
    assert {"stride_captum.adapters.similarity", "stride_captum.evaluation.measures.statistics"} <= set(
        MODULES
    )


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("__main__", "_plugin"))])
def test_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
