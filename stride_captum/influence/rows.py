"""Rows of a top-k result: ids, labels and scores instead of column numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..data import inputs as data
from ..data.digests import row_digests
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
    ids, labels = checked_ids(method.ids, method._every_example()), _sure_labels(method)
    rows = []
    for test, (places, values) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True)):
        for rank, (train, score) in enumerate(zip(places, values, strict=True), 1):
            row = {"test": test, "rank": rank, "train": train}
            row |= {} if ids is None else {"id": ids[train]}
            row |= {} if labels is None else {"label": labels[train].tolist()}
            rows.append({**row, "score": score})
    if as_frame is False or not installed:
        return rows
    import pandas

    return pandas.DataFrame(rows)


def _sure_labels(method: InfluenceMethod) -> Tensor | None:
    """Labels that the data set has beside its examples, if they are those that the method has read."""
    labels, read = own_labels(method._every_example()), getattr(method, "digests_", None)
    if labels is None or read is None or len(labels) != method.n_train_:
        return None
    own = labels[method._own_columns()]
    kinds = (own.dtype, torch.int64, torch.float64, torch.float32)
    sure = any(torch.equal(row_digests(len(own), [own.to(kind)]), read.labels) for kind in kinds)
    return labels if sure else None


def checked_ids(ids: Sequence[Any] | None, dataset: Any) -> Sequence[Any] | None:
    """Ids as given, or the attribute `ids` of the data set.

    Raises:
        TypeError: No sequence.
        ValueError: More or fewer than the training examples.
    """
    found = _ids_of(dataset.dataset if isinstance(dataset, DataLoader) else dataset) if ids is None else ids
    if found is None:
        return None
    if isinstance(found, str) or not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
        raise bad_type("ids", "be a sequence with a name for each training example", found)
    n = data.count_examples(dataset)
    if n is not None and len(found) != n:
        raise bad_value("ids", f"hold one for each of {n} training examples", len(found))
    return found if isinstance(found, list | tuple) else [_plain(name) for name in np.asarray(found)]


def _ids_of(dataset: Any) -> Any:
    """The attribute `ids` of a data set, or those of the examples that a `Subset` takes from one."""
    found = getattr(dataset, "ids", None)
    if found is not None or not isinstance(dataset, Subset):
        return found
    whole = _ids_of(dataset.dataset)
    return None if whole is None else [_plain(np.asarray(whole)[int(i)]) for i in dataset.indices]


def _plain(name: Any) -> Any:
    return name.item() if isinstance(name, np.generic) else name
