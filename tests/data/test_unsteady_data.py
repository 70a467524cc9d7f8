"""Data sets that give something else each time they are read, or can be read once."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from captum.influence import TracInCP
from planted import MLP, BatchNormCNN, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stride_captum.adapters import (
    EKFAC,
    TRAK,
    CaptumInfluence,
    ClassRandom,
    ClassSimilarity,
    ConfidentLearning,
    DiagonalEKFAC,
    KNNShapley,
    LossDetector,
    Random,
    Similarity,
    TracIn,
)
from stride_captum.adapters.captum_influence import ResidualLoss, keep_weights

pytest.importorskip("kronfluence")
pytest.importorskip("cleanlab")

N_TRAIN = 40


def tracincp(model: nn.Module, train: Any) -> TracInCP:
    return TracInCP(model, train, [""], keep_weights, loss_fn=ResidualLoss("none"), batch_size=7)


GRADIENTS: dict[str, Callable[..., Any]] = {
    "TracIn": TracIn,
    "TracIn fast": partial(TracIn, fast=True),
    "TRAK": TRAK,
    "TRAK, both residuals": partial(TRAK, residuals="both"),
    "DiagonalEKFAC": DiagonalEKFAC,
    "EKFAC": EKFAC,
    "CaptumInfluence": partial(CaptumInfluence, build=tracincp),
}
IN_ONE_PASS: dict[str, Callable[..., Any]] = {
    "KNNShapley": KNNShapley,
    "Similarity": Similarity,
    "ClassSimilarity": ClassSimilarity,
    "Random": Random,
    "ClassRandom": ClassRandom,
}
DETECTORS = [LossDetector, ConfidentLearning]


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, TensorDataset, tuple[Tensor, Tensor]]:
    model, train, test = trained(MLP, n_train=N_TRAIN)
    return model, train, test.tensors


class Augmented(Dataset):
    """Another view each time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        x, y = self.data[i]
        return x + 0.1 * torch.randn(6, generator=self.generator), y


