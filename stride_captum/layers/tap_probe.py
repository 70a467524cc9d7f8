"""Two small forward passes that determine how activations at a place become one row per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import ExampleBatch
from ..errors import bad_value
from ..losses.positions import position_rows
from .agreement import MANY, is_plain, rounding, thinned
from .channels import Channels, first_by_kind
from .hooks import watching
from .layouts import Layout, batch_layout
from .patches import Patches
from .pooling import Place, Tap, activation_in, features_of, place_name, to_rows
from .positions import at_positions, grid_of
from .probes import both_sides, spread

_POOL = 4
#: Tensors of one place whose features stand side by side, at most.
_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class Part:
    """One tensor at a place in a pass.

    Attributes:
        source: The tensor; the reference keeps its address from being reused.
        version: Its version counter at that time.
        some: Some of its values at that time.
    """

    source: Tensor
    version: int
    some: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.source.shape


Parts = list[Part | Exception]


class TapProbe:
    """Activations at some places for three examples of a batch, and for two of them.

    Args:
        model: The network, in eval mode.
        batch: Any batch; the model is given copies of its tensors.
        places: Places to probe; submodules that do not run are left out.

    Attributes:
        seen: Tensors at each place, in the order of the forward pass.
        ran: Names of the submodules that were called.
        grid: Sizes of the positions of an example, each of which has features of its own; None where an
            example has one row of outputs.
    """

    def __init__(self, model: nn.Module, batch: Any, places: Sequence[Place]) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.seen: dict[Place, Parts] = {}
        self.ran: set[str] = set()
        self._channels = Channels()
        self._needs_channels = any(first_by_kind(self._modules[name]) is None for name, _ in places)
        every = ExampleBatch.of(batch)
        examples = spread(len(every))

        def some(rows: list[int]) -> ExampleBatch:
            return every[torch.tensor([examples[row] for row in rows])].copied()

        with torch.no_grad():
            inputs = some(list(range(MANY)))
            self._outputs = self._watch(model, inputs, places)
            try:  # Another order reveals whether the model sorts its examples.
                self._order = [1, 0]
                self._fewer = self._watch_fewer(model, some(self._order))
            except Exception:  # The model may require sorted examples.
                self._order = [0, 1]
                self._fewer = self._watch_fewer(model, some(self._order))
        self.grid = grid_of(self._outputs, every.reading.loss)
        if self.grid is not None and inputs.labels is not None:  # before layers are blamed for labels
            position_rows(every.reading.loss, self._outputs, inputs.labels, None, every.argument)
        self._given = [part for _, part in inputs.parts() if isinstance(part, Tensor)]
        self._unit = rounding(model, *(p.some for parts in self.seen.values() for p in _parts(parts)))

    def _watch(self, model: nn.Module, batch: ExampleBatch, places: Sequence[Place]) -> Tensor:
        """Forward pass that records which submodules run."""
        wanted = set(places)

        def see(place: Place, values: list[Any]) -> None:
            self.ran.add(place[0])
            if place in wanted:
                self.seen.setdefault(place, []).extend(_part(value, place) for value in values)
            if self._needs_channels:
                for value in filter(is_plain, values):
                    self._channels.see(self._modules[place[0]], place[1], value.detach())

        with watching(model, dict.fromkeys([*both_sides(model), *places]), see) as run:
            return run(batch)

    def _watch_fewer(self, model: nn.Module, batch: ExampleBatch) -> dict[Place, list[Tensor]]:
        """Forward pass over fewer examples; keeps the same entries of each tensor as the first pass."""
        fewer: dict[Place, list[Tensor]] = {place: [] for place in self.seen}

        def see(place: Place, values: list[Any]) -> None:
            parts = _parts(self.seen[place])
            for value in values:
                part = _part(value, place)
                of_many = parts[len(fewer[place])].shape if len(fewer[place]) < len(parts) else None
                if isinstance(part, Part):
                    fewer[place].append(thinned(part.source, of_many or part.shape))

        with watching(model, self.seen, see) as run:
            run(batch)
        return fewer

    def tap(self, place: Place) -> Tap:
        """Tap for a place: how its activations become rows.

        Raises:
            ValueError: The place does not run, has no batch dimension, or has several incompatible tensors.
            TypeError: There is no tensor at the place.
        """
        if place not in self.seen:
            raise not_run(place)
        if problem := self.problem(place):
            raise problem
        name, found = place_name(place), _parts(self.seen[place])
        layout = self._layout(name, found, self._fewer[place])
        shapes = [part.shape for part in found if len(part.shape) > 2]
        spatials = {self._spatial(name, place, part, layout) for part in found if len(part.shape) > 2}
        tap = Tap(place[0], place[1], max(spatials, default=0), 1, 0, layout.batch_dim, layout.rows)
        tap = replace(tap, parts=len(found) if len(found) <= _SIDE_BY_SIDE else 0)
        if self.grid is not None:
            return self._at_positions(replace(tap, per_position=True, patches=self._patches(tap, found)))
        if len({len(shape) for shape in shapes}) <= 1:
            pool = min([_POOL, *(side for shape in shapes for side in shape[2:])]) if tap.spatial else 1
            tap = self.pooled(tap, 1 << (pool.bit_length() - 1))
        if tap.width == 0:
            some = ", ".join(str(tuple(part.shape)) for part in found[:3])
            raise bad_value(
                "layers",
                "name submodules that run on tensors of one kind",
                f"the shapes {some} from {name!r}, which runs {len(found)} times",
                "Name what reads them, as in 'name:input' of the next layer.",
            )
        return tap

    def problem(self, place: Place) -> Exception | None:
        """Error if the tensors at a place cannot be read; else None."""
        return next((part for part in self.seen[place] if isinstance(part, Exception)), None)

    def pooled(self, tap: Tap, pool: int) -> Tap:
        """Tap with maps pooled to another side; width 0 if its parts cannot be averaged."""
        widths = []
        for part in _parts(self.seen[tap.name, tap.reads_input]):
            like = torch.empty(part.shape, device="meta")
            widths.append(to_rows(like, tap.spatial, pool, tap.batch_dim).shape[1])
        width = sum(widths) if tap.parts else widths[0] * (len(set(widths)) == 1)
        return replace(tap, pool=pool, width=width)

    def _patches(self, tap: Tap, parts: list[Part]) -> Patches | None:
        """How a convolution whose input is read cuts its maps into patches that lie around the positions."""
        found = Patches.of_layer(self._modules[tap.name]) if tap.reads_input else None
        if found is None or self.grid is None or tap.spatial != len(found.kernel):
            return None
        maps = [part.shape[2:] for part in parts]
        fits = all(len(sizes) == tap.spatial and found.are_aligned(sizes, self.grid) for sizes in maps)
        if tap.spatial != len(self.grid):  # a grid in one row: no size can be changed
            fits = fits and all(prod(found.sizes(sizes)) == prod(self.grid) for sizes in maps)
        return found if fits else None

    def without_patches(self, tap: Tap) -> Tap | None:
        """Tap that reads the map itself; None if it does already, or the map has other positions."""
        try:
            return None if tap.patches is None else self._at_positions(replace(tap, patches=None))
        except ValueError:
            return None

    def _at_positions(self, tap: Tap) -> Tap:
        """Tap at the positions of the outputs, with its width there."""
        found = _parts(self.seen[tap.name, tap.reads_input])
        if tap.spatial and len({part.shape[2:] for part in found}) > 1:
            some = ", ".join(str(tuple(part.shape)) for part in found[:3])
            must = "name submodules that run on maps of one size"
            remedy = "Name what reads or returns one of them."
            raise bad_value("layers", must, f"the shapes {some} from {str(tap)!r}", remedy)
        width = sum(self._width_at_positions(tap, part) for part in found)
        return replace(tap, width=width if tap.parts else width // len(found))

    def _width_at_positions(self, tap: Tap, part: Part) -> int:
        """Features of one position in what a place gave.

        Raises:
            ValueError: It gives no row for each position.
        """
        assert self.grid is not None
        found = features_of(torch.empty(part.shape, device="meta"), tap)
        if tap.rows != "one" and found.ndim > 1:
            found = found.unflatten(0, (MANY, -1))
        return at_positions(found, self.grid, tap).shape[-1]

    def _layout(self, name: str, parts: list[Part], fewer: list[Tensor]) -> Layout:
        if len(parts) != len(fewer):
            raise bad_value(
                "layers",
                "name submodules that run on whole batches",
                f"{len(parts)} runs of {name!r} for {MANY} examples and {len(fewer)} for {len(self._order)}",
                "Name a layer that runs once a batch.",
            )
        layouts = {
            batch_layout(part.some, other, self._order, self._unit, name)
            for part, other in zip(parts, fewer, strict=True)
        }
        if len(layouts) > 1:
            raise bad_value(
                "layers",
                "count examples in the same dimension each time that they run",
                f"the dimensions {sorted(layout.batch_dim for layout in layouts)} from {name!r}",
                "Name what reads them, as in 'name:input' of the next layer.",
            )
        return layouts.pop()

    def _spatial(self, name: str, place: Place, part: Part, layout: Layout) -> int:
        """Number of spatial dimensions of an activation with more than two dimensions."""
        first = first_by_kind(self._modules[place[0]])
        if layout.batch_dim or len(part.shape) > 5:
            return 0
        first = self._channels.first(part.source) if first is None else first
        if first is None:
            raise bad_value(
                "layers",
                "name submodules that show which dimension holds the channels",
                f"the shape {tuple(part.shape)} from {name!r}, in a model with channels first and last",
                "Name what a convolution or a Linear behind it reads, as in 'name:input'.",
            )
        return len(part.shape) - 2 if first else 0

    def reads_raw_input(self, tap: Tap, first_layer: bool) -> bool:
        """Whether a tap reads raw images or sequences, or in the first layer normalized ones."""
        addresses = {t.data_ptr() for t in self._given}
        shapes = {t.shape for t in self._given} if first_layer else set()
        several = tap.rows != "one"
        return all(
            len(part.shape) + several > 2 and (part.source.data_ptr() in addresses or part.shape in shapes)
            for part in _parts(self.seen[tap.name, tap.reads_input])
        )

    def returns_outputs(self, place: Place) -> bool:
        """Whether a tensor at a place is the output of the model."""
        return any(part.source.data_ptr() == self._outputs.data_ptr() for part in _parts(self.seen[place]))

    def is_output(self, place: Place) -> bool:
        """Whether the only tensor at a place is the output of the model."""
        size = self._outputs.numel()
        return self.returns_outputs(place) and all(
            part.source.numel() == size for part in _parts(self.seen[place])
        )

    def key(self, place: Place) -> tuple[Any, ...]:
        """Key that is equal for places with the same tensors, unchanged in between."""
        parts = _parts(self.seen[place])
        return tuple((p.source.data_ptr(), p.version, tuple(p.shape)) for p in parts)


def not_run(place: Place) -> ValueError:
    """Error for a submodule that was not called."""
    return bad_value(
        "layers",
        "name submodules that run in the forward pass",
        repr(place[0]),
        "It must be called in eval mode, as `module(x)`.",
    )


def _parts(parts: Parts) -> list[Part]:
    return [part for part in parts if isinstance(part, Part)]


def _part(value: Any, place: Place) -> Part | Exception:
    try:
        source = activation_in(value, place_name(place))
    except (TypeError, ValueError) as error:
        return error
    return Part(source, 0 if source.is_inference() else source._version, thinned(source, source.shape))
