"""What the kernel of a convolution reads at each position of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..system.saved_values import saved_as


@saved_as("patches")
@dataclass(frozen=True)
class Patches:
    """Geometry of a convolution with one, two or three dimensions.

    Attributes:
        kernel: Size of the kernel in each dimension.
        stride: Step between the patches.
        dilation: Step between the entries of a patch.
        padding: Before and behind each dimension, the last dimension first, as for `F.pad`.
        mode: Of the padding, as for `F.pad`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @classmethod
    def of_layer(cls, layer: nn.Module) -> Patches | None:
        """Those of a layer; None if it is no convolution, or its kernel reads single positions."""
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or max(layer.kernel_size) == 1:
            return None
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "same":
            sides = [(span // 2, span - span // 2) for span in spans]
        elif isinstance(layer.padding, str):
            sides = [(0, 0) for _ in spans]
        else:
            sides = [(p, p) for p in layer.padding]
        padding = tuple(p for both in reversed(sides) for p in both)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return cls(layer.kernel_size, layer.stride, layer.dilation, padding, mode)

    @classmethod
    def of_plain(cls, values: Mapping[str, Any] | None) -> Patches | None:
        """From fields that JSON has kept, with lists for tuples."""
        if values is None:
            return None
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the outputs for a map of some sizes."""
        each = zip(sizes, self._around, self._spans, self.stride, strict=True)
        return tuple((size + more - span) // stride + 1 for size, more, span, stride in each)

    def are_aligned(self, sizes: Sequence[int], grid: Sequence[int]) -> bool:
        """Whether each patch of a map lies around its position of the map, or of the outputs of the model.

        Not where a convolution shortens its map, or returns entries that the network cuts off.

        Args:
            sizes: Of the map.
            grid: Of the outputs of the model.
        """
        there = self.sizes(sizes)
        kept = tuple(-(-size // stride) for size, stride in zip(sizes, self.stride, strict=True))
        return there in (kept, tuple(grid))

    @property
    def hold_the_map(self) -> bool:
        """Whether the patch of each position has an entry for that position itself."""
        before = self.padding[::2][::-1]
        each = zip(before, self.dilation, self._spans, self._around, self.stride, strict=True)
        return all(
            s == 1 and around == span - 1 and p % d == 0 and p < span for p, d, span, around, s in each
        )

    def read(self, maps: Tensor) -> Tensor:
        """The patches of maps `(n, channels, sizes...)`, `(n, positions..., width)`.

        Their products with the flat kernels of the layer, `(n_kernels, width)`, are its outputs without the
        bias.
        """
        found = F.pad(maps, self.padding, self.mode) if any(self.padding) else maps
        for i, (span, stride, step) in enumerate(zip(self._spans, self.stride, self.dilation, strict=True)):
            found = found.unfold(2 + i, span, stride)[..., ::step]
        return found.movedim(1, len(self.kernel) + 1).flatten(len(self.kernel) + 1)

    @property
    def _around(self) -> list[int]:
        """Padding of each dimension, both sides together."""
        return [sum(self.padding[i : i + 2]) for i in range(0, len(self.padding), 2)][::-1]

    @property
    def _spans(self) -> list[int]:
        """Positions from the first to the last entry of a patch."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
