"""What determines the scores of a method, as digests that name them in the cache of scores.

These are the code of the method and of this package, the versions of the libraries, and everything that the
method was built from: options, model, training set, checkpoints and callables, by content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from .... import adapters, errors
from ....data.batch import is_batch
from ....influence.checkpoints.checkpoint import Checkpoint
from ....influence.method import InfluenceMethod
from ....system.fingerprints import weights_fingerprint
from ....system.stable_digest import Examples, stable_digest
from ...retraining import store as run_store
from ...system import environment
from ...tasks.task import Task

#: Attributes that fit and query set, or that differ between processes.
NOT_BUILT = frozenset(
    {"fit_seconds_", "query_seconds_", "peak_bytes_", "_fit_bytes", "_fitted_on", "_states"}
)
#: The code of this package is digested by the content of its files.
_PACKAGE = __name__.partition(".")[0]


def of_code(method: InfluenceMethod) -> dict[str, str]:
    """Digests of the code of this package, and of the class of the method."""
    return {"package": _code(), "class": stable_digest(type(method), "class", packages=(_PACKAGE,))}


def of_attribute(method: InfluenceMethod, task: Task, name: str) -> str:
    """Digest of what a method was built from under this name.

    Raises:
        NoStableDigest: It has none.
    """
    value = getattr(method, name)
    if name == "train_dataset" and value is task.train:
        value = task.train.tensors
    elif name in ("train_dataset", "held_out") and not (value is None or is_batch(value)):
        value = Examples(value)
    elif name == "checkpoints" and value is not None:
        value = _loaded(method)
    return stable_digest(value, name, packages=(_PACKAGE,))


def of_key(key: str, model: nn.Module, task: Task, options: Mapping[str, Any]) -> dict[str, str]:
    """What names the scores of a method with a `cache_key`."""
    return {
        "key": key,
        "weights": weights_fingerprint(model),
        "train": run_store.hash_tensors(task.train.tensors),
        "options": stable_digest(dict(options), "options"),
    }


def _loaded(method: InfluenceMethod) -> list[tuple[float, str, list[int] | None]]:
    """Learning rate, weights (as the method's own function loads them) and `seen` of each checkpoint."""
    with method._session() as model:
        return [
            (method._load(model, checkpoint), weights_fingerprint(model), _seen(checkpoint))
            for checkpoint in method._checkpoints()
        ]


def _seen(checkpoint: Any) -> list[int] | None:
    seen = checkpoint.seen if isinstance(checkpoint, Checkpoint) else None
    return None if seen is None else [int(place) for place in seen]


@cache
def _code() -> str:
    """Digest of what methods are made of: sources of this package, and versions of the libraries below."""
    digest = hashlib.sha256(json.dumps(environment.versions(), sort_keys=True).encode())
    for folder in (Path(errors.__file__).parent, Path(adapters.__file__).parent):
        digest.update(_sources(folder).encode())
    return digest.hexdigest()


def _sources(folder: Path) -> str:
    """Digest of all sources in a folder and below; `evaluation` is left out, which only measures methods."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if not path.is_relative_to(Path(__file__).parents[2]):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
