"""Speed of STRIDE next to feature similarity, Captum's TracInCPFast and kronfluence's EKFAC.

All methods of a case are fitted and queried one after another in one process, on the same network, training
set and test points. A fit is compared with one forward pass over the training set. A query is compared with
`Similarity` on the same layers: no method that reads every feature can be much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.influence import TracInCPFast
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from ...adapters import EKFAC, Similarity
from ...influence.method import InfluenceMethod
from ...stride import STRIDE
from ..measures.cost import forward_seconds, in_a_fresh_process, median_seconds
from .networks import examples, network

BATCH_SIZE = 1024


@dataclass(frozen=True)
class Case:
    """A network, a training set and a number of test points.

    Attributes:
        network: Name of the network.
        n_train: N.
        n_test: Test points of a query.
        k: Training examples returned for each test point in a top-k query.
        ekfac: Whether to measure EKFAC, which takes hours on the larger networks.
        batch_size: Examples in a batch.
    """

    network: str
    n_train: int
    n_test: int = 100
    k: int = 100
    ekfac: bool = True
    batch_size: int = BATCH_SIZE


CASES = (
    Case("MLP of Table 2", 5_000),
    Case("width 512", 5_000),
    Case("width 512", 50_000, ekfac=False),
    Case("resnet18", 2_000, ekfac=False, batch_size=256),
    Case("vit_b_16", 1_000, ekfac=False, batch_size=256),
)


def bench_peers(cases: Sequence[Case] = CASES, repeats: int = 5) -> list[dict[str, Any]]:
    """A row for each case and method; each case has its own process.

    Args:
        cases: The cases.
        repeats: Timed repetitions; medians are reported. EKFAC is timed once.

    Returns:
        Rows of `network`, `n_train`, `n_features` (d), `n_test` and `method`; seconds `forward` (over the
        training set), `forward_test`, `fit` (0 for TracInCPFast, which has none), `query`, `top_k` and
        `one_point`; `fit_ratio`, relative to `forward`; and `query_ratio`, `top_k_ratio` and
        `one_point_ratio`, relative to Similarity on the same layers.
    """
    return [row for case in cases for row in in_a_fresh_process(bench_case, case, repeats)]


def bench_case(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure one case in this process; a row for each method."""
    model = network(case.network)
    train, test = examples(case.network, case.n_train, case.n_test)
    forward = forward_seconds(model, train, batch_size=case.batch_size, repeats=repeats)
    test_set = TensorDataset(*test)
    shared = {
        "network": case.network,
        "n_train": case.n_train,
        "n_test": case.n_test,
        "forward": forward,
        "forward_test": forward_seconds(model, test_set, batch_size=case.batch_size, repeats=repeats),
    }
    ours = STRIDE(model, train, batch_size=case.batch_size)
    measure = partial(_measure, test=test, k=case.k, repeats=repeats)
    rows = [{"method": "STRIDE", **measure(ours.fit, ours.influence)}]
    layers = [str(tap) for state in ours._states or [] for tap in state.taps]
    width = ours.n_features_
    del ours
    alike = Similarity(model, train, layers=layers, batch_size=case.batch_size)
    bar = {"method": "Similarity, the same layers", **measure(alike.fit, alike.influence)}
    del alike
    rows.append(bar)
    last = Similarity(model, train, batch_size=case.batch_size)
    rows.append({"method": "Similarity, last layer", **measure(last.fit, last.influence)})
    del last
    tracin = tracin_fast(model, train, case.batch_size)
    rows.append({"method": "TracInCPFast (Captum)", **measure(None, tracin.influence)})
    if case.ekfac:
        peer: InfluenceMethod = EKFAC(model, train, batch_size=case.batch_size).fit()
        row = {
            "method": "EKFAC (kronfluence)",
            **_measure(None, peer.influence, test=test, k=case.k, repeats=1, warm_up=False),
        }
        rows.append({**row, "fit": peer.fit_seconds_ or 0.0})
    for row in rows:
        ratios = {f"{name}_ratio": row[name] / bar[name] for name in ("query", "top_k", "one_point")}
        row.update(shared, n_features=width, fit_ratio=row["fit"] / forward, **ratios)
    return rows


def tracin_fast(model: nn.Module, dataset: TensorDataset, batch_size: int = BATCH_SIZE) -> TracInCPFast:
    """TracInCPFast with its fastest data loading: batches are sliced, not collated example by example.

    Args:
        model: The network; gradients are those of its last linear layer.
        dataset: The training set.
        batch_size: Examples in a batch.
    """
    sampler = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return TracInCPFast(
        model,
        last,
        loader,
        checkpoints=[model.state_dict()],
        checkpoints_load_func=lambda net, state: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )


def _measure(
    fit: Callable[[], Any] | None,
    influence: Callable[..., Any],
    *,
    test: tuple[torch.Tensor, ...],
    k: int,
    repeats: int,
    warm_up: bool = True,
) -> dict[str, Any]:
    """Median seconds of a fit (0 without one), all scores, top-k, and top-k of one point."""
    one = tuple(part[:1] for part in test)
    seconds = partial(median_seconds, repeats=repeats, warm_up=warm_up)
    return {
        "fit": 0.0 if fit is None else seconds(fit),
        "query": seconds(lambda: influence(test)),
        "top_k": seconds(lambda: influence(test, k)),
        "one_point": seconds(lambda: influence(one)),
    }
