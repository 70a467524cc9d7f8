"""Rows of a top-k result: ids, labels and scores instead of column numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..data import inputs as data
from ..errors import bad_type, bad_value
from .stale_data import own_labels

if TYPE_CHECKING:
    from .method import InfluenceMethod


def result_rows(method: InfluenceMethod, result: Any, *, as_frame: bool | None = None) -> Any:
    """A top-k result as rows, the best training example of the first test point first.

    Args:
        method: The method that gave it.
        result: What `influence(inputs, k)` returned.
        as_frame: Whether the rows are a pandas data frame; None: if pandas is installed.

    Returns:
        A data frame, or a list of dicts, with the columns test (place of the test point), rank (from 1),
        train (place of the training example), id (if there are ids), label (if the data set has labels) and
        score.

    Raises:
        TypeError: Not a top-k result.
        ValueError: `as_frame` without pandas, or as many ids as there are not examples.

    >>> from stride_captum.adapters import Similarity
    >>> from stride_captum.conformance.toy_problems import MLP, trained
    >>> model, train, test = trained(MLP)
    >>> method = Similarity(model, train, ids=[f"img{i}.png" for i in range(len(train))])
    >>> rows = result_rows(method, method.influence(test, 2), as_frame=False)
    >>> sorted(rows[0]), len(rows)
    (['id', 'label', 'rank', 'score', 'test', 'train'], 14)
    """
    indices, scores = getattr(result, "indices", None), getattr(result, "influence_scores", None)
    if not isinstance(indices, Tensor) or not isinstance(scores, Tensor):
        must = "be what influence(inputs, k) has returned"
        raise bad_type("result", must, result, "Ask for k.")
    installed = find_spec("pandas") is not None
    if as_frame and not installed:
        raise bad_value("as_frame", "be False or None without pandas", True, "pip install pandas.")
    examples = method._every_example()
    ids, labels = checked_ids(method.ids, examples), own_labels(examples)
    rows = []
    for test, (places, values) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True)):
        for rank, (train, score) in enumerate(zip(places, values, strict=True), 1):
            row = {"test": test, "rank": rank, "train": train}
            row |= {} if ids is None else {"id": ids[train]}
            row |= {} if labels is None else {"label": int(labels[train])}
            rows.append({**row, "score": score})
    if as_frame is False or not installed:
        return rows
    import pandas

    return pandas.DataFrame(rows)


def checked_ids(ids: Sequence[Any] | None, dataset: Any) -> Sequence[Any] | None:
    """Ids as given, or the attribute `ids` of the data set.

    Raises:
        TypeError: No sequence.
        ValueError: More or fewer than the training examples.
    """
    found = getattr(getattr(dataset, "dataset", dataset), "ids", None) if ids is None else ids
    if found is None:
        return None
    if isinstance(found, str) or not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise bad_type("ids", "be a sequence with a name for each training example", found)
    n = data.count_examples(dataset)
    if n is not None and len(found) != n:
        raise bad_value("ids", f"hold one for each of {n} training examples", len(found))
    return np.asarray(found).tolist() if isinstance(found, np.ndarray | Tensor) else found
