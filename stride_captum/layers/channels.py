"""Channel dimension of an activation, inferred from the modules that read or return it.

Convolutions keep channels first, `(n, channels, length...)`, linear layers last, `(n, tokens..., channels)`.
A ReLU or a custom block has no fixed layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, pooling

_FIRST = (
    conv._ConvNd,
    batchnorm._BatchNorm,
    instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.Upsample,
    pooling._MaxPoolNd,
    pooling._AvgPoolNd,
    pooling._LPPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
_KEEPS = {activation.__name__, dropout.__name__, nn.Identity.__module__}

_Key = tuple[int, tuple[int, ...]]


def first_by_kind(module: nn.Module) -> bool | None:
    """Whether modules of this type have channels first; None if the type does not determine it."""
    if isinstance(module, _FIRST):
        return True
    # Subclasses of LayerNorm for maps permute their dimensions.
    last_is_normed = type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    return False if last_is_normed or isinstance(module, _LAST) else None


@dataclass
class Channels:
    """Channel layouts of the tensors of one forward pass.

    Attributes:
        known: Whether channels are first, by address and shape of a tensor.
        same: Pairs of tensors with the same layout, such as the input and output of a ReLU.
        held: References to the tensors, so that no address is reused.
    """

    known: dict[_Key, bool] = field(default_factory=dict)
    same: dict[_Key, set[_Key]] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)
    _read: dict[nn.Module, Tensor] = field(default_factory=dict)

    def see(self, module: nn.Module, reads_input: bool, tensor: Tensor) -> None:
        """Register the input or output of a module."""
        self.held.append(tensor)
        first, key = first_by_kind(module), _key(tensor)
        if first is not None:
            self.known[key] = first
        elif type(module).__module__ in _KEEPS and reads_input:
            self._read[module] = tensor
        elif module in self._read and self._read[module].shape == tensor.shape:
            other = _key(self._read.pop(module))
            self.same.setdefault(key, set()).add(other)
            self.same.setdefault(other, set()).add(key)

    def first(self, tensor: Tensor) -> bool | None:
        """Whether the channels of a tensor are first; None if both are possible.

        If no module determines it, all other tensors with as many dimensions must agree. If there are none,
        sequences have channels last and maps have them first.
        """
        found = {self.known[key] for key in self._with(_key(tensor)) if key in self.known}
        if not found:
            found = {first for (_, shape), first in self.known.items() if len(shape) == tensor.ndim}
        if not found:
            return tensor.ndim > 3
        return found.pop() if len(found) == 1 else None

    def _with(self, key: _Key) -> Iterable[_Key]:
        seen, new = {key}, [key]
        while new:
            more = self.same.get(new.pop(), set()) - seen
            seen |= more
            new += more
        return seen


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tuple(tensor.shape)
