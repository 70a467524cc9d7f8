"""Labels and predictions of any loss, as reports show them."""

from __future__ import annotations

from itertools import groupby

from torch import Tensor

from ...losses import Loss
from ...losses.summed_positions import SummedPositions

#: How many runs of classes, or numbers, are written out.
_FIRST_RUNS, _FIRST_NUMBERS = 6, 4


def label_in_words(loss: Loss, label: Tensor, width: int) -> int | str:
    """The label of one example: its class, the classes of its positions, which labels it has, or numbers.

    Args:
        loss: What the model was trained with.
        label: As the data set gives it.
        width: Width of a row of outputs (`output_rows`).
    """
    y = loss.labels(label[None], width, "labels")
    if isinstance(loss, SummedPositions):
        own = y[0][loss.position.counted(y)[0]]
        return _runs(own.tolist()) if _are_classes(loss.position, own) else _numbers(own)
    return _class(y) if loss.has_classes else _labels_or_numbers(loss, y[0], y[0])


def output_in_words(loss: Loss, row: Tensor, label: Tensor) -> int | str:
    """What the model says of one example, in the unit of its label.

    Args:
        loss: What the model was trained with.
        row: Its outputs, `(width,)` (`output_rows`).
        label: As the data set gives it.
    """
    z = row[None].double()
    y = loss.labels(label[None], len(row), "labels")
    if isinstance(loss, SummedPositions):
        outputs, own, _ = loss.counted_rows(z, y, None)
        if not _are_classes(loss.position, own):
            return _numbers(_predicted(loss.position, outputs, own))
        said = outputs.argmax(1)
        right = int((said == own.to(said)).sum())
        return f"{_runs(said.tolist())} ({right} of {len(said)} right)"
    return int(z.argmax()) if loss.has_classes else _labels_or_numbers(loss, _predicted(loss, z, y)[0], y[0])


def _are_classes(loss: Loss, y: Tensor) -> bool:
    """Whether labels are classes, `(n,)`."""
    return loss.has_classes and y.ndim == 1


def _class(y: Tensor) -> int:
    """The class of a label, the most probable one of a distribution."""
    return int(y[0].argmax()) if y.ndim == 2 else int(y[0])


def _predicted(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """E[y] of the model: the label less the residual."""
    own = y.reshape(z.shape)
    return own.to(z) - loss.residuals(z, own)


def _runs(classes: list[int]) -> str:
    """Classes of positions that follow one another.

    >>> _runs([3, 1, 1, 1, 0])
    '3 1x3 0'
    """
    runs = [(c, len(list(group))) for c, group in groupby(classes)]
    few = " ".join(str(c) + (f"x{n}" if n > 1 else "") for c, n in runs[:_FIRST_RUNS])
    return few + (f" … of {len(classes)}" if len(runs) > _FIRST_RUNS else "")


def _labels_or_numbers(loss: Loss, values: Tensor, label: Tensor) -> str:
    """Which of several labels an example has, those of at least 0.5; other values as numbers.

    >>> import torch
    >>> from stride_captum.losses import BinaryCrossEntropy
    >>> _labels_or_numbers(BinaryCrossEntropy(), torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1, 0, 0]))
    '0, 2'
    """
    if not loss.tempered or len(label) < 2 or not bool(((label == 0) | (label == 1)).all()):
        return _numbers(values)
    return ", ".join(str(i) for i in (values >= 0.5).nonzero().squeeze(1).tolist()) or "none"


def _numbers(values: Tensor) -> str:
    """Numbers, the first few of many."""
    flat = values.flatten()
    few = " ".join(f"{value:.3g}" for value in flat[:_FIRST_NUMBERS].tolist())
    return few + (f" … of {len(flat)}" if len(flat) > _FIRST_NUMBERS else "")
