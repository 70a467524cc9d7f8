"""On-disk cache of scores, so that an interrupted evaluation resumes without refitting.

The name of a file is a digest of everything that determines the scores (`score_names`) and of the query. A
method with a part that has no stable digest is not cached; a warning names the part.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....influence.checkpoints.averages import SUMMED, weighted_sum
from ....influence.method import InfluenceMethod
from ....system.atomic import atomic_write
from ....system.peak_memory import release_free_memory
from ....system.processes import SINGLE_PROCESS
from ....system.stable_digest import NoStableDigest
from ...measures.cost import Build
from ...retraining import store as run_store
from ...tasks.task import Task
from ...tasks.task_loss import loss_of_methods
from .answers import Answer, read_answer, write_answer
from .score_names import NOT_BUILT, of_attribute, of_code, of_key


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
                self._parts = of_code(self.method) if key is None else of_key(key, model, task, options)

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
        answer, damage = read_answer(path)
        if answer is None:
            run_store.say_damaged(path, damage)
        return answer

    def _keep(self, path: Path | None, answer: Answer) -> Answer:
        if path is not None:
            write_answer(path, answer)
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
            name: of_attribute(self.method, self._task, name)
            for name, value in now.items()
            if name not in NOT_BUILT and (name not in self._seen or self._seen[name] is not value)
        }
        self._seen = now
        return found


def _influence(batch: Any, response: str, normalize: str | None, method: InfluenceMethod) -> Tensor:
    return method.influence(batch, response=response, target="label", normalize=normalize)
