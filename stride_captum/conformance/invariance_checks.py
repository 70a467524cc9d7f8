"""Laws about what must not change the scores: order, batches, modes, random states, saving.

Each is one function whose name states it; `stride_captum.conformance` runs them all on planted data.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ..system.random_states import same_random_state
from .registry import Build, close, law, require, same_bits
from .toy_problems import MLP, N_TEST, N_TRAIN, BatchNormCNN, trained, unusual


@law
def permuting_the_training_set_permutes_the_columns(build: Build) -> None:
    """A score belongs to the example, not to its place."""
    model, train, test = trained(MLP)
    order = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(0))
    wanted, found = build(model, train), build(model, TensorDataset(*(t[order] for t in train.tensors)))
    close(found.influence(test.tensors), wanted.influence(test.tensors)[:, order], "scores")
    close(found.self_influence(), wanted.self_influence()[order], "self-influence")


@law
def the_batch_size_changes_rounding_only(build: Build) -> None:
    """Of the training set and of the test points."""
    model, train, test = trained(MLP)
    wanted = build(model, train)
    for size in (1, 5, 1000):
        found = build(model, train, batch_size=size)
        close(found.influence(test.tensors), wanted.influence(test.tensors), f"batch_size={size}")
        close(found.influence(test), wanted.influence(test), f"batch_size={size}, a data set")
        close(found.self_influence(), wanted.self_influence(), f"batch_size={size}, self-influence")


@law
def the_block_size_changes_rounding_only(build: Build) -> None:
    """Scores computed a few columns at a time (`memory_budget`) are those of one block."""
    model, train, test = trained(MLP)
    method = build(model, train)
    wanted, best = method.influence(test.tensors), method.influence(test.tensors, 5)
    for columns in (1, 7, 40):
        method.memory_budget = 16 * N_TEST * columns
        close(method.influence(test.tensors), wanted, f"{columns} columns")
        top = method.influence(test.tensors, 5).influence_scores
        close(top, best.influence_scores, f"{columns} columns, the top 5", wanted)


@law
def a_test_point_alone_scores_as_in_its_batch(build: Build) -> None:
    """One at a time, in another order, or in small batches."""
    model, train, test = trained(MLP)
    x, y = test.tensors
    method = build(model, train)
    scores = method.influence((x, y))
    alone = torch.cat([method.influence((x[i : i + 1], y[i : i + 1])) for i in range(N_TEST)])
    close(alone, scores, "alone")
    order = [4, 2, 6, 0, 1, 3, 5]
    close(method.influence((x[order], y[order])), scores[order], "in another order")


@law
def a_second_call_gives_the_same_bits(build: Build) -> None:
    """Also after a second fit; what the caller does to the scores changes nothing."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores, own = method.influence(test.tensors), method.self_influence()
    kept, kept_own = scores.clone(), own.clone()
    scores.zero_(), own.zero_()
    same_bits(method.influence(test.tensors), kept, "a second call")
    same_bits(method.self_influence(), kept_own, "a second self-influence")
    same_bits(method.fit().influence(test.tensors), kept, "after a second fit")


@law
def a_new_object_gives_the_same_bits(build: Build) -> None:
    """Whatever the global random states are."""
    model, train, test = trained(MLP)
    method = build(model, train)
    scores, own = method.influence(test.tensors), method.self_influence()
    with same_random_state():
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        again = build(model, train)
        same_bits(again.influence(test.tensors), scores, "scores under another global seed")
        same_bits(again.self_influence(), own, "self-influence under another global seed")


@law
def a_saved_method_gives_the_same_bits(build: Build) -> None:
    """`type(method).load(path, model, train)` after `method.save(path)`."""
    model, train, test = trained(MLP)
    method = build(model, train).fit()
    elsewhere = {} if getattr(method, "device", None) is None else {"device": method.device}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "method"
        method.save(path)
        loaded = type(method).load(path, model, train, **elsewhere)
        same_bits(loaded.influence(test.tensors), method.influence(test.tensors), "scores")
        same_bits(loaded.self_influence(), method.self_influence(), "self-influence")


@law
def the_grad_mode_of_the_caller_changes_nothing(build: Build) -> None:
    """`no_grad`, `enable_grad` and `inference_mode`, which are left as they were."""
    model, train, test = trained(MLP)
    wanted = build(model, train).influence(test.tensors)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            found = build(model, train).influence(tuple(t.clone() for t in test.tensors))
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        require(mode == after, f"{context.__name__} was changed")
        require(not found.requires_grad, f"scores carry a graph under {context.__name__}")
        close(found, wanted, context.__name__)


@law
def train_mode_changes_nothing(build: Build) -> None:
    """A model with BatchNorm and Dropout in train mode gives the scores of eval mode."""
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    wanted = build(model, train).influence(test.tensors)
    same_bits(build(model.train(), train).influence(test.tensors), wanted, "in train mode")
    unusual(model).requires_grad_(True)
    same_bits(build(model, train).influence(test.tensors), wanted, "with gradients, hooks and mixed modes")


@law
def frozen_parameters_change_nothing(build: Build) -> None:
    """`requires_grad=False` for the first layer."""
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    wanted = build(model, train).influence(test.tensors)
    model.conv1.requires_grad_(False)
    same_bits(build(model, train).influence(test.tensors), wanted, "with a frozen layer")


@law
def a_model_that_is_all_frozen_scores_as_before(build: Build) -> None:
    """`requires_grad=False` for every parameter, as in a model that is only served."""
    model, train, test = trained(BatchNormCNN, n_train=20, steps=3)
    wanted = build(model, train).influence(test.tensors)
    model.requires_grad_(False)
    same_bits(build(model, train).influence(test.tensors), wanted, "with all parameters frozen")
