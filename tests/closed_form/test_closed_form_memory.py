"""What the closed form allocates: blocks within `memory_budget`, and of the training set only vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flat_options import arguments
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from stride_captum import STRIDE, ClosedForm
from stride_captum.closed_form.options import Residuals
from stride_captum.features.store import FeatureStore

N, D, C, N_TEST = 1_200, 12, 30, 5
SMALL = "64KiB"
OPTIONS = [
    *({"residuals": kind} for kind in ("training", "leave-one-out", "both")),
    *({"curvature": name} for name in ("identity", "eigenvalue-corrected")),
]


class LargeAllocations(TorchDispatchMode):
    """Shapes of new tensors with at least `n` elements."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.shapes, self._known = n, [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            new = isinstance(leaf, torch.Tensor) and _place(leaf) not in known
            if new and leaf.untyped_storage().nbytes() >= self.n * leaf.element_size():
                self.shapes.append(tuple(leaf.shape))
        return result


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def arrays(n: int = N):
    generator = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(n, width, generator=generator) for width in (D, C))
    return features, logits, torch.arange(n) % C


def mapped(folder, n: int = N):
    maps = []
    for name, array in zip(("features", "logits"), arrays(n)[:2], strict=True):
        path = folder / f"{name}.npy"
        np.save(path, array.numpy())
        maps.append(np.load(path, mmap_mode="r"))
    return *maps, arrays(n)[2]


def ask_everything(method: STRIDE, test) -> None:
    method.influence(test, 3)
    method.influence(test)
    method.influence(test, 3, normalize="cosine")
    method.subset_influence(test, [[0, 5], range(9)])
    method.self_influence()
    method.self_influence(test)
    method.mislabel_scores()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mapped_arrays_are_read_and_nothing_of_their_size_is_made(tmp_path, options):
    config = arguments(memory_budget=SMALL, **options)
    features, logits, labels = mapped(tmp_path)
    test = tuple(part[:N_TEST] for part in arrays())
    method = STRIDE.from_features(features, logits, labels, **config)
    with LargeAllocations(N * D) as large:
        method.fit()
        ask_everything(method, test)
    assert large.shapes == []
    kept = method._states[0].operators
    for stored, given in ((kept.features, features), (kept.logits, logits)):
        assert stored.data_ptr() == given.__array_interface__["data"][0]


def network(n: int = N):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, C)).eval()
    return model, TensorDataset(torch.randn(n, 4), torch.arange(n) % C)


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_with_a_store_no_array_grows_with_the_training_set(tmp_path, monkeypatch, held_out):
    monkeypatch.setattr("stride_captum.residuals._LOGITS", 2**12)
    model, train = network()
    test = train.tensors[0][:N_TEST], train.tensors[1][:N_TEST]
    options = {
        "batch_size": 50,
        **arguments(memory_budget=SMALL, select="penultimate"),
        "feature_store": FeatureStore(tmp_path / "store", chunk="32KiB"),
        "held_out": TensorDataset(*(t[:40] for t in train.tensors)) if held_out else None,
    }
    with LargeAllocations(N * D) as large:
        method = STRIDE(model, train, **options).fit()
        ask_everything(method, test)
        later = STRIDE(model, train, **options).fit()
        later.save(tmp_path / "method")
        loaded = STRIDE.load(tmp_path / "method", model, train)
        ask_everything(loaded, test)
    assert large.shapes == []
    assert (tmp_path / "method").stat().st_size < 8 * N * D
    assert torch.equal(loaded.influence(test), method.influence(test))


@pytest.mark.slow
def test_in_memory_the_logits_are_the_only_array_of_their_size():
    features, logits, labels = arrays()
    test = features[:N_TEST], logits[:N_TEST], labels[:N_TEST]
    method = STRIDE.from_features(features, logits, labels, memory_budget=SMALL)
    with LargeAllocations(N * D) as large:
        method.fit()
        ask_everything(method, test)
    assert large.shapes == []


def test_residuals_that_fit_the_budget_are_kept_once(tmp_path):
    features, logits, labels = mapped(tmp_path)
    method = STRIDE.from_features(features, logits, labels, memory_budget="8MiB")
    method.fit()
    kept = method._states[0].operators._residuals.kept
    assert kept.shape == (N, C)
    test = tuple(part[:N_TEST].clone() for part in arrays())
    with LargeAllocations(N * C) as large:
        method.influence(test, 3)
    assert large.shapes == []
    assert method._states[0].operators._residuals.kept is kept


@pytest.mark.slow
@pytest.mark.parametrize("residuals", Residuals.__args__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_or_computed_again_residuals_give_the_same_scores(residuals, dtype):
    features, logits, labels = (t.to(dtype) if t.is_floating_point() else t for t in arrays(900))
    test = features[:N_TEST], logits[:N_TEST], labels[:N_TEST]
    few, many = (
        STRIDE.from_features(
            features, logits, labels, operators=ClosedForm(residuals=residuals), memory_budget=budget
        ).fit()
        for budget in (SMALL, "64MiB")
    )
    assert few._states[0].operators._residuals.kept is None
    assert many._states[0].operators._residuals.kept is not None
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for ask in ({}, {"normalize": "cosine"}, {"response": "loss"}):
        found, wanted = few.influence(test, **ask), many.influence(test, **ask)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < bound
    found, wanted = few.self_influence(), many.self_influence()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < bound


def test_a_saved_method_holds_no_residuals(tmp_path):
    features, logits, labels = arrays(900)
    method = STRIDE.from_features(features, logits, labels).fit()
    assert method._states[0].operators._residuals.kept is not None
    method.save(tmp_path / "method")
    beside = (tmp_path / "method").stat().st_size - features.nbytes - logits.nbytes
    assert beside < logits.nbytes
    loaded = STRIDE.load(tmp_path / "method", method.model, method.train_dataset)
    test = features[:N_TEST], logits[:N_TEST], labels[:N_TEST]
    assert torch.equal(loaded.influence(test), method.influence(test))
