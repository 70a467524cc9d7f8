"""How batches are read: `Batch` as the user says it, `Reading` as it is known for one source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import bad_type, bad_value
from ..losses import CrossEntropy, Loss
from .containers import Path, described
from .shared_parts import shared_parts

if TYPE_CHECKING:
    from .batch import ExampleBatch

#: Key of the labels in a dict, by convention.
LABEL_KEY = "labels"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a batch is read, if it does not follow the conventions.

    By convention a batch is a tuple or list whose last element is the labels, and the model is called as
    `model(*batch[:-1])`; or a dict with the key "labels", and the model is called as
    `model(**batch without "labels")`. Inputs may be nested in any way that the model accepts.

    Args:
        forward: `f(model, batch) -> outputs`, calls the model; `batch` is the original one with its labels,
            on the device of the model.
        label_key: Key of the labels in a dict, or their place in a tuple. `forward` is also needed if the
            model does not take all other parts of the batch.
        per_example: The parts with one row per example, by key or place (a tuple of keys and places for a
            nested part). All others are given to the model whole. None infers them: all parts that the
            default `collate_fn` stacks, and with a custom `collate_fn` those whose length follows the number
            of labels.
        sample_weight: Factor of the loss of each training example in training: `(n_train,)`, in the order of
            the training set; or the key or place of a part of the batch, `(n,)`, which is not given to the
            model and which test points need not have (a place below 0 counts from the end of a batch of the
            training set). With P positions an example also `(n_train, P)`, or `(n, P)`. Weight 0 is
            equivalent to removing the example, 2 to having it twice. A position of weight 0 counts for
            nothing, as one whose label is ignored; one of a test point neither, if it has weights `(n, P)`.

    >>> Batch(label_key="label").label_key
    'label'
    """

    forward: Callable[[nn.Module, Any], Any] | None = None
    label_key: str | int | None = None
    per_example: Sequence[Any] | None = None
    sample_weight: Any = None

    def __post_init__(self) -> None:
        if self.forward is not None and not callable(self.forward):
            raise bad_type("forward", "be a function of a model and a batch", self.forward)
        if isinstance(self.label_key, bool) or not isinstance(self.label_key, str | int | None):
            raise bad_type("label_key", "be a key, a place in a tuple, or None", self.label_key)
        if isinstance(self.per_example, str) or not isinstance(self.per_example, Sequence | None):
            raise bad_type("per_example", "be a list of keys or places", self.per_example, "Write ['x'].")
        if self.sample_weight is not None and not isinstance(self.sample_weight, str | int):
            object.__setattr__(self, "sample_weight", checked_weights(self.sample_weight, "sample_weight"))

    def check_weights_of(self, n_train: int | None) -> None:
        """Refuse weights that are given by number where there are more or fewer than the training examples.

        Args:
            n_train: Number of training examples; None while it is not known.

        Raises:
            ValueError: There is not one for each.
        """
        weights = self.sample_weight
        if isinstance(weights, Tensor) and n_train not in (None, len(weights)):
            must = f"hold one for each of {n_train} training examples"
            raise bad_value("sample_weight", must, len(weights))

    def with_weights_of(self, rows: Tensor | slice) -> Batch:
        """Options for a subset of the training examples."""
        weights = self.sample_weight
        return replace(self, sample_weight=weights[rows]) if isinstance(weights, Tensor) else self


@dataclass(frozen=True)
class Reading:
    """How the batches of one source are read.

    Attributes:
        options: As given by the user.
        loss: Converts outputs to logits.
        shared: Parts recognized as the same for all examples.
        n_parts: Parts of a batch of the training set that is a tuple; None if not known, or for a dict.
    """

    options: Batch = field(default_factory=Batch)
    loss: Loss = field(default_factory=CrossEntropy)
    shared: frozenset[Path] = frozenset()
    n_parts: int | None = None

    @property
    def weight_key(self) -> Any:
        """`sample_weight`, with a negative place as it stands in a batch of the training set.

        Batches of test points may come without weights, which moves every part when counted from the end.
        """
        key, n = self.options.sample_weight, self.n_parts
        if n is None or not isinstance(key, int):
            return key
        return key % n if -n <= key < 0 else key

    def with_parts_of(self, first: ExampleBatch) -> Reading:
        """Copy that knows how many parts a batch of the training set has."""
        return replace(self, n_parts=len(first.content) if isinstance(first.content, tuple) else None)

    def with_shared(self, first: ExampleBatch, second: ExampleBatch | None) -> Reading:
        """Copy with the shared parts that two batches of the source reveal."""
        return replace(self, shared=frozenset(shared_parts(first, second)))


def checked_weights(weights: Any, argument: str) -> Tensor:
    """Weights as `(n,)` float64, or `(n, P)` for positions.

    Raises:
        TypeError: They are not numbers.
        ValueError: Another shape, or a weight that is negative or not a number.
    """
    try:
        flat = torch.as_tensor(weights).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_type(argument, "hold a weight for each training example", weights) from error
    if flat.ndim not in (1, 2):
        must = "hold weights of shape (n,), or (n, P) for examples with P positions"
        raise bad_value(argument, must, f"shape {tuple(flat.shape)}")
    wrong = ~(torch.isfinite(flat) & (flat >= 0))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0, 0])
        must = "hold weights that are numbers of at least 0"
        raise bad_value(argument, must, f"{float(flat[wrong][0])} at place {place}")
    return flat


def label_tensor(labels: Any, argument: str) -> Tensor | None:
    """Labels as a tensor; None without labels.

    Raises:
        ValueError: They are not numbers.
    """
    if labels is None:
        return None
    if isinstance(labels, Tensor):
        return labels.detach()
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise bad_value(
            argument,
            "give labels that are numbers",
            described(labels),
            "Map the names of the classes to 0, 1, 2, ...; labels stand last in a tuple or under "
            "'labels' in a dict, see Batch(label_key=...).",
        ) from error
