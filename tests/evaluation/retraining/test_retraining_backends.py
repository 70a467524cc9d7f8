"""A plan gives the same bits whatever joblib backend runs it."""

from __future__ import annotations

import joblib
import numpy as np
import pytest
import torch
from joblib.parallel import ThreadingBackend
from torch.utils.data import TensorDataset

from stride_captum.evaluation.retraining.plan import RetrainingPlan
from stride_captum.evaluation.tasks.networks import TrainingSettings, digits_mlp
from stride_captum.evaluation.tasks.task import Task
from stride_captum.subsets import random_subsets

pytestmark = pytest.mark.xdist_group("processes")

SETTINGS = TrainingSettings(optimizer="adam", learning_rate=0.01, epochs=2, batch_size=16)


class WithoutGenerators(ThreadingBackend):
    """A backend that gives all results at the end, as ray's does."""

    supports_return_generator = False


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 1, 8, 8, generator=generator)
    y = torch.arange(80) % 10
    task = Task("small", TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:]), digits_mlp, SETTINGS)
    return lambda: RetrainingPlan(task, random_subsets(60, 20, 30), 1, tmp_path_factory.mktemp("store"), 10)


@pytest.fixture(scope="module", params=["processes", "stacked"])
def expected(make_plan, request):
    """The engine and its results with a single worker."""
    return request.param, make_plan().execute(n_jobs=1, show_progress=False, engine=request.param)


@pytest.mark.slow
def test_worker_processes(make_plan, expected):
    engine, logits = expected
    assert np.array_equal(make_plan().execute(n_jobs=2, show_progress=False, engine=engine), logits)


@pytest.mark.slow
def test_threads_do_not_mix_their_random_numbers(make_plan, expected):
    engine, logits = expected
    state = torch.get_rng_state()
    with joblib.parallel_config(backend="threading"):
        found = make_plan().execute(n_jobs=4, show_progress=False, engine=engine)
    assert np.array_equal(found, logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_backend_without_generators(make_plan, expected, capsys):
    engine, logits = expected
    joblib.register_parallel_backend("without-generators", WithoutGenerators)
    with joblib.parallel_config(backend="without-generators"):
        found = make_plan().execute(n_jobs=2, engine=engine)
    assert np.array_equal(found, logits)
    assert "20/20" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the cluster are not ours
def test_a_local_dask_cluster_of_two_workers(make_plan):
    distributed = pytest.importorskip("distributed")
    expected = {
        e: make_plan().execute(n_jobs=1, show_progress=False, engine=e) for e in ("processes", "stacked")
    }
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        for engine, logits in expected.items():
            assert np.array_equal(make_plan().execute(show_progress=False, engine=engine), logits)
        assert len(client.scheduler_info()["workers"]) == 2
