"""On-disk cache of scores, so that an interrupted evaluation resumes without refitting.

The name of a file is a digest of everything that determines the scores: the code of the method and of this
package, the versions of the libraries, everything that the method was built from (options, data, checkpoints
and callables, by content), the model, the training set, and the query. A method with a part that has no
stable digest is not cached; a warning names the part.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .... import adapters, errors
from ....data.batch import is_batch
from ....influence.checkpoints.averages import SUMMED, weighted_sum
from ....influence.checkpoints.checkpoint import Checkpoint
from ....influence.method import InfluenceMethod
from ....system.atomic import atomic_write
from ....system.fingerprints import weights_fingerprint
from ....system.peak_memory import release_free_memory
from ....system.processes import SINGLE_PROCESS
from ....system.stable_digest import Examples, NoStableDigest, stable_digest
from ...measures.cost import Build, Cost
from ...retraining import store as run_store
from ...system import environment
from ...tasks.task import Task
from ...tasks.task_loss import loss_of_methods

#: Attributes that fit and query set, or that differ between processes.
_NOT_BUILT = frozenset(
    {"fit_seconds_", "query_seconds_", "peak_bytes_", "_fit_bytes", "_fitted_on", "_states"}
)
#: The code of this package is digested by the content of its files.
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Answer:
    """Scores of one query, and their cost.

    Attributes:
        values: The scores.
        fit_seconds: Setup.
        seconds: The query, without setup.
        forward_seconds: One forward pass over the training set, measured in the same run.
        peak_bytes: Peak memory of the method; None if it was not measured.
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


