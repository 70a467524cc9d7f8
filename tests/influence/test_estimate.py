from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from flat_options import arguments
from planted import METHODS, MLP, HuggingFaceLike, ListOfDicts, built, expect_untouched, trained
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stride_captum import STRIDE
from stride_captum.adapters import DiagonalEKFAC, Similarity, TracIn
from stride_captum.closed_form import estimate as closed_form_estimate
from stride_captum.closed_form.memory import closed_form_bytes
from stride_captum.features.store import FeatureStore
from stride_captum.influence import estimate
from stride_captum.influence.estimate import Estimate, from_small_runs


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    monkeypatch.setattr(estimate, "_REPEATS", 1)
    monkeypatch.setattr(estimate, "_SMALL", 64)
    monkeypatch.setattr("stride_captum.steering.estimate._STEPS", (1, 2))
    monkeypatch.setattr(closed_form_estimate, "_ROWS", (16, 128))


def network(n: int, width: int = 32, n_classes: int = 3):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, n_classes)).eval()
    x = torch.randn(n, 4, generator=generator)
    return model, TensorDataset(x, torch.randint(n_classes, (n,), generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, DiagonalEKFAC])
def test_an_estimate_runs_nothing_on_the_method_or_the_model(planted, method):
    model, train, _ = planted
    asked = method(model, train)
    before = dict(vars(asked))
    with expect_untouched(model):
        found = asked.estimate(n_test=3, k=2)
    assert vars(asked) == before
    assert (found.n_train, found.n_test, found.k) == (len(train), 3, 2)
    for value in (found.fit_seconds, found.query_seconds):
        assert 0 < value < float("inf")
    assert found.disk_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        arguments(curvature="eigenvalue-corrected"),
        arguments(operators="trained", n_subsets=6, rank=2),
        arguments(projection="random", projection_width=3),
    ],
    ids=["eigenvalue-corrected", "trained", "projection"],
)
def test_options_that_are_not_counted_are_run_small(planted, config):
    model, train, _ = planted
    found = STRIDE(model, train, **config).estimate(2)
    assert "runs on" in found.basis
    assert found.fit_seconds > 0


@pytest.mark.slow
def test_a_few_batches_are_read_and_not_the_training_set():
    model, train = network(20_000)
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    STRIDE(model, train, batch_size=64).estimate(10)
    assert 0 < sum(seen) < 2_000
    seen.clear()
    Similarity(model, train, batch_size=64).estimate(10)
    handle.remove()
    assert 0 < sum(seen) < 2_000


@pytest.mark.parametrize(
    ("n_classes", "options"),
    [
        (3, {}),
        (50, {}),
        (50, {"memory_budget": "64KiB"}),
        (50, {"damping": 1e-3}),
        (50, {"curvature": "identity"}),
    ],
    ids=str,
)
def test_the_bytes_that_a_fit_keeps_are_those_that_were_counted(n_classes, options):
    model, train = network(3_000, 64, n_classes)
    method = STRIDE(model, train, **arguments(**options)).fit()
    form = method._states[0].operators
    parts = [
        vars(part)
        for part in (form, form._residuals, form.head, form.curvature, form.curvature.inverse, form.moments)
    ]
    tensors = [t for t in tree_leaves(parts) if torch.is_tensor(t)]
    kept = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    widths = [tap.width for tap in method._states[0].taps]
    counted, without = (
        closed_form_bytes(
            method.operators,
            3_000,
            widths,
            n_classes,
            in_memory=there,
            memory_budget=method.memory_budget,
        )
        for there in (True, False)
    )
    assert counted.kept == pytest.approx(kept, rel=0.02)
    assert counted.kept - without.kept == form.features.nbytes + form.logits.nbytes
    small = options.get("memory_budget") == "64KiB"
    assert counted.residuals == (0 if small else form._residuals.kept.nbytes)
    assert counted.block <= (2**16 if small else 2**28)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_disk_that_a_store_takes(tmp_path, dtype):
    model, train = network(500)
    method = STRIDE(model, train, feature_store=FeatureStore(tmp_path, dtype=dtype))
    expected = method.estimate(5).disk_bytes
    assert list(tmp_path.iterdir()) == []
    method.fit()
    assert expected == sum(file.stat().st_size for file in tmp_path.glob("*.bin"))


