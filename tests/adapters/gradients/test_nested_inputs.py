from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captum.influence import SimilarityInfluence, TracInCP, TracInCPFast
from planted import MLP, Items, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from stride_captum import STRIDE, Batch
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

N_TRAIN, N_TEST = 14, 4


def captum(kind: type, loss: str, **options: Any) -> Callable[..., Any]:
    def build(model: Any, train: Any) -> Any:
        layers = [model.net.fc3] if kind is TracInCPFast else []
        return kind(
            model, *layers, train, [""], keep_weights, loss_fn=ResidualLoss(loss), batch_size=5, **options
        )

    return partial(CaptumInfluence, build=build)


METHODS: dict[str, Callable[..., Any]] = {
    "TRAK": partial(TRAK, projection_dim=20),
    "DiagonalEKFAC": partial(DiagonalEKFAC, n_fisher=9),
    "TracIn": TracIn,
    "TracIn one by one": partial(TracIn, layers=["net.scale"]),
    "TracIn fast": partial(TracIn, fast=True, layers=["net.fc3"]),
    # The labels that EKFAC draws depend on the bits of the inputs, which a text has not.
    "EKFAC": partial(EKFAC, fisher="empirical"),
    "TracInCP": captum(TracInCP, "none"),
    "TracInCPFast": captum(TracInCPFast, "sum"),
    "KNNShapley": KNNShapley,
    "Similarity": Similarity,
    "ClassSimilarity": ClassSimilarity,
}
DETECTORS = [LossDetector, ConfidentLearning]


