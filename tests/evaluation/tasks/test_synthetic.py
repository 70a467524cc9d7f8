"""Planted clusters: what is said to be influential is, for retraining and for the methods."""

from __future__ import annotations

import pytest
import torch

from stride_captum import STRIDE
from stride_captum.adapters import ClassRandom
from stride_captum.evaluation import load_task, train_attributed
from stride_captum.evaluation.retraining.training import logits_of, train_model
from stride_captum.evaluation.tasks.synthetic import planted_clusters


@pytest.fixture(scope="module")
def planted():
    return planted_clusters()


@pytest.fixture(scope="module")
def task():
    return load_task("synthetic")


@pytest.fixture(scope="module")
def model(task):
    return train_attributed(task, 0)


def test_the_same_seed_gives_the_same_data_and_leaves_the_random_state(planted):
    state = torch.random.get_rng_state()
    again = planted_clusters()
    assert torch.equal(again.train.tensors[0], planted.train.tensors[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(planted_clusters(seed=1).train.tensors[0], planted.train.tensors[0])


@pytest.mark.slow
def test_the_task_can_be_learnt(task, model):
    x, y = task.test.tensors
    assert (logits_of(model, x).argmax(1) == y).float().mean() > 0.97


@pytest.mark.slow
def test_without_its_cluster_a_prediction_is_lost(task, planted):
    x, y = task.train.tensors
    keep = ~planted.influential()[0]
    model = train_model(task.build_model, x[keep], y[keep], task.training, 0)
    there = planted.test_clusters == planted.test_clusters[0]
    x_test, y_test = task.test.tensors
    p = logits_of(model, x_test).softmax(1)[torch.arange(len(y_test)), y_test]
    assert p[there].mean() < 0.6
    assert p[~there].mean() > 0.9


@pytest.mark.slow
def test_stride_finds_the_planted_examples_and_its_control_does_not(task, model, planted):
    x, y = (t[:50] for t in task.test.tensors)
    share = {}
    for cls in (STRIDE, ClassRandom):
        top = cls(model, task.train).influence((x, y), 10).indices
        share[cls] = planted.influential()[:50].gather(1, top).float().mean()
    assert share[STRIDE] > 0.8
    assert share[ClassRandom] < 0.3


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="`n_train` must be at least the number of clusters, 40"):
        planted_clusters(39)
