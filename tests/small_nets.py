"""Networks for tests of a few lines each: submodules by name, and what `forward` does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stride_captum.layers.activations import Tap, recording


class Net(nn.Module):
    """`Net(f, a=Linear(...))` computes `f(net, *inputs)`, where `net.a` is the Linear."""

    def __init__(self, compute: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self, *args, **kwargs)


def net(compute: Callable[..., Any], seed: int = 0, **parts: Callable[[], nn.Module]) -> Net:
    """A network in eval mode; `parts` are made one after the other from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(compute, **{name: make() for name, make in parts.items()}).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def names(taps: list[Tap]) -> list[str]:
    return [str(tap) for tap in taps]


@torch.no_grad()
def read(model: nn.Module, taps: list[Tap], batch: object) -> tuple[Tensor, list[Tensor]]:
    with recording(model, taps) as run:
        return run(batch)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
