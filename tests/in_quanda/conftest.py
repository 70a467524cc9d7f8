"""What runs where quanda is installed (`make test-quanda`); `make test` does not collect this folder."""

from __future__ import annotations

from importlib.metadata import version

import pytest


def pytest_configure(config: pytest.Config) -> None:
    of_torcheval = "ignore:.torch.jit.script. is deprecated:FutureWarning"  # quanda imports it
    config.addinivalue_line("filterwarnings", of_torcheval)


def pytest_report_header() -> str:
    return "  ".join(f"{name} {version(name)}" for name in ("quanda", "captum", "torch", "numpy"))
