"""Second moments of the features of a training set, from one pass over it.

Products are computed in float32 and accumulated in float64. Everything is float64 if that is requested or
cheap, or if squares of the features overflow or underflow float32. Moments are sums over examples, so the
moments of a training set are the sum of those of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import bad_value
from ..linalg import add_gram_matrix, in_float32
from ..losses import CrossEntropy, Loss
from ..system.devices import float64_device, matching
from ..system.memory import MOST_ROWS, blocks
from ..system.saved_values import saved_as
from ..system.to_device import to_device, working_dtype

#: Up to this many multiplications a Gram matrix takes .02 s in float64 on one core.
_CHEAP = 2**28
#: Rows that are summed by class in float32 before they join a sum in float64. With 8,192 the leave-one-out
#: residuals lose a digit, and with it the cosine of examples that the model is sure of.
_CLASS_ROWS = 512


@saved_as("moments")
@dataclass
class Moments:
    """Second moments of the features of a set of training examples; those of two sets add up.

    Attributes:
        gram: `sum_i omega_i h_i h_i^T` with h extended by 1, `(n_features + 1, n_features + 1)` float64.
        targets: `sum_i omega_i h_i e_i^T`, `(n_features + 1, n_classes)` float64, where e_i is what the ridge
            head is fitted to: e_{y_i} with cross-entropy.
        widths: Widths of the layers, in the order of the columns.
        n_train: Number of examples.
    """

    gram: Tensor
    targets: Tensor
    widths: list[int]
    n_train: int

    def __add__(self, other: Moments) -> Moments:
        n = self.n_train + other.n_train
        return Moments(self.gram + other.gram, self.targets + other.targets, self.widths, n)

    def __sub__(self, other: Moments) -> Moments:
        n = self.n_train - other.n_train
        return Moments(self.gram - other.gram, self.targets - other.targets, self.widths, n)

    @cached_property
    def weight(self) -> float:
        """W, the sum of omega; N without weights."""
        return float(self.gram[-1, -1])

    @cached_property
    def scale(self) -> Tensor:
        """Factor of each feature that gives every layer unit mean square norm; 1 for the constant.

        `(n_features + 1,)` float64.
        """
        energy = self.gram.diagonal()
        scale, start = torch.ones_like(energy), 0
        for width in self.widths:
            norm = (energy[start : start + width].sum() / self.weight).sqrt()
            scale[start : start + width] = 1 / norm if norm > 0 else 1.0
            start += width
        return scale

    def of_layers(self, widths: Sequence[int]) -> Moments:
        """The moments of the first layers, which have these widths, and the constant."""
        if len(widths) == len(self.widths):
            return self
        kept = [*range(sum(widths)), len(self.gram) - 1]
        return Moments(self.gram[kept][:, kept], self.targets[kept], list(widths), self.n_train)

    @property
    def second_moment(self) -> Tensor:
        """A = E[phi phi^T], `(n_features + 1, n_features + 1)` float64."""
        return self.gram * self.scale[:, None] * self.scale / self.weight

    @property
    def mean(self) -> Tensor:
        """E[phi], the last row of A, `(n_features + 1,)` float64."""
        return self.gram[-1] * self.scale / self.weight

    @property
    def in_float32(self) -> bool:
        """Whether the squares of features, and of their scales, are within the range of float32."""
        return bool(in_float32(1 / self.scale).all())

    def checked(self) -> Moments:
        """Return these moments after checking that they are usable.

        Raises:
            ValueError: No weight above 0, NaN or infinite features, or features whose squares leave the range
                of float64.
        """
        if not self.weight > 0:
            must = "be above 0 for one training example"
            raise bad_value("sample_weight", must, "weights that are all 0")
        _check_range(self.gram, self.targets, self.widths)
        return self


def feature_moments(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    widths: Sequence[int],
    block_rows: int = MOST_ROWS,
    dtype: torch.dtype | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
) -> Moments:
    """Accumulate the moments.

    Args:
        features: `(n_train, n_features)`, may be memory-mapped, on any device.
        labels: `(n_train,)` int64, or as `loss` has them; products are taken on their device.
        n_classes: C.
        widths: Widths of the layers, in the order of the columns.
        block_rows: Rows of a block.
        dtype: Of the products; None takes float64 if that is cheap, or if squares of the features overflow or
            underflow float32.
        loss: What the model was trained with; None for cross-entropy.
        weights: omega, `(n_train,)`; None for 1.
    """
    chosen = dtype or working_dtype(features)
    if dtype is None and len(features) * features.shape[1] ** 2 <= _CHEAP:
        chosen = torch.float64
    loss = CrossEntropy() if loss is None else loss
    gram, targets = _sums(features, labels, n_classes, block_rows, chosen, loss, weights)
    if dtype != torch.float64 and not _within_float32(gram, targets, widths):
        gram, targets = _sums(features, labels, n_classes, block_rows, torch.float64, loss, weights)
    return Moments(gram, targets, list(widths), len(features))


def _sums(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    block_rows: int,
    dtype: torch.dtype,
    loss: Loss,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sum omega h h^T` and `sum omega h e^T`, with products in `dtype`."""
    n, d = features.shape
    place = float64_device(labels.device)
    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=place)
    one_class = loss.has_classes  # each row of e sums to 1
    targets = torch.zeros(d + 1, n_classes + (not one_class), dtype=torch.float64, device=place)
    device = place if dtype == torch.float64 else labels.device
    for rows in blocks(n, block_rows):
        h = to_device(features[rows], device, dtype)
        e = loss.encoded(labels[rows].to(device), h.new_empty(0, n_classes))
        if not one_class:
            e = torch.cat([e, e.new_ones(len(e), 1)], 1)
        if weights is not None:
            e = e * weights[rows].to(e)[:, None]
        roots = None if weights is None else weights[rows].to(h).sqrt()[:, None]
        add_gram_matrix(gram[:d, :d], h if roots is None else h * roots)
        for few in blocks(len(h), block_rows if dtype == torch.float64 else _CLASS_ROWS):
            targets[:d] += matching(h[few].T @ e[few], gram)
        targets[d] += matching(e.sum(0), gram)
    gram[:, d] = gram[d, :] = targets.sum(1) if one_class else targets[:, -1]
    if weights is None:
        gram[d, d] = n
    return gram, targets if one_class else targets[:, :-1].contiguous()


