"""Every method with its options, every call, how answers are compared, and how gradients are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_options import arguments
from planted import planted_classes
from torch import nn

from stride_captum import STRIDE
from stride_captum.adapters import (
    EKFAC,
    TRAK,
    ClassRandom,
    ClassSimilarity,
    DiagonalEKFAC,
    KNNShapley,
    Random,
    Similarity,
    TracIn,
)
from stride_captum.influence.method import InfluenceMethod

Make = Callable[[nn.Module, Any], InfluenceMethod]
HELD_OUT = planted_classes(20, seed=5)
TRAINED: dict[str, Any] = {
    "operators": "trained",
    "iterations": 6,
    "n_subsets": 12,
    "subset_size": 8,
    "rank": 4,
    "alpha": 0.6,
    "center": False,
}
CURVATURES = ("identity", "kronecker", "eigenvalue-corrected", "gauss-newton")


def stride(**options: Any) -> Make:
    return lambda model, train: STRIDE(model, train, **arguments(**options))


def operators(**options: Any) -> Make:
    return stride(**{**TRAINED, **options})


METHODS: dict[str, Make] = {
    **{f"STRIDE, curvature {name}": stride(curvature=name) for name in CURVATURES},
    **{f"STRIDE, residuals {r}": stride(residuals=r) for r in ("training", "temperature", "leave-one-out")},
    **{f"STRIDE, {p} projection": stride(projection=p, projection_width=4) for p in ("random", "pca")},
    "STRIDE, held-out data": lambda model, train: STRIDE(model, train, held_out=HELD_OUT),
    "operators, Lasso": operators(),
    "operators, dense Lasso": operators(subset_size=24, center=True),
    "operators, ridge": operators(recovery="ridge"),
    "operators, linearity by example": operators(linearity_weight=0.1, linearity="example", recovery="ridge"),
    "operators, linearity by subset": operators(
        linearity_weight=0.1, linearity="subset", memory_budget=60_000, recovery="ridge"
    ),
    "operators, own encoders": operators(encoder="per-subset", recovery="ridge"),
    "operators, representation": operators(steering="representation", select="penultimate", recovery="ridge"),
    "TracIn": TracIn,
    "TracIn, fast": lambda model, train: TracIn(model, train, fast=True),
    "TracIn, residuals both": lambda model, train: TracIn(model, train, residuals="both"),
    "TRAK": lambda model, train: TRAK(
        model, train, projection_dim=32, residuals="temperature", held_out=HELD_OUT
    ),
    "DiagonalEKFAC": DiagonalEKFAC,
    "DiagonalEKFAC, exact": lambda model, train: DiagonalEKFAC(
        model, train, fisher="exact", dense="diagonal"
    ),
    "EKFAC": EKFAC,
    "KNNShapley": KNNShapley,
    "Similarity": Similarity,
    "ClassSimilarity": ClassSimilarity,
    "Random": Random,
    "ClassRandom": ClassRandom,
}
CALLS: dict[str, Callable[[InfluenceMethod, Any], Any]] = {
    "influence": lambda method, test: method.influence(test),
    "top-k": lambda method, test: method.influence(test, 3).indices,
    "opponents": lambda method, test: method.influence(test, 3, False).influence_scores,
    "cosine": lambda method, test: method.influence(test, normalize="cosine"),
    "loss": lambda method, test: method.influence(test, response="loss", target="predicted"),
    "self-influence": lambda method, test: method.self_influence(),
    "self-influence of others": lambda method, test: method.self_influence(test),
    "mislabel scores": lambda method, test: method.mislabel_scores(),
    "subset influence": lambda method, test: method.subset_influence(test, [[0, 1, 2], [5]]),
}


def every_call(method: InfluenceMethod, test: Any) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for name, call in CALLS.items():
        try:
            answers[name] = call(method, test)
        except (ValueError, NotImplementedError) as error:
            answers[name] = error
    return answers


def assert_same_answers(
    found: dict[str, Any], wanted: dict[str, Any], device: torch.device, tolerance: float = 1e-5
) -> None:
    for call, answer in wanted.items():
        if isinstance(answer, Exception):
            assert type(found[call]) is type(answer), call
            assert str(found[call]) == str(answer), call
            continue
        assert not isinstance(found[call], Exception), (call, found[call])
        assert found[call].device == device, call
        assert found[call].dtype == answer.dtype, call
        close = tolerance * float(answer.abs().max()) if answer.is_floating_point() else 0
        same = torch.allclose(found[call].cpu(), answer, rtol=0, atol=close, equal_nan=True)
        assert same, (call, found[call].cpu(), answer)


def count_rows(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[int]:
    """The number of examples in every call of `example_gradients` from some modules."""
    rows: list[int] = []
    for module in modules:

        def spy(model, parameters, batch, vectors, original=module.example_gradients):
            rows.append(len(vectors))
            return original(model, parameters, batch, vectors)

        monkeypatch.setattr(module, "example_gradients", spy)
    return rows
