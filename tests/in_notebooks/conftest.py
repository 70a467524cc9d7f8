"""What runs with the extra `tutorials` (`make notebooks`); `make test` does not collect this folder."""

from __future__ import annotations

from importlib.metadata import version


def pytest_report_header() -> str:
    return "  ".join(f"{name} {version(name)}" for name in ("nbclient", "nbformat", "ipykernel", "torch"))