class CachedMethod:
    """A method on one model. It is fitted at the first query whose scores the store does not hold.

    Args:
        build: Builds the method. If it has an attribute `cache_key` (see `MethodSpec`), scores are named by
            that key, the options, the weights and the training set alone.
        model: The attributed model.
        task: The method gets its training set.
        options: Options for `build`.
        store: Folder of the scores; None keeps nothing.
        forward_seconds: One forward pass over the training set.

    Attributes:
        method: The method, perhaps not fitted yet. Setting an attribute on it changes the names of its
            scores.
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
        if not task.has_classes:
            options = {**options, "loss": loss_of_methods(task.loss)}
        self.method = build(model, task.train, options)
        self._task, self._forward_seconds = task, forward_seconds
        self._folder = None if store is None else Path(store) / "answers"
        self._parts: dict[str, str] = {}
        self._seen: dict[str, Any] = {}
        self._refusal: ValueError | None = None
        key = getattr(build, "cache_key", None)
        self._knows_the_code = key is None
        if self._folder is not None:
            if key is not None:
                self._seen = dict(vars(self.method))
            with self._unless_unstable():
                self._parts = _of_code(self.method) if key is None else _of_key(key, model, task, options)

    @contextmanager
    def _unless_unstable(self) -> Iterator[None]:
        """Stop caching, with one warning, if a part of the method has no stable digest."""
        try:
            yield
        except NoStableDigest as error:
            self._folder = None
            warnings.warn(
                f"The scores of {type(self.method).__name__} are not cached: {error}. Build it without that, "
                "or give its MethodSpec a `cache_key` that changes whenever its scores do.",
                stacklevel=4,
            )

    @property
    def has_own_mislabel_scores(self) -> bool:
        """Whether the class overrides `mislabel_scores`."""
        return type(self.method).mislabel_scores is not InfluenceMethod.mislabel_scores

    def margins(self, batch: tuple[Tensor, Tensor], normalize: str | None = None) -> Answer:
        """Scores `(n_test, n_train)` of the margins of labeled test points (or of the first response)."""
        return self.margins_each_way(batch, [normalize])[0]

    def margins_each_way(
        self, batch: tuple[Tensor, Tensor], normalizations: Sequence[str | None]
    ) -> list[Answer]:
        """`margins` with each of several normalizations.

        Where the store lacks several that need no more than the scores of each checkpoint, one pass serves
        all. The cost of each is that of the pass, and its memory holds the scores of all checkpoints.
        """
        response = self._task.loss.responses[0]
        paths = {
            how: self._path(f"{response} of the label, normalize={how}", batch) for how in normalizations
        }
        found = {how: self._stored(path) for how, path in paths.items()}
        missing = [how for how, answer in found.items() if answer is None]
        if len(missing) > 1 and self._has_plain_influence and set(missing) <= set(SUMMED):
            alone = self._computed(lambda m: m.checkpoint_scores(batch, response=response, target="label"))
            scores, weights = torch.from_numpy(alone.values), self.method.checkpoint_weights_
            for how in missing:
                answer = replace(alone, values=weighted_sum(scores, weights, how).numpy())
                found[how] = self._keep(paths[how], answer)
        return [
            answer or self._keep(paths[how], self._computed(partial(_influence, batch, response, how)))
            for how, answer in found.items()
        ]

    def tried(self, batch: tuple[Tensor, Tensor], normalizations: Sequence[str | None]) -> list[Answer]:
        """`margins_each_way`; that the method refuses its options is kept in the store, as scores are.

        It is not kept for a method with a `cache_key`, which does not change with the code.

        Raises:
            ValueError: It refuses them, or has done so before.
        """
        path = self._path(f"refusal of {list(normalizations)}", batch) if self._knows_the_code else None
        mark = None if path is None else path.with_suffix(".refused")
        if mark is not None and mark.exists():
            raise ValueError(f"{mark.read_text('utf-8')} (kept in {mark})")
        try:
            return self.margins_each_way(batch, normalizations)
        except ValueError as error:
            reason = str(error)
            if mark is not None and error is self._refusal:
                atomic_write(mark, lambda name: Path(name).write_text(reason, "utf-8"))
            raise

    @property
    def _has_plain_influence(self) -> bool:
        own = type(self.method).influence is not InfluenceMethod.influence
        return not own and self.method.ranks is SINGLE_PROCESS

    def support(self, batch: tuple[Tensor, Tensor], normalize: str | None = None) -> Answer:
        """Scores `(n_test, n_train)` of how much a training example supports the label of a test point.

        These are scores of the margin. For a loss without margins they are minus the scores of the loss: a
        duplicate of a test point lowers its loss, but may raise or lower the output of a regression.
        """
        if "margin" in self._task.loss.responses:
            return self.margins(batch, normalize)
        return self.ask(
            f"minus the loss, normalize={normalize}",
            batch,
            lambda m: -m.influence(batch, response="loss", target="label", normalize=normalize),
        )

    def ask(self, what: str, about: tuple[Tensor, ...], compute: Callable[[InfluenceMethod], Any]) -> Answer:
        """Scores of one query, from the store if it holds them.

        Args:
            what: Name of the query.
            about: Tensors that the query depends on, besides the training set.
            compute: Computes the scores with the fitted method.
        """
        path = self._path(what, about)
        answer = self._stored(path)
        return self._keep(path, self._computed(compute)) if answer is None else answer

    def _stored(self, path: Path | None) -> Answer | None:
        if path is None:
            return None
        answer, damage = _read(path)
        if answer is None:
            run_store.say_damaged(path, damage)
        return answer

    def _keep(self, path: Path | None, answer: Answer) -> Answer:
        if path is not None:
            _write(path, answer)
        return answer

    def _computed(self, compute: Callable[[InfluenceMethod], Any]) -> Answer:
        """What a function gives of the fitted method, and its cost."""
        method = self.method
        try:
            if not hasattr(method, "fit_seconds_"):
                release_free_memory()
                method.fit()
            started = time.perf_counter()
            found = compute(method)
        except ValueError as error:
            self._refusal = error
            raise
        finally:  # options that are refused may be set anew
            self._seen = dict(vars(method))
        return Answer(
            values=np.ascontiguousarray(found.cpu() if isinstance(found, Tensor) else found),
            fit_seconds=method.fit_seconds_,
            seconds=time.perf_counter() - started,
            forward_seconds=self._forward_seconds,
            peak_bytes=method.peak_bytes_,
        )

    def _path(self, what: str, about: tuple[Tensor, ...]) -> Path | None:
        """The file of the scores; None if nothing is kept."""
        if self._folder is not None:
            with self._unless_unstable():
                self._parts |= self._changed()
        if self._folder is None:
            return None
        parts = {"parts": self._parts, "what": what, "about": run_store.hash_tensors(about)}
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
        return self._folder / f"{name}.safetensors"

    def _changed(self) -> dict[str, str]:
        """Digests of the attributes that were set since the method was built or last queried."""
        now = dict(vars(self.method))
        found = {
            name: _of_attribute(self.method, self._task, name)
            for name, value in now.items()
            if name not in _NOT_BUILT and (name not in self._seen or self._seen[name] is not value)
        }
        self._seen = now
        return found


def _influence(batch: Any, response: str, normalize: str | None, method: InfluenceMethod) -> Tensor:
    return method.influence(batch, response=response, target="label", normalize=normalize)


def _of_code(method: InfluenceMethod) -> dict[str, str]:
    return {"package": _code(), "class": stable_digest(type(method), "class", packages=(_PACKAGE,))}


def _of_attribute(method: InfluenceMethod, task: Task, name: str) -> str:
    value = getattr(method, name)
    if name == "train_dataset" and value is task.train:
        value = task.train.tensors
    elif name in ("train_dataset", "held_out") and not (value is None or is_batch(value)):
        value = Examples(value)
    elif name == "checkpoints" and value is not None:
        value = _loaded(method)
    return stable_digest(value, name, packages=(_PACKAGE,))


def _of_key(key: str, model: nn.Module, task: Task, options: Mapping[str, Any]) -> dict[str, str]:
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


def _write(path: Path, answer: Answer) -> None:
    from safetensors.numpy import save_file

    facts = {k: v for k, v in vars(answer).items() if k != "values"}
    metadata = {"cost": json.dumps(facts)}
    atomic_write(path, lambda name: save_file({"values": answer.values}, name, metadata))


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
