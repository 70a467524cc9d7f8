"""Owns what methods answered, kept on disk: a killed evaluation fits no method again for what is there.

The name of a file is a fingerprint of all that determines the answer: the code of the methods and the
versions below it, the method's class and settings, the weights, the training set, and what was asked.
Only classes of this package are kept: of others the code is not known.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import adapters
from .. import influence as core
from ..influence import InfluenceMethod
from ..peak_memory import release_free_memory
from ..whole_files import write_whole
from . import environment, run_store
from .cost import Build, Cost
from .tasks import Task


@dataclass(frozen=True)
class Answer:
    """What a method said.

    Attributes:
        values: The scores.
        fit_seconds: Setup, when it was fitted for this.
        seconds: Of this answer, setup not counted.
        forward_seconds: One forward pass over the training set, measured in the same run.
        peak_bytes: The most memory that the method held at once; None where it does not say.
    """

    values: NDArray[Any]
    fit_seconds: float
    seconds: float
    forward_seconds: float
    peak_bytes: int | None

    def cost(self, n_queries: int) -> Cost:
        """As the cost of `n_queries` test points."""
        return Cost(
            fit_seconds=self.fit_seconds,
            query_seconds=self.seconds,
            n_queries=n_queries,
            forward_seconds=self.forward_seconds,
            peak_bytes=self.peak_bytes,
        )


class KeptMethod:
    """A method on one model, fitted on the first question whose answer the store does not hold.

    Args:
        build: Makes it.
        model: The attributed model.
        task: Its training set is that of the method.
        options: Given to `build`.
        store: Folder of the answers; None keeps nothing.
        forward_seconds: One forward pass over the training set.

    Attributes:
        method: The method, perhaps not fitted yet.
    """

    def __init__(
        self,
        build: Build,
        model: nn.Module,
        task: Task,
        options: Mapping[str, Any],
        store: str | Path | None,
        forward_seconds: float,
    ) -> None:
        self.method = build(model, task.train, options)
        self._forward_seconds = forward_seconds
        self._folder: Path | None = None
        if store is not None and type(self.method).__module__.split(".")[0] == __name__.split(".")[0]:
            self._folder = Path(store) / "answers"
            self._trained = [run_store.data_hash(task.train.tensors), self.method._fingerprint()]

    @property
    def has_own_mislabel_scores(self) -> bool:
        """Whether the class ranks labels in a way of its own."""
        return type(self.method).mislabel_scores is not InfluenceMethod.mislabel_scores

    def margins(self, batch: tuple[Tensor, Tensor], normalize: str | None = None) -> Answer:
        """Scores `(n_test, n_train)` of the margins of labelled test points."""
        return self.ask(
            f"margin of the label, normalize={normalize}",
            batch,
            lambda m: m.influence(batch, response="margin", target="label", normalize=normalize),
        )

    def ask(self, what: str, about: tuple[Tensor, ...], compute: Callable[[InfluenceMethod], Any]) -> Answer:
        """The answer to one question, from the store where it is there.

        Args:
            what: Names the question.
            about: What it is about, beside the training set.
            compute: Asks the fitted method.
        """
        path = None if self._folder is None else self._folder / f"{self._name(what, about)}.safetensors"
        if path is not None:
            answer, damage = _read(path)
            if answer is not None:
                return answer
            run_store.say_damaged(path, damage)
        method = self.method
        if not hasattr(method, "fit_seconds_"):
            release_free_memory()
            method.fit()
        started = time.perf_counter()
        values = np.ascontiguousarray(compute(method))
        answer = Answer(
            values=values,
            fit_seconds=method.fit_seconds_,
            seconds=time.perf_counter() - started,
            forward_seconds=self._forward_seconds,
            peak_bytes=method.peak_bytes_,
        )
        if path is not None:
            _write(path, answer)
        return answer

    def _name(self, what: str, about: tuple[Tensor, ...]) -> str:
        cls = type(self.method)
        parts = {
            "code": _code(),
            "class": f"{cls.__module__}.{cls.__qualname__}",
            "settings": self.method._settings(),
            "trained": self._trained,
            "what": what,
            "about": run_store.hash_tensors(about),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """Of all that methods are made of: the sources of this package, and the versions of what they call."""
    digest = hashlib.sha256(json.dumps(environment.versions(), sort_keys=True).encode())
    for folder in (Path(core.__file__).parent, Path(adapters.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _write(path: Path, answer: Answer) -> None:
    from safetensors.numpy import save_file

    facts = {k: v for k, v in vars(answer).items() if k != "values"}
    metadata = {"cost": json.dumps(facts)}
    write_whole(path, lambda name: save_file({"values": answer.values}, name, metadata))


def _read(path: Path) -> tuple[Answer | None, str | None]:
    """The result is that of `run_store.read_array`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return Answer(values=file.get_tensor("values"), **json.loads(file.metadata()["cost"])), None
    except FileNotFoundError:
        return None, None
    except (SafetensorError, OSError, KeyError, TypeError):
        return None, "cut off or not an answer"
