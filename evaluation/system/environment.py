"""Environment of a measurement: versions, hardware and threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ...system.packages import version


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, processor, threads and device as plain values."""
    return {
        "versions": versions(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else str(device),
    }


def versions() -> dict[str, str]:
    """Of Python and of what figures can depend on."""
    packages = ("stride-captum", "torch", "captum", "kronfluence", "numpy", "scikit-learn")
    found = {name: version(name) or "not installed" for name in packages}
    return {"python": platform.python_version(), **found}


def one_line(environment: dict[str, Any]) -> str:
    """The same in one line, for the foot of a table."""
    versions = environment["versions"]
    return (
        f"{environment['cores']} x {environment['processor']}, {environment['torch_threads']} threads on "
        f"{environment['device']}; torch {versions['torch']}, captum {versions['captum']}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