class Clock:
    """A clock that only the work of a method moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.slow
def test_small_runs_are_extrapolated_along_a_line(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    class Linear(Similarity):
        def fit(self, show_progress=False):
            clock.now += 5 + 0.25 * len(self.train_dataset)
            return self

        def influence(self, inputs, k=None, *args, **options):
            clock.now += 1 + 0.5 * len(self.train_dataset) * len(inputs)
            return None

    model, train = network(30_000)
    found = from_small_runs(Linear(model, train, batch_size=256), 7, None)
    assert found.fit_seconds == pytest.approx(5 + 0.25 * 30_000)
    assert found.query_seconds == pytest.approx(1 + 0.5 * 30_000 * 7)


@pytest.mark.slow
def test_what_only_the_first_run_of_all_costs_is_left_out(monkeypatch):
    clock, ran = Clock(), []
    monkeypatch.setattr(time, "perf_counter", clock)

    class SlowImports(Similarity):
        def fit(self, show_progress=False):
            clock.now += (0 if "fit" in ran else 2) + 1e-4 * len(self.train_dataset)
            ran.append("fit")
            return self

        def influence(self, inputs, k=None, *args, **options):
            clock.now += (0 if "query" in ran else 2) + 1e-5 * len(self.train_dataset)
            ran.append("query")
            return None

    model, train = network(5_000)
    found = from_small_runs(SlowImports(model, train), 7, None)
    assert found.fit_seconds == pytest.approx(0.5)
    assert found.query_seconds == pytest.approx(0.05)


def test_wide_features_follow_a_power_of_the_width(monkeypatch):
    widths_seen = []

    def seconds(method, n, widths, n_classes, device):
        widths_seen.append(sum(widths))
        return sum(widths) ** 3 + n * sum(widths) ** 2

    monkeypatch.setattr(closed_form_estimate, "_closed_form_seconds", seconds)
    model, train = network(5_000)
    method, cpu = STRIDE(model, train), torch.device("cpu")
    for width in (400, 2_000):
        reading = closed_form_estimate._Reading(0.0, 0, [width], 3, [])
        found = closed_form_estimate._solving_seconds(method, reading, 5_000, cpu)
        assert found == pytest.approx(width**3 + 5_000 * width**2, rel=1e-6)
    assert max(widths_seen) == 1_000


@pytest.mark.slow
def test_loaders_dicts_and_precomputed_features():
    model = built(HuggingFaceLike).eval()
    for method in (STRIDE, Similarity):
        found = method(model, DataLoader(ListOfDicts(30), batch_size=4)).estimate(5)
        assert found.n_train == 30
    found = STRIDE.from_features(torch.randn(50, 4), torch.randn(50, 3), torch.arange(50) % 3).estimate(5)
    assert found.n_train == 50
    assert found.fit_seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [TracIn, DiagonalEKFAC, STRIDE])
def test_examples_with_several_positions(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    train = TensorDataset(torch.randn(20, 5, 4), torch.randint(3, (20, 5)))
    asked = method(model, train)
    before = dict(vars(asked))
    found = asked.estimate(n_test=3)
    assert (found.n_train, found.n_test) == (20, 3)
    assert found.query_seconds > 0
    assert vars(asked) == before


def test_what_cannot_be_estimated(planted):
    model, train, _ = planted
    with pytest.raises(ValueError, match="`n_test` must be an integer of at least 1; got 0"):
        STRIDE(model, train).estimate(0)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1, or None"):
        STRIDE(model, train).estimate(3, k=0)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(*train.tensors, strict=True))

    with pytest.raises(ValueError, match="`train_dataset` must have a length for an estimate; got a stream"):
        Similarity(model, DataLoader(Stream(), batch_size=4)).estimate(3)


@pytest.mark.slow
def test_the_scores_of_many_points_are_counted():
    model, train, _ = trained(MLP)
    few, many = (STRIDE(model, train).estimate(n_test).query_bytes for n_test in (100_000, 300_000))
    assert many - few == pytest.approx(4 * 200_000 * len(train), rel=0.01)


def test_it_reads_as_a_table():
    numbers = {
        "fit_seconds": 12.34,
        "query_seconds": 0.5,
        "fit_bytes": None,
        "query_bytes": 10,
        "disk_bytes": 2**31,
    }
    text = repr(Estimate(n_train=1_000, n_test=10, k=5, basis="a guess", **numbers))
    assert text.splitlines() == [
        "fit:   about 12 s, an unknown amount of memory, 2 GiB on disk (1,000 training examples)",
        "query: about 0.5 s, 10 bytes of memory (10 test points, top 5)",
        "From a guess.",
    ]


@pytest.mark.slow
def test_checkpoints_multiply_what_is_kept(monkeypatch):
    model, train, _ = trained(MLP)
    method = STRIDE(model, train).fit()
    three = STRIDE(model, train, checkpoints=[model.state_dict()] * 3)
    kept = closed_form_bytes(
        method.operators,
        len(train),
        [tap.width for tap in method._states[0].taps],
        3,
        in_memory=True,
        memory_budget=method.memory_budget,
    ).kept
    read = closed_form_estimate._read_a_little  # without the memory of a forward pass, which is measured
    monkeypatch.setattr(closed_form_estimate, "_read_a_little", lambda *asked: replace(read(*asked), bytes=0))
    assert kept > 0
    # Each is kept; only one is fitted at a time.
    assert three.estimate(3).fit_bytes - method.estimate(3).fit_bytes == 2 * kept


@pytest.mark.slow
def test_checkpoints_multiply_the_disk(tmp_path):
    model, train, _ = trained(MLP)
    one, three = (
        STRIDE(model, train, feature_store=FeatureStore(tmp_path), checkpoints=[model.state_dict()] * n)
        for n in (1, 3)
    )
    assert three.estimate(3).disk_bytes == 3 * one.estimate(3).disk_bytes > 0
