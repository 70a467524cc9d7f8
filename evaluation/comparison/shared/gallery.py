"""Gallery of a comparison: the top training examples of every method for the same few test points.

It shows the first attributed model. It is filled while the methods are fitted, and contains its pictures, so
that the report can be written without the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ....responses import multiclass_logits
from ...report.pictures import picture
from ...retraining.training import logits_of
from ...tasks.task import Task
from .score_cache import CachedMethod
from .suspects import Suspect, most_suspect

Example = dict[str, Any]


class Gallery:
    """Collects the proponents, opponents and suspects of each method.

    Args:
        task: Data and labels.
        models: The attributed models by name; the first is shown. Without any, no test points are shown.
        candidates: Indices in the test set, from which the test points are chosen.
        rank_suspects: Whether to list the most suspect labels of `task` by every method; not needed if
            flipped labels are ranked.
        n_points: Number of test points.
        k: Number of proponents and of opponents for each.
    """

    def __init__(
        self,
        task: Task,
        models: Mapping[str, nn.Module],
        candidates: range,
        *,
        rank_suspects: bool = True,
        n_points: int = 4,
        k: int = 5,
    ) -> None:
        self.task = task
        self.rank_suspects = rank_suspects
        self.k = k
        self.points: list[Example] = []
        self.methods: list[dict[str, Any]] = []
        self.rankings: list[dict[str, Any]] = []
        self.model_name = next(iter(models), None) if task.has_classes else None
        if self.model_name is None:
            return
        x_test, y_test = (t[candidates.start : candidates.stop] for t in task.test.tensors)
        logits = multiclass_logits(logits_of(models[self.model_name], x_test))
        rows = choose_points(logits, y_test, n_points)
        self._rows = rows
        p = logits[rows].softmax(1)
        self.points = [
            {
                "index": candidates.start + row,
                "label": int(y_test[row]),
                "predicted": int(p[i].argmax()),
                "probability": float(p[i, y_test[row]]),
            }
            for i, row in enumerate(rows)
        ]

    def add(self, name: str, method: CachedMethod, scores: NDArray[Any]) -> None:
        """Add a method on the first attributed model.

        Args:
            name: Name of the method.
            method: Computes the most suspect labels.
            scores: Its scores for all candidates, `(n_candidates, n_train)`.
        """
        if not self.task.has_classes:  # examples are shown with their one label
            return
        points = []
        for row in scores[self._rows]:
            best, worst = (np.argsort(sign * row, kind="stable")[: self.k] for sign in (-1, 1))
            points.append({"proponents": self._examples(best, row), "opponents": self._examples(worst, row)})
        self.methods.append({"name": name, "points": points})
        if self.rank_suspects:
            ranking = "mislabel scores" if method.has_own_mislabel_scores else "self-influence"
            labels = self.task.train.tensors[1].numpy()
            scores = method.ask("mislabel scores", (), lambda m: m.mislabel_scores()).values
            found = most_suspect(scores, labels)
            self._add_ranking(name, ranking, found, flips_known=False)

    def add_flips(self, name: str, ranking: str, found: Iterable[Suspect]) -> None:
        """Add the most suspect examples of a ranking of flipped labels."""
        self._add_ranking(name, ranking, found, flips_known=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with a picture of every example that is an image."""
        shown = [n for m in self.methods for p in m["points"] for side in p.values() for n in side]
        shown += [n for ranking in self.rankings for n in ranking["examples"]]
        train, test = self.task.train.tensors[0], self.task.test.tensors[0]
        return {
            "model": self.model_name,
            "points": self.points,
            "methods": self.methods,
            "suspects": self.rankings,
            "pictures": {
                "train": _pictures(train, {n["index"] for n in shown}),
                "test": _pictures(test, {p["index"] for p in self.points}),
            },
        }

    def _examples(self, indices: NDArray[np.int64], scores: NDArray[Any]) -> list[Example]:
        labels = self.task.train.tensors[1]
        return [{**self._named(int(i)), "label": int(labels[i]), "score": float(scores[i])} for i in indices]

    def _named(self, index: int) -> Example:
        """Index of a training example, and its id if it has one."""
        ids = self.task.ids
        return {"index": index} if ids is None else {"index": index, "id": ids[index]}

    def _add_ranking(self, name: str, ranking: str, found: Iterable[Suspect], *, flips_known: bool) -> None:
        examples = [
            {
                **self._named(s.index),
                "label": s.label,
                "score": s.score,
                "true_label": s.true_label if flips_known else None,
            }
            for s in found
        ]
        n_flipped = sum(e["true_label"] != e["label"] for e in examples) if flips_known else None
        self.rankings.append({"name": name, "ranking": ranking, "n_flipped": n_flipped, "examples": examples})


def choose_points(logits: Tensor, labels: Tensor, n: int) -> list[int]:
    """The misclassified point with the highest loss, if there is one, then the first of every other class.

    Args:
        logits: `(n_test, n_classes)`.
        labels: `(n_test,)`.
        n: How many are wanted.

    Returns:
        Row indices, at most `n`.

    >>> choose_points(torch.tensor([[2.0, 0], [2, 0], [0, 2], [3, 0]]), torch.tensor([0, 0, 1, 1]), 3)
    [3, 0, 1]
    """
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    wrong = logits.argmax(1) != labels
    chosen = [int(losses.where(wrong, -torch.inf).argmax())] if bool(wrong.any()) else []
    classes = {int(labels[i]) for i in chosen}
    for i, label in enumerate(labels.tolist()):
        if label not in classes:
            chosen.append(i)
            classes.add(label)
    rest = [i for i in range(len(labels)) if i not in set(chosen)]
    return [*chosen, *rest][:n]


def _pictures(examples: Tensor, indices: Iterable[int]) -> dict[str, str]:
    found = {str(i): picture(examples[i], 0) for i in sorted(indices)}
    return {i: uri for i, uri in found.items() if uri is not None}
