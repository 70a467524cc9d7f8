"""Interface of operators: what `STRIDE` asks of the closed form, of trained operators, or of yours.

`Operators` are options with a `fit`; it gives `FittedOperators`, which score. `STRIDE` reads features and
logits, and knows nothing else of the kind. A third kind is one file with one subclass of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import bad_type, bad_value
from .features.precomputed import Precomputed
from .features.projection import Projection
from .layers.pooling import Tap
from .losses import CrossEntropy, Loss
from .options import Options
from .positions import Positions
from .system.processes import SINGLE_PROCESS, SingleProcess
from .system.saved_values import saved_as

if TYPE_CHECKING:
    from .influence.estimate import Estimate
    from .stride import STRIDE


@dataclass(frozen=True)
class TrainingSet:
    """What operators are fitted to.

    Attributes:
        features: h, raw, `(n_train, n_features)`; memory-mapped where the operators `stream`.
        logits: z, `(n_train, n_classes)`.
        labels: y as the loss has them, `(n_train,)` int64 or `(n_train, n_classes)`, on the working device.
        widths: Widths of the layers, in the order of the columns.
        model: The network, in eval mode.
        layers: Names of the layers.
        memory_budget: Bytes of one block of work.
        temperature: `f(given)`: T of the tempered residuals, as given, matched to held-out data, or the
            default.
        ranks: Who else has a share of the training set.
        show_progress: Whether to show a bar.
        known: `Changed.known` of these examples, if they come from fitted operators.
        n_checkpoints: Checkpoints over which scores are averaged.
        weights: omega of each example, `(n_train,)` float64; None for 1.
        loss: What the model was trained with.
        positions: Where examples have several positions, all arrays above have one row for each, and this
            says which belong to an example; else None.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    widths: list[int]
    model: nn.Module
    layers: list[str]
    memory_budget: int
    temperature: Callable[[float | None], float]
    ranks: SingleProcess = SINGLE_PROCESS
    show_progress: bool = False
    known: Any = None
    n_checkpoints: int = 1
    weights: Tensor | None = None
    loss: Loss = field(default_factory=CrossEntropy)
    positions: Positions | None = None

    @property
    def n_train(self) -> int:
        """Number of examples."""
        return len(self.labels) if self.positions is None else len(self.positions)

    @property
    def usual_residuals(self) -> Literal["both", "temperature"]:
        """Out-of-sample residuals: with a ridge head for one model, which hurts averages over several."""
        return "temperature" if self.n_checkpoints > 1 and self.loss.tempered else "both"


@dataclass(frozen=True)
class TestPoints:
    """A batch of test points with what is asked about them.

    Attributes:
        features: h, raw, `(n_test, n_features)`.
        logits: z, `(n_test, n_classes)`.
        asked: What the response is about (`Loss.asked`); with cross-entropy its class, `(n_test,)` int64.
        gradients: Of the response with respect to the logits, `(n_test, n_classes)`.
        response: One of `Loss.responses`.
        positions: As for `TrainingSet`.
        n_positions: P of this batch, positions without a row included.
    """

    __test__ = False  # the name is not that of a test

    features: Tensor
    logits: Tensor
    asked: Tensor
    gradients: Tensor
    response: str
    positions: Positions | None = None
    n_positions: int = 0


@dataclass(frozen=True)
class Changed(Precomputed):
    """A training set after examples have come, gone or changed, in the order of its examples.

    Attributes:
        known: For `TrainingSet.known`.
    """

    known: Any = None


class Operators(Options, ABC):
    """Options of one kind of operators: a frozen dataclass with a `name`, registered with `saved_as`.

    Attributes:
        takes_positions: Whether an example may have several positions.
        streams: Whether fit and scores read features block by block, so that they may be memory-mapped.
        changeable: Whether examples can be added and removed without a new fit.
        all_columns: Whether `FittedOperators.prepare` computes the scores of all columns at once.
    """

    takes_positions: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    changeable: ClassVar[bool] = False
    all_columns: ClassVar[bool] = False

    @abstractmethod
    def fit(self, training: TrainingSet) -> FittedOperators:
        """Fit them to a training set."""

    def defaults(self) -> dict[str, Any]:
        """Arguments of `STRIDE` that these operators want where the user has given none."""
        return {}

    def check_loss(self, loss: Loss) -> None:
        """Refuse a loss that these operators cannot take. By default every loss is taken.

        Args:
            loss: What the model was trained with; `SummedPositions` for examples with several positions.

        Raises:
            ValueError: They need another loss.
        """

    def check_shared(self) -> None:
        """Refuse a training set that several processes share.

        Raises:
            ValueError: These operators need all of it in one place.
        """
        raise bad_value("operators", "be others in a process group", repr(self.name), "Use STRIDE.")

    def estimate(self, method: STRIDE, n_test: int, k: int | None) -> Estimate | None:
        """What fit and query will cost, where more is known than small runs tell; else None."""
        return None


