"""Detection of mislabeled training examples: are flipped labels at the top of a ranking? (C.2)

    precision = |top_M(scores) & F| / M,    recall = |top_M(scores) & F| / |F|

F are the examples whose labels were flipped; M = |F| by default. Every figure is the expected value over a
random order of ties (McSherry and Najork 2008), so that constant scores have the precision of chance,
wherever the flipped examples are in the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import bad_choice, bad_value
from . import statistics
from .linear_datamodeling import finite_array
from .plain_values import plain
from .statistics import Array, Interval

KINDS = ("symmetric", "class-dependent")
#: Shares of the training set at which `MislabelResult.found` gives the recall.
INSPECTED = (0.05, 0.1, 0.2, 0.3, 0.5)
#: False positive rates at which `MislabelResult.roc` gives the true positive rate.
ROC_GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True, repr=False, eq=False)
class MislabelResult:
    """How well a ranking finds flipped labels; means over attributed models.

    Attributes:
        precision: Precision at M.
        recall: Recall at M; equal to `precision` if M is the number of flipped labels.
        average_precision: Mean over flipped examples of the precision at their rank.
        auc: Area under the ROC curve.
        per_model: Precision of each model.
        interval: Bootstrap interval of `precision` over training examples, for these models and flips; None
            without resamples.
        interval_average_precision: The same for `average_precision`.
        interval_auc: The same for `auc`.
        found: Recall when the shares `INSPECTED` of the training set are inspected.
        roc: True positive rates at the false positive rates `ROC_GRID`.
        rate: Share of flipped labels, which is the precision of chance.
        n_train: Number of training examples.
        m: M of each model.
        seed: Seed of the bootstrap.
        draws: Bootstrap draws of the precision `(n_resamples, n_models)`; those of two results with one seed
            are paired.

    >>> result = mislabel([0.9, 0.8, 0.1, 0.2], [True, False, False, False], n_resamples=0)
    >>> result.m, result.rate, result.auc
    ((1,), 0.25, 1.0)
    """

    precision: float
    recall: float
    average_precision: float
    auc: float
    per_model: tuple[float, ...]
    interval: Interval | None
    interval_average_precision: Interval | None
    interval_auc: Interval | None
    found: tuple[float, ...]
    roc: tuple[float, ...]
    rate: float
    n_train: int
    m: tuple[int, ...]
    seed: int = 0
    draws: Array | None = None

    def __repr__(self) -> str:
        spread = "" if self.interval is None else f" {self.interval} ({self.interval.level:.0%})"
        return (
            f"Precision {self.precision:.3f}{spread} (chance {self.rate:.3f}), "
            f"average precision {self.average_precision:.3f}, AUC {self.auc:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain values for JSON; `draws` is left out."""
        return plain({k: v for k, v in vars(self).items() if k != "draws"})


