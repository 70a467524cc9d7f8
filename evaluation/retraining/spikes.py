"""Spikes of the training loss: epochs after which a model is stopped at a bad moment."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from ..system.text_files import write_text
from ..tasks.task import Task
from . import store as run_store
from .training import mean_residual

#: Mean training residual above which a model counts as stopped on a spike of its training loss.
SPIKE = 0.005
#: A spike exceeds the lowest mean residual of the epochs before it by this factor.
FACTOR = 2.0
#: A spike is one of the last epochs, so many.
LAST = 6


class NoSpikeError(ValueError):
    """A training without a spike in its last epochs."""


@dataclass(frozen=True)
class Spike:
    """The highest spike among the last epochs of a training.

    Attributes:
        epoch: The model is that after this epoch.
        residual: Its mean training residual.
        lowest: The lowest one before.
    """

    epoch: int
    residual: float
    lowest: float


class SpikeWatch:
    """Looks for the highest spike of a training, as its `after_epoch`.

    Args:
        task: What is trained.

    Attributes:
        found: The spike; None as long as there is none.
        state: The weights on it.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.found: Spike | None = None
        self.state: run_store.State = {}
        self._lowest = math.inf

    def __call__(self, epoch: int, model: nn.Module) -> None:
        """Look at the model after an epoch."""
        x, y = self.task.train.tensors
        residual = mean_residual(model, x, y, self.task.loss)
        late = epoch > self.task.training.epochs - LAST
        highest = 0.0 if self.found is None else self.found.residual
        if late and residual > max(highest, FACTOR * self._lowest):
            self.found = Spike(epoch, residual, self._lowest)
            self.state = run_store.whole_state(model.state_dict())
        self._lowest = min(self._lowest, residual)


def no_spike(task: Task, seed: int) -> NoSpikeError:
    """The error for a training without a spike."""
    return NoSpikeError(
        f"The training of {task.name} with seed {seed} has no spike: after none of its last {LAST} epochs is "
        f"the mean residual more than {FACTOR:g} times the lowest one before. Take another seed."
    )


def spike_path(weights: Path) -> Path:
    """The file that tells of the spike of a training, beside that of the weights."""
    return weights.with_name(weights.stem.replace("attributed", "spike") + ".json")


def write_spike(weights: Path, spike: Spike | None) -> None:
    """Keep the spike of a training, or that it has none."""
    write_text(spike_path(weights), json.dumps(None if spike is None else asdict(spike)))


def read_spike(weights: Path) -> tuple[Spike | None, bool]:
    """The spike of a training, and whether its file tells."""
    try:
        found = json.loads(spike_path(weights).read_text(encoding="utf-8"))
        return (None if found is None else Spike(**found)), True
    except (OSError, ValueError, TypeError):
        return None, False