class FittedOperators(ABC):
    """Operators of one checkpoint: a dataclass, registered with `saved_as`, so that it can be saved.

    Attributes:
        n_train: Number of training examples.
        n_classes: C.
        device: Where test points are taken.
        dtype: In which they are.
    """

    n_classes: int
    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def n_train(self) -> int:
        """Number of training examples."""

    @abstractmethod
    def prepare(self, points: TestPoints) -> Any:
        """Compute once what the scores of a batch of test points need."""

    @abstractmethod
    def scores(self, prepared: Any, columns: slice) -> Tensor:
        """Scores `(n_test, n_columns)` against a slice of the training set."""

    def test_points_at_once(self) -> int | None:
        """Test points that fit the memory budget; None: as many as a batch has."""
        return None

    def coverage(self) -> Tensor:
        """Which training examples can have a score, `(n_train,)` bool on the CPU."""
        return torch.ones(self.n_train, dtype=torch.bool, device="cpu")

    def position_scores(self, prepared: Any, example: int | None) -> Tensor | None:
        """The terms of scores that are sums over positions; None: they are not.

        Args:
            prepared: A batch of test points.
            example: None for the positions of the test points, `(n_test, P, n_train)`; a training example for
                its own, `(n_test, P)`.
        """
        return None

    def train_norms(self) -> Tensor | None:
        """Norm of each training example in the kernel of the scores, `(n_train,)`; None: there are none."""
        return None

    def test_norms(self, prepared: Any) -> Tensor | None:
        """The same norm of the test points, `(n_test,)`."""
        return None

    def query_vectors(self, prepared: Any) -> Tensor | None:
        """Vectors of test points whose products with `train_vectors` are scores; None if there are none."""
        return None

    def train_vectors(self, rows: Tensor) -> Tensor | None:
        """Vectors of training examples, `(n, width)`."""
        return None

    def self_influence(self) -> Tensor | None:
        """Of the training set, `(n_train,)`; None: the diagonal of the scores for the response "loss"."""
        return None

    def self_influence_of(self, points: TestPoints) -> Tensor | None:
        """That other examples would have, `(n,)`; None: it is not defined."""
        return None

    def mislabel_scores(self) -> Tensor | None:
        """How suspect each training label is, `(n_train,)`; None: the self-influence."""
        return None

    def mislabel_scores_of_outputs(self) -> Tensor | None:
        """How suspect the label of each output is, `(n_train, n_classes)`; None: it is not known."""
        return None

    # For `Operators.streams`.

    def without_features(self) -> FittedOperators:
        """A copy without features and logits, to be saved beside a store that holds them."""
        raise NotImplementedError

    def with_features(self, features: Tensor, logits: Tensor) -> FittedOperators:
        """The inverse of `without_features`."""
        raise NotImplementedError

    # For `Operators.changeable`.

    @property
    def keeps_rows(self) -> bool:
        """Whether they hold features and logits of the training set; else a change reads all examples."""
        return True

    def with_examples(self, new: Precomputed) -> Changed:
        """The training set with other examples behind it."""
        raise NotImplementedError

    def without_examples(self, keep: Tensor) -> Changed:
        """Some examples of the training set, in order: their places `(n_kept,)` on the CPU."""
        raise NotImplementedError

    def with_others(self, places: Tensor, new: Precomputed) -> Changed:
        """The training set with other examples in some places, `(k,)` on the CPU."""
        raise NotImplementedError


@saved_as("stride")
@dataclass
class STRIDEState:
    """What `STRIDE.fit` learns at one checkpoint.

    Attributes:
        taps: Where features are read.
        operators: Fitted to them.
        projection: Of wide layers, if `Features.projection` asks for it.
    """

    taps: list[Tap]
    operators: FittedOperators
    projection: Projection | None = None


def operators_of(value: Any) -> Operators:
    """Operators by name, or as they are.

    Raises:
        ValueError: Another name.
        TypeError: Another object.
    """
    if isinstance(value, Operators):
        return value
    if isinstance(value, str):
        kind: type[Any] = Operators.named(value, "operators")
        operators: Operators = kind()
        return operators
    raise bad_type(
        "operators",
        "be ClosedForm(...), Trained(...) or a name",
        value,
        "Write operators=ClosedForm(damping=.1).",
    )
