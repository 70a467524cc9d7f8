"""Class probabilities of each example from a fit on other folds, which has not seen it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import bad_value

#: Probabilities `(n_test_rows, n_classes)` for some rows of the training set from a fit on others.
FitPredict = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]


def out_of_sample_probabilities(
    fit_predict: FitPredict, labels: Any, n_folds: int = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Class probabilities of each example from a fit that has not seen it.

    Folds are random and stratified: every class with two examples is in every fit.

    Args:
        fit_predict: `f(train_rows, test_rows) -> (len(test_rows), n_classes)` probabilities.
        labels: `(n,)` integers.
        n_folds: From 2 to n.
        seed: Of the folds.

    Returns:
        `(n, n_classes)`.

    Raises:
        ValueError: A number of folds out of range, or what is no row of probabilities per example.
    """
    labels = np.asarray(labels)
    n = len(labels)
    if not isinstance(n_folds, int) or isinstance(n_folds, bool) or not 2 <= n_folds <= n:
        raise bad_value("n_folds", f"be an integer from 2 to the {n} examples", repr(n_folds))
    by_class = np.lexsort((np.random.default_rng(seed).random(n), labels))
    fold = np.empty(n, dtype=np.int64)
    fold[by_class] = np.arange(n) % n_folds
    parts = []
    for left_out in range(n_folds):
        train, test = np.flatnonzero(fold != left_out), np.flatnonzero(fold == left_out)
        part = np.asarray(fit_predict(train, test), dtype=np.float64)
        if part.ndim != 2 or len(part) != len(test):
            raise bad_value("fit_predict", f"return {len(test)} rows of probabilities", f"shape {part.shape}")
        if not (np.isfinite(part).all() and (part >= 0).all() and np.allclose(part.sum(1), 1, atol=1e-4)):
            raise bad_value("fit_predict", "return rows of probabilities that add up to 1", "other values")
        parts.append((test, part))
    widths = {part.shape[1] for _, part in parts}
    if len(widths) > 1:
        raise bad_value("fit_predict", "return one column per class", f"widths {sorted(widths)}")
    probabilities = np.empty((n, widths.pop()))
    for test, part in parts:
        probabilities[test] = part
    return probabilities


def logistic_regression(features: NDArray[Any], labels: NDArray[Any], n_classes: int) -> FitPredict:
    """Multinomial logistic regression on standardized features, as a `fit_predict`.

    Args:
        features: `(n, n_features)`.
        labels: `(n,)` integers in `[0, n_classes)`.
        n_classes: Design of the probabilities; a class that a fit has not seen gets 0.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit_predict(train: NDArray[np.int64], test: NDArray[np.int64]) -> NDArray[np.float64]:
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        head.fit(features[train], labels[train])
        probabilities = np.zeros((len(test), n_classes))
        probabilities[:, head.classes_] = head.predict_proba(features[test])
        return probabilities

    return fit_predict
