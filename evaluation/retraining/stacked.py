"""Training of many small models at once: one stack of weights, one forward and one backward pass.

For a small network a training step costs little more than the overhead of its kernels. Here S models are one
batch of a mapped forward pass (`torch.func.vmap`); their weights are leaves `(S, ...)` of one optimizer. Adam
and SGD act on each element alone, so a step on the stack is a step on each model.

Model i draws initial weights, batches and Dropout masks from its own seed, in the same order as
`train_model`. On the CPU it is therefore the model of `train_model`, up to rounding of the matrix products,
which training amplifies. On a GPU initial weights and batches are the same, but all models draw their masks
from one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from ...errors import bad_value
from ..tasks.class_logits import class_logits, first_logits
from ..tasks.networks import TrainingSettings
from ..tasks.new_network import new_network, seeded
from .training import is_left_out, make_optimizer

_FEATURE_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
State = dict[str, Tensor]


@dataclass(frozen=True)
class StackedModels:
    """S trained models of one architecture.

    Attributes:
        skeleton: The network that is called with the weights of each model; its own are not used.
        parameters: `(S, ...)` by name.
        buffers: `(S, ...)` by name.
    """

    skeleton: nn.Module
    parameters: State
    buffers: State

    @torch.no_grad()
    def logits(self, x: Tensor, batch_size: int = 1024) -> Tensor:
        """Logits `(S, n, n_classes)` of all models on the same inputs `(n, ...)`, in eval mode."""
        self.skeleton.eval()

        def forward(parameters: State, buffers: State, batch: Tensor) -> Any:
            return class_logits(functional_call(self.skeleton, (parameters, buffers), (batch,)))

        mapped = vmap(forward, in_dims=(0, 0, None))
        return torch.cat([mapped(self.parameters, self.buffers, b) for b in x.split(batch_size)], dim=1)

    def state_dict(self, i: int) -> State:
        """State dict of model `i`, for the network that `build_model` returns."""
        named = (*self.skeleton.named_parameters(), *self.skeleton.named_buffers())
        name_of = {id(tensor): name for name, tensor in named}  # tied weights are stacked once
        stacked = {**self.parameters, **self.buffers}
        own = self.skeleton.state_dict(keep_vars=True)
        return {key: stacked[name_of[id(tensor)]][i].clone() for key, tensor in own.items()}


def train_stacked(
    build_model: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    subsets: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    training: TrainingSettings,
    seeds: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> StackedModels:
    """Train one model on each subset, all at once: `train_model(x[subsets[i]], ..., seeds[i])` for all i.

    Args:
        build_model: Gives an untrained network. `torch.func.vmap` must be able to map its forward pass;
            Dropout must be a module.
        x: Inputs `(n, ...)` of the whole training set.
        y: Labels `(n,)`, int64.
        subsets: S index arrays of equal size, `(S, m)`.
        training: Settings of Table 3.
        seeds: S seeds.
        device: Where they are trained.

    Returns:
        The trained models.

    Raises:
        TypeError: As for `train_model`.
        ValueError: No subsets, subsets of different sizes, not one seed for each; or as for `train_model`.
    """
    rows = _checked(subsets, seeds)
    models, generators = [], []
    for seed in seeds:
        with seeded(seed):
            models.append(new_network(build_model, seed).train())
            generators.append(Generator())
            generators[-1].set_state(torch.get_rng_state())
            if len(models) == 1:
                first_logits(models[0].eval(), x[rows[0, :2]].cpu(), int(y.max()) + 1)
                models[0].train()
    parameters, buffers = stack_module_state(models)
    leaves = _leaves(parameters, device)
    buffers = {name: stacked.to(device) for name, stacked in buffers.items()}
    skeleton = models[0]
    masks = _Masks(skeleton, generators, torch.device(device))
    optimizer = make_optimizer(leaves.values(), training, fused=True)
    x, y, rows = x.to(device), y.to(device), rows.to(device)

    def forward(parameters: State, buffers: State, batch: Tensor, drawn: list[Tensor]) -> Any:
        masks.given = iter(drawn)
        return class_logits(functional_call(skeleton, (parameters, buffers), (batch,)))

    mapped = vmap(forward)
    size = rows.shape[1]
    for _ in range(training.epochs):
        order = torch.stack([torch.randperm(size, generator=g) for g in generators]).to(device)
        for batch in rows.gather(1, order).split(training.batch_size, dim=1):
            width = batch.shape[1]
            if is_left_out(skeleton, width, size, training):
                continue
            optimizer.zero_grad(set_to_none=True)
            inputs = x[batch]
            logits = mapped(_as_weights(leaves), buffers, inputs, masks.draw(inputs)).flatten(0, 1)
            loss = F.cross_entropy(logits, y[batch].flatten(), reduction="sum") / width
            loss.backward()
            optimizer.step()
    skeleton.eval()
    return StackedModels(skeleton, _as_weights({k: v.detach() for k, v in leaves.items()}), buffers)


def why_not_stacked(build_model: Callable[[], nn.Module], x: Tensor) -> str | None:
    """Why networks cannot be trained as a stack; None if they can.

    Args:
        build_model: Gives an untrained network.
        x: A few inputs `(n, ...)`, at least two.

    """
    y = torch.zeros(len(x), dtype=torch.int64)
    subsets = np.arange(len(x))[None].repeat(2, 0)
    step = TrainingSettings(optimizer="sgd", learning_rate=0.0, epochs=1, batch_size=len(x))
    try:
        train_stacked(build_model, x, y, subsets, step, (0, 1)).logits(x)
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error).split("\n")[0]
    return None


def _checked(subsets: Any, seeds: Sequence[int]) -> Tensor:
    sizes = sorted({len(s) for s in subsets})
    if len(sizes) != 1 or sizes[0] == 0:
        raise bad_value(
            "subsets", "all have one size, at least 1", f"sizes {sizes}", "Stack those of one size together."
        )
    if len(seeds) != len(subsets):
        raise bad_value("seeds", f"be one for each of the {len(subsets)} subsets", f"{len(seeds)} seeds")
    return torch.from_numpy(np.stack([np.asarray(s, dtype=np.int64) for s in subsets]))


def _leaves(parameters: State, device: torch.device | str) -> State:
    """Leaves of the optimizer; matrices are transposed, to have the memory order of their gradients.

    Otherwise every gradient is copied before a step, which takes as long as a step of Adam.
    """
    moved = {k: v.detach().to(device) for k, v in parameters.items()}
    return {
        k: (v.mT.contiguous() if v.dim() == 3 else v).requires_grad_(parameters[k].requires_grad)
        for k, v in moved.items()
    }


def _as_weights(leaves: State) -> State:
    return {k: v.mT if v.dim() == 3 else v for k, v in leaves.items()}


class _Masks:
    """Dropout masks of a stack: drawn outside of the mapped pass, and used inside in the order of the calls.

    Every Dropout module of `network` is replaced. Running the network alone, once for each batch width, shows
    which masks a batch needs.
    """

    def __init__(self, network: nn.Module, generators: list[Generator], device: torch.device) -> None:
        self.network, self.generators, self.device = network, generators, device
        self.stream = Generator(device).manual_seed(generators[0].initial_seed())
        self.given: Iterator[Tensor] | None = None
        self.recorded: list[tuple[float, torch.Size]] = []
        self._calls: dict[int, list[tuple[float, torch.Size]]] = {}
        for module in list(network.modules()):
            for name, child in list(module._modules.items()):  # `named_children` skips one used twice
                if isinstance(child, (nn.Dropout, *_FEATURE_DROPOUTS)):
                    setattr(module, name, _MaskedDropout(child, self))

    def draw(self, inputs: Tensor) -> list[Tensor]:
        """The masks of a batch `(S, b, ...)`: `(S, b, ...)` with entries 0 and 1 / (1 - p)."""
        width = inputs.shape[1]
        if width not in self._calls:
            self.given, self.recorded = None, []
            with torch.no_grad():
                self.network(inputs[0].cpu())
            self._calls[width] = self.recorded
        return [self._mask(1 - p, shape, inputs.dtype) for p, shape in self._calls[width]]

    def _mask(self, kept: float, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        mask = torch.empty(len(self.generators), *shape, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            for row, generator in zip(mask, self.generators, strict=True):
                row.bernoulli_(kept, generator=generator)
        else:
            mask.bernoulli_(kept, generator=self.stream)
        return mask.div_(kept)


class _MaskedDropout(nn.Module):
    def __init__(self, dropout: nn.Module, masks: _Masks) -> None:
        super().__init__()
        self.p: float = dropout.p  # type: ignore[assignment]
        self.by_feature = isinstance(dropout, _FEATURE_DROPOUTS)
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        if self.masks.given is None:
            shape = x.shape[:2] + (1,) * (x.dim() - 2) if self.by_feature else x.shape
            self.masks.recorded.append((self.p, torch.Size(shape)))
            return x
        return x * next(self.masks.given)
