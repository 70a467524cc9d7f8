"""Fit and query in a separate process whose memory is limited and watched."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ...stride import STRIDE
from ..system.process_status import status_bytes
from .feature_files import mapped, random_points


def in_own_process(options: dict[str, Any]) -> dict[str, Any]:
    """Run `fit_and_query` in a new process.

    Raises:
        RuntimeError: The process failed, for instance out of memory.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, json.dumps(options)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"the process ended with {ended.returncode}: {ended.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


class PeakAnonymous:
    """Highest RssAnon of this process inside a `with` block, in `bytes`; read every 5 milliseconds."""

    def __enter__(self) -> PeakAnonymous:
        self.bytes = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, rss_anon())

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, rss_anon())


def rss_anon() -> int:
    """Anonymous memory of this process in bytes.

    Raises:
        RuntimeError: The system does not report it.
    """
    found = status_bytes("RssAnon")
    if found is None:
        raise RuntimeError("/proc/self/status has no RssAnon")
    return found


def fit_and_query(options: dict[str, Any]) -> dict[str, Any]:
    """Set the memory limit (-1 for none), then fit and query while memory is watched."""
    import resource  # which Windows does not have

    if options["limit"] > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (options["limit"], options["limit"]))
    shape = (options["n_train"], options["n_features"], options["n_classes"])
    started_with = rss_anon()
    with PeakAnonymous() as fitting:
        arrays = mapped(Path(options["folder"]), *shape)
        if options.get("in_memory"):
            arrays = [np.array(array) for array in arrays]
        method = STRIDE.from_features(*arrays, memory_budget=options.get("budget", "256MiB")).fit()
    with PeakAnonymous() as asking:
        best: Any = method.influence(random_points(options["n_test"], *shape[1:]), options["k"])
    return {
        "anonymous_bytes_at_start": started_with,
        "fit_peak_anonymous_bytes": fitting.bytes,
        "query_peak_anonymous_bytes": asking.bytes,
        "fit_seconds": method.fit_seconds_,
        "query_seconds": method.query_seconds_,
        "result_shape": list(best.indices.shape),
    }


if __name__ == "__main__":
    print(json.dumps(fit_and_query(json.loads(sys.argv[1]))))