class Scale(nn.Module):
    """A layer for which nobody has a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Scaled(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([self.scale(x[:, :3]), x[:, 3:]], 1))


class Reads(nn.Module):
    """The network behind a function that makes a tensor of its inputs."""

    def __init__(self, net: nn.Module, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.read = net, read

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.net(self.read(*args, **kwargs))


class Parts(NamedTuple):
    left: Tensor
    right: Tensor


def text(row: Tensor) -> str:
    return " ".join(map(repr, row.tolist()))


def numbers(texts: Any) -> Tensor:
    return torch.tensor([[float(word) for word in text.split()] for text in texts])


def texts_stay_lists(items: list[Any]) -> Any:
    """As a collate function that leaves texts to the model."""
    inputs, labels = zip(*items, strict=True)
    return list(inputs), torch.stack(labels)


BANK = torch.tensor([[0.5], [1.5], [1.0]])  # three rows that are no examples


def with_bank(items: list[Any]) -> Any:
    texts, parts, labels = zip(*items, strict=True)
    return {"words": {"text": list(texts)}, "more": (torch.stack(parts), BANK), "labels": torch.stack(labels)}


#: How one example `(x, y)` is written, how a batch is put together, and how the model reads it.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, Callable[..., Tensor]]] = {
    "a pair": (
        lambda x, y: ((x[:2], x[2:]), y),
        None,
        lambda pair: torch.cat([pair[0], pair[1]], 1),
    ),
    "a dict in a tuple": (
        lambda x, y: ({"a": x[:2], 1: x[2:]}, y),
        None,
        lambda parts: torch.cat([parts["a"], parts[1]], 1),
    ),
    "a named tuple": (
        lambda x, y: (Parts(x[:4], x[4:]), y),
        None,
        lambda parts: torch.cat([parts.left, parts.right], 1),
    ),
    "a dict of tuples": (
        lambda x, y: {"first": (x[:1], (x[1:3], x[3:])), "labels": y},
        None,
        lambda first: torch.cat([first[0], *first[1]], 1),
    ),
    "a list of texts": (lambda x, y: (text(x), y), texts_stay_lists, numbers),
    "arrays": (
        lambda x, y: (x.numpy(), y),
        lambda items: (np.stack([item[0] for item in items]), torch.stack([item[1] for item in items])),
        lambda array: torch.from_numpy(np.asarray(array, dtype=np.float32)),
    ),
    "a list of numbers": (
        lambda x, y: ((x[1:], float(x[0])), y),
        lambda items: (
            torch.stack([item[0][0] for item in items]),
            [item[0][1] for item in items],
            torch.stack([item[1] for item in items]),
        ),
        lambda rest, first: torch.cat([torch.tensor(first)[:, None], rest], 1),
    ),
    "texts, parts and what all share": (
        lambda x, y: (text(x[:2]), x[2:], y),
        with_bank,
        lambda words, more: torch.cat([numbers(words["text"]), more[0]], 1) * more[1].mean(),
    ),
}


@pytest.fixture(scope="module")
def flat() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    model, train, test = trained(Scaled, n_train=N_TRAIN, steps=10)
    return model, train, TensorDataset(*(t[:N_TEST] for t in test.tensors))


def written(flat: Any, form: str) -> tuple[nn.Module, DataLoader, Any]:
    """The network, the training set and a batch of test points in a form."""
    model, train, test = flat
    write, collate, read = FORMS[form]
    collate = default_collate if collate is None else collate
    items = [write(x, y) for x, y in zip(*train.tensors, strict=True)]
    batch = collate([write(x, y) for x, y in zip(*test.tensors, strict=True)])
    return Reads(model, read).eval(), DataLoader(Items(items), 4, collate_fn=collate), batch


def plain(flat: Any) -> tuple[nn.Module, TensorDataset, Any]:
    model, train, test = flat
    return Reads(model, lambda x: x).eval(), train, test.tensors


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*METHODS, "STRIDE"])
def test_scores_are_those_of_the_flat_model(flat, name, form) -> None:
    build = STRIDE if name == "STRIDE" else METHODS[name]
    model, train, test = written(flat, form)
    found, wanted = build(model, train), build(*plain(flat)[:2])
    expected = wanted.influence(plain(flat)[2])
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.influence(test), expected, rtol=1e-4, atol=1e-5 * scale)
    own = wanted.self_influence()
    torch.testing.assert_close(found.self_influence(), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_a_loop_of_autograd(flat, form) -> None:
    """An independent reference, on the flat model."""
    model, train, (x, y) = plain(flat)
    twin = copy.deepcopy(model)

    def gradient(row: Tensor, label: Tensor, train: bool) -> Tensor:
        logits = twin(row[None])
        others = logits.masked_fill(nn.functional.one_hot(label[None], 3).bool(), -torch.inf).logsumexp(1)
        loss = nn.functional.cross_entropy(logits, label[None])
        value = -loss if train else logits[0, label] - others[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(twin.parameters()))])

    left, right = (
        torch.stack([gradient(a, b, t) for a, b in zip(*rows, strict=True)])
        for rows, t in (((x, y), False), (train.tensors, True))
    )
    model, source, test = written(flat, form)
    found = TracIn(model, source).influence(test)
    wanted = left @ right.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_of_label_noise_read_the_same(flat, detector, form) -> None:
    model, train, _ = written(flat, form)
    wanted = detector(*plain(flat)[:2]).mislabel_scores()
    torch.testing.assert_close(detector(model, train).mislabel_scores(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("control", [Random, ClassRandom])
@pytest.mark.parametrize("form", FORMS)
def test_controls_depend_on_the_example_alone(flat, control, form) -> None:
    model, train, test = written(flat, form)
    scores = control(model, train).influence(test)
    assert scores.shape == (N_TEST, N_TRAIN)
    assert len(scores[:, 0].unique()) == N_TEST
    assert torch.equal(control(model, train).influence(test), scores)


@pytest.mark.slow
def test_parts_are_cut_alike_however_they_are_called(flat) -> None:
    """Said instead of recognized: a bank with as many rows as a batch has examples."""
    model, train, test = plain(flat)
    bank = torch.linspace(0.5, 1.5, 4)[:, None]

    def collate(items: list[Any]) -> Any:
        x, y = default_collate(items)
        return {"x": x, "bank": bank, "labels": y}

    banked = Reads(model.net, lambda x, bank: x * bank.mean()).eval()
    source = DataLoader(train, 4, collate_fn=collate)
    batch = {"x": test[0], "bank": bank, "labels": test[1]}
    for name in ("TRAK", "DiagonalEKFAC", "TracIn", "EKFAC"):
        with pytest.raises(
            ValueError, match=r"`train_dataset` must show which parts .*batch=Batch\(per_example="
        ):
            METHODS[name](banked, source).fit()
        found = METHODS[name](banked, source, batch=Batch(per_example=["x"])).influence(batch)
        wanted = METHODS[name](model, train).influence(test)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_what_captum_cannot_take_is_refused(flat) -> None:
    def similar(model: Any, train: Any) -> Any:
        return SimilarityInfluence(model, "net.fc2", train, "not used", batch_size=7)

    model, train, test = written(flat, "a pair")
    method = CaptumInfluence(model, train, build=similar, answers="similarity")
    with pytest.raises(ValueError, match=r"`inputs` must hold one tensor beside the labels .*; got 2"):
        method.influence(test)
    model, train, test = written(flat, "a list of texts")
    method = captum(TracInCP, "sum", sample_wise_grads_per_batch=True)(model, train)
    with pytest.raises(
        ValueError, match=r"`build` must leave sample_wise_grads_per_batch at False for inputs"
    ):
        method.influence(test)
    method = CaptumInfluence(model, train, build=similar, answers="similarity")
    with pytest.raises(ValueError, match=r"`inputs` must hold one tensor beside the labels .*; got a list"):
        method.influence(test)
