"""Speed of STRIDE's default settings, as ratios to the arithmetic it needs and to Captum's TracInCPFast.

Both sides of a ratio are timed in one process, a few seconds apart: absolute seconds on a shared machine mean
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ...stride import STRIDE
from ...system.devices import CPU, full_precision
from ..measures.cost import in_a_fresh_process, median_seconds
from .networks import examples, network
from .peers import BATCH_SIZE, tracin_fast


@dataclass(frozen=True)
class Case:
    """One network and training set size.

    Attributes:
        name: Name of the network.
        n_train: N.
        layers: Layers that are read; None takes those of STRIDE's default.
        n_test: Test points in one call.
    """

    name: str
    n_train: int
    layers: tuple[str, ...] | None
    n_test: int


CASES = (
    Case("MLP of Table 2", 5_000, None, 1_000),
    Case("MLP of Table 2", 50_000, None, 1_000),
    Case("width 512", 5_000, ("relu",), 1_000),
    Case("width 512", 50_000, ("relu",), 1_000),
    Case("resnet18", 2_000, None, 100),
)


#: Whose scores are averaged.
_CHECKPOINTS = 4


@dataclass(frozen=True)
class CoreRow:
    """Results of one case; times are medians in seconds.

    Attributes:
        model: Name of the network.
        n_train: N.
        n_features: d, total width of all layers that were read.
        n_test: Test points in one call.
        forward: Forward pass over the training set.
        product: One float32 N x d x d product.
        fit: `STRIDE.fit`.
        fit_ratio: `fit / (forward + 2 product)`; the goal is at most 1.5.
        scoring: One float32 n_test x d x N product.
        dense: `influence` of n_test points.
        dense_ratio: `dense / scoring`; the goal is at most 1.5.
        top100: `influence` with k = 100.
        top100_ratio: `top100 / scoring`; the goal is at most 2.
        ensemble: `influence` of n_test points with four checkpoints.
        ensemble_ratio: `ensemble / (4 dense)`; the goal is at most 1.1.
        single: `influence` of one point.
        tracin_single: The same by TracInCPFast.
        single_speedup: `tracin_single / single`; the goal is at least 50.
        tracin_many: n_test points in one call of TracInCPFast.
        many_speedup: `tracin_many / dense`; the goal is at least 3.
        fit_bytes: Peak memory that `fit` adds.
        formula_bytes: Predicted memory: features and residuals (4 N (d + 5C)) and float64 matrices (5 x 8
            d^2).
    """

    model: str
    n_train: int
    n_features: int
    n_test: int
    forward: float
    product: float
    fit: float
    fit_ratio: float
    scoring: float
    dense: float
    dense_ratio: float
    top100: float
    top100_ratio: float
    ensemble: float
    ensemble_ratio: float
    single: float
    tracin_single: float
    single_speedup: float
    tracin_many: float
    many_speedup: float
    fit_bytes: int
    formula_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def bench_core(cases: Sequence[Case] = CASES, repeats: int = 5) -> list[CoreRow]:
    """Run all cases, each in a new process, so that peak memory is that of the case alone.

    Args:
        cases: The cases.
        repeats: Timed repetitions.
    """
    return [in_a_fresh_process(bench_case, case, repeats) for case in cases]


def bench_case(case: Case, repeats: int, device: torch.device = CPU) -> CoreRow:
    """Measure one case in this process, with everything on one device."""
    model = network(case.name).to(device)
    dataset, test = examples(case.name, case.n_train, case.n_test)
    dataset = TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))
    test = test[0].to(device), test[1].to(device)
    median = partial(median_seconds, device=device)

    @torch.no_grad()
    def forward() -> None:
        for batch in dataset.tensors[0].split(BATCH_SIZE):
            model(batch)

    with full_precision(device):
        forward_seconds = median(forward, repeats)
    layers = None if case.layers is None else list(case.layers)
    before = _peak_bytes()
    method = STRIDE(model, dataset, layers=layers, batch_size=BATCH_SIZE).fit()
    fit_bytes = max(_peak_bytes() - before, 0) if device.type == "cpu" else method.peak_bytes_ or 0
    fit = median(method.fit, repeats)
    d = method.n_features_
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(case.n_train, d, generator=generator).to(device)
    queries = torch.randn(case.n_test, d, generator=generator).to(device)
    with full_precision(device):
        product = median(partial(torch.matmul, features.T, features), repeats)
        scoring = median(partial(torch.matmul, queries, features.T), repeats)
    del features
    one = test[0][:1], test[1][:1]
    dense = median(lambda: method.influence(test), repeats)
    top100 = median(lambda: method.influence(test, 100), repeats)
    single = median(lambda: method.influence(one), 2 * repeats)
    states = [
        {name: t * (1 + 1e-3 * i) for name, t in model.state_dict().items()} for i in range(_CHECKPOINTS)
    ]
    averaged = STRIDE(model, dataset, layers=layers, batch_size=BATCH_SIZE, checkpoints=states).fit()
    ensemble = median(partial(averaged.influence, test), repeats)
    del averaged
    tracin = tracin_fast(model, dataset)
    tracin_single = median(lambda: tracin.influence(one), max(repeats // 2, 2))
    tracin_many = median(lambda: tracin.influence(test), 2)
    return CoreRow(
        model=case.name,
        n_train=case.n_train,
        n_features=d,
        n_test=case.n_test,
        forward=forward_seconds,
        product=product,
        fit=fit,
        fit_ratio=fit / (forward_seconds + 2 * product),
        scoring=scoring,
        dense=dense,
        dense_ratio=dense / scoring,
        top100=top100,
        top100_ratio=top100 / scoring,
        ensemble=ensemble,
        ensemble_ratio=ensemble / (_CHECKPOINTS * dense),
        single=single,
        tracin_single=tracin_single,
        single_speedup=tracin_single / single,
        tracin_many=tracin_many,
        many_speedup=tracin_many / dense,
        fit_bytes=fit_bytes,
        formula_bytes=4 * case.n_train * (d + 50) + 5 * 8 * (d + 1) ** 2,
    )


def _peak_bytes() -> int:
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