def _layer_norms(gram: Tensor, widths: Sequence[int]) -> Tensor:
    """Root mean square norm of each layer, `(n_layers,)`."""
    energies = torch.stack([part.sum() for part in gram.diagonal()[:-1].split(list(widths))])
    return (energies / gram[-1, -1]).sqrt()


def _vanished(gram: Tensor, targets: Tensor, widths: Sequence[int]) -> Tensor:
    """Layers whose features are nonzero but whose squares underflow to 0, `(n_layers,)` bool."""
    firsts = torch.cat([targets, gram[:, -1:]], 1)[:-1]
    sums = torch.stack([part.abs().sum() for part in firsts.split(list(widths))])
    return (_layer_norms(gram, widths) == 0) & (sums > 0)


def _within_float32(gram: Tensor, targets: Tensor, widths: Sequence[int]) -> bool:
    if gram[-1, -1] == 0:  # all weights are 0
        return True
    norms = _layer_norms(gram, widths)
    fits = ((norms == 0) & ~_vanished(gram, targets, widths)) | in_float32(norms)
    return bool(fits.all()) and bool(torch.isfinite(gram).all())


def _check_range(gram: Tensor, targets: Tensor, widths: Sequence[int]) -> None:
    of_features = torch.isfinite(gram[:, -1])
    if bool(of_features.all()) and not bool(torch.isfinite(targets).all()):
        output = int((~torch.isfinite(targets).all(0)).nonzero()[0])
        got = f"NaN or infinity, or a product with a feature that overflows, for output {output}"
        raise bad_value("train_dataset", "give finite labels", got)
    finite = torch.isfinite(targets).all(1) & of_features
    if not bool(finite.all()):
        column = int((~finite).nonzero()[0])
        raise bad_value(
            "train_dataset",
            "give finite activations",
            f"NaN or infinity in feature {column}",
            "Look for it in the inputs, or for an overflow in half precision.",
        )
    wrong = _vanished(gram, targets, widths) | ~torch.isfinite(_layer_norms(gram, widths))
    if bool(wrong.any()):
        layer = int(wrong.nonzero()[0])
        raise bad_value(
            "train_dataset",
            "give activations whose squares float64 can hold, about 1e-150 to 1e150",
            f"smaller or larger ones in layer {layer} of those that are read",
            "Scale the inputs.",
        )


def scaled_features(features: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """phi: features times their scale, and the constant 1; `(n, n_features + 1)`.

    Args:
        features: Raw features `(n, n_features)`.
        scale: `(n_features + 1,)`.
        dtype: Of phi; None takes the working dtype of the features.
    """
    features = features.to(dtype or working_dtype(features))
    ones = features.new_ones(len(features), 1)
    return torch.cat([features * scale[:-1].to(features), ones], dim=1)
