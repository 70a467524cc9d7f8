"""Checks of a task before anything is trained on it."""

from __future__ import annotations

import torch

from ...errors import bad_value
from .class_logits import first_logits
from .new_network import built, check_restored
from .task import Task
from .task_loss import check_outputs


def check_task(task: Task) -> None:
    """Check that an untrained network reads the examples and returns what the labels need.

    Raises:
        TypeError: The network does not return a tensor.
        ValueError: Inputs are not finite, the network cannot read them, a label has no logit, or the
            `state_dict` of the network does not restore it.
    """
    task.check_inputs()
    network = built(task).eval()
    few = task.train.tensors[0][:2]
    check_restored(task.build_model, few)
    with torch.no_grad():
        if not task.has_classes:
            outputs = network(few)
            for which, dataset in (("train", task.train), ("test", task.test)):
                check_outputs(task.loss, outputs, dataset.tensors[1], which)
            return
        n_classes = first_logits(network, few, task.n_classes).shape[1]
    for which, dataset in (("training", task.train), ("test", task.test)):
        labels = dataset.tensors[1]
        wrong = torch.nonzero((labels < 0) | (labels >= n_classes)).flatten()
        if len(wrong):
            got = f"label {int(labels[wrong[0]])} of {which} example {int(wrong[0])}"
            raise bad_value("task", f"have labels in [0, {n_classes}), the logits of its network", got)
