"""The parts of `bench_gpu`: the rows of each, and how they are measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed import DistributedSTRIDE
from ...features.store import FeatureStore
from ...steering.options import Trained
from ...steering.training import train_operators
from ...stride import STRIDE
from ...subsets import random_subsets
from ...system.devices import full_precision
from ...system.memory import MOST_ROWS, blocks
from ...system.to_device import to_device
from . import core as benchmark_core
from .gpu_jobs import Clock, Job, side_by_side
from .networks import examples, network
from .retraining import bench_retraining
from .scalability.case import Case as ScalingCase
from .scalability.network import channels, n_parameters
from .scalability.printed import TABLE5
from .scalability.process import run_case

#: Sizes on a GPU (`FULL`) and on the CPU (`TOY`).
FULL: dict[str, dict[str, Any]] = {
    "training": {"n_train": 10_000, "n_features": 1024, "n_subsets": 500, "iterations": 50},
    "queries": {
        "cases": (("MLP of Table 2", 50_000, 1_000), ("width 512", 50_000, 1_000), ("resnet18", 2_000, 100)),
        "repeats": 5,
    },
    "retraining": {
        "cases": (("digits", 64), ("digits", 256), ("mnist", 64), ("mnist", 256), ("cifar10", 64))
    },
    "transfers": {"n_train": 200_000, "n_test": 100},
    "nccl": {"n_train": 50_000, "n_test": 100},
    "scaling": {"sizes": ((4, 64), (8, 128), (8, 256), (12, 512), (16, 768)), "n_train": 5_000},
}
TOY: dict[str, dict[str, Any]] = {
    "training": {"n_train": 60, "n_features": 8, "n_subsets": 6, "iterations": 3},
    "queries": {"cases": (("width 512", 200, 10),), "repeats": 1},
    "retraining": {"cases": (("digits", 2),)},
    "transfers": {"n_train": 400, "n_test": 4},
    "nccl": {"n_train": 400, "n_test": 4},
    "scaling": {"sizes": ((2, 4),), "n_train": 60},
}


def training(
    device: torch.device, clock: Clock, *, n_train: int, n_features: int, n_subsets: int, iterations: int
) -> Iterator[Job]:
    """Training of operators in each precision, with and without fused Adam, against float32 without it."""
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(n_train, n_features, generator=draw).to(device)
    z = torch.randn(n_train, 10, generator=draw).to(device)
    y = torch.randint(10, (n_train,), generator=draw).to(device)
    subsets = random_subsets(n_train, n_subsets, max(n_train // 50, 2))
    options = Trained(iterations=iterations)

    def train(precision: str = "float32", fused: bool | None = None) -> Tensor:
        with full_precision(device):
            chosen = replace(options, precision=precision)  # type: ignore[arg-type]
            trained = train_operators(h, z, y, subsets, chosen, memory_budget=2**31, fused=fused)
            return trained.operators.steering_matrices

    sizes = {"n_train": n_train, "n_features": n_features, "n_subsets": n_subsets, "steps": iterations}
    weight = torch.randn(n_features, n_features, generator=draw).to(device)

    def products() -> None:  # those of the hidden layer of phi for all examples: one forward, two backward
        with full_precision(device):
            for _ in range(3 * iterations):
                h @ weight

    head = {"what": "float32", "other": "three products N x d x d a step", **sizes}
    yield Job(head, lambda: side_by_side(train, products, device))
    for precision, fused in (("float32", True), ("tf32", None), ("tf32", True), ("bfloat16", None)):
        what = precision + (", fused Adam" if fused else "")

        def run(precision: str = precision, fused: bool | None = fused) -> dict[str, Any]:
            exact, other = train(), train(precision, fused)
            gap = float((other - exact).norm() / exact.norm())
            return {**side_by_side(partial(train, precision, fused), train, device), "difference": gap}

        yield Job({"what": what, "other": "float32", **sizes}, run)


def queries(
    device: torch.device, clock: Clock, *, cases: Sequence[tuple[str, int, int]], repeats: int
) -> Iterator[Job]:
    """Fit and query, against the arithmetic they need and against TracInCPFast."""
    for name, n_train, n_test in cases:
        layers = ("relu",) if name == "width 512" else None
        case = benchmark_core.Case(name, n_train, layers, n_test)

        def run(case: benchmark_core.Case = case) -> dict[str, Any]:
            return benchmark_core.bench_case(case, repeats, device).to_dict()

        yield Job({"what": name, "other": "the floor of the hardware"}, run)


def retraining(device: torch.device, clock: Clock, *, cases: Sequence[tuple[str, int]]) -> Iterator[Job]:
    """Stacks of models that are trained together, against models one by one."""
    for name, size in cases:

        def run(name: str = name, size: int = size) -> dict[str, Any]:
            n_single, turns = (4, 2) if device.type != "cpu" else (1, 1)
            figures = bench_retraining(
                [name], device=device, stack_sizes=[size], n_single=n_single, n_jobs=1, repeats=turns
            )[0]
            return {key.replace("ratio", "speedup"): value for key, value in figures.items()}

        yield Job({"what": f"{name}, stack of {size}", "other": "models one by one"}, run)


def transfers(device: torch.device, clock: Clock, *, n_train: int, n_test: int) -> Iterator[Job]:
    """Products with features that are mapped from disk, block by block."""
    model, (dataset, test) = network("width 512").to(device), examples("width 512", n_train, n_test)
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder) / "store")
        mapped = STRIDE(model, dataset, layers=["relu"], feature_store=store).fit()
        inside = STRIDE(model, dataset, layers=["relu"]).fit()
        stored, kept = (
            state.operators.features for method in (mapped, inside) for state in method._states or []
        )
        queries = torch.randn(n_test, stored.shape[1], generator=torch.Generator().manual_seed(1)).to(device)
        points = test[0].to(device), test[1].to(device)

        def through(move: Callable[[Tensor], Tensor], rows: Tensor) -> None:
            for block in blocks(len(rows), MOST_ROWS):
                queries @ move(rows[block]).T

        pinned = partial(through, lambda rows: to_device(rows, device, torch.float32), stored)
        sizes = {"n_train": n_train, "n_features": stored.shape[1], "bytes": stored.nbytes, "n_test": n_test}
        for what, other, run, beside in (
            (
                "pinned blocks",
                "plain copies of them",
                pinned,
                partial(through, lambda r: r.to(device), stored),
            ),
            ("pinned blocks", "features in place", pinned, partial(through, lambda r: r, kept)),
            (
                "the 10 best from a store",
                "from features in place",
                lambda: mapped.influence(points, 10),
                lambda: inside.influence(points, 10),
            ),
        ):
            head = {"what": what, "other": other, **sizes}

            def compare(run: Any = run, beside: Any = beside) -> dict[str, Any]:
                found = side_by_side(run, beside, device)
                return {**found, "bytes_per_second": stored.nbytes / found["seconds"]}

            yield Job(head, compare)


def one_rank(device: torch.device, clock: Clock, *, n_train: int, n_test: int) -> Iterator[Job]:
    """`DistributedSTRIDE` in a group of one process: the cost of its collectives, and whether they work."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    model, (dataset, test) = network("width 512").to(device), examples("width 512", n_train, n_test)
    points = test[0].to(device), test[1].to(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        method, wait = f"file://{folder}/rendezvous", timedelta(seconds=max(clock.left, 1))
        dist.init_process_group(backend, init_method=method, rank=0, world_size=1, timeout=wait)
        try:
            ranks, alone = (kind(model, dataset, layers=["relu"]) for kind in (DistributedSTRIDE, STRIDE))
            head = {"other": "no group", "backend": backend, "n_train": n_train, "n_test": n_test}
            yield Job({"what": "fit", **head}, lambda: side_by_side(ranks.fit, alone.fit, device))

            def ask() -> dict[str, Any]:
                found, wanted = ranks.influence(points), alone.influence(points)
                assert isinstance(found, Tensor)
                assert isinstance(wanted, Tensor)
                gap = float((found - wanted).abs().max() / wanted.abs().max())
                run, beside = (partial(method.influence, points, 10) for method in (ranks, alone))
                return {**side_by_side(run, beside, device), "difference": gap}

            yield Job({"what": "the 10 best", **head}, ask)
        finally:
            dist.destroy_process_group()


def scaling(
    device: torch.device, clock: Clock, *, sizes: Sequence[tuple[int, int]], n_train: int
) -> Iterator[Job]:
    """Setup and query of the closed form on models of growing size, each in its own process."""
    printed = {(row.depth, row.width): row for row in TABLE5}
    with tempfile.TemporaryDirectory() as folder:
        for depth, width in sizes:
            row = printed.get((depth, width))

            def run(depth: int = depth, width: int = width) -> dict[str, Any]:
                case = ScalingCase(
                    method="STRIDE",
                    depth=depth,
                    width=width,
                    n_train=n_train,
                    n_test=min(100, n_train),
                    device=str(device),
                    time_limit=max(clock.left / 3, 1.0),
                )
                found = run_case(case, Path(folder))
                failed = found.first_failure
                return {
                    "forward_seconds": found.forward.seconds,
                    "product_seconds": found.product_seconds,
                    "fingerprint_seconds": found.fingerprint_seconds,
                    "setup_seconds": found.setup.seconds,
                    "ratio": found.floor_ratio,
                    "setup_bytes": found.setup.peak_bytes,
                    "inference_seconds": found.inference.seconds,
                    "inference_bytes": found.inference.peak_bytes,
                    **({} if failed is None else {"skipped": f"{failed.status} {failed.detail}".strip()}),
                }

            head = {
                "what": f"{depth} x {width}",
                "other": "a forward pass and two products N x d x d",
                "n_params": n_parameters(depth, width),
                "n_train": n_train,
                "paper_seconds": None if row is None else row.stride,
            }
            yield Job(head, run, work=_START + _operations(depth, width) * n_train)


#: Operations that take as long as starting a process.
_START = 3e14


def _operations(depth: int, width: int) -> float:
    """Operations of the convolutions for one image of 32 x 32; maps shrink where channels double."""
    counts, side, total = channels(depth, width), 32, 0.0
    for before, count in zip([3, *counts], counts, strict=False):
        if before > 3 and count > before and side > 4:
            side //= 2
        total += 2 * 9 * before * count * side**2
    return total


JOBS: dict[str, Callable[..., Iterator[Job]]] = {
    "training": training,
    "queries": queries,
    "retraining": retraining,
    "transfers": transfers,
    "nccl": one_rank,
    "scaling": scaling,
}
