"""Measurement of one case of the scalability benchmark in this process, phase by phase."""

from __future__ import annotations

import statistics
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .... import adapters
from ....designs import Partition
from ....influence.estimate import timed
from ....influence.method import InfluenceMethod
from ....operators import Operators
from ....steering.options import Trained
from ....stride import STRIDE
from ....system.fingerprints import weights_fingerprint
from ....system.memory import parse_bytes
from ....system.peak_memory import release_free_memory
from ....system.random_states import same_random_state
from .case import GRADIENT_METHODS, PHASES, Case, CaseResult, Outcome
from .network import ScalableCNN, synthetic_images

_N_CLASSES = 10
#: Timed runs after a warm-up run; a phase that takes longer than this is run once.
_REPEATS, _REPEATED_SECONDS = 3, 5.0
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed", "bad_alloc", "not enough memory")


def measure(case: Case, keep: Callable[[CaseResult], None] = lambda result: None) -> CaseResult:
    """Run the forward pass, setup and query of a case.

    Args:
        case: The case.
        keep: Called with the result at the start and at the end of every phase.

    Returns:
        Figures up to the first phase that failed. An error is recorded in the result and not raised.
    """
    result = CaseResult(case)
    outcomes = _outcomes(case, result)
    for phase in PHASES[: PHASES.index(case.last_phase) + 1]:
        setattr(result, phase, Outcome("running"))
        keep(result)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*in no subset")  # as in B.2
                outcome = next(outcomes)
        except Exception as error:
            status, detail = what_failed(error)
            outcome = Outcome(status, detail=detail)
        setattr(result, phase, outcome)
        keep(result)
        if not outcome.ok:
            break
    return result


def what_failed(error: Exception) -> tuple[str, str]:
    """Status of a failure, "out of memory" or "failed", and the first line of the error."""
    said = " ".join(traceback.format_exception_only(error)).split("\n")[0][:300]
    return "out of memory" if is_out_of_memory(error) else "failed", said


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a library below says that memory ran out.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _OUT_OF_MEMORY)


def build(case: Case, model: nn.Module, dataset: TensorDataset) -> InfluenceMethod:
    """The method of a case, not fitted.

    Gradient methods may use a quarter of the memory for gradients of single examples. "STRIDE paper" is the
    preset of CIFAR-10.

    Args:
        case: The case.
        model: Its model; not used if `case.depth` is 0.
        dataset: Its training set; features, logits and labels if `case.depth` is 0.
    """
    if case.method in GRADIENT_METHODS:
        kind: type[InfluenceMethod] = getattr(adapters, case.method)
        return kind(model, dataset, batch_size=case.batch_size, memory_budget=_memory(case) // 4)
    operators: Operators | None = None
    if case.method == "STRIDE paper":
        size = case.subset_size or max(min(100, case.n_train // case.n_subsets), 1)
        shorter = {} if case.iterations is None else {"iterations": case.iterations}
        operators = Trained.paper("cifar10", subsets=Partition(case.n_subsets, size=size), **shorter)
    if case.depth == 0:
        return STRIDE.from_features(*dataset.tensors, operators=operators)
    return STRIDE(model, dataset, batch_size=case.batch_size, operators=operators)


def _outcomes(case: Case, result: CaseResult) -> Iterator[Outcome]:
    """Outcomes of the phases in order; other figures are written into the result."""
    device = torch.device(case.device)
    model, train, test = _model_and_examples(case)

    def forward() -> None:
        for images in train[0].split(case.batch_size):
            model(images)

    if case.depth:
        result.n_params = sum(p.numel() for p in model.parameters())
        result.fingerprint_seconds = _median(lambda: weights_fingerprint(model), device)
    with torch.no_grad():
        seconds = _median(forward, device) if case.depth else 0.0
    yield Outcome("ok", seconds)

    _load_libraries(case)
    method = build(case, model, TensorDataset(*train))
    yield _outcome(method, method.fit, device)
    if isinstance(method, STRIDE):
        result.n_features = method.n_features_
    if case.method == "STRIDE":
        rng = torch.Generator(device).manual_seed(0)
        features = torch.randn(case.n_train, result.n_features, device=device, generator=rng)
        result.product_seconds = _median(lambda: features.T @ features, device)
        del features
    yield _outcome(method, lambda: method.influence(test), device)


def _load_libraries(case: Case) -> None:
    """Fit and query the method on a tiny case, so that loading of libraries is not part of setup."""
    small = replace(
        case,
        depth=min(case.depth, 1),
        width=2,
        n_train=2 * case.n_subsets,
        n_test=2,
        subset_size=None,
        iterations=1,
    )
    model, train, test = _model_and_examples(small)
    build(small, model, TensorDataset(*train)).fit().influence(test)


def _model_and_examples(case: Case) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    device = torch.device(case.device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with same_random_state(devices), device:
        torch.manual_seed(0)
        model = ScalableCNN(case.depth, case.width).eval() if case.depth else nn.Identity()
    train, test = (_examples(case, n, seed) for seed, n in enumerate((case.n_train, case.n_test)))
    return model, train, test


def _examples(case: Case, n: int, seed: int) -> tuple[Tensor, ...]:
    """Images and labels, or features, logits and labels, on the device."""
    examples: tuple[Tensor, ...]
    if case.depth:
        examples = synthetic_images(n, seed)
    else:
        rng = torch.Generator().manual_seed(seed)
        features, logits = (torch.randn(n, width, generator=rng) for width in (case.width, _N_CLASSES))
        examples = features, logits, torch.randint(0, _N_CLASSES, (n,), generator=rng)
    return tuple(tensor.to(case.device) for tensor in examples)


def _memory(case: Case) -> int:
    device = torch.device(case.device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return parse_bytes(case.memory_limit or "4GiB")


def _outcome(method: InfluenceMethod, run: Callable[[], Any], device: torch.device) -> Outcome:
    """Seconds and the highest peak memory of all runs: a later run may reuse freed memory, unseen."""
    release_free_memory()
    if device.type == "cuda":  # no other code uses the statistics of this process, so peaks are exact
        torch.cuda.reset_peak_memory_stats(device)
    peaks: list[int | None] = []

    def watched() -> None:
        run()
        peaks.append(method.peak_bytes_)

    seconds = _median(watched, device)
    return Outcome("ok", seconds, max((peak for peak in peaks if peak is not None), default=None))


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a few runs after a warm-up run, or of a single run if it takes long."""
    seconds: list[float] = []
    while not seconds or (len(seconds) <= _REPEATS and sum(seconds) < _REPEATED_SECONDS):
        seconds.append(timed(run, device))
    return statistics.median(seconds[1:] or seconds)
