"""One case of the scalability benchmark, and its result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ....errors import bad_choice, bad_value
from ....system.memory import parse_bytes

#: Closed form, the paper's operators, and the gradient baselines.
SCALED_METHODS = ("STRIDE", "STRIDE paper", "DiagonalEKFAC", "EKFAC", "TracIn")
GRADIENT_METHODS = SCALED_METHODS[2:]
#: In this order.
PHASES = ("forward", "setup", "inference")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, and all that its figures depend on.

    Attributes:
        method: One of `SCALED_METHODS`.
        depth: Of `ScalableCNN`; 0 for random features without a model.
        width: Channels of its first convolution, or the number of features.
        n_train: N.
        n_test: Test points of the query.
        n_subsets: K of "STRIDE paper".
        subset_size: |S_k| of "STRIDE paper"; None covers what subsets of at most 100 can.
        iterations: T of "STRIDE paper"; None is that of the preset.
        batch_size: Examples a batch, of the forward pass and of every method.
        device: Where the work is done.
        hardware: Name of the device and threads: results of another machine are not taken over.
        memory_limit: What the process may add to what it starts with, such as "8GiB"; None for no limit.
            On a GPU its memory is the limit.
        time_limit: Seconds that each phase may take.
        last_phase: "inference", or an earlier phase to leave out what follows it.

    Raises:
        ValueError: A value out of its range.
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
        """The model in words."""
        return f"{self.depth} x {self.width}" if self.depth else f"{self.width} features"

    @property
    def name(self) -> str:
        """Of its file."""
        model = f"cnn-{self.depth}x{self.width}" if self.depth else f"features-{self.width}"
        subsets = f"-K{self.n_subsets}" if self.method == "STRIDE paper" else ""
        return f"{self.method.replace(' ', '-')}-{model}-N{self.n_train}{subsets}"


@dataclass(frozen=True)
class Outcome:
    """How a phase ended.

    Attributes:
        status: "ok", "out of memory", "over time limit", "failed", "not run", or "running" meanwhile.
        seconds: Median of the repetitions, or of the only run.
        peak_bytes: Most memory that was added (`PeakMemory`) to that of the model and the data.
        detail: What was said of a failure, or why it was not run.
    """

    status: str = "not run"
    seconds: float | None = None
    peak_bytes: int | None = None
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether there are figures."""
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
        forward: One bare forward pass over the training set.
        setup: `fit`.
        inference: `influence` of all test points; its memory is that of setup where that is more.
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
        """Setup of the closed form over (forward pass + two products); None where one is not known."""
        setup, forward, product = self.setup.seconds, self.forward.seconds, self.product_seconds
        if setup is None or forward is None or product is None:
            return None
        return setup / (forward + 2 * product)

    @property
    def first_failure(self) -> Outcome | None:
        """How the first phase without figures ended, or None."""
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
