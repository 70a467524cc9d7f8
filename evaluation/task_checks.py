"""What must hold of a task before anything is trained on it."""

from __future__ import annotations

import torch

from ..errors import bad_value
from ..responses import multiclass_logits
from .run_store import built
from .tasks import Task


def check_task(task: Task) -> None:
    """Whether an untrained network reads all examples and has a logit for every label.

    Raises:
        ValueError: Inputs that are not finite and that the network cannot read, or labels without a logit.
    """
    network = built(task).eval()
    with torch.no_grad():
        few = task.train.tensors[0][:2]
        try:
            n_classes = multiclass_logits(network(few)).shape[1]
        except (RuntimeError, TypeError) as error:
            must = f"have a network that reads inputs of shape {tuple(few.shape)}"
            raise bad_value("task", must, f"one that fails ({error})") from error
        for which, dataset in (("training", task.train), ("test", task.test)):
            x, y = dataset.tensors
            wrong = torch.nonzero((y < 0) | (y >= n_classes)).flatten()
            if len(wrong):
                got = f"label {int(y[wrong[0]])} of {which} example {int(wrong[0])}"
                raise bad_value("task", f"have labels in [0, {n_classes}), the logits of its network", got)
            flat = x.reshape(len(x), -1)
            broken = torch.nonzero(~torch.isfinite(flat).all(1)).flatten() if x.is_floating_point() else []
            if len(broken):  # some networks fill in missing values
                finite = torch.isfinite(network(x[broken])).reshape(len(broken), -1).all(1)
                if not finite.all():
                    place = int(broken[~finite][0])
                    value = flat[place][~torch.isfinite(flat[place])][0]
                    raise bad_value(
                        "task",
                        "have finite inputs",
                        f"{float(value)} in {which} example {place}",
                        "Fill in missing values, or leave the example out.",
                    )