class Shuffled(IterableDataset):
    """Another order each time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.random = data, random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        order = list(range(len(self.data)))
        self.random.shuffle(order)
        return (self.data[i] for i in order)


class ShuffledLater(Shuffled):
    """Keeps its order for the pass that reads residuals, and for the look at it after that."""

    def __init__(self, data: TensorDataset) -> None:
        super().__init__(data)
        self.times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        yield from super().__iter__() if self.times > 2 else (self.data[i] for i in range(len(self.data)))


class Once(IterableDataset):
    """A generator, which is used up after a walk."""

    def __init__(self, data: TensorDataset) -> None:
        self.read, self.rows = 0, iter(self.items(data))

    def items(self, data: TensorDataset) -> Iterator[Any]:
        for i in range(len(data)):
            self.read += 1
            yield data[i]

    def __iter__(self) -> Iterator[Any]:
        return self.rows


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRADIENTS, *IN_ONE_PASS])
def test_views_that_change_are_spoken_of_once(problem, name) -> None:
    model, train, test = problem
    method = {**GRADIENTS, **IN_ONE_PASS}[name](model, Augmented(train), batch_size=16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = method.influence(test)
        method.influence(test, normalize=None)
        method.self_influence()
    found = [
        str(w.message) for w in said if "gives other inputs when an example is read again" in str(w.message)
    ]
    assert len(found) == 1, [str(w.message) for w in said]
    assert scores.shape == (7, N_TRAIN)


@pytest.mark.parametrize(
    "name", [name for name in GRADIENTS if "TRAK" not in name]
)  # which keeps what it needs
def test_inputs_that_change_after_the_fit_are_spoken_of(problem, name) -> None:
    model, train, test = problem
    x, y = train.tensors[0].clone(), train.tensors[1]
    method = GRADIENTS[name](model, TensorDataset(x, y), batch_size=16).fit()
    x[30] += 1
    with pytest.warns(UserWarning, match="gives other inputs when an example is read again"):
        method.influence(test)


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_speak_of_views_that_change(problem, detector) -> None:
    model, train, _ = problem
    with pytest.warns(UserWarning, match="gives other inputs when an example is read again"):
        detector(model, Augmented(train), batch_size=16).mislabel_scores()


@pytest.mark.parametrize("name", [*GRADIENTS, *IN_ONE_PASS])
def test_an_order_that_changes_is_refused(problem, name) -> None:
    model, train, test = problem
    method = {**GRADIENTS, **IN_ONE_PASS}[name](model, Shuffled(train), batch_size=16)
    with pytest.raises(ValueError, match="`train_dataset` must give the same examples in the same order"):
        method.influence(test)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_one_example_never_meet_the_residuals_of_another(problem, name) -> None:
    model, train, test = problem
    source = ShuffledLater(train)
    method = GRADIENTS[name](model, source, batch_size=16)
    with pytest.raises(ValueError, match="`train_dataset` must give the same examples in the same order"):
        method.influence(test)
    assert source.times == 3


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_source_that_can_be_read_once_is_refused_before_it_is_read(problem, name, loader) -> None:
    model, train, test = problem
    stream = Once(train)
    source = DataLoader(stream, 16) if loader else stream
    method = GRADIENTS[name](model, source, batch_size=16)
    with pytest.raises(ValueError, match="`train_dataset` must be a source that can be walked several times"):
        method.influence(test)
    assert stream.read == 0


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_what_reads_once_takes_a_source_that_can_be_read_once(problem, name, loader) -> None:
    model, train, test = problem
    stream = Once(train)
    found = IN_ONE_PASS[name](model, DataLoader(stream, 16) if loader else stream, batch_size=16)
    wanted = IN_ONE_PASS[name](model, train, batch_size=16)
    torch.testing.assert_close(found.influence(test), wanted.influence(test))
    assert stream.read == N_TRAIN


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_take_a_source_that_can_be_read_once(problem, detector) -> None:
    model, train, _ = problem
    stream = Once(train)
    method = detector(model, stream, batch_size=16)
    found = method.mislabel_scores()
    assert stream.read == N_TRAIN
    wanted = detector(model, train, batch_size=16).mislabel_scores()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`train_dataset` must hold at least one example; .* walked once"):
        method.mislabel_scores()


@pytest.mark.parametrize("name", [*GRADIENTS, *IN_ONE_PASS])
def test_empty_batches_change_nothing(problem, name) -> None:
    model, train, test = problem
    x, y = train.tensors
    build = {**GRADIENTS, **IN_ONE_PASS}[name]
    batches = [(x[:25], y[:25]), (x[:0], y[:0]), (x[25:], y[25:]), (x[:0], y[:0])]
    found = build(model, DataLoader(batches, batch_size=None)).influence(test)
    wanted = build(model, train).influence(test)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("detector", DETECTORS)
def test_empty_batches_change_no_detector(problem, detector) -> None:
    model, train, _ = problem
    x, y = train.tensors
    batches = [(x[:25], y[:25]), (x[:0], y[:0]), (x[25:], y[25:]), (x[:0], y[:0])]
    found = detector(model, DataLoader(batches, batch_size=None)).mislabel_scores()
    torch.testing.assert_close(found, detector(model, train).mislabel_scores(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRADIENTS, *IN_ONE_PASS])
def test_a_last_batch_of_one_example_changes_nothing_under_batch_norm(name) -> None:
    model, train, test = trained(BatchNormCNN, n_train=9, steps=2)
    build = {**GRADIENTS, **IN_ONE_PASS}[name]
    last = {"layers": ["fc"]} if name == "TracIn fast" else {}
    wanted = build(model, train, **last).influence(test.tensors)
    found = build(model.train(), train, batch_size=4, **last).influence(DataLoader(test, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