def flip_labels(
    labels: Any, rate: float, n_classes: int, *, kind: str = "symmetric", seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Flip the labels of a random share of the examples, the same share for every seed.

    Args:
        labels: `(n,)` in `[0, n_classes)`.
        rate: Share of labels that are flipped, rounded to whole examples.
        n_classes: Number of classes. Labels are flipped only to classes that some example has.
        kind: "symmetric" (to any other class with equal probability) or "class-dependent" (from each class to
            the next one, and from the last to the first, as annotators confuse neighbors).
        seed: Seed of the draw. The global random state is not used.

    Returns:
        The noisy labels, `(n,)` int64, and which were flipped, `(n,)` bool.

    Raises:
        ValueError: An argument is out of range, or no label or all labels would be flipped.
    """
    clean = np.asarray(labels)
    if kind not in KINDS:
        raise bad_choice("kind", kind, KINDS)
    if not 0 < rate < 1:
        raise bad_value("rate", "be in (0, 1)", rate)
    if n_classes < 2:
        raise bad_value("n_classes", "be at least 2", n_classes)
    if clean.ndim != 1 or not np.isin(clean, np.arange(n_classes)).all():
        raise bad_value("labels", f"be classes in [0, {n_classes}), shape (n,)", f"shape {clean.shape}")
    classes, places = np.unique(clean, return_inverse=True)
    if len(classes) < 2:
        raise bad_value("labels", "be of at least 2 classes", f"class {classes.tolist()} alone")
    n_flipped = round(float(rate) * len(clean))
    if not 0 < n_flipped < len(clean):
        raise bad_value("rate", f"flip some of the {len(clean)} labels and not all", f"{rate}: {n_flipped}")
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(clean), size=n_flipped, replace=False)
    steps = generator.integers(1, len(classes), size=len(rows)) if kind == "symmetric" else 1
    noisy = clean.astype(np.int64)
    noisy[rows] = classes[(places[rows] + steps) % len(classes)]
    return noisy, np.isin(np.arange(len(clean)), rows)


def mislabel(
    scores: Any,
    flipped: Any,
    *,
    m: int | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> MislabelResult:
    """Precision, recall, average precision and ROC of a ranking of suspect labels.

    Args:
        scores: `(n_train,)`, high = suspect; or a list with one such vector for each attributed model.
        flipped: Which labels were flipped, `(n_train,)`; or `(n_models, n_train)`.
        m: M, the number of inspected examples; None takes the number of flipped ones.
        n_resamples: Draws of the bootstrap; 0 leaves the intervals out. 1,000 draws take about 6 seconds for
            60,000 examples (linear in both, and in the number of models).
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or all or no labels are flipped.

    >>> suspicion, flipped = [0.9, 0.8, 0.1, 0.2], [True, False, False, True]
    >>> mislabel(suspicion, flipped, n_resamples=0).precision  # one of the two most suspect
    0.5
    """
    vectors = [finite_array("scores", s) for s in _vectors(scores)]
    masks = np.atleast_2d(np.asarray(flipped))
    n_train = masks.shape[1]
    if masks.dtype != bool or masks.ndim != 2 or len(masks) not in (1, len(vectors)):
        raise bad_value("flipped", "be boolean, (n_train,) or (n_models, n_train)", np.shape(flipped))
    for vector in vectors:
        if vector.shape != (n_train,):
            raise bad_value("scores", f"have shape ({n_train},) for each model", vector.shape)
    if not (masks.any(1) & ~masks.all(1)).all():
        raise bad_value("flipped", "hold flipped and unflipped labels", f"{masks.sum(1).tolist()} flipped")
    if m is not None and not 1 <= m <= n_train:
        raise bad_value("m", f"be in [1, {n_train}]", m)
    if n_resamples < 0:
        raise bad_value("n_resamples", "be at least 0", n_resamples)
    masks = np.broadcast_to(masks, (len(vectors), n_train))
    rankings = [_Ranking.of(s, f) for s, f in zip(vectors, masks, strict=True)]
    sizes = [int(f.sum()) if m is None else m for f in masks]
    hits = np.array([r.hits(k) for r, k in zip(rankings, sizes, strict=True)])
    per_model = hits / sizes
    draws = _bootstrap(rankings, masks, m, n_resamples, seed)
    spread = [None] * 3 if not n_resamples else [statistics.interval(d.mean(1), level) for d in draws]
    return MislabelResult(
        precision=float(per_model.mean()),
        recall=float((hits / masks.sum(1)).mean()),
        average_precision=float(np.mean([r.average_precision() for r in rankings])),
        auc=float(np.mean([r.auc() for r in rankings])),
        per_model=tuple(per_model.tolist()),
        interval=spread[0],
        interval_average_precision=spread[1],
        interval_auc=spread[2],
        found=tuple(
            float(np.mean([r.hits(round(share * n_train)) / r.positives.sum() for r in rankings]))
            for share in INSPECTED
        ),
        roc=tuple(np.mean([r.true_positive_rates(ROC_GRID) for r in rankings], axis=0).tolist()),
        rate=float(masks.mean()),
        n_train=n_train,
        m=tuple(sizes),
        seed=seed,
        draws=draws[0] if n_resamples else None,
    )


def expected_hits(scores: Any, positives: Any, k: int) -> float:
    """Expected number of positives among the k highest scores, over a random order of ties.

    Args:
        scores: `(n,)`.
        positives: `(n,)` bool.
        k: How many scores are inspected.

    >>> expected_hits([3.0, 1.0, 1.0, 0.0], [False, True, False, True], 2)
    0.5
    """
    return _Ranking.of(np.asarray(scores, dtype=np.float64), np.asarray(positives)).hits(k)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Groups of equal scores in descending order, with the numbers of examples and positives in each."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: Array
    positives: Array

    @classmethod
    def of(cls, scores: Array, positives: NDArray[np.bool_]) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        return cls(order, starts, *_group_sums(order, starts, np.ones(len(scores)), positives))

    def resampled(self, counts: Array, positives: NDArray[np.bool_]) -> _Ranking:
        """The ranking of a draw that holds example i `counts[i]` times."""
        sums = _group_sums(self.order, self.starts, counts, positives)
        return _Ranking(self.order, self.starts, *(s[sums[0] > 0] for s in sums))

    def hits(self, k: int) -> float:
        ends = np.cumsum(self.sizes)
        g = int(np.searchsorted(ends, k))
        inside = (k - (ends[g] - self.sizes[g])) / self.sizes[g]
        return float(self.positives[:g].sum() + inside * self.positives[g])

    def auc(self) -> float:
        before = np.cumsum(self.positives) - self.positives
        negatives = self.sizes - self.positives
        pairs = self.positives.sum() * negatives.sum()
        return float(negatives @ (before + self.positives / 2) / pairs)

    def average_precision(self) -> float:
        # At place j of a group of n with p positives, after N examples with P positives, a positive sits
        # with probability p / n and expects P + 1 + (j - 1)(p - 1) / (n - 1) positives among N + j.
        n, p = self.sizes, self.positives
        seen, found = np.cumsum(n) - n, np.cumsum(p) - p
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n.sum() + 1))])
        inverse = harmonic[(seen + n).astype(int)] - harmonic[seen.astype(int)]
        others = (p - 1) / np.maximum(n - 1, 1) * (n - (seen + 1) * inverse)
        return float((p / n * ((found + 1) * inverse + others)).sum() / p.sum())

    def true_positive_rates(self, false_positive_rates: Array) -> Array:
        """The ROC curve: linear within ties; at a vertical step its upper end."""
        tpr = np.concatenate([[0.0], np.cumsum(self.positives) / self.positives.sum()])
        negatives = self.sizes - self.positives
        fpr = np.concatenate([[0.0], np.cumsum(negatives) / negatives.sum()])
        return np.asarray(np.interp(false_positive_rates, fpr, tpr))


def _group_sums(
    order: NDArray[np.int64], starts: NDArray[np.int64], counts: Array, positives: NDArray[np.bool_]
) -> tuple[Array, Array]:
    weights = counts[order]
    return np.add.reduceat(weights, starts), np.add.reduceat(weights * positives[order], starts)


def _bootstrap(
    rankings: Sequence[_Ranking], masks: NDArray[np.bool_], m: int | None, n_resamples: int, seed: int
) -> Array:
    """Precision, average precision and AUC of resampled training examples, `(3, n_resamples, n_models)`."""
    generator = np.random.default_rng(seed)
    n_train = masks.shape[1]
    draws = np.full((3, n_resamples, len(rankings)), np.nan)
    for r in range(n_resamples):
        drawn = generator.integers(0, n_train, size=n_train)
        counts = np.bincount(drawn, minlength=n_train).astype(np.float64)
        for i, (ranking, flipped) in enumerate(zip(rankings, masks, strict=True)):
            sample = ranking.resampled(counts, flipped)
            n_flipped = int(sample.positives.sum())
            if 0 < n_flipped < n_train:
                k = n_flipped if m is None else m
                draws[:, r, i] = sample.hits(k) / k, sample.average_precision(), sample.auc()
    return draws


def _vectors(scores: Any) -> list[Any]:
    """One vector for each attributed model."""
    if len(scores) == 0:
        raise bad_value("scores", "hold one vector for each attributed model", "none")
    return [scores] if np.ndim(scores[0]) == 0 else list(scores)
