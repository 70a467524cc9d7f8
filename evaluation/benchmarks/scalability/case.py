"""One case of the scalability benchmark, and its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ....errors import bad_choice, bad_value
from ....system.memory import parse_bytes

#: The closed form, the paper's trained operators, and the gradient baselines.
SCALED_METHODS = ("STRIDE", "STRIDE paper", "DiagonalEKFAC", "EKFAC", "TracIn")
GRADIENT_METHODS = SCALED_METHODS[2:]
#: Phases of a case, in order.
PHASES = ("forward", "setup", "inference")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement, with everything that its figures depend on.

    Attributes:
        method: One of `SCALED_METHODS`.
        depth: Depth of `ScalableCNN`; 0 for random features without a model.
        width: Channels of its first convolution, or the number of features.
        n_train: N.
        n_test: Test points of the query.
        n_subsets: K of "STRIDE paper".
        subset_size: |S_k| of "STRIDE paper"; None takes N / K, at most 100.
        iterations: T of "STRIDE paper"; None takes that of the preset.
        batch_size: Examples in a batch, for the forward pass and for every method.
        device: Where the work is done.
        hardware: Name of the device and threads; stored results of another machine are not used.
        memory_limit: Memory that the process may allocate after its start, such as "8GiB"; None for no
            limit. On a GPU the memory of the device is the limit.
        time_limit: Seconds that each phase may take.
        last_phase: The last phase to run, "inference" for all.

    Raises:
        ValueError: A value is out of range.
    """

    method: str
    depth: int
    width: int
    n_train: int
    n_test: int = 100
    n_subsets: int = 50
    subset_size: int | None = None
    iterations: int | None = None
    batch_size: int = 256
    device: str = "cpu"
    hardware: str = ""
    memory_limit: str | None = None
    time_limit: float = 120.0
    last_phase: str = "inference"

    def __post_init__(self) -> None:
        known = SCALED_METHODS if self.depth else SCALED_METHODS[:2]
        if self.method not in known:
            raise bad_choice("method", self.method, known)
        if self.last_phase not in PHASES:
            raise bad_choice("last_phase", self.last_phase, PHASES)
        if not 0 < self.time_limit < math.inf:
            raise bad_value("time_limit", "be a positive number of seconds", self.time_limit)
        try:
            parse_bytes(self.memory_limit or 1)
        except ValueError as error:
            must = "be None or a number of bytes such as '8GiB'"
            raise bad_value("memory_limit", must, repr(self.memory_limit)) from error

    @property
    def size(self) -> str:
        """The model, in words."""
        return f"{self.depth} x {self.width}" if self.depth else f"{self.width} features"

    @property
    def name(self) -> str:
        """Name of its file."""
        model = f"cnn-{self.depth}x{self.width}" if self.depth else f"features-{self.width}"
        subsets = f"-K{self.n_subsets}" if self.method == "STRIDE paper" else ""
        return f"{self.method.replace(' ', '-')}-{model}-N{self.n_train}{subsets}"


@dataclass(frozen=True)
class Outcome:
    """Result of a phase.

    Attributes:
        status: "ok", "out of memory", "over time limit", "failed", "not run" or "running".
        seconds: Median of the repetitions.
        peak_bytes: Peak memory (`PeakMemory`) in addition to the model and the data.
        detail: Message of a failure, or the reason why the phase was not run.
    """

    status: str = "not run"
    seconds: float | None = None
    peak_bytes: int | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether the phase has figures."""
        return self.status == "ok"


@dataclass
class CaseResult:
    """Figures of a case.

    Attributes:
        case: The case.
        n_params: P; 0 without a model.
        n_features: d, the total width of the features of STRIDE; 0 for other methods.
        product_seconds: One product of the size of a Gram matrix, N x d x d in float32; closed form only.
        fingerprint_seconds: Hashing the weights, which is part of every setup.
        forward: One forward pass over the training set.
        setup: `fit`.
        inference: `influence` on all test points; its peak memory is at least that of setup.
    """

    case: Case
    n_params: int = 0
    n_features: int = 0
    product_seconds: float | None = None
    fingerprint_seconds: float | None = None
    forward: Outcome = field(default_factory=Outcome)
    setup: Outcome = field(default_factory=Outcome)
    inference: Outcome = field(default_factory=Outcome)

    @property
    def floor_ratio(self) -> float | None:
        """Setup of the closed form / (forward pass + two products); None if one of them is not known."""
        setup, forward, product = self.setup.seconds, self.forward.seconds, self.product_seconds
        if setup is None or forward is None or product is None:
            return None
        return setup / (forward + 2 * product)

    @property
    def first_failure(self) -> Outcome | None:
        """Outcome of the first phase without figures, or None."""
        outcomes = (getattr(self, phase) for phase in PHASES)
        return next((outcome for outcome in outcomes if not outcome.ok), None)

    def ended_with(self, status: str) -> str | None:
        """The phase that ended with this status, or None."""
        return next((phase for phase in PHASES if getattr(self, phase).status == status), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "floor_ratio": self.floor_ratio}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """The inverse of `to_dict`."""
        values = {key: value for key, value in values.items() if key != "floor_ratio"}
        phases: dict[str, Any] = {phase: Outcome(**values.pop(phase)) for phase in PHASES}
        return cls(Case(**values.pop("case")), **values, **phases)
